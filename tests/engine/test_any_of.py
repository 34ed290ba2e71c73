"""Several answers that count as one: their probabilities add up. Against the oracle, by definition."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from engine_oracle import FLAGS, METRICS, Patch, TrueModel
from engine_tiny import VARIANTS, VOCAB, model_of, nearly_equal_tokens, pairs, true_model
from hypothesis import given, settings
from hypothesis import strategies as st

import deltapatch as dp
from deltapatch.analysis.attribution import attribute_edges
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.pairs_file import write_pairs
from deltapatch.tasks.answered import answered

TOLERANCE = {"fp32": 1e-5, "fp64": 1e-8}
SITES = ["resid_pre", "mlp_out", "z", "attn_out"]


def with_any(true, seed=0):
    """Pairs whose answers are sets: of both, of one beside a single token, and beside one of two tokens."""
    drawn = pairs(true, (5, 4, 5, 6), seed)
    rng = np.random.default_rng(seed)

    def tokens(n, beside):
        return tuple(rng.choice([t for t in range(VOCAB) if t not in beside], n, replace=False).tolist())

    out = []
    for i, pair in enumerate(drawn):
        clean, corrupted = pair.clean_answer, pair.corrupted_answer
        # The apt answers are among them, so that no metric divides by nearly nothing.
        several = (clean, *tokens((3, 9, 1, 2)[i], (clean, corrupted)))
        others = (corrupted, *tokens(4, (corrupted, *several)))
        out.append(pair._replace(clean_answer=several, corrupted_answer=(others, corrupted)[i % 2]))
    out[3] = out[3]._replace(corrupted_answer=[out[3].corrupted_answer, 3])
    return out


def given_pairs(drawn):
    def answer(value):
        return dp.AnyOf(list(value)) if isinstance(value, tuple) else value

    return [
        dp.PromptPair(
            **{
                **p._asdict(),
                "clean_answer": answer(p.clean_answer),
                "corrupted_answer": answer(p.corrupted_answer),
            }
        )
        for p in drawn
    ]


def assert_agrees(got, want, tolerance, where, metrics=METRICS):
    for metric in metrics:
        right = want[metric]
        error, scale = (np.linalg.norm(np.nan_to_num(x)) for x in (got(metric) - right, right))
        assert np.array_equal(np.isnan(got(metric)), np.isnan(right)), where
        twice = 2 if metric in ("ie", "dp_clean", "dp_corrupted", "prob_diff") else 1
        assert error <= (0 if metric in FLAGS else twice * tolerance * scale), f"{where}, {metric}: {error}"


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sweeps(variant, precision):
    """All variants, capped logits among them."""
    true = true_model(variant)
    drawn = with_any(true)
    for direction in ("denoise", "noise"):
        effects = dp.sweep(
            model_of(variant, precision),
            given_pairs(drawn),
            sites=SITES,
            direction=direction,
            precision=precision,
        )
        for site in SITES:
            want = true.sweep(drawn, site, direction=direction)
            assert_agrees(
                partial(effects.values, site=site),
                want,
                TOLERANCE[precision],
                f"{site} {direction}",
            )
    said = effects.reference.logp
    for i, pair in enumerate(drawn[:3]):
        logits = true.logits(pair.clean)[-1]
        p = np.exp(logits - np.logaddexp.reduce(logits))
        np.testing.assert_allclose(np.exp(said[i, 0, 0]), p[list(pair.clean_answer)].sum(), rtol=1e-5)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 1000), st.sampled_from(["neox-parallel", "llama-grouped", "gemma2"]))
def test_random_joint_patches(seed, variant):
    true = true_model(variant)
    drawn = with_any(true, seed)
    rng = np.random.default_rng(seed)
    joint = [
        [
            Patch(site, int(rng.integers(true.n_layers)), int(rng.integers(-4, 0)))
            for site in ("mlp_out", "attn_out")
        ]
        for _ in range(3)
    ]
    asked = [
        dp.Intervention(i, [dp.Patch(*patch) for patch in patches])
        for i in range(len(drawn))
        for patches in joint
    ]
    outcome = dp.run(model_of(variant, "fp64"), given_pairs(drawn), asked, precision="fp64")
    each = [true.effects(pair, joint) for pair in drawn]
    want = {m: np.concatenate([e[m] for e in each]) for m in METRICS}
    metrics = [m for m in METRICS if m != "recovered"]
    assert_agrees(outcome.values, want, 1e-8, f"{variant}, {drawn}", metrics)


@pytest.mark.filterwarnings("ignore:recovered is undefined")
@pytest.mark.parametrize("variant", ["neox-sequential", "llama-grouped", "gemma2"])
def test_tiny_effects(variant):
    hf, pair = nearly_equal_tokens(variant, 1e-6)
    pair = pair._replace(clean_answer=(30, 40, 7), corrupted_answer=(11, 5))
    effects = dp.sweep(dp.from_transformers(hf), given_pairs([pair]), sites=["mlp_out"], precision="fp32")
    want = TrueModel(hf, np.longdouble).sweep([pair], "mlp_out")
    assert 0 < np.abs(want["dlogp_clean"]).max() < 1e-4
    metrics = [m for m in METRICS if m != "recovered"]
    assert_agrees(partial(effects.values, site="mlp_out"), want, 1e-5, variant, metrics)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_one_is_the_answer_itself(precision):
    """Any of one is that one, and all of the vocabulary is certain."""
    engine, drawn = model_of("llama-grouped", precision), pairs(true_model("llama-grouped"))
    single = [dp.PromptPair(**p._asdict()) for p in drawn]
    one = [p._replace(clean_answer=(p.clean_answer,), corrupted_answer=(p.corrupted_answer,)) for p in drawn]
    options = {"sites": ["mlp_out"], "precision": precision}
    first, second = (dp.sweep(engine, p, **options) for p in (single, given_pairs(one)))
    for metric in METRICS:
        np.testing.assert_array_equal(*(e.values(metric, site="mlp_out") for e in (first, second)))
    everything = [p._replace(clean_answer=tuple(range(VOCAB))) for p in drawn]
    certain = dp.sweep(engine, given_pairs(everything), **options)
    np.testing.assert_allclose(np.nan_to_num(certain.values("dlogp_clean", site="mlp_out")), 0, atol=1e-6)
    assert np.nanmin(certain.values("says_clean", site="mlp_out")) == 1


def test_large_changes():
    """Where one token of an answer takes over from another, by a change that exp of a float cannot hold."""
    from deltapatch.kernels.answers import answer_change

    unembedding = torch.tensor([[500.0], [-500.0], [0.0], [1.0]])
    logits = torch.tensor([0.0, 900.0, 1.0, 2.0])
    dn = torch.tensor([[1.0], [-2.0], [1e-6]])
    tokens = torch.tensor([[0, 1, 2], [3, -1, -1]])
    _, moved = answer_change(dn, unembedding, tokens, logits, None)
    got = moved.whole.numpy()
    moved = logits.double() + dn.double() @ unembedding.double().T
    for i, some in enumerate(([0, 1, 2], [3])):
        want = moved[:, some].logsumexp(-1) - logits[some].double().logsumexp(-1)
        np.testing.assert_allclose(got[:, i], want, rtol=1e-5)


def test_edges_and_estimates():
    """Edges read the same; estimates by gradients are of the same logit difference."""
    true = true_model("llama-grouped")
    engine, drawn = model_of("llama-grouped", "fp64"), with_any(true)[:3]
    edges = dp.sweep_edges(engine, given_pairs(drawn), precision="fp64").values("logit_diff")
    estimates = attribute_edges(engine, given_pairs(drawn))
    there = np.isfinite(edges)
    assert np.corrcoef(edges[there], estimates[there])[0, 1] > 0.5
    small, near = nearly_equal_tokens("llama-grouped", 1e-5)
    near = near._replace(clean_answer=(30, 40, 7), corrupted_answer=(11, 5))
    close = dp.from_transformers(small.double())
    exact = dp.sweep_edges(close, given_pairs([near]), precision="fp64").values("logit_diff")
    there = np.isfinite(exact)
    got = attribute_edges(close, given_pairs([near]))
    error = np.linalg.norm((got - exact)[there])
    assert error < 1e-3 * np.linalg.norm(exact[there])


def test_runs_and_files_keep_them(tmp_path):
    engine = model_of("llama-grouped")
    drawn = given_pairs(with_any(true_model("llama-grouped")))
    write_pairs(tmp_path / "pairs.jsonl", drawn)
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert lines[0]["clean_answer"] == {"any": list(drawn[0].clean_answer.any)}
    again = dp.load_pairs(tmp_path / "pairs.jsonl")
    assert encode_pairs(again, None, VOCAB) == encode_pairs(drawn, None, VOCAB)
    effects = dp.sweep(engine, str(tmp_path / "pairs.jsonl"), sites="mlp_out", out=tmp_path / "run")
    back = dp.load_effects(tmp_path / "run")
    assert back.pairs == effects.pairs
    assert back.pairs[0].clean_others == list(drawn[0].clean_answer.any)[1:]
    assert " | " in back.pairs[0].clean_answer_text
    by_dictionary = dp.sweep(engine, lines, sites="mlp_out")
    np.testing.assert_array_equal(by_dictionary.values("ie"), effects.values("ie"))


def test_the_filter_takes_any(tmp_path):
    engine, true = model_of("llama-grouped"), true_model("llama-grouped")
    (pair,) = pairs(true, (5,))
    best = [int(true.logits(prompt)[-1].argmax()) for prompt in (pair.clean, pair.corrupted)]
    other = next(t for t in range(VOCAB) if t not in best)
    right = dp.PromptPair(pair.clean, pair.corrupted, dp.AnyOf([other, best[0]]), other)
    assert answered(engine, [right]).tolist() == [[True, False]]
    assert answered(engine, [right], "answers")[0, 0]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ((dp.AnyOf([]), 3), "give a list of them"),
        ((dp.AnyOf("yes"), 3), "give a list of them, not 'yes'"),
        ((dp.AnyOf(7), 3), "give a list of them, not 7"),
        ((dp.AnyOf([5, 6, 5]), 3), "5 is there twice"),
        ((dp.AnyOf([5, [6, 7]]), 3), "has 2 tokens: each must be one token"),
        ((dp.AnyOf([5, VOCAB]), 3), "out of range"),
        ((dp.AnyOf([5, 6]), [6, 3]), "its first is one of the other answer's"),
        (([6, 3], dp.AnyOf([5, 6])), "its first is one of the other answer's"),
    ],
)
def test_what_is_refused(answers, message):
    with pytest.raises(DeltapatchError, match=re.escape(message)):
        dp.sweep(model_of("llama-grouped"), dp.PromptPair([1, 2], [1, 3], *answers), sites="mlp_out")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ('{"any": "yes"}', "must be any of several answers"),
        ('{"all": [1]}', "must be any of several answers"),
        ('{"any": [1], "more": 2}', "must be any of several answers"),
        ('{"any": [1, [2]]}', "must be text or a token id"),
    ],
)
def test_what_files_are_refused(tmp_path, answer, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{{"clean": [1], "corrupted": [2], "clean_answer": {answer}, "corrupted_answer": 4}}\n')
    with pytest.raises(DeltapatchError, match=re.escape(message)) as error:
        dp.load_pairs(path)
    assert "line 1" in str(error.value)
