"""The planner: cuts interventions into passes that keep within a memory budget, and a few minutes."""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from deltapatch.engine.costs import layer_parameters
from deltapatch.engine.limit import Limit
from deltapatch.engine.patches import PatchTable
from deltapatch.errors import DeltapatchError
from deltapatch.kernels import attention, readout, readout_triton
from deltapatch.kernels.product import Precision
from deltapatch.models.model import Model


@dataclass(frozen=True)
class Pass:
    """What goes through the layers together.

    Attributes:
        pairs: numbers of the pairs whose runs it needs, ordered by length.
        table: the interventions, with pairs counted within `pairs`.
        out: [row], where the effects go.
    """

    pairs: list[int]
    table: PatchTable
    out: np.ndarray


@dataclass(frozen=True)
class Costs:
    """What things cost in memory, in bytes. Upper estimates: a test holds them against the real peak.

    Attributes:
        fixed: one layer's converted weights, the ends, and the workspace of a block.
        pair: a pair's output distribution.
        base_token: a token of a pair's prompts: the activations of two layers, of base and source runs.
        row_token: a token of a row in flight, in this layer's packing and the next's.
        row: the bookkeeping of a row.
    """

    fixed: int
    pair: int
    base_token: int
    row_token: int
    row: int

    @classmethod
    def of(
        cls, model: Model, precision: Precision, block_tokens: int, n_sources: int, length: int, threads: int
    ) -> "Costs":
        """The costs of a sweep of this model, with prompts of at most `length` tokens.

        Args:
            threads: how many blocks are worked on at once (`Map.count`).
        """
        spec = model.spec
        size = precision.base.itemsize
        layer, ends = layer_parameters(spec), 2 * spec.d_vocab * spec.d_model
        fixed = 0
        if model.dtype.itemsize != size:
            fixed += (2 * layer + ends) * size  # the next layer is prepared while the rows pass through one
        on_gpu = model.device.type == "cuda"
        if precision.name not in ("fp64", "fp32"):
            # Elsewhere than on a GPU what is rounded may be kept in float32.
            fixed += (2 * layer + ends // 2) * (precision.operand.itemsize if on_gpu else size)
        # Activations of one token in one layer, and a few copies of the widest.
        widths = 8 * spec.d_model + (3 + spec.gated) * spec.d_mlp + 6 * spec.n_heads * spec.d_head
        # Each thread has a block of its own, a GPU one after the other, with copies of the widest activations
        # and of attention's logits; the read-out holds logit changes, in float64 too, and expm1 of them.
        held = readout_triton.CELLS if on_gpu else readout.CELLS
        tokens = block_tokens * 3 // 2 + length
        cells = min(tokens * spec.n_heads * length, max(attention.CELLS, tokens * length))
        step = (tokens * widths + 6 * cells) * size
        # Half as much again stays with each thread's allocator.
        fixed += threads * max(step, 3 * held * (size + 8)) * 3 // 2
        fixed += 3 * spec.d_model * spec.d_mlp * size  # entries of neurons: columns, transposed and gathered
        return cls(fixed, spec.d_vocab * (3 * size + 40), 2 * (1 + n_sources) * widths * size,
                   2 * spec.d_model * size, 400)  # fmt: skip

    def total(self, pairs: int, base_tokens: int, row_tokens: int, rows: int) -> int:
        """Bytes of a pass."""
        return (
            self.fixed
            + pairs * self.pair
            + base_tokens * self.base_token
            + row_tokens * self.row_token
            + rows * self.row
        )


def default_budget(device: torch.device | None = None) -> int:
    """A quarter of the memory that is free now, at most 4 GiB: more makes passes no faster.

    On a GPU it is half of what is free there: the more rows in a pass, the fuller its products.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        free = 8 << 30
    return min(free // 4, 4 << 30)


def cut(
    tables: Iterable[tuple[int, PatchTable, np.ndarray]],
    length: np.ndarray,
    costs: Costs,
    budget: int,
    share_lengths: bool,
    limit: Limit | None = None,
) -> Iterator[Pass]:
    """Cut interventions into passes.

    Args:
        tables: (pair, its interventions, where their effects go), ordered by the pairs' lengths.
        length: [pair], of all pairs.
        costs: of memory.
        budget: bytes.
        share_lengths: a pass needs the runs of all pairs of a length (source "mean").
        limit: of the work of a pass, if there is one.

    Raises:
        DeltapatchError: not even one intervention fits.
    """
    held: list[tuple[int, PatchTable, np.ndarray]] = []
    used = _Used()

    def with_pair(used: _Used, pair: int) -> _Used:
        """What is used once a pair's runs are carried too, before any of its rows."""
        same = int((length == length[pair]).sum()) if share_lengths else 1
        if share_lengths and int(length[pair]) in used.lengths:
            same = 0
        return _Used(
            used.pairs + same,
            used.base_tokens + same * int(length[pair]),
            used.row_tokens,
            used.rows,
            used.work,
            used.lengths | {int(length[pair])},
        )

    def too_much(used: _Used) -> bool:
        """Whether a pass has to end before that."""
        if used.bytes(costs) > budget:
            return True
        if limit is None:
            return False
        unpatched = limit.of_unpatched(used.pairs, used.base_tokens)
        return used.work > (limit.most_beside(unpatched) if share_lengths else limit.most - unpatched)

    for pair, table, out in tables:
        tokens = (length[pair] - first_positions(table)).clip(0)  # patches may lie behind the read-out
        work = np.zeros(len(tokens)) if limit is None else limit.of_rows(table, tokens)  # [row]
        after = with_pair(used, pair).plus(tokens, work)
        if held and too_much(after):
            yield _join(held, length, share_lengths)
            held, used = [], _Used()
            after = with_pair(used, pair).plus(tokens, work)
        room = budget - with_pair(used, pair).bytes(costs)
        each = tokens * costs.row_token + costs.row  # [row], bytes
        longest = int(each.max(initial=0))
        if room < longest:
            least = with_pair(_Used(), pair).bytes(costs) + longest
            raise DeltapatchError(
                f"a memory budget of {budget / 1e6:,.0f} MB is too small: this model and these prompts need "
                f"at least {least / 1e6:,.0f} MB; raise the budget, or shorten the prompts"
            )
        pieces = _pieces(each, room)
        if limit is not None:
            least = with_pair(_Used(), pair)
            most = limit.most_beside(limit.of_unpatched(least.pairs, least.base_tokens))
            if work.sum() > most:
                pieces = _pieces(np.maximum(each / room, work / most), 1)
        if len(pieces) < 2:  # a pair without interventions is run as well: its answers are part of the result
            held.append((pair, table, out))
            used = after
            continue
        for piece in pieces:
            rows = np.arange(piece.start, piece.stop)
            yield _join([(pair, take(table, rows), out[piece])], length, share_lengths)
    if held:
        yield _join(held, length, share_lengths)


@dataclass(frozen=True)
class _Used:
    """What a pass holds so far."""

    pairs: int = 0
    base_tokens: int = 0
    row_tokens: int = 0
    rows: int = 0
    work: float = 0.0
    lengths: frozenset[int] = frozenset()

    def plus(self, tokens: np.ndarray, work: np.ndarray) -> "_Used":
        """With rows of so many tokens and so much work each."""
        return replace(
            self,
            row_tokens=self.row_tokens + int(tokens.sum()),
            rows=self.rows + len(tokens),
            work=self.work + float(work.sum()),
        )

    def bytes(self, costs: Costs) -> int:
        """What that costs."""
        return costs.total(self.pairs, self.base_tokens, self.row_tokens, self.rows)


def first_positions(table: PatchTable) -> np.ndarray:
    """[row], each intervention's first patched position."""
    first = np.full(table.n_rows, np.iinfo(np.int64).max)
    np.minimum.at(first, table.row, table.position)
    return first


def row_layers(table: PatchTable, length: int | np.ndarray, n_layers: int) -> int:
    """Row tokens times the layers that they pass, for prompts of that length (of each row, or of all)."""
    first_layer = np.full(table.n_rows, n_layers)
    np.minimum.at(first_layer, table.row, table.layer)
    return int(((length - first_positions(table)).clip(0) * (n_layers - 1 - first_layer)).sum())


def _pieces(each: np.ndarray, room: int) -> list[slice]:
    """Even runs of rows that each fit into `room`."""
    n = max(1, math.ceil(each.sum() / max(1, room)))
    while True:
        edges = np.searchsorted(np.cumsum(each), np.arange(1, n) * (each.sum() / n)).tolist()
        pieces = [slice(a, b) for a, b in zip([0, *edges], [*edges, len(each)], strict=True) if b > a]
        if all(each[p].sum() <= room for p in pieces) or not pieces:
            return pieces
        n += 1


def take(table: PatchTable, rows: np.ndarray) -> PatchTable:
    """Some interventions; `rows` ascends."""
    number = np.full(table.n_rows, -1)
    number[rows] = np.arange(len(rows))
    new = number[table.row]
    kept = new >= 0
    columns = (getattr(table, f)[kept] for f in ("layer", "place", "position", "index"))
    return PatchTable(len(rows), table.pair[rows], new[kept], *columns)


def _join(parts: list[tuple[int, PatchTable, np.ndarray]], length: np.ndarray, share_lengths: bool) -> Pass:
    """One pass of several pairs' interventions."""
    pairs = [pair for pair, _, _ in parts]
    if share_lengths:
        pairs = np.flatnonzero(np.isin(length, length[pairs])).tolist()
        pairs.sort(key=lambda p: int(length[p]))
    number = {pair: i for i, pair in enumerate(pairs)}
    firsts = np.cumsum([0, *(t.n_rows for _, t, _ in parts)])
    tables = [t for _, t, _ in parts]
    table = PatchTable(
        int(firsts[-1]),
        np.concatenate([np.full(t.n_rows, number[pair]) for pair, t, _ in parts]),
        np.concatenate([t.row + first for t, first in zip(tables, firsts[:-1], strict=True)]),
        *(np.concatenate([getattr(t, f) for t in tables]) for f in ("layer", "place", "position", "index")),
    )
    return Pass(pairs, table, np.concatenate([out for _, _, out in parts]))
