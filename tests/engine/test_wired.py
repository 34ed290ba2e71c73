"""Wired runs against the oracle of edges: any edge carries its own, the source's or the base's, at random."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from engine_edge_oracle import BASE, OWN, SOURCE, edges, effects, receivers, senders
from engine_oracle import METRICS
from engine_tiny import FAMILIES, VARIANTS, hf_model, pairs, true_model, with_long_answers

import deltapatch
from deltapatch import Intervention, Patch
from deltapatch.engine.sweep import run_wired
from deltapatch.interventions.given import Listed
from deltapatch.interventions.nodes import Nodes
from deltapatch.interventions.wirings import At, Wiring, Wirings, all_own, existing
from deltapatch.results.merge import merge

TOLERANCE = {"fp32": 2e-5, "fp64": 2e-8}


def run(variant, drawn, wirings, precision="fp64", **options):
    """Every wiring of every pair: name -> [pair, wiring]."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model = deltapatch.from_transformers(hf_model(variant, dtype))
    given = [deltapatch.PromptPair(**pair._asdict()) for pair in drawn]
    n = len(wirings)

    def made(spec, pairs):
        both = np.repeat(np.arange(len(pairs)), n), np.tile(np.arange(n), len(pairs))
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


@pytest.mark.parametrize("variant", ["neox-parallel", "llama-grouped", "gemma2", "olmo2"])
def test_patches_that_only_some_see(variant):
    """Alone, jointly, and beside patches that all see."""
    true, rng = true_model(variant), np.random.default_rng(1)
    drawn = pairs(true, (5, 4), seed=6)
    model = deltapatch.from_transformers(hf_model(variant, torch.float64))
    last, heads = true.n_layers - 1, [f"a0.h{h}" for h in range(true.shape.n_heads)]
    own = {
        ("z", 0, 1): ["a0.h1"], ("attn_out", 0, None): heads, ("mlp_out", 0, None): ["m0"],
        ("resid_pre", 0, None): ["input"],
    }  # fmt: skip
    intos = [f"a{last}.h0<k>", [f"m{last}", "logits"], f"a{last}<v>", "logits", None]
    interventions, told = [], []
    for i in range(14):
        pair = i % 2
        length, wiring, patches = len(drawn[pair].clean), {}, []
        for which in rng.choice(4, 2 if i > 7 else 1, replace=False):
            site, layer, index = list(own)[which]
            into, position = intos[int(rng.integers(5))], int(rng.integers(length))
            patches.append(Patch(site, layer, position, index, into=into))
            names = receivers(true) if into is None else [into] if isinstance(into, str) else into
            for edge in edges(true):
                wide = [n for n in names if edge[1] == n or (n.endswith("<v>") and "h" not in n and
                        edge[1].startswith(f"a{last}.") and edge[1].endswith("<v>"))]  # fmt: skip
                if edge[0] in own[site, layer, index] and wide:
                    wiring.setdefault(edge, np.full(length, OWN))[position] = SOURCE
        if all(p.into is None for p in patches):
            patches[0] = dataclasses.replace(patches[0], into="all")
        interventions.append(Intervention(pair, patches))
        told.append(wiring)
    given = [deltapatch.PromptPair(**pair._asdict()) for pair in drawn]
    found = deltapatch.run(model, given, interventions, precision="fp64", progress=False)
    for name in METRICS:
        want = np.array([effects(true, drawn[i % 2], [w])[name][0] for i, w in enumerate(told)])
        got = found.values(name)
        error, scale = np.linalg.norm(got - want), np.linalg.norm(want)
        assert error <= 2e-8 * max(scale, 1e-9), name


@pytest.mark.parametrize(
    ("patches", "said"),
    [
        ([Patch("mlp_post", 0, 1, 2, into="logits")], "at what nodes say"),
        ([Patch("z", 0, 1, 2, into="logits"), Patch("q", 0, 1, 1)], "at what nodes say"),
        ([Patch("resid_pre", 1, 1, into="logits")], "at what nodes say"),
        ([Patch("mlp_out", 1, 1, into="a0.h0<q>")], "does not come before"),
        ([Patch("mlp_out", 1, 1, into="nowhere")], "unknown receiver"),
        ([Patch("mlp_out", 9, 1, into="logits")], "layer 9 does not exist"),
        ([Patch("z", 0, 1, into="logits")], "needs an index"),
    ],
)
def test_an_into_that_cannot_be(patches, said):
    drawn = pairs(true_model("llama"), (4,))
    model = deltapatch.from_transformers(hf_model("llama"))
    given = [deltapatch.PromptPair(**pair._asdict()) for pair in drawn]
    with pytest.raises(deltapatch.DeltapatchError, match=said):
        deltapatch.run(model, given, Intervention(0, patches), progress=False)


def seen_by_few():
    """A model, two pairs, and interventions some of whose patches only some receivers see."""
    drawn = [deltapatch.PromptPair(**pair._asdict()) for pair in pairs(true_model("llama"), (5, 4))]
    intos = ["logits", None, ["a1.h0<v>", "m1"], "a1<k>"]
    given = [
        Intervention(
            i % 2, [Patch("mlp_out", 0, i % 3, into=intos[i % 4]), Patch("z", 0, 1, i % 2, into="logits")]
        )
        for i in range(8)
    ]
    return deltapatch.from_transformers(hf_model("llama")), drawn, given


def test_patches_that_only_some_see_have_a_run_folder(tmp_path):
    """Written at once or in parts, saved later, read back: the same; which receivers see what is in it."""
    model, drawn, given = seen_by_few()
    given = 50 * given
    options = {"precision": "fp32", "progress": False, "noise_sample": 0}
    with pytest.raises(deltapatch.DeltapatchError, match=r"need at least [\d.]+ MB") as error:
        deltapatch.run(model, drawn, given, memory_budget=1, **options)
    least = float(re.search(r"([\d.]+) MB", str(error.value))[1])
    options["memory_budget"] = int((least + 0.3) * 1e6)
    want = deltapatch.run(model, drawn, given, **options)
    assert want.meta["passes"] > 1
    want.save(tmp_path / "saved")
    whole = deltapatch.run(model, drawn, given, out=tmp_path / "whole", **options)
    for part in (1, 2, 3):
        deltapatch.run(model, drawn, given, out=tmp_path / "parts", shard=(part, 3), **options)
    merge(tmp_path / "parts")
    resumed = deltapatch.run(model, drawn, given, out=tmp_path / "parts", resume=True, **options)
    read = [deltapatch.load_outcome(tmp_path / name) for name in ("saved", "whole", "parts")]
    order = list(Nodes.of(model.spec).receivers)
    for found in (whole, resumed, *read):
        for name in METRICS:
            np.testing.assert_array_equal(found.values(name), want.values(name))
        seen = found.interventions.seen_by
        assert [order[r] for r in seen[seen[:, 0] == 4, 1]] == ["a1.h0<v>", "m1"]
        assert not (seen[:, 0] == 2).any()  # which all see


def test_another_into_is_another_run(tmp_path):
    model, drawn, given = seen_by_few()
    options = {"precision": "fp32", "progress": False, "out": tmp_path / "run"}
    deltapatch.run(model, drawn, given, **options)
    other = [dataclasses.replace(given[0], patches=[Patch("mlp_out", 0, 0, into="m1")]), *given[1:]]
    everyone = [Intervention(i.pair, [dataclasses.replace(p, into=None) for p in i.patches]) for i in given]
    for asked in (other, everyone):
        with pytest.raises(deltapatch.DeltapatchError, match="interventions"):
            deltapatch.run(model, drawn, asked, resume=True, **options)


def test_a_folder_with_receivers_that_cannot_be_is_damaged():
    model, drawn, given = seen_by_few()
    found = deltapatch.run(model, drawn, given, precision="fp32", progress=False)
    arrays = found.interventions.arrays()
    for wrong in (np.array([[99, 0]]), np.array([[0, -1]]), np.array([0, 1]), np.zeros((1, 2))):
        with pytest.raises(ValueError, match="interventions"):
            Listed.of_arrays(arrays | {"seen_by": wrong}, found.pairs)


def test_circuits_and_paths_write_no_run_folder(tmp_path):
    model, drawn, _ = seen_by_few()
    with pytest.raises(deltapatch.DeltapatchError, match="circuits and paths write no run folder"):
        run_wired(model, drawn, lambda spec, found: None, out=tmp_path / "run")
