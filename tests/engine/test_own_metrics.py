"""Metrics that users bring as functions of the patched logits."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from engine_oracle import Patch as OraclePatch
from engine_oracle import TrueModel
from engine_tiny import hf_model, pairs, prompt_pairs, true_model, with_long_answers

import deltapatch as dp
from deltapatch.errors import DeltapatchError

TOLERANCE = {"fp32": 1e-5, "fp64": 1e-8}


def top_two(logits, base, pair):
    """How far apart the two likeliest tokens are."""
    two = logits.topk(2).values
    return two[:, 0] - two[:, 1]


def moved(logits, base, pair):
    """How far all logits are from the base run's."""
    return (logits - base).norm(dim=-1)


def first_of_pair(logits, base, pair):
    """The logit of the pair's first token."""
    return logits[:, pair.clean[0]]


OWN = [top_two, moved, first_of_pair]


def want_of(logits, base, pair):
    ordered = np.sort(logits, -1)
    return {
        "top_two": ordered[:, -1] - ordered[:, -2],
        "moved": np.linalg.norm(logits - base, axis=-1),
        "first_of_pair": logits[:, pair.clean[0]],
    }


def engine_of(variant, precision):
    return dp.from_transformers(hf_model(variant, torch.float64 if precision == "fp64" else torch.float32))


def truth(true: TrueModel, drawn, site):
    """name -> [pair, layer, position], NaN where there is none."""
    longest = max(len(p.clean) for p in drawn)
    out = {f.__name__: np.full((len(drawn), true.n_layers, longest), np.nan) for f in OWN}
    for i, pair in enumerate(drawn):
        rows = [[OraclePatch(site, l, t)] for l in range(true.n_layers) for t in range(len(pair.clean))]
        logits = true.patched(pair.corrupted, true.activations(pair.clean), rows, [])
        base = true.logits(pair.corrupted)[-1]
        for name, values in want_of(logits.reshape(len(rows), -1), base, pair).items():
            out[name][i, :, : len(pair.clean)] = values.reshape(true.n_layers, -1)
    return out


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("variant", ["neox-parallel", "llama-grouped", "gemma2", "gpt2"])
def test_what_functions_are_given(variant, precision):
    """Capped logits among them; pieces of the vocabulary and of rows are of any size."""
    true = true_model(variant)
    drawn = pairs(true, (5, 4))
    options = {"sites": "attn_out", "metrics": [*OWN, "kl"], "precision": precision}
    effects = dp.sweep(engine_of(variant, precision), prompt_pairs(drawn), **options)
    assert effects.metrics == ["kl", "top_two", "moved", "first_of_pair"]
    for name, right in truth(true, drawn, "attn_out").items():
        got = effects.values(name)
        assert np.array_equal(np.isnan(got), np.isnan(right))
        np.testing.assert_array_equal(got, effects.values(next(f for f in OWN if f.__name__ == name)))
        error = np.linalg.norm(np.nan_to_num(got - right)) / np.linalg.norm(np.nan_to_num(right))
        assert error < TOLERANCE[precision], name


def test_rows_come_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr("deltapatch.engine.wavefront.readout._CELLS_ON_CPU", 200)
    seen = []

    def counted(logits, base, pair):
        seen.append(len(logits))
        return logits[:, 0]

    drawn = pairs(true_model("llama-grouped"), (5, 4))
    engine = engine_of("llama-grouped", "fp32")
    effects = dp.sweep(engine, prompt_pairs(drawn), sites="z", metrics=counted, precision="fp32")
    assert max(seen) <= max(1, 200 // engine.spec.d_vocab)
    whole = dp.sweep(engine, prompt_pairs(drawn), sites="z", metrics=first_of_pair, precision="fp32")
    assert whole.values("first_of_pair").shape == effects.values("counted").shape
    assert np.isfinite(effects.values("counted")[0, :, -1]).all()


def test_what_cannot_reach_the_readout_is_as_the_base_run():
    """A patch behind the read-out, or in the last layer before it, moves nothing: not 0 but what is there."""
    true = true_model("llama-grouped")
    (pair,) = pairs(true, (5,))
    engine, last = engine_of("llama-grouped", "fp64"), true.n_layers - 1
    effects = dp.sweep(engine, prompt_pairs([pair]), sites="mlp_out", metrics=OWN, precision="fp64")
    want = want_of(true.logits(pair.corrupted)[None, -1], true.logits(pair.corrupted)[-1], pair)
    for name in ("top_two", "first_of_pair"):
        np.testing.assert_allclose(effects.values(name)[0, last, 0], want[name][0], rtol=1e-9)
    assert effects.values("moved")[0, last, 0] == 0


def test_answers_of_several_tokens_edges_and_wired_runs():
    true = true_model("llama-grouped")
    engine = engine_of("llama-grouped", "fp64")
    (pair,) = pairs(true, (5,))
    long = with_long_answers(true, pair, (3, 2), 1, seed=1)
    short = dp.sweep(engine, prompt_pairs([pair]), sites="mlp_out", metrics=OWN, precision="fp64")
    of_long = dp.sweep(engine, prompt_pairs([long]), sites="mlp_out", metrics=[*OWN, "ie"], precision="fp64")
    edges = dp.sweep_edges(engine, prompt_pairs([pair]), metrics=OWN, precision="fp64")
    into = dp.Intervention(0, [dp.Patch("mlp_out", 0, -1, into=["logits"])])
    wired = dp.run(engine, prompt_pairs([pair]), into, metrics=OWN, precision="fp64")
    same = dp.sweep_edges(engine, prompt_pairs([pair]), metrics=OWN, precision="fp64", positions=[-1])
    at = same.senders.index("m0"), same.receivers.index("logits")
    for name in ("top_two", "moved", "first_of_pair"):
        np.testing.assert_allclose(of_long.values(name), short.values(name), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(wired.values(name)[0], same.values(name)[(0, *at, 0)], rtol=1e-9)
        assert np.isfinite(edges.values(name)).any()


def test_runs_keep_them_and_tell_them_apart(tmp_path):
    engine = engine_of("llama-grouped", "fp32")
    drawn = prompt_pairs(pairs(true_model("llama-grouped"), (5, 4)))
    options = {"sites": "mlp_out", "metrics": [top_two, "logit_diff"], "precision": "fp32"}
    effects = dp.sweep(engine, drawn, out=tmp_path / "run", **options)
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["functions"]
    assert list(kept) == ["top_two"]
    assert re.fullmatch("[0-9a-f]{64}", kept["top_two"])
    back = dp.load_effects(tmp_path / "run")
    np.testing.assert_array_equal(back.values("top_two"), effects.values("top_two"))
    assert "top_two" in back.to_pandas("top_two").columns
    dp.sweep(engine, drawn, out=tmp_path / "run", resume=True, **options)

    def other():
        def top_two(logits, base, pair):
            return logits[:, 1]

        return top_two

    with pytest.raises(DeltapatchError, match="source of a metric"):
        dp.sweep(
            engine, drawn, out=tmp_path / "run", resume=True, **options | {"metrics": [other(), "logit_diff"]}
        )
    parts = tmp_path / "parts"
    for i in (1, 2):
        dp.sweep(engine, drawn, out=parts, shard=(i, 2), **options)


def test_another_process_reads_them(tmp_path):
    engine = engine_of("llama-grouped", "fp32")
    drawn = prompt_pairs(pairs(true_model("llama-grouped"), (5,)))
    run = tmp_path / "run"
    effects = dp.sweep(engine, drawn, sites="mlp_out", metrics=top_two, out=run, precision="fp32")
    code = (
        "import deltapatch, sys; e = deltapatch.load_effects(sys.argv[1]); "
        "print(e.metrics, e.values('top_two').sum())"
    )
    said = subprocess.check_output([sys.executable, "-c", code, str(run)], text=True).split("]")
    assert said[0] == "['top_two'"
    assert float(said[1]) == pytest.approx(effects.values("top_two").sum())


def test_a_function_needs_a_name():
    def function(logits, base, pair):
        return logits[:, 0]

    function.__name__ = "<lambda>"
    with pytest.raises(DeltapatchError, match="goes by its name, and '<lambda>' is none"):
        dp.sweep(engine_of("llama-grouped", "fp32"), dp.PromptPair([1, 2], [1, 3], 4, 5), metrics=function)


def test_names_that_are_taken():
    def ie(logits, base, pair):
        return logits[:, 0]

    pair = dp.PromptPair([1, 2], [1, 3], 4, 5)
    with pytest.raises(DeltapatchError, match="'ie' is taken"):
        dp.sweep(engine_of("llama-grouped", "fp32"), pair, metrics=[ie])
    with pytest.raises(DeltapatchError, match="two metrics are called 'top_two'"):
        dp.sweep(engine_of("llama-grouped", "fp32"), pair, metrics=[top_two, top_two])
    effects = dp.sweep(engine_of("llama-grouped", "fp32"), pair, sites="mlp_out", metrics=["ie"])
    with pytest.raises(DeltapatchError, match=re.escape("sweep again with metrics=[top_two]")):
        effects.values(top_two)


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda logits: logits, "of shape"),
        (lambda logits: logits.sum(), "must give a number for each row"),
        (lambda logits: logits[:, 0] / 0, "not finite"),
        (lambda logits: logits[:, 0] + 1j, "must give a number for each row"),
    ],
)
def test_what_it_gives_is_checked(gives, message):
    def wrong(logits, base, pair):
        return gives(logits)

    with pytest.raises(DeltapatchError, match=message):
        dp.sweep(engine_of("llama-grouped", "fp32"), dp.PromptPair([1, 2], [1, 3], 4, 5), metrics=wrong)
