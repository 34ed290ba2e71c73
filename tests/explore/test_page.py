"""The explorer's page: its numbers are the run's, its texts end no script, and large runs are cut."""

import base64
import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

import deltapatch as dp
from deltapatch.analysis.positions import aligned
from deltapatch.analysis.statistics import bootstrap, mean_over_pairs
from deltapatch.cli.main import cli
from deltapatch.errors import DeltapatchError
from deltapatch.explore import page as page_module
from deltapatch.explore.collect import collect
from deltapatch.explore.collect_edges import collect_edges
from deltapatch.explore.page import as_script, page, write_page
from deltapatch.results.effects import SiteEffects

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def floats(text):
    return np.frombuffer(base64.b64decode(text), "<f4")


def ints(text):
    return np.frombuffer(base64.b64decode(text), "<i4")


def content_of(html):
    (text,) = re.findall(r'<script id="content" type="application/json">\n(.*?)\n</script>', html, re.DOTALL)
    return json.loads(text)


@pytest.mark.parametrize("metric", ["recovered", "ie"])
def test_whole_vectors_have_the_means_and_intervals_of_the_run(make_effects, metric):
    effects = make_effects(lengths=(8, 10, 9))
    (site,) = [s for s in collect(effects, ["recovered", "ie"])["sites"] if s["name"] == "attn_out"]
    labels, values, over = aligned(effects, metric, "attn_out")
    assert site["columns"] == labels
    found = site["metrics"][metric]
    mean = mean_over_pairs(values, over)[0]
    np.testing.assert_allclose(floats(found["mean"]), mean.ravel(), rtol=1e-6)
    for end, want in zip(("low", "high"), bootstrap(values, over=over), strict=True):
        np.testing.assert_allclose(floats(found[end]), want.ravel(), rtol=1e-6)
    each = effects.values(metric, "attn_out")
    np.testing.assert_allclose(floats(found["pairs"]), each.ravel(), rtol=1e-6)


def test_neurons_are_those_of_the_run_strongest_first(make_effects):
    effects = make_effects()
    site = collect(effects, ["kl"])["sites"][2]
    found = site["metrics"]["kl"]
    mean = effects.values("kl", "mlp_post").mean(0)  # [layer, position, neuron]
    at = ints(found["layer"]), ints(found["column"]), ints(found["index"])
    assert len(at[0]) == mean.size
    np.testing.assert_allclose(floats(found["mean"]), mean[at], rtol=1e-6)
    assert (np.diff(np.abs(floats(found["mean"]))) <= 0).all()


def test_columns_say_what_a_patch_says(make_effects):
    effects = make_effects(lengths=(8, 10))
    site = collect(effects, ["kl"])["sites"][0]
    places = dict(zip(site["columns"], site["places"], strict=True))
    assert [places[name] for name in ("op1", "op2", "last")] == ["op1", "op2", "last"]
    assert places["early"] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert site["where"][1][0] == [0, 1, 2, 3, 4]
    plain = collect(make_effects(lengths=(8, 10), labels=False), ["kl"])["sites"][0]
    assert plain["places"][-8:] == [*range(-8, 0)]
    assert plain["places"][0] == [[], [0]]  # only the second pair is so long
    assert plain["where"][0][-1] == [7]


def test_one_pair_has_no_tests_and_says_so(make_effects):
    found = collect(make_effects(lengths=(8,)), ["kl"])
    assert np.isnan(floats(found["sites"][0]["metrics"]["kl"]["q"])).all()
    assert any("significant" in note for note in found["notes"])


def test_what_few_pairs_cannot_tell_is_not_called_an_accident(make_effects):
    """All pairs agree on one head, but among 200 cells the p of 6 pairs, 1/32, is no discovery."""
    effects = make_effects(lengths=(8,) * 6)
    measured = {"logit_diff": np.random.default_rng(0).normal(size=(6, 5, 1, 40)).astype(np.float32)}
    measured["logit_diff"][:, 2, 0, 7] = np.linspace(8, 9, 6)
    effects.sites = {"z": SiteEffects("z", np.arange(5), [-1], measured)}
    content = collect(effects, ["logit_diff"])
    found = content["sites"][0]["metrics"]["logit_diff"]
    assert (ints(found["layer"])[0], ints(found["index"])[0]) == (2, 7)
    rates = floats(found["q"])
    assert np.isnan(rates[0])
    assert np.nanmin(rates) > 0.05
    assert (rates > 0.05).sum() > 150
    assert any("With 6 pairs the test" in note for note in content["notes"])


def test_the_noise_floor_is_that_of_the_run(make_effects):
    effects = make_effects()
    assert collect(effects, ["kl"])["sites"][0]["metrics"]["kl"]["floor"] is None
    effects.meta["noise_floor"] = {"relative_error": {"kl": 0.1, "logit_diff": 0.2}}
    found = collect(effects, ["kl", "recovered"])["sites"][0]["metrics"]
    size = np.sqrt((effects.values("recovered", "mlp_out") ** 2).mean())
    assert found["recovered"]["floor"] > 0
    # Of classes of positions, whose means are smaller than single effects.
    assert found["recovered"]["floor"] <= 0.2 * size


def test_half_a_million_neurons_make_a_page_of_a_few_megabytes(make_effects):
    effects = make_effects(lengths=(8,) * 3)
    shape = (3, 28, 1, 16_384)
    rng = np.random.default_rng(0)
    measured = {"logit_diff": rng.normal(size=shape).astype(np.float32)}
    measured["logit_diff"][:, 5, 0, 77] = 40
    effects.sites = {"mlp_post": SiteEffects("mlp_post", np.arange(28), [-1], measured)}
    found = collect(effects, ["logit_diff"])
    assert len(as_script(found)) < 6_000_000
    entries = found["sites"][0]["metrics"]["logit_diff"]
    assert (ints(entries["layer"])[0], ints(entries["index"])[0]) == (5, 77)
    assert set(ints(entries["layer"]).tolist()) == set(range(28))
    assert any("458,752 neurons" in note for note in found["notes"])


def test_long_prompts_keep_the_strongest_positions_and_say_so(make_effects):
    effects = make_effects(lengths=(8,) * 2, labels=False)
    measured = {"kl": np.zeros((2, 40, 4000), dtype=np.float32)}
    measured["kl"][:, 3, 1234] = 1
    effects.sites = {"mlp_out": SiteEffects("mlp_out", np.arange(40), list(range(4000)), measured)}
    effects.pairs = [
        type(p)(
            **{
                **p.__dict__,
                "clean": [1] * 4000,
                "corrupted": [1] * 4000,
                "clean_text": ["a"] * 4000,
                "corrupted_text": ["a"] * 4000,
            }
        )
        for p in effects.pairs
    ]
    found = collect(effects, ["kl"])
    assert 1234 in found["sites"][0]["places"]
    assert any("of 4000 positions" in note for note in found["notes"])
    assert len(as_script(found)) < 8_000_000


def test_no_text_of_a_run_can_end_the_script_that_holds_it(make_effects):
    effects = make_effects(lengths=(8, 8))
    for pair in effects.pairs:
        pair.clean_text[0] = pair.corrupted_text[1] = HOSTILE
        pair.labels[HOSTILE] = 1
    effects.meta["model"] = HOSTILE
    html = page(effects, "kl", run=HOSTILE)
    assert HOSTILE not in html
    found = content_of(html)
    assert found["about"]["model"] == found["run"] == found["pairs"][0]["clean"][0] == HOSTILE
    assert as_script("\u2028") == '"\\u2028"'


def test_the_page_asks_for_nothing_outside_itself(make_effects):
    html = page(make_effects(), "kl")
    assert "default-src 'none'" in html
    own = html[: html.index('<script id="content"')]
    assert not re.search(r"(?:src|href)=.(?!data:)", own)


def test_the_command_makes_a_page_and_replaces_only_its_own(make_effects, tmp_path):
    run = tmp_path / "run"
    make_effects().save(run)

    def explore(*words):
        return CliRunner().invoke(cli, ["explore", str(run), *words])

    done = explore("--metric", "kl,ie")
    assert done.exit_code == 0, done.output
    made = run / "explore.html"
    assert done.stdout == f"{made}\n"
    assert [m["name"] for m in content_of(made.read_text())["metrics"]] == ["kl", "ie"]
    assert explore("--metric", "kl").exit_code == 0
    other = tmp_path / "page.html"
    said = json.loads(explore("--metric", "kl", "--out", str(other), "--json").stdout)
    assert said["bytes"] == other.stat().st_size
    refused = explore("--out", str(other))
    assert refused.exit_code == 2
    assert "is taken" in refused.stderr
    assert explore("--metric", "best").exit_code == 2


def test_a_missing_plotly_is_one_sentence(make_effects, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(DeltapatchError, match=r"pip install 'deltapatch\[explore\]'"):
        page_module.write_page(make_effects(), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_folder_that_is_not_there_is_one_sentence(make_effects, tmp_path):
    with pytest.raises(DeltapatchError, match="cannot write"):
        write_page(make_effects(), tmp_path / "no" / "page.html", "kl")


def test_edges_have_the_means_and_intervals_of_the_run_strongest_first(make_edges):
    edges = make_edges()
    content = collect_edges(edges, ["recovered", "kl"])
    for effect in ("total", "direct"):
        found = content["found"][effect]["recovered"]
        mean = floats(found["mean"])
        assert (np.diff(np.abs(mean)) <= 0).all()
        assert len(mean) == len(edges.edges)
        at = [
            edges.edges.index((content["senders"][s], content["receivers"][r]))
            for s, r in zip(ints(found["sender"]), ints(found["receiver"]), strict=True)
        ]
        np.testing.assert_allclose(mean, edges.mean("recovered", effect)[at], rtol=1e-5)
        top, over = edges.terms("recovered", effect)
        for end, want in zip(("low", "high"), bootstrap(top[:, at], over=over), strict=True):
            np.testing.assert_allclose(floats(found[end]), want, rtol=1e-5)
        each = floats(found["pairs"]).reshape(5, -1)
        np.testing.assert_allclose(each, edges.flat("recovered", effect)[:, at], rtol=1e-5)
    assert content["whole"]
    assert content["towards"] == {"recovered": 1, "kl": 1}
    assert collect_edges(edges, ["logit_diff"])["towards"] == {"logit_diff": -1}


def test_edges_of_a_real_model_are_cut_to_the_strongest(make_edges):
    edges = make_edges(3, (30, 9), measured=("logit_diff", "kl"))
    edges.measured["kl"][0, 0, 0, 77] = 99  # of one pair alone
    content = collect_edges(edges, ["logit_diff", "kl"])
    assert len(edges.edges) == 123_211
    assert len(as_script(content)) < 8_000_000
    assert any("Of 123,211 edges" in note for note in content["notes"])
    found = content["found"]["total"]["kl"]
    there = set(zip(ints(found["sender"]).tolist(), ints(found["receiver"]).tolist(), strict=True))
    assert tuple(edges.grid.edges[77].tolist()) in there
    strongest = edges.grid.edges[np.argsort(-np.abs(edges.mean("kl", "total")))[:1000]]
    assert set(map(tuple, strongest.tolist())) <= there
    layers = {(re.sub(r"\.h\d+", "", s), re.sub(r"\.h\d+", "", r)) for s, r in edges.edges}
    names = [(content["senders"][s], content["receivers"][r]) for s, r in there]
    assert {(re.sub(r"\.h\d+", "", s), re.sub(r"\.h\d+", "", r)) for s, r in names} == layers


def test_edges_at_single_positions_say_where(make_edges):
    edges = make_edges(positions=(0, "last"), receivers=["a1.h0<q>", "m2"])
    content = collect_edges(edges, ["kl"])
    assert content["positions"] == [0, "last"]
    assert not content["whole"]
    assert not content["ends"]
    found = content["found"]["direct"]["kl"]
    s, r, p = (ints(found[name])[0] for name in ("sender", "receiver", "position"))
    want = edges.by_node(edges.mean("kl", "direct"))
    np.testing.assert_allclose(floats(found["mean"])[0], want[s, r, p], rtol=1e-5)
    assert np.nanmax(np.abs(want)) == np.abs(want[s, r, p])


def test_the_command_makes_pages_of_edges_and_refuses_given_interventions(make_edges, tmp_path):
    run = tmp_path / "edges"
    make_edges().save(run)
    done = CliRunner().invoke(cli, ["explore", str(run), "--metric", "kl"])
    assert done.exit_code == 0, done.output
    assert content_of((run / "explore.html").read_text())["effects"] == ["total", "direct"]
    assert make_edges().explore("kl").save(tmp_path / "page.html").is_file()
    model = dp.load_model("builtin:gpt-neox-arithmetic")
    pair = dp.PromptPair("1 + 2 =", "1 + 3 =", " 3", " 4")
    dp.run(model, pair, dp.Intervention(0, [dp.Patch("mlp_out", 1, -1)]), out=tmp_path / "given")
    refused = CliRunner().invoke(cli, ["explore", str(tmp_path / "given")])
    assert refused.exit_code == 2
    assert "given interventions" in refused.stderr


def test_no_text_of_a_run_of_edges_can_end_the_script_that_holds_it(make_edges):
    edges = make_edges(2)
    edges.meta["model"] = edges.pairs[0].clean_text[0] = HOSTILE
    html = page(edges, "kl", run=HOSTILE)
    assert HOSTILE not in html
    assert content_of(html)["run"] == HOSTILE
    own = html[: html.index('<script id="content"')]
    assert not re.search(r"(?:src|href)=.(?!data:)", own)
