"""Circuits: chosen, pruned, saved, run; faithfulness, paths and ACDC against plain implementations."""

import json

import numpy as np
import pytest
from engine_edge_oracle import BASE, OWN, SOURCE, direct, edges, effects, receivers, senders, total
from engine_tiny import hf_model, model_of, pairs, prompt_pairs, true_model

import deltapatch
from deltapatch import Circuit, DeltapatchError
from deltapatch.analysis.acdc import acdc, order
from deltapatch.analysis.circuit_runs import circuit_curve, faithfulness, path_effects
from deltapatch.interventions.nodes import Nodes
from deltapatch.interventions.wirings import existing

VARIANTS = pytest.mark.parametrize("variant", ["neox-parallel", "llama-grouped", "gemma2", "olmo2"])


def told(true, circuit):
    """The wiring of a circuit for the oracle."""
    kept = set(circuit.edges)
    return {edge: OWN if edge in kept else SOURCE for edge in edges(true)}


@VARIANTS
@pytest.mark.parametrize("source", ["counterpart", "zero"])
def test_faithfulness(variant, source):
    true, drawn = true_model(variant), pairs(true_model(variant), (5, 4), seed=1)
    model = model_of(variant, "fp64")
    nodes, rng = Nodes.of(model.spec), np.random.default_rng(0)
    scores = rng.normal(size=existing(nodes).shape)
    circuits = [Circuit.of_scores(nodes, scores, 16, n) for n in (10, 60, nodes.n_edges)]
    for removed in (False, True):
        chosen = [c.complement() for c in circuits] if removed else circuits
        wirings = [dict.fromkeys(edges(true), SOURCE), *(told(true, c) for c in chosen)]
        want = np.stack([effects(true, pair, wirings, "noise", source)["logit_diff"] for pair in drawn], 1)
        got = faithfulness(
            model, prompt_pairs(drawn), circuits, source=source, removed=removed, progress=False
        )
        assert np.allclose(got.raw, want[1:], rtol=1e-8, atol=1e-12)
        assert np.allclose(got.empty, want[0], rtol=1e-8)
        assert np.allclose(got.share, 1 - want[1:].mean(1) / want[0].mean(), rtol=1e-8, atol=1e-12)
        assert got.share[-1] == (pytest.approx(0, abs=1e-9) if removed else 1)


@VARIANTS
def test_paths(variant):
    true, drawn = true_model(variant), pairs(true_model(variant), (4,), seed=3)
    paths = [("a0.h1", "a1.h0<v>", "logits"), ("input", "m0", "m1", "logits"), ("m0", "logits")]
    got = path_effects(model_of(variant, "fp64"), prompt_pairs(drawn), paths, progress=False)
    nodes = [[p.split("<")[0] for p in path] for path in paths]
    wirings = []
    for path, names in zip(paths, nodes, strict=True):
        kinds = dict.fromkeys(edges(true), BASE)
        kinds |= {(names[i], path[i + 1]): OWN for i in range(1, len(path) - 1)}
        wirings.append(kinds | {(path[0], path[1]): SOURCE})
    want = effects(true, drawn[0], wirings)["logit_diff"]
    assert np.allclose(got[0], want, rtol=1e-8)
    loose = path_effects(model_of(variant, "fp64"), prompt_pairs(drawn), paths, freeze=False, progress=False)
    assert np.allclose(
        loose[0], effects(true, drawn[0], [total(p[:2]) for p in paths])["logit_diff"], rtol=1e-8
    )
    # Of one step the frozen path is the direct effect.
    two = effects(true, drawn[0], [direct(paths[0][:2])])["logit_diff"]
    assert got[0][0] == pytest.approx(two[0], rel=1e-8)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (["a0.h1"], "leads from a sender"),
        (["a0.h1", "m1"], "leads from a sender"),
        (["a9.h1", "logits"], "no edge from a9.h1"),
        (["m1", "a0.h0<q>", "logits"], "does not come before"),
    ],
)
def test_a_path_that_is_none(path, said):
    with pytest.raises(DeltapatchError, match=said):
        path_effects(model_of("llama", "fp64"), prompt_pairs(pairs(true_model("llama"), (4,))), [path])


def sequential(true, drawn, threshold, metric):
    """ACDC, edge after edge, as it is written down."""
    kept = dict.fromkeys(edges(true), OWN)
    column = {name: i for i, name in enumerate(receivers(true))}
    row = {name: i for i, name in enumerate(senders(true))}
    sign = -1 if metric == "logit_diff" else 1

    def loss(wiring):
        return sign * np.mean([effects(true, pair, [wiring], "noise")[metric][0] for pair in drawn])

    now = 0.0
    for edge in sorted(edges(true), key=lambda e: (-column[e[1]], -row[e[0]])):
        without = kept | {edge: SOURCE}
        if (new := loss(without)) - now < threshold:
            kept, now = without, new
    return {edge for edge, kind in kept.items() if kind == OWN}


@pytest.mark.parametrize("metric", ["kl", "logit_diff"])
@pytest.mark.parametrize("variant", ["neox-parallel", "gpt2"])
def test_acdc_is_the_sequential_one(variant, metric):
    true, drawn = true_model(variant), pairs(true_model(variant), (4, 4), seed=5)
    model = model_of(variant, "fp64")
    names, columns = senders(true), receivers(true)
    first = order(Nodes.of(model.spec))[0]
    assert (names[first[0]], columns[first[1]]) == (names[-1], "logits")
    options = {"metric": metric, "precision": "fp64", "progress": False}
    for threshold, at_once in ((0.003, 64), (0.03, 5)):
        want = sequential(true, drawn, threshold, metric)
        found = acdc(model, prompt_pairs(drawn), threshold, at_once=at_once, **options)
        kept = {(names[s], columns[r]) for s, r in np.argwhere(found.kept)}
        assert kept == want
        assert set(found.circuit.edges) <= want
        assert 0 < len(want) < len(edges(true))
    assert found.noise == 0
    assert found.close == []


def test_decisions_near_the_threshold_are_told():
    drawn = prompt_pairs(pairs(true_model("llama"), (4,), seed=5))
    model = deltapatch.from_transformers(hf_model("llama"))
    plain = acdc(model, drawn, 0.01, precision="fp32", progress=False)
    assert 0 < plain.noise < 1e-4
    row, column = np.argwhere(~np.isnan(plain.increments) & (plain.increments > 1e-3))[-1]
    near = float(plain.increments[row, column]) + plain.noise / 2
    found = acdc(model, drawn, near, precision="fp32", progress=False)
    names = (Nodes.of(model.spec).senders[row], list(Nodes.of(model.spec).receivers)[column])
    assert names in found.close


# ------------------------------------------------------------------------------------------ choosing


@pytest.fixture(scope="module")
def swept():
    model = deltapatch.from_transformers(hf_model("llama-grouped"))
    drawn = prompt_pairs(pairs(true_model("llama-grouped"), (5, 4), seed=7))
    options = {"progress": False, "precision": "fp32"}
    return (
        model,
        drawn,
        {
            direction: deltapatch.sweep_edges(model, drawn, direction=direction, **options)
            for direction in ("denoise", "noise")
        },
    )


def test_top(swept):
    _, _, found = swept
    edges_found = found["noise"]
    mean = edges_found.mean("logit_diff")
    best = Circuit.top(edges_found, 12, prune=False)
    ranked = np.argsort(-np.abs(mean))[:12]
    assert set(best.edges) == {edges_found.edges[i] for i in ranked}
    # By sign: what speaks for the clean answer, whichever the direction.
    for direction, sign in (("denoise", 1), ("noise", -1)):
        mean = sign * found[direction].mean("logit_diff")
        got = Circuit.top(found[direction], 9, by="sign", prune=False)
        assert set(got.edges) == {found[direction].edges[i] for i in np.argsort(-mean)[:9]}
    above = Circuit.above(
        edges_found, float(np.sort(np.abs(edges_found.mean("logit_diff")))[-12]), prune=False
    )
    assert set(above.edges) == set(best.edges)
    assert "Circuit of 12 of" in repr(best)


def test_pruning_leaves_what_is_connected(swept):
    model, *_ = swept
    nodes = Nodes.of(model.spec)
    row = {name: i for i, name in enumerate(nodes.senders)}
    column = {name: i for i, name in enumerate(nodes.receivers)}
    kept = np.zeros(existing(nodes).shape, dtype=bool)
    whole = [("input", "a0.h0<q>"), ("a0.h0", "m1"), ("m1", "logits")]
    dead = [("m0", "logits"), ("input", "a1.h2<k>"), ("a0.h3", "a1.h2<v>")]
    for s, r in whole + dead:
        kept[row[s], column[r]] = True
    assert Circuit(nodes, kept, kept * 1.0).pruned().edges == whole


def test_greedy_grows_from_the_logits(swept):
    model, *_ = swept
    nodes = Nodes.of(model.spec)
    rng = np.random.default_rng(2)
    scores = rng.normal(size=existing(nodes).shape)
    for n in (1, 7, 40):
        found = Circuit.of_scores(nodes, scores, 16, n, greedy=True, prune=False)
        assert len(found) == n
        reached, best = {"logits"}, np.abs(scores)
        chosen = set()
        column = {name: i for i, name in enumerate(nodes.receivers)}
        row = {name: i for i, name in enumerate(nodes.senders)}
        for _ in range(n):
            open_ = [
                (s, r) for r in column if r.split("<")[0] in reached
                for s in row if existing(nodes)[row[s], column[r]] and (s, r) not in chosen
            ]  # fmt: skip
            edge = max(open_, key=lambda e: best[row[e[0]], column[e[1]]])
            chosen.add(edge)
            reached.add(edge[0])
        assert set(found.edges) == chosen


def test_a_file_is_what_eap_ig_reads_and_writes(swept, tmp_path):
    _, _, found = swept
    circuit = Circuit.top(found["noise"], 20)
    circuit.save(tmp_path / "circuit.json")
    about = json.loads((tmp_path / "circuit.json").read_text())
    assert set(about) == {"cfg", "nodes", "edges"}
    assert about["cfg"]["n_layers"] == circuit.nodes.n_layers
    assert about["cfg"]["d_model"] == 16
    assert set(about["nodes"]) == {*circuit.nodes.senders, "logits"}
    assert len(about["edges"]) == circuit.nodes.n_edges
    assert {tuple(name.split("->")) for name, e in about["edges"].items() if e["in_graph"]} == set(
        circuit.edges
    )
    again = Circuit.load(tmp_path / "circuit.json")
    assert again.edges == circuit.edges
    assert np.array_equal(again.scores, np.where(existing(circuit.nodes), circuit.scores, 0))
    with pytest.raises(DeltapatchError, match="is taken"):
        circuit.save(tmp_path / "circuit.json")
    del about["cfg"]["n_kv_heads"]  # EAP-IG does not write it
    theirs = tmp_path / "theirs.json"
    theirs.write_text(json.dumps(about))
    assert Circuit.load(theirs).edges == circuit.edges


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"cfg": {"n_layers": 1}}',
             '{"cfg": {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": false}, "edges": {"m0->a0.h0<q>": '
             '{"score": 1, "in_graph": true}}}'],
)  # fmt: skip
def test_a_damaged_file(text, tmp_path):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DeltapatchError, match="cannot be read as a circuit"):
        Circuit.load(tmp_path / "c.json")
    with pytest.raises(DeltapatchError, match="cannot be read as a circuit"):
        Circuit.load(tmp_path / "none.json")


def test_the_curve(swept):
    model, drawn, found = swept
    shares = (0.01, 0.1, 0.5, 1)
    got = circuit_curve(model, drawn, lambda n: Circuit.top(found["noise"], n), shares=shares, progress=False)
    f = got.faithfulness.share
    assert f[-1] == 1
    steps = list(zip(shares[:-1], shares[1:], f[:-1], f[1:], strict=True))
    assert got.cpr == pytest.approx(sum((b - a) * (x + y) / 2 for a, b, x, y in steps))
    assert got.cmd == pytest.approx(sum((b - a) * (abs(1 - x) + abs(1 - y)) / 2 for a, b, x, y in steps))
    assert [len(c) <= int(s * c.nodes.n_edges) for c, s in zip(got.circuits, shares, strict=True)]


def test_what_is_refused(swept):
    model, drawn, found = swept
    some = deltapatch.sweep_edges(model, drawn, senders="input", progress=False)
    circuit = Circuit.top(found["noise"], 5)
    other = deltapatch.from_transformers(hf_model("gpt2"))
    for call, said in (
        (lambda: Circuit.top(some, 5), "a sweep of all edges"),
        (lambda: Circuit.top(found["noise"], 10**6), "cannot be had"),
        (lambda: Circuit.top(found["noise"], 5, by="size"), "choose from magnitude, sign"),
        (lambda: faithfulness(other, drawn, circuit), "is of another model"),
        (lambda: faithfulness(model, drawn, []), "give at least one"),
        (lambda: faithfulness(model, drawn, circuit, direction="denoise"), "leave out direction"),
        (lambda: faithfulness(model, drawn, circuit, out="x"), "write no run folder"),
        (lambda: acdc(model, drawn, 0), "more than 0"),
        (lambda: path_effects(model, drawn, []), "there are no paths"),
    ):
        with pytest.raises(DeltapatchError, match=said):
            call()
