"""Datasets: prompts that are no pairs, over whose runs a mean is taken, position by position and by label."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import EncodedPair


@dataclass(frozen=True)
class Dataset:
    """The prompts of a dataset, and which of its means each position of some pairs takes.

    Attributes:
        prompts: token ids, cut behind what is needed.
        labelled: of each label that any has, the prompts and positions that it is at.
        lines: [pair][position], up to where effects are read: a position, or behind all of the longest
            prompt's the number of a label.
    """

    prompts: list[list[int]]
    labelled: list[list[tuple[int, int]]]
    lines: list[np.ndarray]

    @property
    def longest(self) -> int:
        """The tokens of the longest prompt, as it is cut."""
        return max(map(len, self.prompts))

    @classmethod
    def of(
        cls,
        encoded: Sequence[tuple[list[int], dict[str, int]]],
        pairs: Sequence[EncodedPair],
        lengths: np.ndarray,
        places: Collection[str],
    ) -> "Dataset":
        """That of some prompts, for some pairs.

        Args:
            encoded: token ids and labels of each prompt.
            pairs: that take its means.
            lengths: [pair], tokens up to where effects are read.
            places: that are patched.

        Raises:
            DeltapatchError: no prompt reaches a position that has no label; a position has two labels, which
                the dataset has at different ones; patterns are patched, whose keys are positions.
        """
        at: dict[str, list[tuple[int, int]]] = {}
        for number, (_, labels) in enumerate(encoded):
            for label, position in labels.items():
                at.setdefault(label, []).append((number, position))
        spots = list(dict.fromkeys(map(tuple, at.values())))  # two labels may be at the same ones
        line_of = {label: spots.index(tuple(found)) for label, found in at.items()}
        own = [_labelled(number, pair, line_of) for number, pair in enumerate(pairs)]
        if "pattern" in places and any(own):
            raise DeltapatchError(
                "a mean of pattern is taken position by position, since its keys are positions: leave "
                "pattern out, or the labels of mean_over"
            )
        length = int(lengths.max())
        most = max(len(ids) for ids, _ in encoded)
        for number, n in enumerate(lengths.tolist()):
            missing = [t for t in range(most, n) if t not in own[number]]
            if missing:
                raise DeltapatchError(
                    f"the longest prompt of mean_over has {most} tokens, so there is no mean at position "
                    f"{missing[0]} of pair {number}, which has {n} up to where effects are read: give one as "
                    "long"
                )
        ends = [max([length, *(p + 1 for p in labels.values())]) for _, labels in encoded]
        prompts = [ids[:end] for (ids, _), end in zip(encoded, ends, strict=True)]
        longest = max(map(len, prompts))
        lines = [
            np.array([longest + mine[t] if t in mine else t for t in range(n)], dtype=np.int64)
            for mine, n in zip(own, lengths.tolist(), strict=True)
        ]
        return cls(prompts, [list(found) for found in spots], lines)


def _labelled(number: int, pair: EncodedPair, line_of: dict[str, int]) -> dict[int, int]:
    """Position -> which of the means by label a pair takes there.

    Of a text's tokens, `subject` goes before `subject[0]`, and that before `subject[-1]`.
    """
    names: dict[int, list[str]] = {}
    for label, position in pair.labels.items():
        if label in line_of:
            names.setdefault(position, []).append(label)
    out = {}
    for position, all_of_it in names.items():
        first = min(map(_rank, all_of_it))
        chosen = [name for name in all_of_it if _rank(name) == first]
        if len({line_of[name] for name in chosen}) > 1:
            raise DeltapatchError(
                f"position {position} of pair {number} has the labels {' and '.join(chosen)}, which "
                "mean_over has at different positions: leave one of them out there"
            )
        out[position] = line_of[chosen[0]]
    return out


def _rank(label: str) -> int:
    return 0 if not label.endswith("]") else 2 if "[-" in label else 1
