"""Answers of several tokens, from pairs to plots: a model whose tokenizer splits numbers into digits."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import deltapatch

SCRIPT = Path(__file__).parents[2] / "scripts" / "builtin_tokenizer.py"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A tiny LLaMA with one token a digit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = importlib.util.spec_from_file_location("builtin_tokenizer", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    tokenizer = script.build_tokenizer(200, bos=True, digits=True)
    folder = tmp_path_factory.mktemp("models") / "digits"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(command, digits, tmp_path) -> Path:
    made = command(
        *("pairs", "--task", "arithmetic", "--model", digits, "--answers", "text", "--operators", "+*"),
        *(
            "--max-number",
            300,
            "--per-template",
            3,
            "--shots",
            0,
            "--out",
            tmp_path / "pairs.jsonl",
            "--json",
        ),
    )
    assert made.code == 0, made.err
    assert "limited" not in made.err
    assert json.loads(made.out)["pairs"] == 36
    return tmp_path / "pairs.jsonl"


def logp(hf, prompt, answer):
    """log P(answer | prompt), by the model itself."""
    with torch.no_grad():
        logits = hf(torch.tensor([[*prompt, *answer[:-1]]])).logits[0].double()
    told = logits.log_softmax(-1)[len(prompt) - 1 :]
    return float(told[range(len(answer)), answer].sum())


def test_the_whole_path(command, digits, pairs, tmp_path):
    from transformers import LlamaForCausalLM

    results = [json.loads(line)["meta"]["clean_fact"][2] for line in pairs.read_text().splitlines()]
    assert min(results) < 100 < max(results)
    run = tmp_path / "run"
    swept = command("sweep", "--model", digits, "--pairs", pairs, "--sites", "resid_pre,mlp_post",
                    "--positions", "op1,last", "--layers", 0, "--out", run, "--json")  # fmt: skip
    assert swept.code == 0, swept.err
    assert "answers have up to 3 tokens: effects are of the probability of whole answers" in swept.err
    assert json.loads(swept.out)["answer_tokens"] == 3
    effects = deltapatch.load_effects(run)
    assert [len(p.clean_answer) for p in effects.pairs] == [len(str(result)) for result in results]

    # A token's embedding patched in is that token in its place.
    hf = LlamaForCausalLM.from_pretrained(digits)
    for number in (0, 7, 20, 35):
        pair = effects.pairs[number]
        patched = list(pair.corrupted)
        patched[pair.labels["op1"]] = pair.clean[pair.labels["op1"]]
        for name, answer in (("clean", pair.clean_answer), ("corrupted", pair.corrupted_answer)):
            want = logp(hf, patched, answer) - logp(hf, pair.corrupted, answer)
            assert effects.values(f"dlogp_{name}", "resid_pre")[number, 0, 0] == pytest.approx(want, abs=1e-4)

    shown = command("effects", run, "--site", "mlp_post", "--metric", "says_clean", "--top", 3)
    assert shown.code == 0, shown.err
    drawn = command("plot", run, "--out", tmp_path / "figures")
    assert drawn.code == 0, drawn.err
    assert list((tmp_path / "figures").glob("*.png"))


def test_one_token_is_what_pairs_have_unless_asked(command, digits, tmp_path):
    made = command("pairs", "--model", digits, "--operators", "+", "--per-template", 2, "--shots", 0,
                   "--out", tmp_path / "pairs.jsonl")  # fmt: skip
    assert made.code == 0, made.err
    assert "limited to 1..9" in made.err
    assert "Answers of any length, as text, have all results." in made.err
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
    results = [json.loads(line)["meta"]["clean_fact"][2] for line in lines]
    assert max(results) <= 9
    swept = command("sweep", "--model", digits, "--pairs", tmp_path / "pairs.jsonl", "--positions", "last",
                    "--out", tmp_path / "run")  # fmt: skip
    assert swept.code == 0
    assert "whole answers" not in swept.err


def test_ids_are_the_same_answers(command, digits, pairs, tmp_path):
    args = ("--model", digits, "--operators", "+*", "--max-number", 300, "--per-template", 3, "--shots", 0)
    made = command("pairs", *args, "--answers", "ids", "--out", tmp_path / "ids.jsonl")
    assert made.code == 0, made.err
    swept = []
    for path in (pairs, tmp_path / "ids.jsonl"):
        options = ("--model", digits, "--pairs", path, "--positions", "last", "--sites", "attn_out")
        assert command("sweep", *options, "--out", path.with_suffix("")).code == 0
        swept.append(deltapatch.load_effects(path.with_suffix("")))
    assert swept[0].pairs == swept[1].pairs
    assert np.array_equal(swept[0].values("ie"), swept[1].values("ie"))


def test_only_correct_keeps_whole_answers_that_are_right(command, digits, pairs, tmp_path):
    refused = command("pairs", "--model", digits, "--answers", "text", "--per-template", 2, "--shots", 0,
                      "--only-correct", "--out", tmp_path / "right.jsonl")  # fmt: skip
    assert refused.code == 2
    assert "answers both prompts of no pair right" in refused.err  # it was never taught
    assert not (tmp_path / "right.jsonl").exists()
