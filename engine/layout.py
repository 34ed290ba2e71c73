"""Layout: how the rows in flight at one layer are packed into segments, and these into blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np

from deltapatch.kernels.segments import Fork, Segment


class RunShape(NamedTuple):
    """The shape of a run: its prompt, and what the answers add.

    Attributes:
        prompt: tokens up to the first position that is read, the end of the prompt.
        length: all tokens.
        fork: where the run parts into two branches, if it does.
    """

    prompt: int
    length: int
    fork: Fork | None = None

    @property
    def reads(self) -> int:
        """How many tokens are read from: the last of the prompt and all after it."""
        return self.length - self.prompt + 1

    @property
    def positions(self) -> np.ndarray:
        """[token], each token's position; the second branch counts from the fork."""
        position = np.arange(self.length)
        if self.fork is not None:
            position[self.fork[1] :] -= self.fork[1] - self.fork[0]
        return position

    @property
    def order(self) -> tuple[int, int, Fork | tuple[()]]:
        """What pairs are ordered by: those of one prompt length together, and among them those alike."""
        return self.prompt, self.length, self.fork or ()


class PairShapes:
    """Where the base tokens of each pair in a pass lie, one run after the other.

    Attributes:
        runs: [pair], in their order.
        prompt, length: [pair], as of a `RunShape`.
        base: [pair], a run's first base token.
    """

    def __init__(self, runs: Sequence[RunShape]) -> None:
        self.runs = list(runs)
        self.prompt = np.array([run.prompt for run in runs], dtype=np.int64)
        self.length = np.array([run.length for run in runs], dtype=np.int64)
        self.base = np.array([0, *accumulate(run.length for run in runs)], dtype=np.int64)[:-1]

    @property
    def n_tokens(self) -> int:
        """How many base tokens there are."""
        return int(self.length.sum())

    @property
    def reads(self) -> np.ndarray:
        """[pair], how many positions are read."""
        return self.length - self.prompt + 1

    def segments(self, rows: int, most: int | None = None) -> list[Segment]:
        """Whole runs, `rows` of each pair: pairs that are alike together, in order of the base tokens.

        Args:
            rows: a pair.
            most: tokens in a segment, unless a single pair has more; by default there is no limit.
        """
        out = []
        for run, pairs in groupby(range(len(self.runs)), lambda i: self.runs[i]):
            alike = list(pairs)
            step = len(alike) if most is None else max(1, most // (run.length * rows))
            for some in (alike[i : i + step] for i in range(0, len(alike), step)):
                base = int(self.base[some[0]])
                out.append(
                    Segment(base * rows, len(some), run.length, rows, base, run.length, run.reads, run.fork)
                )
        return out


@dataclass(frozen=True)
class Block:
    """Whole segments that go through a layer together; their `token` counts from the block's first token."""

    rows: slice  # into Layout.rows
    tokens: slice
    segments: list[Segment]
    first_pairs: list[int]  # of each segment


@dataclass(frozen=True)
class Layout:
    """The packing of some rows of a pass.

    Attributes:
        rows: [row in layout], row ids in the order of the segments.
        token, stride: [row id], a row's first token and the distance between its tokens; -1 where not packed.
        n_tokens: all row tokens.
        blocks: in order.
    """

    rows: np.ndarray
    token: np.ndarray
    stride: np.ndarray
    n_tokens: int
    blocks: list[Block]

    def places(self, block: Block, ids: np.ndarray) -> np.ndarray:
        """[token], where the tokens of another packing's block lie in this one; `ids` are its rows."""
        return spread(block.segments, self.token[ids], self.stride[ids])


def spread(segments: list[Segment], first: np.ndarray, stride: np.ndarray) -> np.ndarray:
    """[token], a number for each token of segments, counted from each row's first one in its steps, [row]."""
    parts, row = [], 0
    for s in segments:
        mine = slice(row, row + s.pairs * s.rows)
        begin, step = (a[mine].reshape(s.pairs, 1, s.rows) for a in (first, stride))
        parts.append((begin + np.arange(s.positions)[:, None] * step).ravel())
        row = mine.stop
    return np.concatenate(parts)


def first_tokens(segments: list[Segment]) -> np.ndarray:
    """[row], the first token of each row of segments."""
    return np.concatenate(
        [
            (s.token + np.arange(s.pairs)[:, None] * (s.positions * s.rows) + np.arange(s.rows)).ravel()
            for s in segments
        ]
    )


def lay_out(
    rows: np.ndarray, pair: np.ndarray, start: np.ndarray, shapes: PairShapes, n_blocks: int
) -> Layout:
    """Pack rows into blocks of about equal size.

    Args:
        rows: [n] row ids, those of one pair that start at one position together.
        pair, start: [row id], the pair of a row and its first position.
        shapes: the pairs.
        n_blocks: how many; fewer where there are not enough rows. A block exceeds its share by less than a
            row's tokens.
    """
    token = np.full(len(pair), -1, dtype=np.int64)
    stride = np.full(len(pair), -1, dtype=np.int64)
    blocks: list[Block] = []
    left = int((shapes.length[pair[rows]] - start[rows]).sum())  # tokens of this block and the next ones
    done = n_tokens = 0  # rows and tokens packed
    draft = _Draft()
    for first, count in _alike(rows, pair, start):
        run, base = shapes.runs[first], int(shapes.base[first])
        width = run.length - int(start[rows[done]])
        while count:
            share = -(-left // max(1, n_blocks - len(blocks)))
            some = min(count, -(-(share - draft.n_tokens) // width))
            ids = rows[done : done + some]
            token[ids] = n_tokens + np.arange(some)
            stride[ids] = some
            draft.add(Segment(0, 1, width, some, base, run.length, run.reads, run.fork), first)
            done, count, n_tokens = done + some, count - some, n_tokens + some * width
            if draft.n_tokens >= share:
                blocks.append(draft.block(done, n_tokens))
                left, draft = left - draft.n_tokens, _Draft()
    return Layout(rows, token, stride, n_tokens, blocks)


class _Draft:
    """A block that is being filled."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.first_pairs: list[int] = []
        self.n_tokens = self.n_rows = 0

    def add(self, s: Segment, pair: int) -> None:
        """Add rows of one pair; they join those of the pair before, where these are alike."""
        before = self.segments[-1] if self.segments else None
        if (
            before is not None
            and (before.positions, before.rows, before.length) == (s.positions, s.rows, s.length)
            and (before.reads, before.fork) == (s.reads, s.fork)
            and self.first_pairs[-1] + before.pairs == pair
        ):
            self.segments[-1] = replace(before, pairs=before.pairs + 1)
        else:
            self.segments.append(replace(s, token=self.n_tokens))
            self.first_pairs.append(pair)
        self.n_tokens += s.n_tokens
        self.n_rows += s.rows

    def block(self, row: int, token: int) -> Block:
        """The block, whose last row and token come before these."""
        return Block(
            slice(row - self.n_rows, row),
            slice(token - self.n_tokens, token),
            self.segments,
            self.first_pairs,
        )


def _alike(rows: np.ndarray, pair: np.ndarray, start: np.ndarray) -> list[tuple[int, int]]:
    """Rows that start at one position of one pair, as (pair, how many)."""
    if not len(rows):
        return []
    p, s = pair[rows], start[rows]
    firsts = np.concatenate([[0], np.flatnonzero((np.diff(p) != 0) | (np.diff(s) != 0)) + 1])
    counts = np.diff(np.concatenate([firsts, [len(rows)]]))
    return list(zip(p[firsts].tolist(), counts.tolist(), strict=True))
