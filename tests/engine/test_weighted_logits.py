"""Weighted sums of logits as a metric, against the oracle's own logits."""

import json
import re

import numpy as np
import pytest
import torch
from engine_oracle import Patch, TrueModel
from engine_tiny import VARIANTS, VOCAB, hf_model, nearly_equal_tokens, pairs, true_model, with_long_answers

import deltapatch as dp
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.pairs_file import write_pairs

TOLERANCE = {"fp32": 1e-5, "fp64": 1e-8}
METRIC = "weighted_logits"


def engine_of(variant, precision="fp32"):
    return dp.from_transformers(hf_model(variant, torch.float64 if precision == "fp64" else torch.float32))


def weighted(drawn):
    """Pairs with weights of their own, of 1 to 4 tokens, as a mapping or a list."""
    rng = np.random.default_rng()
    out = []
    for i, pair in enumerate(drawn):
        tokens = rng.choice(VOCAB, 1 + i % 4, replace=False).tolist()
        weights = list(zip(tokens, rng.normal(size=len(tokens)).tolist(), strict=True))
        out.append(dp.PromptPair(**pair._asdict(), weights=dict(weights) if i % 2 else weights))
    return out


def want(true, pair, rows, direction="denoise"):
    """[row], patched minus base."""
    base, source = (pair.corrupted, pair.clean)[:: 1 if direction == "denoise" else -1]
    tokens, weights = zip(*dict(pair.weights).items(), strict=True)
    logits = true.patched(base, true.activations(source), rows, []).reshape(len(rows), -1)
    return (logits - true.logits(base)[-1])[:, list(tokens)] @ np.array(weights)


def agrees(got, right, tolerance, where):
    assert np.linalg.norm(got - right) <= tolerance * np.linalg.norm(right), where


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sweeps_and_joint_patches(variant, precision):
    true, model = true_model(variant), engine_of(variant, precision)
    given = weighted(pairs(true, (5, 4, 6)))
    options = {"metrics": [METRIC, "kl"], "precision": precision}
    for direction in ("denoise", "noise"):
        effects = dp.sweep(model, given, sites=["mlp_out"], direction=direction, **options)
        assert effects.metrics == ["kl", METRIC]
        got = effects.values(METRIC)
        joint = [[Patch("attn_out", 0, t), Patch("mlp_out", 1, -1)] for t in (-3, -2, -1)]
        asked = [
            dp.Intervention(i, [dp.Patch(*p) for p in patches])
            for i in range(len(given))
            for patches in joint
        ]
        both = dp.run(model, given, asked, direction=direction, **options).values(METRIC)
        right = np.concatenate([want(true, pair, joint, direction) for pair in given])
        agrees(both, right, TOLERANCE[precision], (variant, direction, given))
        one_by_one, right = [], []
        for i, pair in enumerate(given):
            n = len(pair.clean)
            rows = [[Patch("mlp_out", l, t)] for l in range(true.n_layers) for t in range(n)]
            one_by_one.append(got[i, :, :n].ravel())
            right.append(want(true, pair, rows, direction))
            agrees(one_by_one[-1], right[-1], 5 * TOLERANCE[precision], (variant, direction, pair))
            assert np.isnan(got[i, :, n:]).all()
            assert (got[i, -1, : n - 1] == 0).all()  # behind which nothing is read
        # Of all pairs together: the weights of one may all but cancel.
        found = np.concatenate(one_by_one), np.concatenate(right)
        agrees(*found, TOLERANCE[precision], (variant, direction, given))


@pytest.mark.parametrize("variant", ["llama-grouped", "gemma2"])
def test_tiny_effects_and_what_columns_have_in_common(variant):
    """Of prompts that hardly differ, and weights that add up to 0."""
    hf, drawn = nearly_equal_tokens(variant, 1e-6)
    pair = dp.PromptPair(**drawn._asdict(), weights={3: 1000, 9: -500, 17: -500.0})
    effects = dp.sweep(dp.from_transformers(hf), pair, sites="mlp_out", metrics=METRIC, precision="fp32")
    true = TrueModel(hf, np.longdouble)
    rows = [[Patch("mlp_out", l, t)] for l in range(true.n_layers) for t in range(len(pair.clean))]
    agrees(effects.values(METRIC).ravel(), want(true, pair, rows).astype(float), 1e-5, variant)


def test_the_difference_of_two_logits_wherever_they_are_read():
    """With answers of several tokens, edges, and patches that some receivers alone see."""
    true, model = true_model("gemma2"), engine_of("gemma2", "fp64")
    (drawn,) = pairs(true, (5,))
    two = {drawn.clean_answer: 1, drawn.corrupted_answer: -1}
    pair = dp.PromptPair(**drawn._asdict(), weights=two)
    long = dp.PromptPair(**with_long_answers(true, drawn, (3, 2), 1, seed=1)._asdict(), weights=two)
    options = {"metrics": [METRIC, "logit_diff"], "precision": "fp64"}
    effects = dp.sweep(model, pair, sites="z", **options)
    of_long = dp.sweep(model, long, sites="z", **options)
    edges = dp.sweep_edges(model, pair, **options)
    into = dp.Intervention(0, [dp.Patch("mlp_out", 0, -1, into=["logits"])])
    wired = dp.run(model, pair, into, **options)
    for found in (effects, edges, wired):
        np.testing.assert_allclose(found.values(METRIC), found.values("logit_diff"), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(of_long.values(METRIC), effects.values(METRIC), rtol=1e-9, atol=1e-12)


def test_files_and_runs_keep_them(tmp_path):
    model, drawn = engine_of("llama-grouped"), pairs(true_model("llama-grouped"), (5, 4))
    given = weighted(drawn)
    write_pairs(tmp_path / "pairs.jsonl", given)
    assert encode_pairs(dp.load_pairs(tmp_path / "pairs.jsonl"), None, VOCAB) == encode_pairs(
        given, None, VOCAB
    )
    options = {"sites": "mlp_out", "metrics": ["all", METRIC], "out": tmp_path / "run"}
    effects = dp.sweep(model, tmp_path / "pairs.jsonl", **options)
    back = dp.load_effects(tmp_path / "run")
    assert back.pairs == effects.pairs
    assert METRIC in back.metrics
    np.testing.assert_array_equal(back.values(METRIC), effects.values(METRIC))
    dp.sweep(model, given, **options, resume=True)
    with pytest.raises(DeltapatchError, match="pairs"):
        dp.sweep(model, weighted(drawn), **options, resume=True)
    without = [dp.PromptPair(**pair._asdict()) for pair in drawn]
    assert METRIC not in dp.sweep(model, without, sites="mlp_out").metrics


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "pair 0 has no weights, which the metric weighted_logits needs"),
        ({}, "weights must be of tokens"),
        ([5, 6], "weights must be of tokens"),
        ({5: float("nan")}, "the weight of 5 must be a finite number, not nan"),
        ({5: "1"}, "the weight of 5 must be a finite number, not '1'"),
        ({5: True}, "the weight of 5 must be a finite number"),
        ({VOCAB: 1}, f"token {VOCAB} of weights is out of range"),
        ({(5, 6): 1}, "weights are of one token each, and (5, 6) has 2"),
        ([(5, 1), (6, 1), (5, 2)], "weights have the token '5' twice"),
        ({" yes": 1}, "no tokenizer"),
    ],
)
def test_what_is_refused(weights, message):
    pair = dp.PromptPair([1, 2], [1, 3], 4, 5, weights=weights)
    with pytest.raises(DeltapatchError, match=re.escape(message)):
        dp.sweep(engine_of("llama-grouped"), pair, sites="mlp_out", metrics=METRIC)


def test_a_file_names_the_line(tmp_path):
    pair = {"clean": [1], "corrupted": [2], "clean_answer": 3, "corrupted_answer": 4}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair) + "\n" + json.dumps(pair | {"weights": {"a": None}}) + "\n")
    with pytest.raises(DeltapatchError, match=r"line 2: the weight of 'a' must be a finite number, not None"):
        dp.load_pairs(path)


def test_a_metric_cannot_be_called_so():
    def weighted_logits(logits, base, pair):
        return logits[:, 0]

    with pytest.raises(DeltapatchError, match="'weighted_logits' is taken"):
        dp.sweep(engine_of("llama-grouped"), dp.PromptPair([1, 2], [1, 3], 4, 5), metrics=weighted_logits)
