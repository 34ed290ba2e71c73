"""Layout: how the rows in flight at one layer are packed into segments, and these into blocks."""

from dataclasses import dataclass

import numpy as np

from deltapatch.kernels.segments import Segment

_LEAST = 64  # tokens in a block: with fewer, a product does little but read its weights
_SPREAD = 4  # blocks that few tokens are cut into, so that cores share them; not as many as there are cores,
# since effects must not depend on the machine


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


def how_many_blocks(tokens: int, block_tokens: int, spread: bool) -> int:
    """Into how many blocks so many row tokens go.

    Args:
        block_tokens: that a block should have.
        spread: whether few tokens are cut too, so that the cores of a CPU share them.
    """
    few = min(_SPREAD, tokens // _LEAST) if spread else 1
    return max(round(tokens / block_tokens), few, 1)


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
    block, pairs, widths, lengths = (
        np.searchsorted(ends, first, side="right"),
        own[first],
        width[first],
        shapes.length[own[first]],
    )
    alike = np.diff(pairs) == 1
    for column in (block, count, widths, lengths):
        alike &= np.diff(column) == 0
    new = np.flatnonzero(np.concatenate([[True], ~alike]))
    n_pairs = np.diff(np.concatenate([new, [len(first)]]))
    begins = np.concatenate([[0], ends[:-1]])  # [block], its first row
    columns = (tokens[first[new]] - tokens[begins[block[new]]], n_pairs, widths[new], count[new],
               shapes.base[pairs[new]], lengths[new])  # fmt: skip
    segments = [Segment(*values) for values in zip(*(c.tolist() for c in columns), strict=True)]
    edges = np.searchsorted(block[new], np.arange(len(ends) + 1)).tolist()
    of = pairs[new].tolist()
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
