"""Edges against an oracle of their own: every edge of every block kind and family, total and direct."""

import numpy as np
import pytest
from engine_edge_oracle import BASE, OWN, SOURCE, direct, edges, effects, receivers, senders, total, unpatched
from engine_oracle import METRICS, Patch
from engine_tiny import (
    FAMILIES,
    VARIANTS,
    hf_model,
    model_of,
    pairs,
    prompt_pairs,
    true_model,
    with_long_answers,
)

import deltapatch
from deltapatch import DeltapatchError
from deltapatch.interventions.edges import EdgeGrid
from deltapatch.interventions.nodes import Nodes
from deltapatch.interventions.roles import Roles
from deltapatch.results.merge import merge

TOLERANCE = {"fp32": 1e-5, "fp64": 1e-8}
ALL = [*VARIANTS, *FAMILIES]
FEW = ["neox-parallel", "llama-grouped", "gemma2", "olmo2"]  # block kinds, groups, norms behind, wide norms


def sweep(variant, drawn, precision="fp32", **options):
    options = {"precision": precision, "metrics": "all", "progress": False} | options
    return deltapatch.sweep_edges(model_of(variant, precision), prompt_pairs(drawn), **options)


def assert_close(got, want, precision, where):
    """All metrics of the same edges, relative to the norm of each."""
    for metric in METRICS:
        a, b = got(metric), want[metric]
        assert a.shape == b.shape, (where, metric)
        assert np.array_equal(np.isnan(a), np.isnan(b)), (where, metric)
        error, scale = (np.linalg.norm(np.nan_to_num(x)) for x in (a - b, b))
        # Relative metrics are exponentials of log-probabilities.
        allowed = 2 * TOLERANCE[precision] * (scale if scale > 1e-9 else 1)
        assert error <= allowed, f"{where}, {metric}: relative error {error / scale:.1e}"


def of_pairs(true, drawn, wirings, **options):
    """Every metric, [pair, edge]."""
    found = [effects(true, pair, wirings, **options) for pair in drawn]
    return {name: np.stack([f[name] for f in found]) for name in METRICS}


@pytest.mark.parametrize("variant", ALL)
def test_the_oracle_is_the_plain_forward(variant):
    """With all as it is, and with every edge carrying what the base run says, nothing changes."""
    true, (pair,) = true_model(variant), pairs(true_model(variant), (5,))
    assert set(unpatched(true, tuple(pair.clean))) == set(senders(true))
    found = effects(true, pair, [{}, dict.fromkeys(edges(true), BASE), dict.fromkeys(edges(true), OWN)])
    assert np.abs(found["logit_diff"]).max() < 1e-12


@pytest.mark.parametrize("variant", ALL)
def test_all_edges(variant):
    true, precision = true_model(variant), ["fp32", "fp64"][len(variant) % 2]
    drawn = pairs(true, (5, 4), seed=len(variant))
    direction = ["denoise", "noise"][sum(map(ord, variant)) % 2]
    got = sweep(variant, drawn, precision, effect="both", direction=direction)
    assert (got.senders, got.receivers, got.edges) == (senders(true), receivers(true), edges(true))
    for effect in ("total", "direct"):
        wirings = [total(e) if effect == "total" else direct(e) for e in edges(true)]
        want = of_pairs(true, drawn, wirings, direction=direction)
        assert_close(lambda metric, e=effect: got.flat(metric, e), want, precision, effect)


@pytest.mark.parametrize("variant", FEW)
def test_every_position_by_itself(variant):
    true, drawn = true_model(variant), pairs(true_model(variant), (4, 3), seed=2)
    names = [e for e in edges(true) if e[0] in ("input", "a0.h1", "m0")]
    options = {"senders": ["input", "a0.h1", "m0"], "positions": "all", "effect": "both"}
    got = sweep(variant, drawn, "fp64", **options)
    assert got.edges == names
    for effect in ("total", "direct"):
        values = {metric: got.flat(metric, effect) for metric in METRICS}  # [pair, edge, position]
        for position in range(4):
            kind = np.where(np.arange(4) == position, SOURCE, OWN)
            for i, pair in enumerate(drawn):
                if position >= len(pair.clean):
                    assert np.isnan(values["logit_diff"][i, :, position]).all()
                    continue
                here = kind[: len(pair.clean)]
                wirings = [total(e, here) if effect == "total" else direct(e, here) for e in names]
                if effect == "direct":  # elsewhere the edge carries what it does without the patch
                    wirings = [
                        w | {e: np.where(here == SOURCE, SOURCE, BASE)}
                        for w, e in zip(wirings, names, strict=True)
                    ]
                want = effects(true, pair, wirings)
                at = {metric: values[metric][i, :, position] for metric in METRICS}
                assert_close(at.__getitem__, want, "fp64", (effect, position, i))


@pytest.mark.parametrize("variant", ["neox-parallel", "llama-grouped"])
def test_long_answers_and_zeros(variant):
    """Answers of several tokens, whose runs fork, and a source that is no run."""
    true = true_model(variant)
    drawn = [with_long_answers(true, pair, (2, 3), 0, seed=4) for pair in pairs(true, (4,), seed=5)]
    for source in ("counterpart", "zero"):
        got = sweep(variant, drawn, "fp64", source=source)
        want = of_pairs(true, drawn, [total(e) for e in edges(true)], source=source)
        assert_close(got.flat, want, "fp64", source)


@pytest.mark.parametrize("variant", FEW)
def test_other_sources(variant):
    """The mean over all prompts of one length, and another pair's source run."""
    true = true_model(variant)
    drawn = [*pairs(true, (4, 4), seed=5), *pairs(true, (3,), seed=8), *pairs(true, (3,), seed=9)]
    wirings = [total(e) for e in edges(true)]
    same = [[p for q in drawn if len(q.clean) == len(d.clean) for p in (q.clean, q.corrupted)] for d in drawn]
    partner = [drawn[i] for i in (1, 0, 3, 2)]  # the only other one of its length
    for source, runs_of in (("mean", same), ("resample", [[p.clean] for p in partner])):
        got = sweep(variant, drawn, "fp64", source=source)
        found = [
            effects(true, d, wirings, source=source, runs_of=r) for d, r in zip(drawn, runs_of, strict=True)
        ]
        assert_close(got.flat, {m: np.stack([f[m] for f in found]) for m in METRICS}, "fp64", source)


def test_key_value_heads_read_for_their_group():
    true, drawn = true_model("llama-grouped"), pairs(true_model("llama-grouped"), (5,), seed=6)
    got = sweep("llama-grouped", drawn, "fp64", keys="kv", receivers=["a1<k>", "a1<v>"])
    group = true.shape.n_heads // true.shape.n_kv_heads
    assert got.receivers == [f"a1.kv{h}<{r}>" for r in "kv" for h in range(true.shape.n_kv_heads)]
    wirings = [
        {(s, f"a1.h{h}{r[-3:]}"): SOURCE for h in range(kv * group, (kv + 1) * group)}
        for s, r in got.edges
        for kv in [int(r[5])]
    ]
    assert_close(got.flat, of_pairs(true, drawn, wirings), "fp64", "kv")


@pytest.mark.parametrize("variant", FEW)
def test_identities(variant):
    """What must hold of any model, bit for bit or nearly."""
    true = true_model(variant)
    (pair,) = pairs(true, (6,), seed=7)
    same = pair._replace(corrupted=pair.clean)
    assert not sweep(variant, [same]).flat("logit_diff").any()
    got = sweep(variant, [pair], "fp64", positions="all")
    flat = got.flat("logit_diff")  # [pair, edge, position]
    told = np.array([s == "input" for s, _ in got.edges])
    equal = np.array(pair.clean) == np.array(pair.corrupted)
    assert equal.any()
    assert not flat[0][told][:, equal].any()  # the embedding of equal tokens says the same
    values = got.values("logit_diff")
    assert values.shape == (1, len(got.senders), len(got.receivers), 6)
    assert np.isnan(values).any()
    assert np.nansum(values) == pytest.approx(flat.sum())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_products(precision):
    drawn = pairs(true_model("llama-grouped"), (5, 5), seed=8)
    exact, got = (sweep("llama-grouped", drawn, p).flat("logit_diff") for p in ("fp64", precision))
    assert np.linalg.norm(got - exact) <= 2e-2 * np.linalg.norm(exact)


def test_a_run_folder_holds_them(tmp_path):
    """Written, resumed, split, merged and read: the same numbers; asked for other edges: refused."""
    drawn = pairs(true_model("llama"), (5, 4, 5), seed=9)
    options = {"precision": "fp32", "memory_budget": "32MB", "effect": "both"}
    whole = sweep("llama", drawn, **options)
    first = sweep("llama", drawn, out=tmp_path / "run", **options)
    again = deltapatch.load_edges(tmp_path / "run")
    for part in (1, 2):
        sweep("llama", drawn, out=tmp_path / "parts", shard=(part, 2), **options)
    assert merge(tmp_path / "parts")
    parts = deltapatch.load_edges(tmp_path / "parts")
    finished = sweep("llama", drawn, out=tmp_path / "run", resume=True, **options)
    for found in (first, again, parts, finished):
        assert found.edges == whole.edges
        for effect in ("total", "direct"):
            assert np.array_equal(found.flat("kl", effect), whole.flat("kl", effect))
    for other, said in (
        ({"senders": "input"}, "a different senders"),
        ({"direction": "noise"}, "a different direction"),
    ):
        with pytest.raises(DeltapatchError, match=said):
            sweep("llama", drawn, out=tmp_path / "run", resume=True, **options | other)
    with pytest.raises(DeltapatchError, match="a sweep of edges, not a sweep: load_edges reads it"):
        deltapatch.load_effects(tmp_path / "run")
    deltapatch.sweep(
        model_of("llama"), prompt_pairs(drawn), sites="z", out=tmp_path / "sites", progress=False
    )
    with pytest.raises(DeltapatchError, match="not a sweep of edges: load_effects reads it"):
        deltapatch.load_edges(tmp_path / "sites")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"senders": "a9"}, "unknown sender 'a9': this model has input, a0.h0"),
        ({"senders": "logits"}, "unknown sender 'logits'"),
        ({"receivers": "a0.h0<z>"}, "unknown receiver"),
        ({"receivers": ["a0.h0<q>"], "senders": ["m1"]}, "there is no edge between"),
        ({"receivers": []}, "no receivers were given"),
        ({"effect": "half"}, "unknown effect 'half'"),
        ({"keys": "all"}, "unknown keys 'all'"),
        ({"positions": ["together", 1]}, "stands alone"),
        ({"senders": 3}, "a sender must be a name"),
    ],
)
def test_what_is_refused(options, said):
    with pytest.raises(DeltapatchError, match=said):
        sweep("llama", pairs(true_model("llama"), (4,)), **options)


def test_names_of_many():
    got = sweep(
        "llama", pairs(true_model("llama"), (4,)), senders="input,m0-1,a0.h2", receivers="a1<k>,m,logits"
    )
    assert got.senders == ["input", "a0.h2", "m0", "m1"]
    assert got.receivers == ["m0", "a1.h0<k>", "a1.h1<k>", "a1.h2<k>", "a1.h3<k>", "m1", "logits"]
    table = got.columns("logit_diff")
    assert [*table] == ["pair", "sender", "receiver", "logit_diff"]
    assert list(zip(table["sender"], table["receiver"], strict=True)) == got.edges
    assert "Effects of" in repr(got)


@pytest.mark.parametrize("variant", FEW)
def test_a_site_at_all_positions_together(variant):
    """The same as a joint patch of every position of the prompt."""
    true, drawn = true_model(variant), pairs(true_model(variant), (5, 3), seed=11)
    model, given = model_of(variant, "fp64"), prompt_pairs(drawn)
    for site, source in (("z", "counterpart"), ("attn_out", "zero"), ("resid_pre", "counterpart")):
        options = {"sites": site, "source": source, "progress": False}
        got = deltapatch.sweep(model, given, positions="together", **options)
        assert got.positions(site) == ["together"]
        for i, pair in enumerate(drawn):
            cells = [(l, h) for l in range(true.n_layers) for h in range(true.n_indices(site) or 1)]
            index = (lambda h: h) if true.n_indices(site) else (lambda h: None)
            rows = [[Patch(site, l, t, index(h)) for t in range(len(pair.clean))] for l, h in cells]
            want = true.effects(pair, rows, source=source)
            at = {metric: got.values(metric, site)[i].ravel() for metric in METRICS}
            assert_close(at.__getitem__, want, "fp64", (site, source))


def test_together_survives_a_run_folder(tmp_path):
    given = prompt_pairs(pairs(true_model("llama"), (5, 3), seed=12))
    options = {"sites": "z,mlp_out", "positions": "together", "progress": False, "precision": "fp32"}
    whole = deltapatch.sweep(model_of("llama"), given, **options)
    for part in (1, 2):
        deltapatch.sweep(model_of("llama"), given, out=tmp_path / "run", shard=(part, 2), **options)
    assert merge(tmp_path / "run")
    found = deltapatch.load_effects(tmp_path / "run")
    assert np.array_equal(found.values("kl", "z"), whole.values("kl", "z"))
    assert set(found.columns(sites="z")["position"]) == {"together"}


@pytest.mark.parametrize(
    ("shape", "keys", "n"),
    [
        ((12, 12, 12), "query", 32_491),  # GPT-2 small
        ((24, 14, 2), "query", 179_749),  # Qwen2.5-0.5B
        ((26, 8, 4), "query", 74_218),  # Gemma-2-2B
        ((32, 32, 8), "query", 1_592_881),  # Llama-3.1-8B
        ((32, 32, 8), "kv", 805_681),
    ],
)
def test_as_many_edges_as_are_published(shape, keys, n):
    """By MIB's benchmark."""
    nodes = Nodes(*shape, False, keys)
    grid = EdgeGrid(
        nodes,
        nodes.choose_senders("all"),
        nodes.choose_receivers("all"),
        ["together"],
        ("total",),
        Roles("noise"),
        1,
    )
    assert nodes.n_edges == len(grid.edges) == n


@pytest.mark.parametrize("variant", FEW)
def test_a_streamed_model_has_the_same_edges(variant, tmp_path):
    """Bit for bit: its weights are read in every pass. Circuits too."""
    hf_model(variant).save_pretrained(tmp_path / "model")
    given = prompt_pairs(pairs(true_model(variant), (5, 4), seed=13))
    options = {"precision": "fp32", "progress": False, "noise_sample": 0, "metrics": "logit_diff"}
    found, shares = [], []
    for stream in (False, True):
        model = deltapatch.load_model(tmp_path / "model", stream=stream)
        assert model.stream == stream
        edges_found = deltapatch.sweep_edges(model, given, direction="noise", **options)
        found.append(edges_found.flat("logit_diff"))
        circuit = deltapatch.Circuit.top(edges_found, 40)
        shares.append(deltapatch.faithfulness(model, given, circuit, progress=False, precision="fp32").raw)
    assert np.array_equal(*found)
    assert np.array_equal(*shares)


def test_they_show_themselves():
    """Figures, rankings and the tables of notebooks; texts of a run stay text."""
    drawn = pairs(true_model("llama"), (5, 4), seed=14)
    found = sweep("llama", drawn, effect="both", direction="noise")
    assert found.plot("logit_diff").axes
    assert found.plot("kl", "direct", pair=1).axes
    top = found.top(4, "logit_diff")
    assert len(top) == 4
    assert (np.diff(np.abs(top.columns["logit_diff"])) <= 0).all()
    assert "<table>" in found._repr_html_()
    apart = sweep("llama", drawn, positions="all", senders="input")
    assert "position" in apart.top(3).columns
    assert apart.plot("logit_diff").axes
    circuit = deltapatch.Circuit.top(found, 30)
    assert circuit.plot().axes
    for call, said in (
        (lambda: found.plot("magic"), "unknown metric"),
        (lambda: found.plot("kl", "half"), "was not measured"),
        (lambda: found.plot("kl", pair=7), "pair 7 does not exist"),
        (lambda: deltapatch.Circuit.top(found, 0).plot(), "no edges to draw"),
    ):
        with pytest.raises(DeltapatchError, match=said):
            call()
