"""What the paper reports of its four models, to be printed beside ours (Stolfo, Belinkov and Sachan 2023)."""

from dataclasses import dataclass, field
from pathlib import PurePath

from deltapatch.models.model import Model


@dataclass(frozen=True)
class Published:
    """The figures that the paper gives for one model, all in percent.

    Attributes:
        name: as the paper has it.
        names: what the last part of its hub id or folder is called, in lower case.
        shape: architecture, layers, d_model and d_mlp.
        adapter: what the last part of its adapter's name is called; None where there is none.
        accuracy: experiment -> operator (or "all") -> accuracy.
        importance: experiment -> relative importance of the late MLPs at the last token.
        tuned_accuracy, tuned_importance: after the authors' fine-tuning on three operands.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[str, int, int, int]
    accuracy: dict[str, dict[str, float]]
    importance: dict[str, float]
    adapter: str | None = None
    tuned_accuracy: dict[str, float] = field(default_factory=dict)
    tuned_importance: dict[str, float] = field(default_factory=dict)


def _operators(plus: float, minus: float, times: float, over: float, every: float) -> dict[str, float]:
    return {"+": plus, "-": minus, "*": times, "/": over, "all": every}


_MAIN, _SAME = "numerals-operands", "numerals-same-result"
_LLAMA = (
    ("llama-7b", "llama-7b-hf"),
    ("llama", 32, 4096, 11008),
)

PUBLISHED = (
    Published(
        "GPT-J",
        ("gpt-j-6b",),
        ("gptj", 28, 4096, 16384),
        {_MAIN: _operators(69.3, 78.0, 82.8, 40.8, 67.8)},
        {
            _MAIN: 40.2,
            _SAME: 4.4,
            "words-operands": 27.8,
            "words-same-result": 4.5,
            "retrieval": 8.7,
            "factual": 4.2,
        },
    ),
    Published(
        "Pythia",
        ("pythia-2.8b-deduped",),
        ("gpt_neox", 32, 2560, 10240),
        {_MAIN: _operators(57.4, 77.5, 64.7, 40.2, 59.9), "three-operands-operands": {"all": 0.9}},
        {_MAIN: 43.2, _SAME: 5.8, "three-operands-operands": 13.5},
        tuned_accuracy={"three-operands-operands": 39.7},
        tuned_importance={"three-operands-operands": 24.7, "three-operands-same-result": 13.6},
    ),
    Published(
        "LLaMA",
        *_LLAMA,
        {_MAIN: _operators(100, 99.8, 100, 88.7, 97.2)},
        {_MAIN: 36.1, _SAME: 7.5},
    ),
    Published(
        "Goat",
        *_LLAMA,
        {_MAIN: _operators(100, 100, 91.4, 54.0, 85.6)},
        {_MAIN: 33.5, _SAME: 7.4},
        "goat-lora-7b",
    ),
)

# Shares of the 400 strongest of 4,096 coordinates that two tasks have in common in GPT-J, in percent.
OVERLAP = {
    ("numerals-operands", "words-operands"): "50",
    ("numerals-operands", "retrieval"): "22-23",
    ("numerals-operands", "factual"): "9-10",
}


def published(model: Model, adapter: str | None = None) -> Published | None:
    """What the paper says of a model: one of its four by name and by shape, with its adapter or with none.

    Llama 2 and fine-tuned Pythias have the shape of one of them too, so the name has to be the whole of the
    last part of a hub id or path.
    """
    spec = model.spec
    shape = (spec.architecture, spec.n_layers, spec.d_model, spec.d_mlp)
    own, lora = _last(model.name), None if adapter is None else _last(adapter)
    for known in PUBLISHED:
        if known.shape == shape and own in known.names and known.adapter == lora:
            return known
    return None


def _last(name: str) -> str:
    path = PurePath(name)
    for part in path.parts:
        if part.startswith("models--"):  # a snapshot in the hub's cache
            return part.split("--")[-1].lower()
    return path.name.lower()
