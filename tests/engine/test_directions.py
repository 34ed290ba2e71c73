"""Sweeps over directions: what `run` says of each patch alone, which test_vectors.py holds to the oracle."""

import re

import numpy as np
import pytest
import torch
from engine_oracle import METRICS
from engine_tiny import hf_model, pairs, true_model

import deltapatch as dp
from deltapatch.engine.options import Options
from deltapatch.engine.passes import memory_costs
from deltapatch.engine.question import ask
from deltapatch.errors import DeltapatchError
from deltapatch.results.merge import merge

RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def engine():
    return dp.from_transformers(hf_model("llama-grouped", torch.float64))


@pytest.fixture(scope="module")
def drawn():
    return [dp.PromptPair(**pair._asdict()) for pair in pairs(true_model("llama-grouped"), (5, 4))]


def one_by_one(engine, drawn, columns, patch):
    """The same patches, given as objects."""
    rows = range(len(columns["pair"]))
    asked = [
        dp.Intervention(int(columns["pair"][i]), [patch({name: columns[name][i] for name in columns})])
        for i in rows
    ]
    return dp.run(engine, drawn, asked, precision="fp64")


def test_swapped_and_steered_at_whole_sites(engine, drawn):
    width = engine.spec.d_model
    anywhere, by_layer = RNG.normal(size=(3, width)), {1: RNG.normal(size=(2, width))}
    given = {"resid_post": anywhere, "mlp_out": by_layer}
    sites = list(given)

    def vector(row):
        own = given[sites[row["site"]]]
        return (own[row["layer"]] if row["site"] else own)[row["direction"]]

    def at(row):
        return sites[row["site"]], int(row["layer"]), int(row["position"])

    swapped = dp.sweep_directions(engine, drawn, given, precision="fp64")
    columns = swapped.columns()
    # Five and four positions; three directions in each layer and two in one.
    assert len(swapped) == 9 * (3 * engine.spec.n_layers + 2)
    want = one_by_one(engine, drawn, columns, lambda row: dp.Patch(*at(row), along=vector(row)))
    steered = dp.sweep_directions(engine, drawn, given, strengths=[-1.5, 0, 2], precision="fp64")
    told = steered.columns()
    assert len(steered) == 3 * len(swapped)
    added = one_by_one(engine, drawn, told, lambda row: dp.Patch(*at(row), add=row["strength"] * vector(row)))
    for metric in METRICS:
        np.testing.assert_allclose(swapped.values(metric), want.values(metric), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(steered.values(metric), added.values(metric), rtol=1e-12, atol=1e-15)
    assert not steered.values("logit_diff")[told["strength"] == 0].any()


def test_heads_each_by_itself(engine, drawn):
    rows = torch.tensor(RNG.normal(size=(2, engine.spec.d_head)))
    swapped = dp.sweep_directions(engine, drawn, {"k": rows}, positions=[-1, 1], layers=[1], precision="fp64")
    columns = swapped.columns()
    assert sorted(set(columns["head"])) == list(range(engine.spec.n_kv_heads))
    assert "site" not in columns
    want = one_by_one(
        engine,
        drawn,
        columns,
        lambda r: dp.Patch("k", 1, int(r["position"]), int(r["head"]), along=rows[int(r["direction"])]),
    )
    np.testing.assert_allclose(swapped.values("kl"), want.values("kl"), rtol=1e-12, atol=1e-18)


def test_a_basis_adds_up_where_nothing_comes_after(engine, drawn):
    """In the last layer each direction of a basis takes its own part of the whole swap's logit change."""
    basis, last = np.eye(engine.spec.d_model), engine.spec.n_layers - 1
    options = {"positions": [-1], "precision": "fp64"}
    each = dp.sweep_directions(engine, drawn, {"resid_post": basis}, layers=[last], **options)
    want = dp.sweep(engine, drawn, sites="resid_post.dim", layers=[last], **options).values("logit_diff")
    np.testing.assert_allclose(each.values("logit_diff"), want[:, 0, 0].ravel(), rtol=1e-9)


def test_runs_are_kept_and_resumed(engine, drawn, tmp_path):
    given = {"resid_post": RNG.normal(size=engine.spec.d_model)}
    options = {"positions": ["subject"], "strengths": (1, 2), "out": tmp_path / "run"}
    outcome = dp.sweep_directions(engine, drawn, given, **options)
    back = dp.load_outcome(tmp_path / "run")
    np.testing.assert_array_equal(back.columns()["strength"], outcome.columns()["strength"])
    dp.sweep_directions(engine, drawn, given, resume=True, **options)
    with pytest.raises(DeltapatchError, match="list of interventions"):
        dp.sweep_directions(engine, drawn, given, resume=True, **options | {"strengths": (1, 3)})


@pytest.mark.parametrize(
    ("directions", "options", "message"),
    [
        ({}, {}, "must be a dictionary such as"),
        ([1.0], {}, "must be a dictionary such as"),
        ({"resid_post": [1.0, 2.0]}, {}, "must be vectors of"),
        ({"resid_post": "up"}, {}, "directions of resid_post must be a vector"),
        ({"resid_post": np.zeros((1, 1, 3))}, {}, "must be vectors of"),
        ({"mlp_post": [1.0]}, {}, "site mlp_post is no vector"),
        ({"pattern": [1.0]}, {}, "site pattern is no vector"),
        ({"nowhere": [1.0]}, {}, "unknown site 'nowhere'"),
        ({"resid_post": {9: [1.0]}}, {}, "layer 9 does not exist"),
        ({"resid_post": {1: [1.0]}}, {"layers": [0]}, "no direction is at any of the chosen layers"),
        ({"resid_post": [1.0]}, {"positions": "together"}, "one position at a time"),
        ({"resid_post": [1.0]}, {"strengths": []}, "no strengths were given"),
        ({"resid_post": [1.0]}, {"strengths": "big"}, "a strength must be a number"),
        ({"resid_post": [1.0]}, {"strengths": float("inf")}, "a strength must be a number"),
    ],
)
def test_what_is_refused(engine, drawn, directions, options, message):
    with pytest.raises(DeltapatchError, match=re.escape(message)):
        dp.sweep_directions(engine, drawn, directions, **options)


def test_a_direction_that_is_nothing(engine, drawn):
    with pytest.raises(DeltapatchError, match="are zero or depend on each other"):
        dp.sweep_directions(engine, drawn, {"resid_post": np.zeros(engine.spec.d_model)})


def test_what_patches_are_given_counts_as_memory(engine, drawn):
    """Every pass holds it: 8 bytes for each of its numbers in float64."""
    rows = RNG.normal(size=(7, engine.spec.d_model))
    fixed = []
    for n in (2, 7):
        patches = [dp.Patch("resid_post", 1, -1, add=row) for row in rows[:n]]
        question = ask(engine, drawn, Options(precision="fp64"), [dp.Intervention(0, [p]) for p in patches])
        fixed.append(memory_costs(question, question.decided(question.precision), 1).fixed)
    assert fixed[1] - fixed[0] == 5 * engine.spec.d_model * 8


# ------------------------------------------------------------------------------------------ as a sweep's site


def test_directions_of_a_sweep_are_those_that_are_listed(engine, drawn):
    """In all layers and by layer, beside other sites, from each source; NaN where a pair has no position."""
    width = engine.spec.d_model
    given = {"resid_post": RNG.normal(size=(3, width)), "attn_out": {2: RNG.normal(size=(2, width))}}
    for options in ({}, {"source": "zero"}, {"source": "mean", "direction": "noise"}):
        asked = {"precision": "fp64", "progress": False, **options}
        outcome = dp.sweep_directions(engine, drawn, given, **asked)
        at, told = outcome.values("logit_diff"), outcome.columns()
        for number, (site, layers) in enumerate(
            (("resid_post", range(engine.spec.n_layers)), ("attn_out", [2]))
        ):
            names = [f"{site}.along", "mlp_out"]
            own = {site: given[site]}
            effects = dp.sweep(engine, drawn, sites=names, layers=list(layers), directions=own, **asked)
            found = effects.values("logit_diff", site=names[0])  # [pair, layer, position, direction]
            assert found.shape == (2, len(layers), 5, 3 - number)
            assert np.isnan(found[1, :, 4]).all()
            mine = told["site"] == number
            where = (told[name][mine] for name in ("pair", "layer", "position", "direction"))
            pair, layer, position, direction = where
            listed = found[pair, layer - layers[0], position, direction]
            np.testing.assert_allclose(listed, at[mine], rtol=0, atol=1e-12 * np.abs(at).max())
            assert mine.sum() == np.isfinite(found).sum()
            plain = dp.sweep(engine, drawn, sites="mlp_out", layers=list(layers), **asked).values(
                "logit_diff"
            )
            np.testing.assert_allclose(effects.values("logit_diff", site="mlp_out"), plain, rtol=1e-9)


def test_unit_vectors_are_coordinates(engine, drawn):
    units = np.eye(engine.spec.d_model)[[4, 0, 9]]
    asked = {"precision": "fp64", "progress": False}
    for positions in ("all", "together", [-1]):
        found, want = (
            dp.sweep(engine, drawn, sites=f"mlp_out.{kind}", positions=positions, **more, **asked).values(
                "kl"
            )
            for kind, more in (("along", {"directions": {"mlp_out": units}}), ("dim", {}))
        )
        np.testing.assert_allclose(found, want[..., [4, 0, 9]], rtol=1e-8, atol=1e-13)


def test_a_run_folder_of_directions_in_parts(engine, drawn, tmp_path):
    given = {"resid_pre": RNG.normal(size=(4, engine.spec.d_model))}
    asked = {"sites": "resid_pre.along", "directions": given, "precision": "fp64", "progress": False}
    asked["memory_budget"] = "64MiB"
    whole = dp.sweep(engine, drawn, out=tmp_path / "whole", **asked)
    for part in (2, 1):
        dp.sweep(engine, drawn, out=tmp_path / "parts", shard=(part, 2), **asked)
    merge(tmp_path / "parts")
    read = dp.load_effects(tmp_path / "parts")
    np.testing.assert_array_equal(read.values("ie"), whole.values("ie"))
    assert read.to_xarray("ie")["ie"].dims == ("pair", "layer", "position", "direction")
    assert set(read.to_pandas("ie")["index"]) == {0, 1, 2, 3}
    assert len(read.top(2).columns["index"]) == 2
    assert "directions" in (tmp_path / "whole" / "run.json").read_text()


def test_a_screen_of_directions(engine, drawn, tmp_path):
    """The top and the sample are what a sweep of all says, and a run folder has the estimates beside them."""
    directions = {"resid_post": RNG.normal(size=(6, engine.spec.d_model))}
    asked = {"sites": ["resid_post.along", "z"], "directions": directions, "precision": "fp64"}
    asked |= {"progress": False}
    exact = dp.sweep(engine, drawn, **asked)
    screen = {"screen": "attribution", "top": 9, "screen_sample": 12, "out": tmp_path / "run"}
    found = dp.sweep(engine, drawn, **asked, **screen)
    assert found.meta["directions"] == exact.meta["directions"]
    for site in asked["sites"]:
        here = found.is_verified(site)
        assert 0 < here.sum() < here.size
        want, got = (one.values("logit_diff", site) for one in (exact, found))
        np.testing.assert_allclose(got[here], want[here], rtol=1e-9, atol=1e-12)
        assert np.isnan(got[~here]).all()
    estimate, want = found.estimate(site="resid_post.along"), exact.values("logit_diff", "resid_post.along")
    assert estimate.shape == want.shape == (2, engine.spec.n_layers, 5, 6)
    there = np.isfinite(want)
    assert np.corrcoef(estimate[there], want[there])[0, 1] > 0.5
    again = dp.sweep(engine, drawn, **asked, **screen, resume=True)
    read = dp.load_screened(tmp_path / "run")
    for one in (again, read):
        np.testing.assert_array_equal(one.columns()["recovered"], found.columns()["recovered"])
        np.testing.assert_array_equal(one.estimate(site="resid_post.along"), estimate)
    other = {"resid_post": directions["resid_post"][::-1]}
    with pytest.raises(DeltapatchError, match="different directions"):
        dp.sweep(engine, drawn, **asked | {"directions": other}, **screen, resume=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sites": "resid_post.along"}, "resid_post.along is swapped along directions: give directions="),
        (
            {"directions": {"resid_post": [[1.0] * 16]}},
            "directions of resid_post are given: name resid_post.along",
        ),
        ({"sites": "mlp_out.along", "directions": {"mlp_out": [[1.0] * 3]}}, "vectors of [0-9]+ numbers"),
        ({"sites": "mlp_out.along", "directions": {"mlp_out": "up"}}, "must be a vector of"),
        (
            {"sites": "mlp_out.along", "directions": {"mlp_out": {0: np.eye(1, 16)}}},
            "layer 1 of mlp_out has no",
        ),
        (
            {
                "sites": "mlp_out.along",
                "layers": [0, 1],
                "directions": {"mlp_out": {0: np.eye(1, 16), 1: np.eye(2, 16)}},
            },
            "different numbers of directions",
        ),
        ({"directions": []}, "directions must be a dictionary"),
        ({"directions": {"z": np.eye(2, 4)}}, "directions of z are given: name z.along"),
    ],
)
def test_directions_that_a_sweep_does_not_take(engine, drawn, given, message):
    with pytest.raises(DeltapatchError, match=message):
        dp.sweep(engine, drawn, progress=False, **given)


def test_a_patch_names_the_place_of_its_direction(engine, drawn):
    with pytest.raises(DeltapatchError, match=r"give Patch\('resid_post', ..., along=...\)"):
        dp.run(engine, drawn, dp.Intervention(0, [dp.Patch("resid_post.along", 0, 1, 2)]))
