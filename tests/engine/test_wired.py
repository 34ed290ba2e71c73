"""Wired runs against the oracle of edges: any edge carries its own, the source's or the base's, at random."""

import numpy as np
import pytest
import torch
from engine_edge_oracle import BASE, OWN, SOURCE, edges, effects, receivers, senders
from engine_oracle import METRICS
from engine_tiny import FAMILIES, VARIANTS, hf_model, pairs, true_model, with_long_answers

import deltapatch
from deltapatch.engine.sweep import run_wired
from deltapatch.interventions.nodes import Nodes
from deltapatch.interventions.wirings import At, Wiring, Wirings, all_own, existing

TOLERANCE = {"fp32": 2e-5, "fp64": 2e-8}


def run(variant, drawn, wirings, precision="fp64", **options):
    """Every wiring of every pair: name -> [pair, wiring]."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model = deltapatch.from_transformers(hf_model(variant, dtype))
    given = [deltapatch.PromptPair(**pair._asdict()) for pair in drawn]
    n = len(wirings)

    def made(spec, n_pairs):
        both = np.repeat(np.arange(n_pairs), n), np.tile(np.arange(n), n_pairs)
        differs = options.get("source", "counterpart") == "counterpart"
        return Wirings(Nodes.of(spec), wirings, *both, differs)

    options = {"precision": precision, "progress": False, "metrics": "all"} | options
    found = run_wired(model, given, made, **options)
    return {name: found.values(name).reshape(len(drawn), n) for name in METRICS}


def drawn_wiring(true, rng, kinds=(OWN, SOURCE, BASE)):
    """A wiring for the oracle, and the same for the engine."""
    column = {name: i for i, name in enumerate(receivers(true))}
    row = {name: i for i, name in enumerate(senders(true))}
    weights = rng.dirichlet(np.ones(len(kinds)))
    told = {edge: int(rng.choice(kinds, p=weights)) for edge in edges(true)}
    own, source = np.zeros((2, len(row), len(column)), dtype=bool)
    for (s, r), kind in told.items():
        own[row[s], column[r]], source[row[s], column[r]] = kind == OWN, kind == SOURCE
    return told, Wiring(own, source)


def assert_close(got, want, precision, where):
    for metric in METRICS:
        error, scale = np.linalg.norm(got[metric] - want[metric]), np.linalg.norm(want[metric])
        allowed = TOLERANCE[precision] * (scale if scale > 1e-9 else 1)
        assert error <= allowed, f"{where}, {metric}: relative error {error / scale:.1e}"


@pytest.mark.parametrize("variant", [*VARIANTS, *FAMILIES])
def test_any_wiring(variant):
    true, precision = true_model(variant), ["fp64", "fp32"][len(variant) % 2]
    rng = np.random.default_rng(sum(map(ord, variant)))
    drawn = pairs(true, (5, 4), seed=2)
    told, wirings = zip(*(drawn_wiring(true, rng) for _ in range(6)), strict=True)
    direction = str(rng.choice(["noise", "denoise"]))
    got = run(variant, drawn, wirings, precision, direction=direction)
    found = [effects(true, pair, told, direction) for pair in drawn]
    assert_close(got, {m: np.stack([f[m] for f in found]) for m in METRICS}, precision, variant)


@pytest.mark.parametrize("variant", ["neox-parallel", "llama-grouped", "gemma2", "olmo2"])
@pytest.mark.parametrize("source", ["counterpart", "zero"])
def test_long_answers_and_single_positions(variant, source):
    """Edges that carry the source at some positions; answers of several tokens, after which none does."""
    true, rng = true_model(variant), np.random.default_rng(len(variant))
    drawn = [with_long_answers(true, pair, (2, 3), 0, seed=4) for pair in pairs(true, (4,), seed=5)]
    column = {name: i for i, name in enumerate(receivers(true))}
    row = {name: i for i, name in enumerate(senders(true))}
    told, wirings = [], []
    for _ in range(4):
        own = all_own(Nodes.of(deltapatch.from_transformers(hf_model(variant)).spec))
        some = [edges(true)[i] for i in rng.choice(len(edges(true)), 5, replace=False)]
        at = [(edge, int(p)) for edge in some for p in rng.choice(4, 2, replace=False)]
        wirings.append(Wiring(own.own, own.source, tuple(At(p, row[s], column[r]) for (s, r), p in at)))
        kinds = {edge: np.full(4, OWN) for edge in some}
        for edge, p in at:
            kinds[edge][p] = SOURCE
        told.append(kinds)
    got = run(variant, drawn, wirings, source=source)
    want = effects(true, drawn[0], told, source=source)
    assert_close(got, {m: want[m][None] for m in METRICS}, "fp64", variant)


@pytest.mark.parametrize("variant", ["neox-parallel", "llama-grouped", "gemma2", "olmo2"])
def test_the_whole_model_and_none_of_it(variant):
    """All edges kept change nothing, bit for bit; with all removed the run is the source's."""
    true, drawn = true_model(variant), pairs(true_model(variant), (5,), seed=9)
    model = deltapatch.from_transformers(hf_model(variant))
    every = existing(Nodes.of(model.spec))
    assert [(senders(true)[s], receivers(true)[r]) for r, s in np.argwhere(every.T)] == edges(true)
    none = np.zeros_like(every)
    got = run(variant, drawn, [Wiring(every, none), Wiring(none, every), Wiring(none, none)])
    assert not got["logit_diff"][0, [0, 2]].any()
    assert not got["kl"][0, [0, 2]].any()
    clean, corrupted = (true.logits(p)[-1] for p in (drawn[0].clean, drawn[0].corrupted))
    a, b = drawn[0].clean_answer, drawn[0].corrupted_answer
    apart = (clean[a] - clean[b]) - (corrupted[a] - corrupted[b])
    assert got["logit_diff"][0, 1] == pytest.approx(apart, rel=1e-9)


def test_a_small_budget_cuts_and_changes_nothing():
    true = true_model("llama")
    rng = np.random.default_rng(0)
    drawn = pairs(true, (5, 4, 5), seed=1)
    wirings = [drawn_wiring(true, rng, (OWN, SOURCE))[1] for _ in range(40)]
    whole = run("llama", drawn, wirings)
    with pytest.raises(deltapatch.DeltapatchError, match="at least"):
        run("llama", drawn, wirings, memory_budget=1)
    assert np.allclose(run("llama", drawn, wirings, memory_budget="360MB")["kl"], whole["kl"], rtol=1e-9)
