"""Precisions on the built-in trained models: products narrower than float64 against those in float64."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

import deltapatch
from deltapatch.models.builtin_models import STUDY_MODELS
from deltapatch.tasks import make_pairs

BUILTIN = Path(deltapatch.__file__).parent / "models" / "builtin"
MODELS = [
    pytest.param(name, marks=[pytest.mark.slow] if name.endswith("-study") else [])
    for name in sorted(f.parent.name for f in BUILTIN.glob("*/model.safetensors"))
]
SWEEPS = {"mlp_out": "all", "attn_out": "all", "mlp_post": "last"}  # site -> positions
METRICS = (
    "ie",
    "logit_diff",
    "recovered",
    "dlogp_clean",
    "dlogp_corrupted",
    "dp_clean",
    "dp_corrupted",
    "kl",
)
# Exponentials of log-probabilities: a relative error of the exponent comes out multiplied by the exponent,
# and a few huge effects carry the norm.
EXPONENTIAL = ("ie", "dp_clean", "dp_corrupted")
# An answer that is all but certain, or all but impossible, hardly moves almost everywhere, in an order that
# bfloat16 cannot keep: ranks of these correlate by 0.983 and more, those of the other metrics by 0.9995.
ONE_ANSWER = ("dlogp_clean", "dlogp_corrupted", "dp_clean", "dp_corrupted")


@cache
def effects(model, precision):
    loaded = deltapatch.load_model(BUILTIN / model)
    pairs, _ = make_pairs("arithmetic", loaded.tokenizer, per_template=1, shots=0, seed=0, max_number=100)
    pairs = pairs[::3]  # two templates of each operator
    options = {"precision": precision, "progress": False}
    everywhere = deltapatch.sweep(loaded, pairs, "mlp_out,attn_out", **options)
    neurons = deltapatch.sweep(loaded, pairs, "mlp_post", positions="last", **options)
    return {"mlp_out": everywhere, "attn_out": everywhere, "mlp_post": neurons}


def both(model, precision, site, metric):
    """Effects in a precision and in float64, as long as there is such a position."""
    got, right = (effects(model, p)[site].values(metric, site=site) for p in (precision, "fp64"))
    exists = ~np.isnan(right)
    assert np.array_equal(exists, ~np.isnan(got))
    assert np.linalg.norm(right[exists]) > 0
    return got[exists], right[exists]


def relative_error(got, right):
    return np.linalg.norm(got - right) / np.linalg.norm(right)


def rank_correlation(a, b):
    """Spearman's, of the effects that are not exactly zero."""
    there = b != 0
    ranks = [x[there].argsort().argsort() for x in (a, b)]
    return np.corrcoef(*ranks)[0, 1]


# What the README promises: of logit_diff and recovered, of the exponential metrics, and of all others.
BOUNDS = {
    "fp32": (1e-5, 1e-5, 1e-5),
    "tf32": (5e-4, 3e-3, 1e-3),
    "fp16": (5e-4, 3e-3, 1e-3),
    "bf16": (5e-3, 5e-2, 1e-2),
    "fp8": (5e-2, 2e-1, 1e-1),
}
RANKS = {  # correlation of ranks: of the metrics of one answer, and of the others
    "fp32": (0.9999, 0.9999),
    "tf32": (0.999, 0.999),
    "fp16": (0.999, 0.999),
    "bf16": (0.98, 0.999),
    "fp8": (0.8, 0.98),
}
# The study models are surer, and answer several kinds of questions: more effects are all but nothing.
STUDY_RANKS = {"bf16": (0.98, 0.997)}


@pytest.mark.parametrize("site", SWEEPS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", BOUNDS)
def test_effects_stay_within_the_bounds_of_their_precision(precision, model, site):
    of_logits, exponential, others = BOUNDS[precision]
    for metric in METRICS:
        got, right = both(model, precision, site, metric)
        bound = exponential if metric in EXPONENTIAL else others
        if metric in ("logit_diff", "recovered"):
            bound = of_logits
        error, ranks = relative_error(got, right), rank_correlation(got, right)
        assert error <= bound, f"{metric}: {error:.1e}"
        of_one, of_two = (STUDY_RANKS if model in STUDY_MODELS else {}).get(precision, RANKS[precision])
        assert ranks >= (of_one if metric in ONE_ANSWER else of_two), f"{metric}: {ranks:.5f}"
        if precision == "fp32":
            assert np.array_equal(got == 0, right == 0), metric


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_finds_the_same_neurons(model):
    """Of each pair, the fifty with the largest indirect effects."""
    got, right = (effects(model, p)["mlp_post"].values("ie") for p in ("bf16", "fp64"))
    for pair in range(len(right)):
        top = [set(np.abs(x[pair]).ravel().argsort()[-50:].tolist()) for x in (got, right)]
        assert len(top[0] & top[1]) >= 48, f"pair {pair}"


def test_every_shipped_model_is_tested():
    assert MODELS, "no built-in model was found"
