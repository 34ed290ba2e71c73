"""The planner: cuts interventions into passes that keep within a memory budget, and a few minutes."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from deltapatch.arguments import at_least_bytes, at_most_bytes
from deltapatch.engine.planning.limit import Limit
from deltapatch.engine.planning.memory import Costs
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.runs import RunShape
from deltapatch.interventions.table import PatchTable, first_layers, row_tokens, take


@dataclass(frozen=True)
class Pass:
    """What goes through the layers together.

    Attributes:
        pairs: numbers of the pairs whose runs it needs, in the order of their shapes.
        table: the interventions, with pairs counted within `pairs`.
        out: [row], where the effects go.
    """

    pairs: list[int]
    table: PatchTable
    out: np.ndarray


def cut(
    tables: Iterable[tuple[int, PatchTable, np.ndarray]],
    runs: Sequence[RunShape],
    costs: Costs,
    budget: int,
    share_lengths: bool,
    limit: Limit | None = None,
    few: bool = False,
) -> Iterator[Pass]:
    """Cut interventions into passes.

    Args:
        tables: (pair, its interventions, where their effects go), in the order of the pairs' shapes.
        runs: [pair], the shapes of all pairs.
        costs: of memory.
        budget: bytes.
        share_lengths: a pass needs the runs of all pairs with a prompt of one length (source "mean").
        limit: of the work of a pass, if there is one.
        few: see `cut_rows`.

    Raises:
        DeltapatchError: not even one intervention fits.
    """
    known: dict[int, tuple[PatchTable, np.ndarray]] = {}

    def rows_of() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for pair, table, out in tables:
            known[pair] = table, out
            yield pair, row_tokens(table, runs[pair]), first_layers(table)

    for part, _ in cut_rows(rows_of(), runs, costs, budget, share_lengths, limit, few):
        parts = []
        for pair, rows in part:
            table, out = known[pair]
            whole = rows.stop - rows.start == table.n_rows
            some = table if whole else take(table, np.arange(rows.start, rows.stop))
            parts.append((pair, some, out[rows]))
            if rows.stop >= table.n_rows:
                del known[pair]
        yield join(parts, runs, share_lengths)


def cut_rows(
    rows: Iterable[tuple[int, np.ndarray, np.ndarray]],
    runs: Sequence[RunShape],
    costs: Costs,
    budget: int,
    share_lengths: bool,
    limit: Limit | None = None,
    few: bool = False,
) -> Iterator[tuple[list[tuple[int, slice]], "Used"]]:
    """Cut rows into passes: which rows of which pairs go together, and what that holds.

    Args:
        rows: (pair, [row] how many tokens it has, [row] its first patched layer), in the order of the pairs'
            shapes.
        runs, costs, budget, share_lengths, limit: as for `cut`.
        few: make passes as few as can be, though a pair's prompts are run in two of them. Else a pair is cut
            only where it does not fit by itself, into even pieces.

    Raises:
        DeltapatchError: not even one row fits.
    """
    held: list[tuple[int, slice]] = []
    used = Used()
    alike: dict[int, list[RunShape]] = {}
    for run in runs if share_lengths else ():
        alike.setdefault(run.prompt, []).append(run)

    def with_pair(used: Used, pair: int) -> Used:
        """What is used once a pair's runs are carried too, before any of its rows."""
        run = runs[pair]
        same = alike[run.prompt] if share_lengths else [run]
        return used.with_runs([] if share_lengths and run.prompt in used.prompts else same)

    def room_in(used: Used) -> tuple[float, float]:
        """Bytes and work that are left."""
        left = budget - used.bytes(costs)
        if limit is None:
            return left, math.inf
        unpatched = limit.of_unpatched(used.reads, used.base_tokens)
        most = limit.most_beside(unpatched) if share_lengths else limit.most - unpatched
        return left, most - used.work

    for pair, tokens, first_layer in rows:
        # (1) What each row of the pair takes. One that fits no pass by itself is a sentence for the user.
        reads = runs[pair].reads
        bytes_of = tokens * costs.row_token + reads * costs.row  # [row]
        work = np.zeros(len(tokens)) if limit is None else limit.of_rows(tokens, first_layer, reads)  # [row]
        longest = int(bytes_of.max(initial=0))
        alone = with_pair(Used(), pair)
        if budget - alone.bytes(costs) < longest:
            least = alone.bytes(costs) + longest
            raise DeltapatchError(
                f"a memory budget of {at_most_bytes(budget)} is too small: this model and these prompts need "
                f"at least {at_least_bytes(least)}; raise the budget, or shorten the prompts"
            )
        ends = [np.concatenate([[0], np.cumsum(a)]) for a in (bytes_of, work)]
        done = 0
        while few and held and done < len(tokens):
            # (2) Of few passes, what fits of this pair fills the one that is under way, and ends it.
            room = room_in(with_pair(used, pair))
            fits = min(
                int(np.searchsorted(end, end[done] + left, side="right")) - 1
                for end, left in zip(ends, room, strict=True)
            )
            if fits >= len(tokens):
                break
            if fits > done:
                held.append((pair, slice(done, fits)))
                used = with_pair(used, pair).plus(tokens[done:fits], reads, work[done:fits])
                done = fits
            yield held, used
            held, used = [], Used()
        # (3) What is left of the pair joins the pass under way where all of it fits; else that pass ends.
        left = slice(done, len(tokens))
        after = with_pair(used, pair).plus(tokens[left], reads, work[left])
        if held and min(room_in(after)) < 0:
            yield held, used
            held, used = [], Used()
            after = with_pair(used, pair).plus(tokens[left], reads, work[left])
        # (4) Where the pair is too much for a pass of its own, it is cut into pieces, by bytes and by work.
        room_for_bytes = budget - with_pair(used, pair).bytes(costs)
        pieces = _pieces(bytes_of[left], room_for_bytes, few)
        if limit is not None:
            most = limit.most_beside(limit.of_unpatched(alone.reads, alone.base_tokens))
            if work[left].sum() > most:
                pieces = _pieces(np.maximum(bytes_of[left] / room_for_bytes, work[left] / most), 1, few)
        if len(pieces) < 2:  # a pair without interventions is run as well: its answers are part of the result
            held.append((pair, slice(done, len(tokens))))
            used = after
            continue
        # (5) Every piece is a pass; of few passes, the last one stays open for the next pair.
        for piece in pieces:
            held = [(pair, slice(done + piece.start, done + piece.stop))]
            used = alone.plus(tokens[left][piece], reads, work[left][piece])
            if piece is not pieces[-1] or not few:
                yield held, used
                held, used = [], Used()
    if held:
        yield held, used


@dataclass(frozen=True)
class Used:
    """What a pass holds.

    Attributes:
        pairs, reads, base_tokens: of the unpatched runs; a run is read at one position or several.
        rows, row_reads, row_tokens, work: of the interventions.
        prompts: lengths of the prompts.
    """

    pairs: int = 0
    reads: int = 0
    base_tokens: int = 0
    rows: int = 0
    row_reads: int = 0
    row_tokens: int = 0
    work: float = 0.0
    prompts: frozenset[int] = frozenset()

    def with_runs(self, runs: Sequence[RunShape]) -> "Used":
        """With these runs more."""
        return replace(
            self,
            pairs=self.pairs + len(runs),
            reads=self.reads + sum(run.reads for run in runs),
            base_tokens=self.base_tokens + sum(run.tokens for run in runs),
            prompts=self.prompts | {run.prompt for run in runs},
        )

    def plus(self, tokens: np.ndarray, reads: int, work: np.ndarray) -> "Used":
        """With rows of so many tokens and so much work each, read at so many positions."""
        return replace(
            self,
            rows=self.rows + len(tokens),
            row_reads=self.row_reads + reads * len(tokens),
            row_tokens=self.row_tokens + int(tokens.sum()),
            work=self.work + float(work.sum()),
        )

    def bytes(self, costs: Costs) -> int:
        """What that costs."""
        return costs.total(self.reads, self.base_tokens, self.row_tokens, self.row_reads)


def _pieces(sizes: np.ndarray, room: int, few: bool) -> list[slice]:
    """Runs of rows that each fit into `room`: even ones, or `few` full ones."""
    if few:
        ends, edges = np.concatenate([[0], np.cumsum(sizes)]), [0]
        while edges[-1] < len(sizes):
            edges.append(int(np.searchsorted(ends, ends[edges[-1]] + room, side="right")) - 1)
        return [slice(a, b) for a, b in pairwise(edges)]
    n = max(1, math.ceil(sizes.sum() / max(1, room)))
    while True:
        cuts = np.searchsorted(np.cumsum(sizes), np.arange(1, n) * (sizes.sum() / n)).tolist()
        pieces = [slice(a, b) for a, b in pairwise([0, *cuts, len(sizes)]) if b > a]
        if all(sizes[p].sum() <= room for p in pieces) or not pieces:
            return pieces
        n += 1


def join(
    parts: list[tuple[int, PatchTable, np.ndarray]], runs: Sequence[RunShape], share_lengths: bool
) -> Pass:
    """One pass of several pairs' interventions."""
    pairs = [pair for pair, _, _ in parts]
    if share_lengths:
        prompts = {runs[pair].prompt for pair in pairs}
        pairs = [pair for pair, run in enumerate(runs) if run.prompt in prompts]
        pairs.sort(key=lambda p: runs[p].order)
    number = {pair: i for i, pair in enumerate(pairs)}
    firsts = np.cumsum([0, *(t.n_rows for _, t, _ in parts)])
    tables = [t for _, t, _ in parts]
    table = PatchTable(
        int(firsts[-1]),
        np.concatenate([np.full(t.n_rows, number[pair]) for pair, t, _ in parts]),
        np.concatenate([t.row + first for t, first in zip(tables, firsts[:-1], strict=True)]),
        *(np.concatenate(parts) for parts in zip(*(t.columns(slice(None)) for t in tables), strict=True)),
    )
    return Pass(pairs, table, np.concatenate([out for _, _, out in parts]))
