"""Layout: how the rows in flight at one layer are packed into segments, and these into blocks."""

from dataclasses import dataclass, replace

import numpy as np

from deltapatch.kernels.segments import Segment


@dataclass(frozen=True)
class PairShapes:
    """Where the base tokens of each pair in a pass lie. Pairs are ordered by length."""

    length: np.ndarray  # [pair]
    base: np.ndarray  # [pair], first base token

    @property
    def n_tokens(self) -> int:
        """How many base tokens there are."""
        return int(self.length.sum())

    def segments(self, rows: int, most: int | None = None) -> list[Segment]:
        """Whole prompts, `rows` of each pair: pairs of one length together, in order of the base tokens.

        Args:
            rows: a pair.
            most: tokens in a segment, unless a single pair has more; by default there is no limit.
        """
        out = []
        for length in np.unique(self.length).tolist():
            pairs = np.flatnonzero(self.length == length)
            step = len(pairs) if most is None else max(1, most // (length * rows))
            for some in (pairs[i : i + step] for i in range(0, len(pairs), step)):
                base = int(self.base[some[0]])
                out.append(Segment(base * rows, len(some), length, rows, base, length))
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


def lay_out(
    rows: np.ndarray, pair: np.ndarray, start: np.ndarray, shapes: PairShapes, n_blocks: int
) -> Layout:
    """Pack rows into blocks of about equal size.

    Args:
        rows: [n] row ids, ordered by (length, start, pair).
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
    for first, count in _runs(rows, pair, start):
        length = int(shapes.length[first])
        width = length - int(start[rows[done]])
        while count:
            share = -(-left // max(1, n_blocks - len(blocks)))
            some = min(count, -(-(share - draft.n_tokens) // width))
            ids = rows[done : done + some]
            token[ids] = n_tokens + np.arange(some)
            stride[ids] = some
            draft.add(Segment(0, 1, width, some, int(shapes.base[first]), length), first)
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


def _runs(rows: np.ndarray, pair: np.ndarray, start: np.ndarray) -> list[tuple[int, int]]:
    """Rows that start at one position of one pair, as (pair, how many)."""
    if not len(rows):
        return []
    p, s = pair[rows], start[rows]
    firsts = np.concatenate([[0], np.flatnonzero((np.diff(p) != 0) | (np.diff(s) != 0)) + 1])
    counts = np.diff(np.concatenate([firsts, [len(rows)]]))
    return list(zip(p[firsts].tolist(), counts.tolist(), strict=True))
