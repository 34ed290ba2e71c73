"""Layout: how the rows in flight at one layer are packed into segments, and these into blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np

from deltapatch.interventions.runs import RunShape
from deltapatch.kernels.segments import Segment

_LEAST = 64  # tokens in a block: with fewer, a product does little but read its weights


class PairShapes:
    """Where the base tokens of each pair in a pass lie, one run after the other.

    Attributes:
        runs: [pair], in their order.
        prompt, length: [pair], as of a `RunShape`.
        base: [pair], a run's first base token.
        kind: [pair], a number for each shape of runs.
    """

    def __init__(self, runs: Sequence[RunShape]) -> None:
        self.runs = list(runs)
        number = {run: i for i, run in enumerate(dict.fromkeys(runs))}
        self.kind = np.array([number[run] for run in runs], dtype=np.int64)
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


def adjoining(places: np.ndarray) -> slice | np.ndarray:
    """Places as a slice, where each is next to the one before."""
    if places[-1] - places[0] == len(places) - 1 and (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places


def first_tokens(segments: list[Segment]) -> np.ndarray:
    """[row], the first token of each row of segments."""
    return np.concatenate(
        [
            (s.token + np.arange(s.pairs)[:, None] * (s.positions * s.rows) + np.arange(s.rows)).ravel()
            for s in segments
        ]
    )


def how_many_blocks(tokens: int, block_tokens: int, workers: int = 1) -> int:
    """Into how many blocks so many row tokens go.

    Args:
        block_tokens: that a block should have.
        workers: who share the blocks; in a layer that has few tokens too, each has one.
    """
    return max(round(tokens / block_tokens), min(workers, tokens // _LEAST), 1)


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
    if not len(rows):
        return Layout(rows, token, stride, 0, [])
    own, at = pair[rows], start[rows]
    width = shapes.length[own] - at  # [row in layout], its tokens
    tokens = np.concatenate([[0], np.cumsum(width)])  # before each row, and in all
    ends = _block_ends(tokens, n_blocks)
    # A piece is a run of rows that start at one position of one pair, or what a block has of it.
    cuts = np.flatnonzero((np.diff(own) != 0) | (np.diff(at) != 0)) + 1
    first = np.unique(np.concatenate([[0], cuts, ends[:-1]]))
    count = np.diff(np.concatenate([first, [len(rows)]]))
    token[rows] = np.repeat(tokens[first], count) + np.arange(len(rows)) - np.repeat(first, count)
    stride[rows] = np.repeat(count, count)
    # Pieces of consecutive pairs that are alike make one segment.
    block, pairs, widths = np.searchsorted(ends, first, side="right"), own[first], width[first]
    alike = np.diff(pairs) == 1
    for column in (block, count, widths, shapes.kind[pairs]):
        alike &= np.diff(column) == 0
    new = np.flatnonzero(np.concatenate([[True], ~alike]))
    n_pairs = np.diff(np.concatenate([new, [len(first)]]))
    begins = np.concatenate([[0], ends[:-1]])  # [block], its first row
    of = pairs[new].tolist()
    columns = (tokens[first[new]] - tokens[begins[block[new]]], n_pairs, widths[new], count[new],
               shapes.base[pairs[new]])  # fmt: skip
    segments = []
    for p, (at, n, positions, n_rows, base) in zip(
        of, zip(*(c.tolist() for c in columns), strict=True), strict=True
    ):
        run = shapes.runs[p]
        segments.append(Segment(at, n, positions, n_rows, base, run.length, run.reads, run.fork))
    edges = np.searchsorted(block[new], np.arange(len(ends) + 1)).tolist()
    blocks = [
        Block(slice(a, b), slice(int(tokens[a]), int(tokens[b])), segments[i:j], of[i:j])
        for a, b, i, j in zip(begins.tolist(), ends.tolist(), edges[:-1], edges[1:], strict=True)
    ]
    return Layout(rows, token, stride, int(tokens[-1]), blocks)


def _block_ends(tokens: np.ndarray, n_blocks: int) -> np.ndarray:
    """[block], the row after its last one: a block takes rows until it has its share of the tokens left."""
    ends = [0]
    while ends[-1] < len(tokens) - 1:
        done = int(tokens[ends[-1]])
        share = -(-(int(tokens[-1]) - done) // max(1, n_blocks - len(ends) + 1))
        ends.append(int(np.searchsorted(tokens, done + share)))
    return np.array(ends[1:])
