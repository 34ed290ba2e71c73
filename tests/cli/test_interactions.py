"""`deltapatch interactions`, `shapley`, `smallest-set`, and what `effects` and `plot` say of interactions."""

import csv
import io
import json

import numpy as np
import pytest

import deltapatch as dp

PARTS = [
    {"site": "z", "layer": 0, "position": "last", "index": 1},
    {"site": "z", "layer": 1, "position": "op1", "index": 0},
    {"site": "mlp_out", "layer": 1, "position": -1},
    {"site": "mlp_post", "layer": 0, "position": "op1", "index": 3},
]


@pytest.fixture
def given(tiny, write_pairs, text_pair, tmp_path):
    """Model, pairs and a file of parts, as options."""
    other = text_pair | {"clean": "Q: What is 2 plus 6? A:", "corrupted": "Q: What is 1 plus 6? A:"}
    pairs = write_pairs(text_pair, other | {"clean_answer": "8"})
    parts = tmp_path / "parts.jsonl"
    parts.write_text("".join(json.dumps(part) + "\n\n" for part in PARTS))
    return {"--model": str(tiny), "--pairs": pairs, "--parts": str(parts)}


def as_tuples():
    return [(p["site"], p["layer"], p["position"], p.get("index")) for p in PARTS]


def flat(options, *more):
    return [*(text for pair in options.items() for text in pair), *more]


def test_a_run_its_tables_and_figure(command, given, tmp_path):
    run = str(tmp_path / "run")
    made = command("interactions", *flat(given, "--out", run))
    assert made.code == 0, made.err
    assert made.out == f"{run}\n"
    assert "6 interactions patched" in made.err
    assert "of the interactions' own size" in made.err
    want = dp.interactions(dp.load_model(given["--model"]), given["--pairs"], as_tuples())
    found = dp.load_interactions(run)
    assert found.names == ["z L0.H1 @last", "z L1.H0 @op1", "mlp_out L1 @last", "mlp_post L0.N3 @op1"]
    np.testing.assert_array_equal(found.values("logit_diff"), want.values("logit_diff"))
    rows = list(csv.DictReader(io.StringIO(command("effects", run, "--format", "csv").out)))
    assert len(rows) == 6
    first, second = np.triu_indices(4, 1)
    measured = want.measured("recovered")
    mean = measured.interaction.mean(0)[first, second] / measured.over.mean()
    np.testing.assert_allclose([float(row["recovered"]) for row in rows], mean, rtol=1e-9)
    assert {"stderr", "low", "high", "p", "q", "first_alone", "second_alone", "both"} <= rows[0].keys()
    each = list(csv.DictReader(io.StringIO(command("effects", run, "--by", "none", "--format", "csv").out)))
    assert len(each) == 12
    top = json.loads(command("effects", run, "--top", "2", "--metric", "dp_clean", "--format", "json").out)
    assert len(top["rows"]) == 2
    assert "rows have q <= 0.5" in command("effects", run, "--fdr", "0.5").err
    plotted = command("plot", run, "--dpi", "60", "--out", tmp_path / "figures")
    assert [line.rsplit(".", 1)[1] for line in plotted.out.split()] == ["png", "pdf"]
    for line in plotted.out.split():
        assert (tmp_path / line).stat().st_size > 1000
    for wrong, said in (
        (["effects", run, "--site", "z"], "leave out --site"),
        (["effects", run, "--by", "layer"], "leave out --by"),
        (["effects", run, "--metric", "logit_diff,dp_clean"], "one metric at a time"),
        (["effects", run, "--metric", "kl"], "do not add up"),
        (["plot", run, "--pair", "0"], "leave out --pair"),
        (["plot", run, "--metric", "kl"], "do not add up"),
        (["interactions", *flat(given, "--out", run)], "is taken"),
    ):
        refused = command(*wrong)
        assert refused.code == 2
        assert said in refused.err
    again = command("interactions", *flat(given, "--out", run, "--resume", "--json"))
    assert json.loads(again.out)["interactions"] == 6


def test_the_strongest_of_a_sweep(command, given, tmp_path):
    run, own = str(tmp_path / "run"), {k: v for k, v in given.items() if k != "--parts"}
    assert command("sweep", *flat(own, "--sites", "z,mlp_out", "--out", run, "-q")).code == 0
    out = str(tmp_path / "inter")
    made = command("interactions", run, *flat(own, "--top", "5", "--site", "z", "--out", out, "-q"))
    assert made.code == 0, made.err
    parts = dp.load_interactions(out).parts
    want = dp.top_parts(dp.load_effects(run), 5, sites=["z"])
    assert [(p.layer, p.position, p.index) for p in parts] == [(p.layer, p.position, p.index) for p in want]


def test_shapley_and_smallest_set(command, given, tmp_path):
    shared = command("shapley", *flat(given, "--metric", "logit_diff", "--format", "json"))
    assert shared.code == 0, shared.err
    values = [row["logit_diff"] for row in json.loads(shared.out)["rows"]]
    found = dp.interactions(dp.load_model(given["--model"]), given["--pairs"], as_tuples())
    np.testing.assert_allclose(sum(values), found.together("logit_diff").mean(), rtol=1e-4)
    assert "24 orders" in shared.err
    path = tmp_path / "sets.csv"
    small = command("smallest-set", *flat(given, "--share", "9", "--format", "csv", "--out", str(path), "-q"))
    assert small.code == 0, small.err
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [row["method"] for row in rows] == ["top"] * 4 + ["search"] * 4
    assert {row["parts"] for row in rows if row["size"] == "4"} == {"; ".join(found.names)}


@pytest.mark.parametrize(
    ("name", "text", "more", "message"),
    [
        ("interactions", None, [], "say which parts"),
        ("shapley", "[1]", [], "line 1 is no part such as"),
        ("smallest-set", '{"site": "z"', [], "line 1 is not JSON"),
        ("interactions", '{"site": "z", "layer": 0, "position": 0, "head": 1}', [], "line 1 is no part"),
        ("interactions", "", [], "0 part(s) were given"),
        ("shapley", "", ["--top", "3"], "--top is of a run folder"),
        ("smallest-set", "", ["--share", "0"], "share must be above 0"),
    ],
)
def test_mistakes(command, given, tmp_path, name, text, more, message):
    options = dict(given)
    if text is None:
        del options["--parts"]
    else:
        (tmp_path / "parts.jsonl").write_text(text)
    out = ["--out", str(tmp_path / "none")] if name == "interactions" else []
    result = command(name, *flat(options, *more, *out))
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["interactions", "smallest-set"])
def test_a_mistake_in_the_pairs_is_told_by_its_line(command, given, write_pairs, text_pair, tmp_path, name):
    write_pairs(text_pair, text_pair | {"clean": "Q: What is 3 plus 4? A: so"})
    out = ["--out", str(tmp_path / "none")] if name == "interactions" else []
    result = command(name, *flat(given, *out))
    assert result.code == 2
    assert "line 2" in result.err


def test_a_run_without_a_number_of_parts(command, given, tmp_path):
    own = {k: v for k, v in given.items() if k != "--parts"}
    result = command("shapley", str(tmp_path), *flat(own))
    assert result.code == 2
    assert "--top N" in result.err
