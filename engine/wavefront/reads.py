"""Reads: the positions at which the output distributions of a pass are read, and what they say together.

Every pair is read at the end of its prompt, and at each token that its answers add (see continuation.py); a
row is read wherever its pair is. What is asked of a read depends on which answers go on from there. The
changes of the log-probability of an answer add up over its tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from deltapatch.engine.wavefront.layout import Block, PairShapes, spread
from deltapatch.interventions.runs import NONE
from deltapatch.kernels.segments import read_segments
from deltapatch.results.metrics import Reference

_ANSWERS = ("clean", "corrupted")
# What is read wherever the answers go on; all else is of the end of the prompt.
_OF_ANSWERS = ("logit_diff", "dlogp_clean", "dlogp_corrupted", "says_clean", "says_corrupted")


@dataclass(frozen=True)
class Asked:
    """Reads of which the same is asked.

    Attributes:
        reads: their numbers.
        gives: (what is measured there, the number that it is part of, the sign with which it is).
    """

    reads: np.ndarray
    gives: tuple[tuple[str, str, int], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What is measured there."""
        return tuple(dict.fromkeys(name for name, _, _ in self.gives))


class Reads:
    """The reads of a pass, pair by pair.

    Args:
        shapes: of its pairs.
        targets: [read, (clean, corrupted), token], as `any_targets` has them.
    """

    def __init__(self, shapes: PairShapes, targets: np.ndarray) -> None:
        self.any, self.targets = targets, targets[..., 0]  # [read, answer, token], [read, answer]
        self.pair = np.repeat(np.arange(len(shapes.runs)), shapes.reads)  # [read]
        self.first = np.concatenate([[0], np.cumsum(shapes.reads)[:-1]])  # [pair], its first read
        after = np.arange(len(self.pair)) - self.first[self.pair]  # tokens after the prompt
        self.token = (shapes.base + shapes.prompt - 1)[self.pair] + after  # [read], the base token

    @cached_property
    def shared(self) -> np.ndarray:
        """[read], whether both answers go on from there."""
        return (self.targets != NONE).all(1)

    @property
    def tokens(self) -> np.ndarray:
        """[read, 2, token], the targets; where one answer alone goes on, its token twice."""
        alone = (self.targets == NONE)[..., None]
        return np.where(alone, self.any.max(1, keepdims=True), self.any)

    def asked(self, measured: Sequence[str]) -> list[Asked]:
        """What is asked of which reads, so that these numbers follow. The end of the prompt comes first."""
        at_end = np.zeros(len(self.pair), dtype=bool)
        at_end[self.first] = True
        of_tokens = tuple(name for name in measured if name.startswith(("dlogp_", "says_")))
        parting = self.shared & (self.targets[:, 0] != self.targets[:, 1])
        kinds = [
            (at_end, tuple(measured)),
            (~at_end & self.shared & ~parting, of_tokens),
            (~at_end & parting, tuple(name for name in measured if name in _OF_ANSWERS)),
        ]
        found = [(np.flatnonzero(which), tuple((name, name, 1) for name in names)) for which, names in kinds]
        for i, answer in enumerate(_ANSWERS):
            # Where one answer alone goes on, its token stands in both columns: the first is asked for.
            alone = [(f"dlogp_{answer}", "dlogp_clean", 1), (f"says_{answer}", "says_clean", 1)]
            alone.append(("logit_diff", "dlogp_clean", (1, -1)[i]))
            gives = tuple((asked, name, sign) for name, asked, sign in alone if name in measured)
            found.append((np.flatnonzero(self.targets[:, 1 - i] == NONE), gives))
        return [Asked(reads, gives) for reads, gives in found if len(reads)]

    def reference(self, logit: np.ndarray, logp: np.ndarray, prediction: np.ndarray) -> Reference:
        """What the unpatched runs say of whole answers.

        Args:
            logit, logp: [read, run, target], the logits of the two targets and their log-probabilities.
            prediction: [read, run], the likeliest token.
        """
        n_pairs, n_runs = len(self.first), prediction.shape[1]
        out = Reference.empty(n_pairs, n_runs)
        out.prediction[:] = prediction[self.first]
        parting = self.first + np.bincount(self.pair, self.shared, n_pairs).astype(np.int64) - 1
        out.logit[:] = logit[parting]
        out.logp[:], out.says[:] = 0, True
        for i in range(len(_ANSWERS)):
            mine = np.flatnonzero(self.targets[:, i] != NONE)
            alone = mine[~self.shared[mine]]
            np.add.at(out.logp[..., i], self.pair[mine], logp[mine, :, i])
            np.add.at(out.logit[..., i], self.pair[alone], logp[alone, :, i])
            right = (prediction[mine, :, None] == self.any[mine, i, None]).any(-1)
            np.logical_and.at(out.says[..., i], self.pair[mine], right)
        return out


class Part(NamedTuple):
    """Reads of rows of which the same is asked.

    Attributes:
        rows: their numbers, those of one read of a pair together, read after read.
        lines: where they are packed, in this order.
    """

    asked: Asked
    rows: np.ndarray
    lines: slice


class RowReads:
    """The reads of rows: every row's, numbered row by row, and where their differences are packed.

    Args:
        reads: of the pairs.
        pair: [row], the pair of each row.
        measured: which numbers are to follow.
    """

    def __init__(self, reads: Reads, pair: np.ndarray, measured: Sequence[str]) -> None:
        self.reads, self.measured = reads, tuple(measured)
        n_reads = np.bincount(reads.pair, minlength=len(reads.first))[pair]
        self.row = np.repeat(np.arange(len(pair)), n_reads)  # [read of a row]
        self.first = np.cumsum(n_reads) - n_reads  # [row]
        self.read = (reads.first[pair] - self.first)[self.row] + np.arange(len(self.row))  # [read of a row]
        self.place = np.empty(len(self.row), dtype=np.int64)  # [read of a row], the line of its difference
        self.parts: list[Part] = []
        line = 0
        order = np.argsort(self.read, kind="stable")
        for asked in reads.asked(measured):
            wanted = np.zeros(len(reads.pair), dtype=bool)
            wanted[asked.reads] = True
            mine = order[wanted[self.read[order]]]
            self.place[mine] = np.arange(line, line + len(mine))
            self.parts.append(Part(asked, mine, slice(line, line + len(mine))))
            line += len(mine)

    @property
    def n_tokens(self) -> int:
        """How many lines there are."""
        return len(self.row)

    def places(self, block: Block, ids: np.ndarray) -> np.ndarray:
        """[token], the lines of what is read of a block, with its rows' numbers."""
        first = self.first[ids]
        return self.place[spread(read_segments(block.segments), first, np.ones_like(first))]

    def together(self, found: Sequence[np.ndarray]) -> np.ndarray:
        """The numbers that were to follow: [measured, row].

        Args:
            found: for each part [what is measured there, read of a row in the order of its lines].
        """
        out = np.empty((len(self.measured), len(self.first)), found[0].dtype)
        for number, (part, values) in enumerate(zip(self.parts, found, strict=True)):
            rows = self.row[part.rows]
            by_name = dict(zip(part.asked.names, values, strict=True))
            for name, of, sign in part.asked.gives:
                total = out[self.measured.index(of)]
                if number == 0:  # every row is read at the end of its prompt
                    total[rows] = by_name[name]
                elif of.startswith("says_"):
                    np.multiply.at(total, rows, by_name[name])
                else:
                    np.add.at(total, rows, sign * by_name[name])
        return out
