"""Sources: what a patched activation is replaced by."""

from typing import Literal

import numpy as np

from deltapatch.errors import DeltapatchError

Source = Literal["counterpart", "zero", "mean", "resample", "noise"]

# Sources that bring nothing where both prompts are the same up to a position.
DIFFERING = ("counterpart", "noise")

SOURCES: dict[str, str] = {
    "counterpart": "the pair's other prompt",
    "zero": "zero",
    "mean": "the mean over both prompts of all pairs of the same length, position by position",
    "resample": "the source run of another pair of the same length",
    "noise": "the clean prompt with Gaussian noise on the embeddings where the prompts differ, "
    "in place of the corrupted prompt (ROME's causal tracing)",
}


def check_source(name: str) -> Source:
    """The source of that name, or a sentence that lists the names."""
    if name not in SOURCES:
        raise DeltapatchError(f"unknown source {name!r}: choose from {', '.join(SOURCES)}")
    return name  # type: ignore[return-value]


def partners(length: np.ndarray, seed: int) -> np.ndarray:
    """[pair], another pair of the same length for each, by a seeded cyclic shift of a shuffle.

    Raises:
        DeltapatchError: a pair is alone with its length.
    """
    out = np.arange(len(length))
    rng = np.random.default_rng(seed)
    for n in np.unique(length):
        same = rng.permutation(np.flatnonzero(length == n))
        if len(same) < 2:
            raise DeltapatchError(
                f"source 'resample' needs another pair of the same length, but pair {same[0]} is alone "
                f"with its {n} tokens"
            )
        out[same] = np.roll(same, 1)
    return out
