"""Segments: how the rows in flight lie in memory, and which base activations belong to them.

A segment holds rows that start at one position, of consecutive pairs whose runs are alike. Its tokens are
ordered [pair, position, row], so that tokens with one base token are neighbours: base values broadcast over
rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from deltapatch.kernels.device import upload

_KEPT = 128  # arrays of the base tokens of segments

Fork = tuple[int, int]  # where two branches of a run begin: positions of the second see none of the first


@dataclass(frozen=True)
class Segment:
    """A dense piece of a packed array of row tokens.

    Attributes:
        token: where its first token lies in the packed array.
        pairs, positions, rows: its shape; a row's positions are the last `positions` of the run.
        base: where the first pair's position 0 lies among the base tokens.
        length: tokens of these pairs' runs.
        reads: how many of the last positions are read out; rows have no fewer.
        fork: where the run parts into two branches, if it does.
    """

    token: int
    pairs: int
    positions: int
    rows: int
    base: int
    length: int
    reads: int = 1
    fork: Fork | None = None

    @property
    def n_tokens(self) -> int:
        """How many row tokens the segment holds."""
        return self.pairs * self.positions * self.rows

    def tokens(self, packed: Tensor) -> Tensor:
        """The segment's part of [token, ...], as [pair, position, row, ...]."""
        part = packed[self.token : self.token + self.n_tokens]
        return part.view(self.pairs, self.positions, self.rows, *packed.shape[1:])

    def run(self, base: Tensor) -> Tensor:
        """The pairs' base activations, of [base token, ...], as [pair, position of the run, ...]."""
        part = base[self.base : self.base + self.pairs * self.length]
        return part.view(self.pairs, self.length, *base.shape[1:])

    def own(self, base: Tensor) -> Tensor:
        """The base activations of the rows' own positions, as [pair, position, 1, ...]: one for all rows."""
        return self.run(base)[:, self.length - self.positions :].unsqueeze(2)

    def read(self, token: int) -> "Segment":
        """The same rows with the positions alone that are read out, from `token` on."""
        return replace(self, token=token, positions=self.reads)


def read_segments(segments: list[Segment]) -> list[Segment]:
    """The same rows with the positions alone that are read out."""
    out, token = [], 0
    for segment in segments:
        out.append(segment.read(token))
        token += out[-1].n_tokens
    return out


def base_of_tokens(segments: Sequence[Segment], device: torch.device) -> Tensor:
    """The base token of every token, [token] int32, of segments in order."""
    return _base_of_tokens(tuple(segments), device)


@lru_cache(_KEPT)
def _base_of_tokens(segments: tuple[Segment, ...], device: torch.device) -> Tensor:
    parts = []
    for s in segments:
        end = s.base + s.length * np.arange(1, s.pairs + 1)[:, None]  # of each pair's run
        parts.append(np.repeat(end - np.arange(s.positions, 0, -1), s.rows))
    return upload(np.concatenate(parts).astype(np.int32), device)


def base_lines(segments: Sequence[Segment], device: torch.device) -> tuple[Tensor, Tensor]:
    """The base tokens that segments meet, [base token met] int32, and which each token has, [token] int32."""
    return _base_lines(tuple(segments), device)


@lru_cache(_KEPT)
def _base_lines(segments: tuple[Segment, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    met, line = np.unique(_base_of_tokens(segments, torch.device("cpu")).numpy(), return_inverse=True)
    return upload(met, device), upload(line.astype(np.int32), device)


def span(segments: Sequence[Segment]) -> slice:
    """The tokens of segments that lie one after the other."""
    return slice(segments[0].token, segments[-1].token + segments[-1].n_tokens)


def gather(
    segments: Sequence[Segment],
    size: Callable[[Segment], int],
    most: int,
    alike: Callable[[Segment, Segment], bool] = lambda a, b: True,
) -> list[slice]:
    """Segments one after the other that are taken together: small ones, an eighth of `most` in size or less.

    Rows that start at many positions are many small segments: what is done to each by itself takes longer to
    start than to do.

    Args:
        size: of a segment, in any unit.
        most: that those together have.
        alike: whether one may be with the one before.
    """
    edges, together = [0], 0
    for i, s in enumerate(segments):
        mine = size(s) if 8 * size(s) <= most else most
        if i and (together + mine > most or not alike(segments[i - 1], s)):
            edges.append(i)
            together = 0
        together += mine
    return [slice(a, b) for a, b in zip(edges, [*edges[1:], len(segments)], strict=True)]


def cut_segments(segments: list[Segment], most: int) -> list[tuple[slice, list[Segment]]]:
    """Segments in groups of at most `most` tokens, or of one position where that has more rows.

    Only for what is done token by token: a piece of a long row looks like a row of a shorter prompt.

    Args:
        segments: they cover all tokens in order.
        most: tokens in a group.

    Returns:
        The tokens of each group, and its segments, whose `token` counts from the first of these.
    """
    pieces = []
    for s in segments:
        if s.n_tokens <= most:
            pieces.append(s)
            continue
        step = max(1, most // s.rows)
        for pair in range(s.pairs):
            for a in range(0, s.positions, step):
                n = min(step, s.positions - a)
                token = s.token + (pair * s.positions + a) * s.rows
                base, length = s.base + pair * s.length, s.length - s.positions + a + n
                pieces.append(Segment(token, 1, n, s.rows, base, length))
    out: list[tuple[slice, list[Segment]]] = []
    for piece in pieces:
        before = out[-1][0] if out else slice(0, 0)
        if not out or piece.token + piece.n_tokens - before.start > most:
            out.append((slice(piece.token, piece.token + piece.n_tokens), [replace(piece, token=0)]))
        else:
            out[-1][1].append(replace(piece, token=piece.token - before.start))
            out[-1] = slice(before.start, piece.token + piece.n_tokens), out[-1][1]
    return out


def keep_reads(packed: Tensor, segments: list[Segment]) -> Tensor:
    """The positions that are read out, of [token, ...]: [token, ...], packed as `read_segments` says."""
    if all(s.positions == s.reads for s in segments):
        return packed
    kept = read_segments(segments)
    out = packed.new_empty(sum(s.n_tokens for s in kept), *packed.shape[1:])
    for segment, read in zip(segments, kept, strict=True):
        read.tokens(out).copy_(segment.tokens(packed)[:, segment.positions - segment.reads :])
    return out


def in_prompt(at: Tensor, fork: Fork | None) -> Tensor:
    """Positions in the prompt of tokens that stand there in a run: the second branch begins as the first."""
    return at if fork is None else at - (at >= fork[1]) * (fork[1] - fork[0])


def unseen(queries: Segment, some: slice, device: torch.device, window: int | None = None) -> Tensor | None:
    """Which positions of its run, up to its own last one, each query does not attend to: bool, [query, key].

    None where it is one position that attends to all of them.

    Args:
        queries: a segment; `some` of its positions are the queries.
        window: how many positions a query sees, its own the last; None: all up to its own.
    """
    first = queries.length - queries.positions
    windowed = window is not None and window < first + some.stop
    if some.stop - some.start == 1 and queries.fork is None and not windowed:
        return None
    key = torch.arange(first + some.stop, device=device)
    query = key[first + some.start :, None]
    hidden = key > query
    if queries.fork is not None:
        first, second = queries.fork
        hidden |= (query >= second) & (key >= first) & (key < second)
    if window is not None and windowed:
        position = in_prompt(key, queries.fork)
        hidden |= position[len(key) - len(query) :, None] - position >= window
    return hidden
