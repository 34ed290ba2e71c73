"""Base and source runs of few tokens share their products; those of many go one after the other."""

import numpy as np
import pytest
from engine_tiny import model_of, pairs, prompt_pairs, true_model

import deltapatch as dp
from deltapatch.engine.wavefront import unpatched
from deltapatch.kernels import backend

SITES = ("resid_pre", "q", "k", "v", "z", "attn_out", "mlp_post", "mlp_out", "resid_post", "pattern")


@pytest.mark.parametrize(
    ("variant", "source"),
    [
        ("neox-parallel", "counterpart"),
        ("gemma2", "resample"),
        ("qwen3", "zero"),
        ("llama-grouped", "mean"),
        ("gpt2", "resample"),
    ],
)
def test_together_and_apart_are_the_same(variant, source, monkeypatch):
    drawn = prompt_pairs(pairs(true_model(variant), (5, 4, 5, 4)))
    model, shared, counted = model_of(variant, "fp64"), unpatched.side_by_side, []

    def count(base, source):
        counted.append(1)
        shared(base, source)

    monkeypatch.setattr(unpatched, "side_by_side", count)
    options = {"sites": SITES, "source": source, "precision": "fp64"}
    together = dp.sweep(model, drawn, **options)
    assert len(counted) >= model.spec.n_layers
    del counted[:]
    monkeypatch.setattr(backend.REFERENCE, "block_tokens", 8)
    apart = dp.sweep(model, drawn, **options)
    assert not counted
    for site in SITES:
        for metric in ("logit_diff", "dlogp_clean", "kl"):
            a, b = (np.nan_to_num(e.values(metric, site=site)) for e in (together, apart))
            assert np.linalg.norm(a - b) <= 1e-11 * np.linalg.norm(b), (site, metric)
