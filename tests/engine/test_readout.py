"""The end of a pass: the same numbers whatever is held at a time, and however the unembedding is stored."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_tiny import hf_model, pairs, true_model

import deltapatch
from deltapatch.engine.wavefront import readout
from deltapatch.results.metrics import MEASURED

OPTIONS = {"sites": ["mlp_out", "k"], "progress": False}


def given(variant, lengths=(5, 3, 5, 4, 5)):
    """Pairs; the answers of every other one have several tokens."""
    drawn = [deltapatch.PromptPair(*pair) for pair in pairs(true_model(variant), lengths)]
    drawn[::2] = [replace(pair, clean_answer=[4, 2, 7], corrupted_answer=[4, 3, 1]) for pair in drawn[::2]]
    return drawn


def assert_close(one, other, bound=1e-5):
    for site in OPTIONS["sites"]:
        for name in MEASURED:
            a, b = (np.nan_to_num(e.values(name, site)) for e in (one, other))
            assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b), (site, name)
    for name in ("logit", "logp", "prediction"):
        assert np.allclose(getattr(one.reference, name), getattr(other.reference, name), atol=1e-5)


@pytest.mark.parametrize("source", ["counterpart", "resample", "mean"])
@pytest.mark.parametrize("held", [1, 2, 3])
def test_distributions_of_some_reads_at_a_time(source, held, monkeypatch):
    model, drawn = deltapatch.from_transformers(hf_model("gptj")), given("gptj", (5, 3, 5, 3, 5))
    whole = deltapatch.sweep(model, drawn, source=source, **OPTIONS)
    monkeypatch.setattr(readout, "reads_held", lambda *args: held)
    assert_close(deltapatch.sweep(model, drawn, source=source, **OPTIONS), whole)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16", "fp8", "fp64"])
def test_an_unembedding_that_is_narrowed_piece_by_piece(precision, monkeypatch):
    model, drawn = deltapatch.from_transformers(hf_model("llama-grouped", torch.bfloat16)), given("llama")
    options = OPTIONS | {"precision": precision, "noise_sample": 0}
    whole = deltapatch.sweep(model, drawn, **options)
    monkeypatch.setattr(model, "stream", True)
    pieces = deltapatch.sweep(model, drawn, **options)
    for site in OPTIONS["sites"]:
        for name in MEASURED:
            assert np.array_equal(pieces.values(name, site), whole.values(name, site), equal_nan=True)
