"""Precisions against float64: on the built-in trained models, and where attention's scores are large."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_oracle import TrueModel
from engine_tiny import VOCAB, build
from engine_tiny import pairs as drawn_pairs
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import deltapatch
from deltapatch.models.builtin_models import STUDY_MODELS
from deltapatch.models.patched import patched_logits
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
EXPONENTIAL = ("ie", "dp_clean", "dp_corrupted", "prob_diff")
# An answer that is all but certain, or all but impossible, hardly moves almost everywhere, in an order that
# bfloat16 cannot keep: ranks of these correlate by 0.983 and more, those of the other metrics by 0.9995.
ONE_ANSWER = ("dlogp_clean", "dlogp_corrupted", "dp_clean", "dp_corrupted")


@cache
def effects(model, precision):
    loaded = deltapatch.load_model(BUILTIN / model)
    pairs, _ = make_pairs("arithmetic", loaded.tokenizer, per_template=1, shots=0, seed=0, max_number=100)
    pairs = pairs[::3]  # two templates of each operator
    options = {"precision": precision, "progress": False}
    everywhere = deltapatch.sweep(loaded, pairs, sites="mlp_out,attn_out", **options)
    neurons = deltapatch.sweep(loaded, pairs, sites="mlp_post", positions="last", **options)
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
    # The entropy hardly moves where one certain answer gives way to another: its error is that of the logits.
    got, right = both(model, precision, site, "entropy")
    assert np.linalg.norm(got - right) <= others * np.linalg.norm(both(model, precision, site, "kl")[1])


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_finds_the_same_neurons(model):
    """Of each pair, the fifty with the largest indirect effects."""
    got, right = (effects(model, p)["mlp_post"].values("ie") for p in ("bf16", "fp64"))
    for pair in range(len(right)):
        top = [set(np.abs(x[pair]).ravel().argsort()[-50:].tolist()) for x in (got, right)]
        assert len(top[0] & top[1]) >= 48, f"pair {pair}"


def test_every_shipped_model_is_tested():
    assert MODELS, "no built-in model was found"


# Large scores of attention ----------------------------------------------------------------------------------

SCORED = ("mlp_out", "attn_out", "z", "q", "k", "v")


def with_large_scores(variant, factor):
    """A random model whose query and key weights are so many times as large."""
    hf = build(variant)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "query_key_value" in name:
                weight.view(hf.config.num_attention_heads, 3, -1)[:, :2].mul_(factor)
            elif "q_proj" in name or "k_proj" in name:
                weight.mul_(factor)
    return hf


def with_wide_heads():
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    hf, generator = GPTNeoXForCausalLM(config).eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            noise = 0.3 * torch.randn(weight.shape, generator=generator)
            weight.copy_(noise + ("norm" in name and name.endswith("weight")))
    return hf


def largest_score(model, pairs):
    """What no score exceeds: the norms of a query and a key, which rotary leaves as they are."""
    largest = {}

    def visit(site, layer, value):  # [row, T, head, d_head]
        if site in ("q", "k"):
            norm = float(value.norm(dim=-1).max())
            largest[site, layer] = max(norm, largest.get((site, layer), 0.0))

    for prompt in (prompt for pair in pairs for prompt in (pair.clean, pair.corrupted)):
        patched_logits(model, torch.tensor([prompt]), visit)
    layers = range(model.spec.n_layers)
    return max(largest["q", l] * largest["k", l] for l in layers) / model.spec.d_head**0.5


@pytest.mark.parametrize(
    ("hf", "scores", "saturated"),
    [
        *((lambda v=v: with_large_scores(v, 30), 2e3, False) for v in ("neox-parallel", "gptj", "llama")),
        *((lambda v=v: with_large_scores(v, 1e4), 2e8, True) for v in ("neox-parallel", "gptj", "llama")),
        (with_wide_heads, 100, False),
    ],
)
def test_large_scores_of_attention_stay_within_their_bound(hf, scores, saturated):
    hf = hf()
    given = [deltapatch.PromptPair(*pair) for pair in drawn_pairs(TrueModel(hf), (5, 7))]
    model = deltapatch.from_transformers(hf)
    largest = largest_score(model, given)
    assert largest > scores
    bound = 1e-5 if saturated else max(1e-5, 5e-7 * largest)
    options = {"metrics": "logit_diff", "progress": False, "noise_sample": 0}
    got, want = (
        deltapatch.sweep(model, given, sites=SCORED, precision=p, **options) for p in ("fp32", "fp64")
    )
    for site in SCORED:
        found, true = (e.values("logit_diff", site) for e in (got, want))
        there = ~np.isnan(true)
        assert np.linalg.norm((found - true)[there]) <= bound * np.linalg.norm(true[there]), site
