"""The paper's figures go with the paper's models alone: by name, shape and adapter."""

from types import SimpleNamespace

import pytest

from deltapatch.study.presets import experiments
from deltapatch.study.published import PUBLISHED, published

GPTJ = ("gptj", 28, 4096, 16384)
PYTHIA = ("gpt_neox", 32, 2560, 10240)
LLAMA = ("llama", 32, 4096, 11008)


def named(name: str, shape: tuple) -> SimpleNamespace:
    architecture, n_layers, d_model, d_mlp = shape
    spec = SimpleNamespace(architecture=architecture, n_layers=n_layers, d_model=d_model, d_mlp=d_mlp)
    return SimpleNamespace(name=name, spec=spec)


@pytest.mark.parametrize(
    ("name", "shape", "adapter", "found"),
    [
        ("EleutherAI/gpt-j-6b", GPTJ, None, "GPT-J"),
        ("EleutherAI/gpt-j-6B", GPTJ, None, "GPT-J"),
        ("/models/gpt-j-6b/", GPTJ, None, "GPT-J"),
        ("/cache/models--EleutherAI--gpt-j-6b/snapshots/0123abcd", GPTJ, None, "GPT-J"),
        ("EleutherAI/pythia-2.8b-deduped", PYTHIA, None, "Pythia"),
        ("huggyllama/llama-7b", LLAMA, None, "LLaMA"),
        ("huggyllama/llama-7b", LLAMA, "tiedong/goat-lora-7b", "Goat"),
        ("huggyllama/llama-7b", LLAMA, "someone/alpaca-lora-7b", None),
        ("EleutherAI/gpt-j-6b", GPTJ, "someone/lora", None),
        ("EleutherAI/pythia-2.8b", PYTHIA, None, None),
        ("EleutherAI/pythia-2.8b-deduped-tuned", PYTHIA, None, None),
        ("meta-llama/Llama-2-7b-hf", LLAMA, None, None),
        ("me/gpt-j-6b", ("gptj", 4, 128, 512), None, None),
    ],
)
def test_models_are_told_apart(name, shape, adapter, found) -> None:
    known = published(named(name, shape), adapter)
    assert (known.name if known else None) == found


def test_figures_are_of_experiments_that_exist() -> None:
    known = experiments()
    for paper in PUBLISHED:
        names = {*paper.accuracy, *paper.importance, *paper.tuned_accuracy, *paper.tuned_importance}
        assert names <= set(known)
        every = [*paper.importance.values(), *(v for a in paper.accuracy.values() for v in a.values())]
        assert all(0 < value <= 100 for value in every)
        assert set(paper.accuracy["numerals-operands"]) == {"+", "-", "*", "/", "all"}
