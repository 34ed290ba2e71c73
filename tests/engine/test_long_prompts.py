"""Prompts of a thousand tokens and more, whose rows go through a layer in pieces, against the oracle."""

import numpy as np
import pytest
import torch
from engine_oracle import METRICS, Pair, Patch
from engine_tiny import VOCAB, hf_model, true_model, with_apt_answers

import deltapatch

LENGTH = 1_100  # a row from the start has more tokens than two blocks


def long_pair(variant, length):
    """Prompts of random tokens that differ in two."""
    draw = torch.Generator().manual_seed(length)
    clean = torch.randint(VOCAB, (length,), generator=draw).tolist()
    corrupted = clean.copy()
    for at in (2, length - 5):
        corrupted[at] = (clean[at] + 7) % VOCAB
    return with_apt_answers(true_model(variant), Pair(clean, corrupted, 0, 1, {}))


def interventions(variant, length):
    """Patches from early to late positions, alone and together, hidden neurons in flight among them."""
    true = true_model(variant)
    alone = [[Patch(site, 0, t)] for site in ("mlp_out", "attn_out") for t in (0, 2, 700, length - 1)]
    last = true.n_layers - 1
    neurons = [[Patch("mlp_out", 0, 2)] + [Patch("mlp_post", last, t, 3) for t in (length - 5, length - 1)]]
    heads = [[Patch("resid_pre", 0, 2), Patch("k", last, 2, 0), Patch("z", last, length - 1, 1)]]
    return alone + neurons + heads


def as_given(patches):
    return [
        deltapatch.Patch(p.site, p.layer, p.position, *(() if p.index is None else (p.index,)))
        for p in patches
    ]


@pytest.mark.parametrize(
    ("variant", "source"),
    [("gptj", "counterpart"), pytest.param("llama-grouped", "zero", marks=pytest.mark.slow)],
)
def test_a_long_prompt_agrees_with_the_oracle(variant, source):
    model = deltapatch.from_transformers(hf_model(variant, torch.float64))
    pair = long_pair(variant, LENGTH)
    asked = interventions(variant, LENGTH)
    want = true_model(variant).effects(pair, asked, source=source)
    given = [deltapatch.Intervention(0, as_given(patches)) for patches in asked]
    prompts = [deltapatch.PromptPair(**pair._asdict())]
    outcome = deltapatch.run(model, prompts, given, source=source, precision="fp64", progress=False)
    for metric in METRICS:
        off = np.linalg.norm(outcome.values(metric) - want[metric])
        assert off <= (0 if metric == "flip" else 1e-7) * np.linalg.norm(want[metric]), metric
