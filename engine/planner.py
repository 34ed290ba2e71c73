"""The planner: cuts interventions into passes that keep within a memory budget."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from deltapatch.engine.memory import Costs
from deltapatch.engine.patches import PatchTable
from deltapatch.errors import DeltapatchError


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


def cut(
    tables: Iterable[tuple[int, PatchTable, np.ndarray]],
    length: np.ndarray,
    costs: Costs,
    budget: int,
    share_lengths: bool,
) -> Iterator[Pass]:
    """Cut interventions into passes.

    Args:
        tables: (pair, its interventions, where their effects go), ordered by the pairs' lengths.
        length: [pair], of all pairs.
        costs: of memory.
        budget: bytes.
        share_lengths: a pass needs the runs of all pairs of a length (source "mean").

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
            used.lengths | {int(length[pair])},
        )

    for pair, table, out in tables:
        tokens = (length[pair] - first_positions(table)).clip(0)  # patches may lie behind the read-out
        after = with_pair(used, pair).plus(tokens)
        if held and after.bytes(costs) > budget:
            yield _join(held, length, share_lengths)
            held, used = [], _Used()
            after = with_pair(used, pair).plus(tokens)
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
    lengths: frozenset[int] = frozenset()

    def plus(self, tokens: np.ndarray) -> "_Used":
        """With rows of so many tokens each."""
        return replace(self, row_tokens=self.row_tokens + int(tokens.sum()), rows=self.rows + len(tokens))

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
    """Even runs of rows that each fit into `room` bytes."""
    n = max(1, -(-int(each.sum()) // max(1, room)))
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
