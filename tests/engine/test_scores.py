"""Attention scores are no site: patched in the oracle, they do what `pattern` does here."""

import numpy as np
import pytest
import torch
from engine_oracle import METRICS, Patch
from engine_tiny import hf_model, pairs, true_model

import deltapatch as dp


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("variant", ["neox-parallel", "llama-grouped", "gemma2"])  # the last: window, cap
def test_scores_of_another_run_are_its_pattern(variant, direction):
    """Alone, and together with what changes keys, values and the block's input before them."""
    true = true_model(variant)
    pair = pairs(true, (6,), seed=11)[0]
    heads = range(true.n_indices("pattern"))
    alone = [[("scores", layer, at, head)] for layer in (0, 1) for at in (2, 5) for head in heads]
    joint = [("mlp_out", 0, 1), ("k", 1, 1, 0), ("v", 1, 2, 0), ("scores", 1, 4, 0), ("scores", 1, 5, 1)]
    rows = [*alone, joint]
    want = true.effects(pair, [[Patch(*patch) for patch in row] for row in rows], direction)
    ours = [[dp.Patch("pattern" if s == "scores" else s, *at) for s, *at in row] for row in rows]
    asked = [dp.Intervention(0, row) for row in ours]
    prompts = [dp.PromptPair(**pair._asdict())]
    model = dp.from_transformers(hf_model(variant, torch.float64))
    found = dp.run(model, prompts, asked, direction=direction, precision="fp64", progress=False)
    assert np.any(want["logit_diff"] != 0)
    for metric in METRICS:
        error = np.linalg.norm(found.values(metric) - want[metric])
        assert error <= 1e-8 * np.linalg.norm(want[metric]), metric
