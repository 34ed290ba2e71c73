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
        ({}, {}, "must be a dictionary of sites"),
        ([1.0], {}, "must be a dictionary of sites"),
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
