"""Tiles: which rows each program of a Triton kernel works on, as small tables on the device.

A tile holds neighbouring row tokens with one base token, so that base values are loaded once for all of them.
Tables follow from the segments alone; those of the last few blocks of rows are kept, so that a layer's
operations share them and no kernel waits for the host.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from deltapatch.kernels.device import upload
from deltapatch.kernels.segments import Segment, read_segments

_KEPT = 128  # tables; one block of rows needs about five

BY_ROWS_BELOW = 8  # own positions; rows with more fill half a tile of queries with those of one row
ROWS_FROM = 32  # in a tile; fewer rows with many own keys are quicker alone, where these come in blocks


def base_tiles(segments: list[Segment], rows: int, device: torch.device) -> Tensor:
    """[tile, (first token, tokens, base token)] int32, at most `rows` tokens a tile."""
    return _base_tiles(tuple(segments), rows, device)


def pair_tiles(segments: list[Segment], first_pairs: list[int], rows: int, device: torch.device) -> Tensor:
    """[tile, (first row, rows, pair)] int32, of segments with one position a row."""
    return _pair_tiles(tuple(segments), tuple(first_pairs), rows, device)


def pair_of_rows(segments: list[Segment], first_pairs: list[int], device: torch.device) -> Tensor:
    """[row] int64, of segments with one position a row."""
    return _pair_of_rows(tuple(segments), tuple(first_pairs), device)


def query_tiles(
    segments: list[Segment], reads_only: bool, rows: int, queries: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tiles of queries: of several rows at one position, and of one row at several positions.

    Args:
        segments: where the rows lie.
        reads_only: only the positions that are read out are queries.
        rows, queries: the most in a tile of either kind.

    Returns:
        Two tables [tile, (first query's token, where its output goes, token of the first own position,
        queries, tokens from a row's position to its next, base token of position 0, first own position,
        position of the first query, where the first branch of the run begins, and the second)] int32. The
        branches of a run that has none begin at its end.
    """
    return _query_tiles(tuple(segments), reads_only, rows, queries, device)


@lru_cache(_KEPT)
def _base_tiles(segments: tuple[Segment, ...], rows: int, device: torch.device) -> Tensor:
    parts = []
    for s in segments:
        pair, position, row = _axes(s.pairs, s.positions, range(0, s.rows, rows))
        token = s.token + (pair * s.positions + position) * s.rows + row
        base = s.base + pair * s.length + s.length - s.positions + position
        parts.append(_columns(token, np.minimum(rows, s.rows - row), base))
    return _to_device(parts, 3, device)


@lru_cache(_KEPT)
def _pair_tiles(
    segments: tuple[Segment, ...], first_pairs: tuple[int, ...], rows: int, device: torch.device
) -> Tensor:
    parts = []
    for s, first in zip(segments, first_pairs, strict=True):
        pair, _, row = _axes(s.pairs, 1, range(0, s.rows, rows))
        parts.append(_columns(s.token + pair * s.rows + row, np.minimum(rows, s.rows - row), first + pair))
    return _to_device(parts, 3, device)


@lru_cache(_KEPT)
def _pair_of_rows(
    segments: tuple[Segment, ...], first_pairs: tuple[int, ...], device: torch.device
) -> Tensor:
    parts = [
        np.repeat(np.arange(first, first + s.pairs), s.rows)
        for s, first in zip(segments, first_pairs, strict=True)
    ]
    return _to_device(parts, 1, device).squeeze(1).long()


@lru_cache(_KEPT)
def _query_tiles(
    segments: tuple[Segment, ...], reads_only: bool, rows: int, queries: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    by_rows: list[np.ndarray] = []
    by_queries: list[np.ndarray] = []
    wanted = read_segments(list(segments)) if reads_only else segments
    for s, to in zip(segments, wanted, strict=True):
        first = s.positions - to.positions
        across = s.positions < BY_ROWS_BELOW or (reads_only and min(rows, s.rows) >= ROWS_FROM)
        if across:
            pair, position, row = _axes(s.pairs, range(first, s.positions), range(0, s.rows, rows))
            count = np.minimum(rows, s.rows - row)
        else:
            pair, position, row = _axes(s.pairs, range(first, s.positions, queries), s.rows)
            count = np.minimum(queries, s.positions - position)
        own = s.token + pair * (s.positions * s.rows) + row
        token = own + position * s.rows
        out = to.token + (pair * to.positions + position - first) * s.rows + row
        base, start = s.base + pair * s.length, s.length - s.positions
        branches = s.fork or (s.length, s.length)
        table = _columns(token, out, own, count, s.rows, base, start, start + position, *branches)
        (by_rows if across else by_queries).append(table)
    return _to_device(by_rows, 10, device), _to_device(by_queries, 10, device)


def _axes(*sizes: int | range) -> list[np.ndarray]:
    """Coordinates of a dense grid, one array for each axis, that broadcast against each other."""
    return list(np.ix_(*(np.arange(s) if isinstance(s, int) else np.array(s) for s in sizes)))


def _columns(*columns: np.ndarray | int) -> np.ndarray:
    """Columns of any broadcastable shapes as a table [tile, column]."""
    return np.stack([c.ravel() for c in np.broadcast_arrays(*columns)], axis=1)


def _to_device(parts: list[np.ndarray], columns: int, device: torch.device) -> Tensor:
    whole = np.concatenate([np.empty((0, columns)), *(p.reshape(-1, columns) for p in parts)])
    return upload(whole.astype(np.int32), device)
