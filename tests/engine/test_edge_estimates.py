"""Estimates of edges: slopes of their oracle, exact effects of small changes, and sums that must hold."""

import numpy as np
import pytest
import torch
from engine_edge_oracle import OWN, SOURCE, _together, direct, edges, forward, total, unpatched
from engine_tiny import FAMILIES, VARIANTS, hf_model, nearly_the_same, pairs, true_model

import deltapatch
from deltapatch import PromptPair
from deltapatch.analysis.attribution import attribute_edges
from deltapatch.engine.options import EdgeOptions
from deltapatch.engine.question import ask
from deltapatch.engine.screening.estimates import Estimates, Method, reaching

STEP = 1e-4
PLAIN = ["neox-parallel", "neox-sequential", "gptj", "llama-grouped", "gpt2", "qwen3", "stablelm"]


def estimated(model, given, method="attribution", by="logit_diff", steps=1, **options):
    """[pair, effect, position, edge], and the grid."""
    question = ask(model, given, EdgeOptions(progress=False, **options))
    grid = question.interventions
    return Estimates(question, Method(method, by, steps)).run().reshape(grid.shape), grid


def slopes(true, pair, wirings, theirs=None):
    """[wiring], by finite steps of what edges carry, from the base run's value to the source's.

    The source is the clean run unless given: sender -> what it says.
    """
    own, clean = (unpatched(true, tuple(p)) for p in (pair.corrupted, pair.clean))
    theirs = clean if theirs is None else theirs
    n, ends = len(pair.corrupted), []
    for step in (STEP, -STEP):
        carried = {name: own[name] + step * (theirs[name] - own[name]) for name in own}
        wired = _together(true, wirings, n, n)
        logits = forward(true, pair.corrupted, len(wirings), wired, carried, own)[0][:, -1]
        ends.append(logits[:, pair.clean_answer] - logits[:, pair.corrupted_answer])
    return (ends[0] - ends[1]) / (2 * STEP)


def double(variant):
    return deltapatch.from_transformers(hf_model(variant, torch.float64))


def as_pairs(drawn):
    return [PromptPair(**pair._asdict()) for pair in drawn]


@pytest.mark.parametrize("variant", PLAIN)
def test_estimates_are_slopes_of_the_oracle(variant):
    """Total and direct, of every edge; messages of these families are linear in what heads say."""
    true = true_model(variant)
    drawn = pairs(true, (5, 4), seed=4)
    found, grid = estimated(double(variant), as_pairs(drawn), effect="both")
    assert [(grid.nodes.senders[s], grid.receivers[r]) for s, r in grid.edges.tolist()] == edges(true)
    for number, pair in enumerate(drawn):
        for effect, wiring in enumerate((total, direct)):
            want = slopes(true, pair, [wiring(edge) for edge in edges(true)])
            got = found[number, effect, 0]
            assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want), wiring.__name__


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
@pytest.mark.parametrize("variant", [*VARIANTS, *FAMILIES])
def test_they_are_those_of_a_forward_in_which_each_receiver_reads_its_own(variant, method):
    """There every reading is a tensor, and gradients go through the whole forward at once."""
    model, given = double(variant), as_pairs(pairs(true_model(variant), (5, 4), seed=9))
    want = attribute_edges(model, given, method=method, steps=3, direction="noise")
    name, steps = ("ig-inputs", 3) if method == "eap-ig" else ("attribution", 1)
    found, grid = estimated(model, given, name, steps=steps, direction="noise")
    want = want[:, grid.edges[:, 0], grid.edges[:, 1]]
    assert np.linalg.norm(found[:, 0, 0] - want) <= 1e-8 * np.linalg.norm(want)


@pytest.mark.parametrize("variant", ["gptj", "llama-grouped"])
def test_each_position_by_itself(variant):
    true = true_model(variant)
    drawn = pairs(true, (5, 3), seed=5)
    found, _ = estimated(double(variant), as_pairs(drawn), positions="all", senders="input,a0,m0")
    names = [e for e in edges(true) if e[0] == "input" or e[0][1] == "0"]
    for number, pair in enumerate(drawn):
        for position in range(5):
            got = found[number, 0, position]
            if position >= len(pair.clean):
                assert np.isnan(got).all()
                continue
            kind = np.where(np.arange(len(pair.clean)) == position, SOURCE, OWN)
            want = slopes(true, pair, [total(edge, kind) for edge in names])
            assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()
    whole, _ = estimated(double(variant), as_pairs(drawn), senders="input,a0,m0")
    assert np.allclose(np.nansum(found, 2), whole[:, :, 0])


@pytest.mark.parametrize("variant", [*VARIANTS, *FAMILIES])
def test_of_small_changes_they_are_the_exact_effects(variant):
    """Every family, with norms behind and norms of heads, answers of several tokens, and any of several."""
    model, given = nearly_the_same(variant)
    given = given[::2] if variant == "phi3" else given  # whose angles depend on how long answers are
    number = sum(map(ord, variant))
    by = ("logit_diff", "dlogp_clean", "dlogp_corrupted")[number % 3]
    options = {"positions": ("together", "all")[number % 2], "keys": ("query", "kv")[number // 2 % 2]}
    options |= {"effect": "both", "precision": "fp64"}
    exact = deltapatch.sweep_edges(model, given, progress=False, noise_sample=0, **options)
    found, _ = estimated(model, given, by=by, **options)
    for at, effect in enumerate(("total", "direct")):
        want = exact.flat(by, effect)
        got = found[:, at, 0] if exact.grid.together else np.moveaxis(found[:, at], 1, 2)
        assert np.array_equal(np.isnan(got), np.isnan(want))
        assert np.nanmax(np.abs(got - want)) <= 1e-4 * np.nanmax(np.abs(want)), effect


@pytest.mark.parametrize("method", ["attribution", "ig-inputs"])
@pytest.mark.parametrize("variant", ["gptj", "llama-grouped", "gemma2", "olmo2", "qwen3"])
def test_edges_of_a_sender_add_up_to_its_site(variant, method):
    """All that read a sender, at first order: patching what it says to everyone. Whatever the gradient is."""
    model, given = double(variant), as_pairs(pairs(true_model(variant), (5, 4), seed=6))
    found, grid = estimated(model, given, method, steps=3)
    sums = np.zeros((len(given), len(grid.senders)))
    np.add.at(sums, (slice(None), np.searchsorted(grid.senders, grid.edges[:, 0])), found[:, 0, 0])
    sites = {"resid_pre": [0]} | {"mlp_out": range(model.spec.n_layers)}
    options = {"screen": method, "positions": "together", "precision": "fp64", "progress": False, "top": 1}
    options |= {"screen_steps": 3} if method == "ig-inputs" else {}
    for site, layers in sites.items():
        whole = deltapatch.sweep(model, given, sites=site, layers=list(layers), **options).estimate()[:, :, 0]
        at = [0] if site == "resid_pre" else [grid.nodes.mlp(l) for l in layers]
        assert np.allclose(sums[:, at], whole, rtol=1e-8, atol=1e-12)
    heads = deltapatch.sweep(model, given, sites="z", **options).estimate()[:, :, 0]  # [pair, layer, head]
    if not model.spec.post_norm:  # behind a norm a head's message is no linear map of what it says
        at = [[grid.nodes.attention(l) + h for h in range(heads.shape[2])] for l in range(heads.shape[1])]
        assert np.allclose(sums[:, at], heads, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("variant", ["gptj", "llama-grouped", "gemma2", "qwen3"])
def test_relevance_of_a_sender_adds_up_to_its_site(variant):
    """Queries and keys have none, so all other edges of a sender are all of it."""
    model, given = double(variant), as_pairs(pairs(true_model(variant), (5, 4), seed=6))
    found, grid = estimated(model, given, "relp", receivers="a<v>,m,logits")
    sums = np.zeros((len(given), len(grid.senders)))
    np.add.at(sums, (slice(None), grid.edges[:, 0]), found[:, 0, 0])
    options = {"screen": "relp", "positions": "together", "precision": "fp64", "progress": False, "top": 1}
    whole = deltapatch.sweep(model, given, sites="mlp_out", **options).estimate()[:, :, 0]
    at = [grid.nodes.mlp(l) for l in range(model.spec.n_layers)]
    assert np.allclose(sums[:, at], whole, rtol=1e-8, atol=1e-12)
    embedding = deltapatch.sweep(model, given, sites="resid_pre", layers=[0], **options).estimate()
    assert np.allclose(sums[:, 0], embedding[:, 0, 0], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", ["attribution", "relp", "ig-inputs"])
@pytest.mark.parametrize("variant", ["gptj", "llama-grouped", "gemma2"])
def test_what_the_last_layer_says_goes_to_the_logits_alone(variant, method):
    """So there total and direct effects are the same: of MLPs, of logits, and of heads beside an MLP."""
    model, given = double(variant), as_pairs(pairs(true_model(variant), (5, 4), seed=6))
    last = model.spec.n_layers - 1
    names = f"m{last},logits" + (f",a{last}<v>" if model.spec.parallel else "")
    found, _ = estimated(model, given, method, steps=2, receivers=names, effect="both")
    assert found.any()
    assert np.allclose(found[:, 0], found[:, 1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("positions", ["together", "all"])
def test_in_pieces_they_are_the_same(positions, monkeypatch):
    model, given = double("llama-grouped"), as_pairs(pairs(true_model("llama-grouped"), (6, 4), seed=6))
    whole, _ = estimated(model, given, effect="both", positions=positions)
    monkeypatch.setattr("deltapatch.engine.screening.sent._NUMBERS", 300)
    pieces, _ = estimated(model, given, effect="both", positions=positions)
    assert np.allclose(pieces, whole, rtol=1e-10, atol=1e-14, equal_nan=True)


def test_integrated_inputs_take_the_mean_of_gradients_between_the_prompts():
    """One step: the gradients of the source run, so the negative of the estimates the other way round."""
    model, given = double("llama"), as_pairs(pairs(true_model("llama"), (5,), seed=3))
    one, _ = estimated(model, given, "ig-inputs", effect="both")
    there, _ = estimated(model, given, effect="both", direction="noise")
    many, _ = estimated(model, given, "ig-inputs", steps=8, effect="both")
    assert np.allclose(one, -there)
    assert not np.allclose(many, one)


@pytest.mark.parametrize("method", ["attribution", "ig-inputs"])
def test_streamed_or_in_chunks_they_are_the_same(method, tmp_path):
    hf_model("llama-grouped").save_pretrained(tmp_path)
    given, found = as_pairs(pairs(true_model("llama-grouped"), (6, 4, 5), seed=7)), []
    for stream, budget in ((False, None), (True, 8_000), (True, None)):
        model = deltapatch.load_model(tmp_path, device="cpu", stream=stream)
        options = {"memory_budget": budget, "effect": "both", "receivers": "a1-2,m1,logits"}
        question = ask(model, given, EdgeOptions(**options))
        assert len(list(Estimates(question, Method(method, "logit_diff", 2)).chunks())) == (
            3 if budget else 1
        )
        found.append(estimated(model, given, method, steps=2, **options)[0])
    close = {"rtol": 1e-4, "atol": 1e-6 * np.abs(found[0]).max()}
    assert all(np.allclose(other, found[0], **close) for other in found[1:])


@pytest.mark.parametrize("source", ["zero", "mean", "resample"])
def test_other_sources(source):
    true = true_model("llama-grouped")
    drawn = pairs(true, (5, 5), seed=8)
    found, _ = estimated(double("llama-grouped"), as_pairs(drawn), source=source)
    runs = [unpatched(true, tuple(p)) for pair in drawn for p in (pair.clean, pair.corrupted)]
    for number, pair in enumerate(drawn):
        theirs = {
            "zero": {name: 0 * said for name, said in runs[0].items()},
            "mean": {name: np.mean([run[name] for run in runs], 0) for name in runs[0]},
            "resample": unpatched(true, tuple(drawn[1 - number].clean)),
        }[source]
        want = slopes(true, pair, [total(edge) for edge in edges(true)], theirs)
        assert np.linalg.norm(found[number, 0, 0] - want) <= 1e-6 * np.linalg.norm(want)


def test_where_nothing_can_happen():
    """Before the prompts differ, behind the read-out, and where the last layer is not read: known to be 0."""
    model = double("gpt2")
    given = [PromptPair([1, 2, 3, 4, 5], [1, 2, 7, 4, 5], 8, 9)]
    options = {"readout": 3, "positions": "all", "effect": "both"}
    found, grid = estimated(model, given, **options)
    question = ask(model, given, EdgeOptions(**options))
    can = reaching(question).reshape(grid.shape)
    exact = deltapatch.sweep_edges(model, given, precision="fp64", progress=False, **options)
    for at, effect in enumerate(("total", "direct")):
        flat = np.moveaxis(exact.flat("logit_diff", effect), 2, 1)  # [pair, position, edge]
        assert not flat[~can[:, at]].any()
        assert flat[can[:, at]].any()
        assert not found[:, at][~can[:, at]].any()
