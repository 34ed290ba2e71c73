"""The models that ship: files, tokenizers, and the accuracy that their cards claim."""

import json
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.encode import encode_pairs
from deltapatch.models import builtin_models
from deltapatch.models.builtin_models import (
    ARITHMETIC_MODELS,
    AUTOENCODERS,
    BUILTIN_MODELS,
    builtin_model_path,
)
from deltapatch.tasks.arithmetic import arithmetic_pairs
from deltapatch.tasks.split import is_held_out
from deltapatch.tasks.templates import OPERATORS, facts

each_model = pytest.mark.parametrize("name", ARITHMETIC_MODELS)


@cache
def load(name: str) -> tuple[Any, Any]:
    folder = builtin_model_path(name)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@cache
def metrics(name: str) -> dict[str, Any]:
    return json.loads((builtin_model_path(name) / "metrics.json").read_text())


@torch.no_grad()
def predictions(model: Any, prompts: list[Any]) -> list[int]:
    """The argmax of the last position; prompts of any lengths."""
    found = [0] * len(prompts)
    for length in {len(p) for p in prompts}:
        chosen = [i for i, p in enumerate(prompts) if len(p) == length]
        for part in torch.tensor(chosen).split(512):
            tokens = torch.tensor([list(prompts[i]) for i in part])
            best = model(tokens, logits_to_keep=1).logits[:, -1].argmax(-1)
            for i, token in zip(part.tolist(), best.tolist(), strict=True):
                found[i] = token
    return found


@pytest.mark.parametrize("name", BUILTIN_MODELS)
def test_small_and_complete(name: str) -> None:
    folder = builtin_model_path(name)
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    assert {p.name for p in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "metrics.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    model, tokenizer = load(name)
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == metrics(name)["parameters"] <= 1_000_000
    assert len(tokenizer) == model.config.vocab_size


def test_nothing_else_is_in_the_folder() -> None:
    shipped = Path(builtin_models.__file__).parent / "builtin"
    assert {p.name for p in shipped.iterdir()} == {*BUILTIN_MODELS, *AUTOENCODERS}


@each_model
def test_every_template_round_trips(name: str) -> None:
    _, tokenizer = load(name)
    for operator in OPERATORS.values():
        for template in operator.templates:
            question = template.format(x=137, y=8)
            text = f"{question} 45\n{question}"
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            words = question.replace("?", " ?").replace(":", " :").split()
            assert len(ids) == 2 * len(words) + 2 + name.startswith("llama")
    other = "Überall 1234 — «naïve»\t\n  x"
    assert tokenizer.decode(tokenizer(other)["input_ids"], skip_special_tokens=True) == other


@each_model
def test_numbers_are_single_tokens(name: str) -> None:
    _, tokenizer = load(name)
    top = metrics(name)["recipe"]["max_number"]
    for n in range(top + 1):
        for text in (f"{n}", f" {n}"):
            (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode([token]) == text
    assert len(tokenizer(f" {top + 1}", add_special_tokens=False)["input_ids"]) > 1


@each_model
@pytest.mark.parametrize("template", [3, 5])
def test_held_out_accuracy_is_what_the_card_says(name: str, template: int) -> None:
    model, tokenizer = load(name)
    for symbol, operator in OPERATORS.items():
        table = facts(symbol, metrics(name)["recipe"]["max_number"])
        held = [(x, y, r) for x, y, r in table if is_held_out(symbol, x, y)]
        texts = [operator.templates[template].format(x=x, y=y) for x, y, _ in held]
        found = predictions(model, tokenizer(texts)["input_ids"])
        right = sum(
            f == tokenizer.convert_tokens_to_ids(f"Ġ{r}") for f, (_, _, r) in zip(found, held, strict=True)
        )
        claimed, asked = metrics(name)["held_out_0_shot"][symbol][template]
        assert len(held) == asked
        assert abs(right - claimed) <= 2  # a near tie may fall otherwise on another processor


@each_model
def test_the_card_shows_the_metrics(name: str) -> None:
    card = (builtin_model_path(name) / "README.md").read_text()
    for symbol, counts in metrics(name)["held_out_0_shot"].items():
        percent = 100 * sum(right for right, _ in counts) / sum(asked for _, asked in counts)
        assert f"| {symbol} | {percent:.2f} | " in card


@each_model
@pytest.mark.parametrize("shots", [0, 1, 2])
def test_pairs_are_answered(name: str, shots: int) -> None:
    model, tokenizer = load(name)
    pairs, _ = arithmetic_pairs(tokenizer, per_template=8, shots=shots)
    encoded = encode_pairs(pairs, tokenizer, len(tokenizer))
    found = predictions(model, [e.clean for e in encoded] + [e.corrupted for e in encoded])
    answers = [e.clean_answer for e in encoded] + [e.corrupted_answer for e in encoded]
    assert sum([f] == a for f, a in zip(found, answers, strict=True)) / len(found) > 0.95


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert builtin_model_path() == builtin_model_path("gpt_neox") == builtin_model_path("gpt-neox-arithmetic")
    with pytest.raises(DeltapatchError, match="no built-in model 'gpt2'; the built-in models are gpt-neox"):
        builtin_model_path("gpt2")
    monkeypatch.setattr(builtin_models, "__file__", str(tmp_path / "builtin_models.py"))
    with pytest.raises(DeltapatchError, match=r"'llama-arithmetic' is not at .*--only llama-arithmetic"):
        builtin_model_path("llama")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The training script, as a module."""
    scripts = str(Path(__file__).parents[2] / "scripts")
    sys.path.insert(0, scripts)  # as Python does for the script that it runs
    try:
        yield import_module("train_builtin_models")
    finally:
        sys.path.remove(scripts)


@pytest.mark.slow
@each_model
def test_the_script_trains_every_model(script: ModuleType, name: str, tmp_path: Path) -> None:
    trains(script, name, tmp_path)


def test_the_script_trains(script: ModuleType, tmp_path: Path) -> None:
    trains(script, "gptj-arithmetic", tmp_path)


def trains(script: ModuleType, name: str, tmp_path: Path) -> None:
    script.train(name, script.Recipe(steps=3, soft_steps=2, max_number=12, warmup=1), tmp_path / name)
    assert {p.name for p in tmp_path.iterdir()} == {name}
    assert {p.name for p in (tmp_path / name).iterdir()} == {
        p.name for p in builtin_model_path(name).iterdir()
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
    assert model.config.architectures == load(name)[0].config.architectures
    assert "| + | " in (tmp_path / name / "README.md").read_text()


@pytest.mark.slow
def test_the_same_seed_trains_the_same_model(script: ModuleType, tmp_path: Path) -> None:
    weights = []
    for folder in (tmp_path / "once", tmp_path / "again"):
        script.train(
            "llama-arithmetic", script.Recipe(steps=3, soft_steps=2, max_number=12, warmup=1), folder
        )
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_the_script_writes_the_prompts_that_are_asked(script: ModuleType) -> None:
    tokenizer = script.build_tokenizer(50, bos=True)
    prompts = script.Prompts(tokenizer, 50)
    seen, held = script.split_facts(50)
    for symbol, operator in OPERATORS.items():
        assert not {tuple(f) for f in seen[symbol]} & {tuple(f) for f in held[symbol]}
        assert all(is_held_out(symbol, x, y) for x, y, _ in held[symbol].tolist())
        for i, template in enumerate(operator.templates):
            numbers = seen[symbol][:6].reshape(3, 2, 3)
            tokens, ends = prompts.fill(symbol, i, numbers)
            for row, ((x, y, r), (x2, y2, _)) in zip(tokens, numbers.tolist(), strict=True):
                text = f"{template.format(x=x, y=y)} {r}\n{template.format(x=x2, y=y2)}"
                assert row.tolist() == tokenizer(text)["input_ids"]
                assert tokenizer.decode([row[ends[0] + 1]]) == f" {r}"
                assert ends[1] == len(row) - 1
    tokens, ends, answers = next(script.batches(prompts, seen, 500, (0, 0, 1), (0.25,) * 4, seed=0))
    assert answers.shape == (len(tokens), len(ends)) == (len(tokens), 3)
    for row, wanted in zip(tokens, answers, strict=True):
        assert row[ends[:-1] + 1].tolist() == wanted[:-1].tolist()
