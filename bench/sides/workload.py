"""A workload: a model on disk and prompt pairs in token ids; what a side is told before it starts."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import PromptPair
from deltapatch.results.metrics import METRICS as ENGINE_METRICS

METRICS = ("ie", "logit_diff")  # what a comparison can be about


@dataclass(frozen=True)
class Workload:
    """One model, prompt pairs of one length, and the metric that is asked for.

    Corrupted runs are the base and clean ones the source, as `direction="denoise"` has it.
    """

    folder: str  # a model folder that both transformers and deltapatch read
    clean: list[list[int]]  # [pair][T]
    corrupted: list[list[int]]  # [pair][T]
    answers: list[list[int]]  # [pair][2]: clean, corrupted
    metric: str = "ie"
    device: str = "cpu"
    batches: Sequence[int] = (16, 64, 256)  # rows of a forward, which peers that have the choice try
    threads: int = 0  # of PyTorch; 0 leaves them as they are
    direction: Sequence[float] = ()  # [d_model], of length one: what edits along a direction replace
    autoencoder: str = ""  # SAELens' folder of a standard one of resid_post, whose features edits replace

    def __post_init__(self) -> None:
        """Check what sides rely on."""
        check_metric(self.metric)

    @property
    def length(self) -> int:
        """Tokens of every prompt."""
        return len(self.clean[0])

    @property
    def pairs(self) -> list[PromptPair]:
        """The pairs as `deltapatch.sweep` takes them."""
        return [
            PromptPair(a, b, answers[0], answers[1])
            for a, b, answers in zip(self.clean, self.corrupted, self.answers, strict=True)
        ]

    @property
    def columns(self) -> tuple[str, ...]:
        """What is measured of each intervention: the metric follows from it."""
        return ENGINE_METRICS[self.metric].needs

    def effect(self, values: np.ndarray) -> np.ndarray:
        """The metric, [n], from its columns, [n, column]."""
        if self.metric == "logit_diff":
            return values[:, 0]
        with np.errstate(over="ignore"):
            return 0.5 * (np.expm1(values[:, 0]) + np.expm1(-values[:, 1]))

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "Workload":
        """Read what `save` wrote."""
        return Workload(**json.loads(path.read_text(encoding="utf-8")))


def check_metric(name: str) -> None:
    """Raise DeltapatchError for a metric that a comparison cannot be about."""
    if name not in METRICS:
        raise DeltapatchError(f"unknown metric {name!r}: bench measures {', '.join(METRICS)}")


def one_length(pairs: Sequence[tuple[list[int], list[int], int, int]]) -> tuple[list, list, list]:
    """Pairs (clean, corrupted, clean answer, corrupted answer) as the fields of a Workload.

    Raises:
        DeltapatchError: prompts of several lengths.
    """
    lengths = sorted({len(clean) for clean, *_ in pairs})
    if len(lengths) > 1:
        raise DeltapatchError(
            f"bench compares pairs of one length, since most peers batch only those, but these have "
            f"{', '.join(map(str, lengths))} tokens: choose pairs of one length"
        )
    return (
        [list(clean) for clean, *_ in pairs],
        [list(corrupted) for _, corrupted, *_ in pairs],
        [[a, b] for *_, a, b in pairs],
    )
