"""`deltapatch edges` and `circuit`, as users start them, on the model that the project ships."""

import json

import pytest

import deltapatch

MODEL = "builtin:gpt-neox-arithmetic"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of all edges, made once."""
    from deltapatch.cli.main import cli

    folder = tmp_path_factory.mktemp("edges")
    pairs = str(folder / "pairs.jsonl")
    for arguments in (
        ("pairs", "--model", MODEL, "--per-template", "1", "--operators", "+", "--out", pairs),
        ("edges", "--model", MODEL, "--pairs", pairs, "--direction", "noise", "--effect", "both",
         "--out", str(folder / "RUN"), "-q"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        assert end.value.code == 0
    return folder / "RUN"


def test_a_run_is_told_in_tables(command, run):
    got = command("effects", str(run), "--effect", "total", "--top", "3")
    assert got.code == 0
    assert [line.split()[1:3] for line in got.out.splitlines()[2:3]] == [["input", "m0"]]
    for more in (
        ("--by", "sender"),
        ("--by", "receiver,pair"),
        ("--interval", "--top", "2"),
        ("--format", "json"),
    ):
        assert command("effects", str(run), *more).code == 0
    every = command("effects", str(run), "--format", "csv", "--effect", "direct").out.splitlines()
    found = deltapatch.load_edges(run)
    assert every[0].split(",")[:4] == ["pair", "effect", "sender", "receiver"]
    assert len(every) == 1 + len(found.pairs) * len(found.edges)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("effects", "--site", "z"), "is a run of edges: leave out --site"),
        (("effects", "--by", "layer"), "edges have no layer: group by"),
        (("effects", "--by", "sender,position"), "leave position out"),
        (("effects", "--effect", "half"), "was not measured"),
        (("circuit", "--out", "c.json"), "say how the circuit is chosen"),
        (("circuit", "--edges", "5", "--threshold", "1", "--out", "c.json"), "say how the circuit is chosen"),
        (("circuit", "--edges", "5", "--no-check", "--curve", "--out", "c.json"), "leave one out"),
        (("circuit", "--edges", "99999", "--out", "c.json"), "cannot be had"),
        (("circuit", "--edges", "5", "--no-check", "--plot", "c.gif", "--out", "c.json"), "must end in"),
    ],
)
def test_mistakes(command, run, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got = command(arguments[0], str(run), *arguments[1:])
    assert (got.code, got.out) == (2, "")
    assert said in got.err
    assert "Traceback" not in got.err
    assert not list(tmp_path.iterdir())


def test_figures(command, run, tmp_path):
    got = command("plot", str(run), "--metric", "logit_diff", "--out", str(tmp_path / "figures"))
    assert got.code == 0
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    stems = ("edges_total", "edges_direct", "graph")
    assert names == {f"{s}_logit_diff.{kind}" for s in stems for kind in ("png", "pdf")}


def test_a_circuit_is_chosen_checked_and_written(command, run, tmp_path):
    out, figure = tmp_path / "c.json", tmp_path / "c.png"
    got = command(
        "circuit", str(run), "--edges", "120", "--curve", "--plot", str(figure), "--out", str(out), "--json"
    )
    assert got.code == 0
    about = json.loads(got.out)
    circuit = deltapatch.Circuit.load(out)
    assert len(circuit) == about["edges"] <= 120
    assert about["faithfulness"]["kept"] > 0.8 > 0.2 > about["faithfulness"]["removed"]
    assert [point["share"] for point in about["curve"]][-1] == 1
    assert about["curve"][-1]["faithfulness"] == 1
    assert about["cpr"] == pytest.approx(1, abs=0.3)
    assert figure.stat().st_size > 10_000
    again = command("circuit", str(run), "--edges", "5", "--out", str(out))
    assert again.code == 2
    assert "is taken" in again.err


def test_sites_are_no_edges(command, run, tmp_path):
    found = deltapatch.load_edges(run)
    deltapatch.sweep(
        deltapatch.load_model(MODEL),
        found.pairs,
        sites="z",
        positions="last",
        out=tmp_path / "S",
        progress=False,
    )
    for arguments, said in (
        (
            ("circuit", str(tmp_path / "S"), "--edges", "5", "--out", str(tmp_path / "c")),
            "load_effects reads it",
        ),
        (("effects", str(tmp_path / "S"), "--effect", "total"), "is a run of sites: leave out --effect"),
    ):
        got = command(*arguments)
        assert got.code == 2
        assert said in got.err
