"""Estimates by gradients: the split forward gives exact effects, and its slopes are what finite steps say."""

import numpy as np
import pytest
import torch
from engine_tiny import FAMILIES, VARIANTS, hf_model, pairs, true_model, with_long_answers

import deltapatch
from deltapatch import DeltapatchError
from deltapatch.analysis.attribution import SplitForward, attribute_edges
from deltapatch.interventions.nodes import Nodes


def prepared(variant, length=5):
    model = deltapatch.from_transformers(hf_model(variant, torch.float64))
    (pair,) = pairs(true_model(variant), (length,), seed=3)
    return model, deltapatch.PromptPair(**pair._asdict())


@pytest.mark.parametrize("variant", [*VARIANTS, *FAMILIES])
def test_estimates_are_the_slopes_of_exact_effects(variant):
    model, pair = prepared(variant)
    nodes, split = Nodes.of(model.spec), SplitForward(model, torch.float64)
    exact = deltapatch.sweep_edges(model, [pair], direction="noise", progress=False, precision="fp64")
    answers = pair.clean_answer, pair.corrupted_answer
    base, source = (split.run(split.embed(tokens), answers) for tokens in (pair.clean, pair.corrupted))
    message = split.messages(base, source)
    estimates = attribute_edges(model, [pair], direction="noise")[0]
    receivers = list(nodes.receivers)
    values = exact.values("logit_diff")[0]
    assert np.array_equal(np.isnan(estimates), np.isnan(values))
    rng = np.random.default_rng(len(variant))
    for _ in range(12):
        s = int(rng.integers(nodes.n_senders))
        there = [i for i, r in enumerate(receivers) if s < nodes.before(nodes.receivers[r])]
        r = int(rng.choice(there))
        with torch.no_grad():
            whole = split.run(split.embed(pair.clean), answers, {r: message[s]}).metric - base.metric
            ends = [split.run(split.embed(pair.clean), answers, {r: e * message[s]}) for e in (1e-5, -1e-5)]
        scale = max(abs(values[s, r]), 1e-3)
        assert abs(float(whole) - values[s, r]) < 1e-8 * max(scale, 1), (
            "the whole message is the exact effect"
        )
        slope = float(ends[0].metric - ends[1].metric) / 2e-5
        assert abs(slope - estimates[s, r]) < 1e-4 * max(abs(estimates[s, r]), 1e-2)


def test_integrated_gradients():
    """One step is the slope at the source run; the direction turns it round."""
    model, pair = prepared("llama")
    turned = deltapatch.PromptPair(pair.corrupted, pair.clean, pair.clean_answer, pair.corrupted_answer)
    one = attribute_edges(model, [pair], method="eap-ig", steps=1, direction="noise")
    there = attribute_edges(model, [turned], method="eap", direction="noise")
    assert np.allclose(np.nan_to_num(one), -np.nan_to_num(there))
    many = attribute_edges(model, [pair], method="eap-ig", steps=20, direction="noise")
    assert not np.allclose(np.nan_to_num(one), np.nan_to_num(many))


def test_what_is_refused():
    model, pair = prepared("llama")
    long = with_long_answers(true_model("llama"), pairs(true_model("llama"), (4,))[0], (2, 2), 0, seed=1)
    for given, options, said in (
        ([pair], {"method": "magic"}, "unknown method"),
        ([pair], {"method": "eap-ig", "steps": 0}, "1 or more"),
        ([deltapatch.PromptPair(**long._asdict())], {}, "answers of one token"),
    ):
        with pytest.raises(DeltapatchError, match=said):
            attribute_edges(model, given, **options)
