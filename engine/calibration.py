"""What things take on this machine: a small piece of a plan, carried out by the engine itself and timed.

The piece is some rows of some pairs through at most three layers: rows enter in the first, pass through the
second, and are read after the third. Done in two sizes, it tells what a block, a token or a row takes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.costs import layer_parameters
from deltapatch.engine.job import Job
from deltapatch.engine.layout import Layout, how_many_blocks
from deltapatch.engine.patches import WHOLE, PatchTable
from deltapatch.engine.plan import Plan
from deltapatch.engine.planner import first_positions, join, take
from deltapatch.engine.readout import ReadOut
from deltapatch.engine.wavefront import Wavefront
from deltapatch.engine.work import Work
from deltapatch.engine.workers import Map
from deltapatch.kernels.product import Precision
from deltapatch.kernels.readout import BaseReadout
from deltapatch.models.weights import EndWeights

LAYERS = 3
_FLOPS = {"cpu": 2e10, "cuda": 4e12}  # that a layer of the larger piece takes, more or less
_BLOCKS = 2  # of each thread in the larger piece, where the plan has as many
_SMALLER = 8  # times, the smaller piece
_STARTS = 4  # positions of a pair that rows are taken from
_QUICK = 0.2  # seconds: a piece that takes less is timed again
_READ = 1 << 28  # bytes that are read to see how fast a file is


@dataclass(frozen=True)
class Line:
    """Seconds of work that grow with a count: of each call, and of each thing."""

    call: float = 0.0
    each: float = 0.0

    def __call__(self, n: Any, calls: Any = 1) -> Any:
        """Of so many things in so many calls."""
        return self.call * calls + self.each * n

    @staticmethod
    def through(small: "Amount", large: "Amount") -> "Line":
        """The line that explains two measurements, with nothing negative."""
        if large.n <= small.n:
            return Line(0.0, large.seconds / large.n) if large.n else Line()
        determinant = small.calls * large.n - large.calls * small.n
        if determinant > 0:
            call = (small.seconds * large.n - large.seconds * small.n) / determinant
            each = (small.calls * large.seconds - large.calls * small.seconds) / determinant
            if call >= 0 and each >= 0:
                return Line(call, each)
        return Line(0.0, large.seconds / large.n)


@dataclass
class Amount:
    """Seconds of work, and of how many things in how many calls."""

    n: float = 0
    calls: float = 0
    seconds: float = 0.0

    def add(self, n: float, calls: float, seconds: float) -> None:
        """One more measurement."""
        self.n, self.calls, self.seconds = self.n + n, self.calls + calls, self.seconds + seconds


@dataclass(frozen=True)
class Rates:
    """Seconds, of one thread where several share a thing.

    Attributes:
        threads: that share it.
        weights: a layer's: to convert, whatever else rows find ready.
        unpatched: a block of base tokens, and each of these, in a layer.
        rows, last: a block of rows in flight, and each token of it, in a layer and in the last one.
        entering: the same of rows that enter.
        distribution: the output distributions of some pairs, and of each.
        read_out: a block of rows that are read, and each of these.
        layer, whole: what nobody shares, of a layer and of a pass, and of each row there.
        table: to make the interventions of a pair, and each of them.
        reading: of a layer, from the file, where it is streamed; of the ends.
        first: what the first pass of a process takes more.
    """

    threads: int
    weights: float
    unpatched: Line
    rows: Line
    last: Line
    entering: Line
    distribution: Line
    read_out: Line
    layer: Line
    whole: Line
    table: Line
    reading: float
    reading_ends: float
    first: float


def calibrate(job: Job, work: Work, plan: Plan, precision: Precision, each: Map) -> Rates:
    """Time a piece of a plan.

    Args:
        job, work, plan: whose; the job's model may have random weights.
        precision: that the work is expected to take.
        each: does blocks, as in the run itself.
    """
    small_size, size = _sizes(job, plan, each.count)
    piece = partial(_timed, job, work, precision, Map(each.pool, each.count))
    began = _now(job)
    small = piece(small_size)
    first = _now(job) - began
    began = _now(job)
    again = piece(small_size)
    warm = _now(job) - began
    small = small.faster(again)
    large = piece(size)
    if large.total < _QUICK:
        large = large.faster(piece(size))
        small = small.faster(piece(small_size))
    reading, reading_ends = _reading(job)
    return Rates(
        threads=each.count,
        weights=min(small.weights, large.weights),
        **{name: Line.through(small.amounts[name], large.amounts[name]) for name in large.amounts},
        reading=reading,
        reading_ends=reading_ends,
        first=max(0.0, first - warm),
    )


@dataclass(frozen=True)
class _Size:
    base_tokens: int
    row_tokens: int
    reads: int  # rows that are read
    length: int  # of a prompt, at most


def _sizes(job: Job, plan: Plan, threads: int) -> tuple[_Size, _Size]:
    """Of the smaller and the larger piece: as a layer of the plan, but not more than takes a moment."""
    most = int(_flops(job) / (2 * layer_parameters(job.model.spec)))
    tokens = int(plan.in_flight.sum() / len(plan.in_flight) / len(plan.passes))
    entering = int(plan.entering.max() / len(plan.passes))
    rows = min(max(tokens, entering, 1), _BLOCKS * threads * job.backend.block_tokens, most)
    runs = 2 + (job.partner is not None)
    base = min(int(np.mean([used.base_tokens for used in plan.passes])), max(1, most // runs))
    spec, length = job.model.spec, max(2, base)
    reads = int(_flops(job) / (2 * spec.d_model * spec.d_vocab))
    reads = min(plan.rows // len(plan.passes), _BLOCKS * threads * job.backend.block_tokens, reads)
    return (
        _Size(base // _SMALLER, max(1, rows // _SMALLER), reads // _SMALLER, length),
        _Size(base, rows, reads, length),
    )


def _flops(job: Job) -> float:
    return _FLOPS.get(job.model.device.type, _FLOPS["cpu"])


class _Piece:
    """What one piece took."""

    def __init__(self) -> None:
        names = (
            "unpatched",
            "rows",
            "last",
            "entering",
            "distribution",
            "read_out",
            "layer",
            "whole",
            "table",
        )
        self.amounts = {name: Amount() for name in names}
        self.weights = self.total = 0.0

    def faster(self, other: "_Piece") -> "_Piece":
        """The same piece timed twice: of everything the shorter time."""
        for name, amount in self.amounts.items():
            amount.seconds = min(amount.seconds, other.amounts[name].seconds)
        self.weights, self.total = min(self.weights, other.weights), min(self.total, other.total)
        return self


def _timed(job: Job, work: Work, precision: Precision, each: Map, size: _Size) -> _Piece:
    """Carry a piece out."""
    found = _Piece()
    spec = job.model.spec
    excerpt = job.model.first_layers(LAYERS)
    numbers = _some_pairs(job, work, size)
    pairs, length = list(job.pairs), job.length.copy()
    parts = []
    for i in numbers:
        began = _now(job)
        table, out = work.table_of(i)
        found.amounts["table"].add(table.n_rows, 1, _now(job) - began)
        cut_off = max(0, int(length[i]) - size.length)
        own = job.pairs[i]
        pairs[i] = replace(own, clean=own.clean[cut_off:], corrupted=own.corrupted[cut_off:])
        length[i] -= cut_off
        table = _through(table, spec.n_layers, excerpt.spec.n_layers, cut_off)
        rows = _some_rows(table, int(length[i]), size.row_tokens // len(numbers))
        parts.append((i, take(table, rows), out[rows]))
    partner = None if job.partner is None else np.arange(len(pairs))
    mine = replace(job, model=excerpt, pairs=pairs, length=length, partner=partner)
    began = _now(job)
    part = join(parts, length, share_lengths=False)
    prompts = mine._prompts(part.pairs)
    wavefront = _Timed(
        found, size.reads, excerpt, prompts, part.table, job.measured, precision, job.backend, each
    )
    wavefront.run()
    found.total = _now(job) - began
    wavefront.tell(found.total)
    return found


def _some_pairs(job: Job, work: Work, size: _Size) -> list[int]:
    """Pairs that lie evenly among the tokens of all."""
    length = np.minimum(job.length[work.order], size.length)
    n = max(1, min(len(work.order), int(size.base_tokens / length.mean())))
    ends = np.cumsum(length)
    at = np.searchsorted(ends, (np.arange(n) + 0.5) / n * ends[-1])
    return [work.order[i] for i in np.unique(at).tolist()]


def _through(table: PatchTable, n_layers: int, n_kept: int, cut_off: int) -> PatchTable:
    """The same rows in an excerpt: they enter in its first layer, but for those of the model's last one."""
    layer = np.where(table.layer == n_layers - 1, n_kept - 1, np.minimum(table.layer, 0))
    return replace(table, layer=layer, position=(table.position - cut_off).clip(0))


def _some_rows(table: PatchTable, length: int, tokens: int) -> np.ndarray:
    """Rows with about so many tokens in all, from a few positions that lie evenly among them, ascending."""
    first = first_positions(table)
    last = table.layer.max(initial=0)
    early = np.full(table.n_rows, True)
    early[table.row[table.layer == last]] = last == table.layer.min(initial=0)
    rows = np.flatnonzero((first < length) & early)
    if not len(rows):
        return np.arange(min(1, table.n_rows))
    starts, counts = np.unique(first[rows], return_counts=True)
    weight = np.cumsum((length - starts) * counts)
    n = max(1, min(_STARTS, len(starts), tokens // int(max(1, (length - starts).mean()))))
    chosen = np.unique(np.searchsorted(weight, (np.arange(n) + 0.5) / n * weight[-1]))
    out = []
    for start in starts[chosen].tolist():
        here = rows[first[rows] == start]
        many = max(1, tokens // (len(chosen) * (length - start)))
        out.append(here[:: max(1, len(here) // many)][:many])
    return np.sort(np.concatenate(out))


class _Timed(Wavefront):
    """A wavefront that says what it took. It prepares a layer only when it is asked for."""

    def __init__(self, found: _Piece, reads: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.found, self.reads = found, reads
        self.prepared: list[tuple[float, float]] = []  # [layer], seconds of all, and of the unpatched runs
        self.advanced = self.through = self.read = 0.0
        self._runs = 0.0
        for name in ("base", "sources"):
            setattr(self.unpatched, name, self._adding(getattr(self.unpatched, name)))

    def _adding(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = self._now()
            result = work(*arguments)
            self._runs += self._now() - began
            return result

        return timed

    def _now(self) -> float:
        return _now(self)

    def _prepare(self, l: int, *arguments: Any, **named: Any) -> Any:
        self._runs, began = 0.0, self._now()
        ready = super()._prepare(l, *arguments, **named)
        self.prepared.append((self._now() - began, self._runs))
        return ready

    def _advance(self, ready: Any, l: int, parts: list[tuple[int, Layout]], *arguments: Any) -> None:
        began = self._now()
        super()._advance(ready, l, parts, *arguments)
        seconds = self._now() - began
        self.advanced += seconds
        blocks = sum(len(layout.blocks) for _, layout in parts)
        if not blocks:
            return
        # Of a layer where rows are in flight and others enter, most is of those in flight.
        whole = parts[0][1]
        name = "entering" if not whole.n_tokens else "last" if ready.here.last else "rows"
        assert parts[0][0] == WHOLE
        tokens = whole.n_tokens or sum(layout.n_tokens for _, layout in parts)
        self.found.amounts[name].add(tokens, blocks, seconds * min(blocks, self.each.count))

    def _through_layers(self, *arguments: Any) -> Any:
        began = self._now()
        result = super()._through_layers(*arguments)
        self.through = self._now() - began
        return result

    def _reader(self) -> ReadOut:
        mine = (self.model, self.prompts, self.shapes, self.measured, self.precision, self.ops, self.each)
        return _TimedReadOut(self, *mine)

    def tell(self, total: float) -> None:
        """Add up what was taken; `total` is that of the pass with all that goes with it."""
        amounts, n_rows, n_layers = self.found.amounts, self.rows.patches.n_rows, len(self.prepared)
        later = self.prepared[1:] or self.prepared
        self.found.weights = min(all_ - runs for all_, runs in later)
        segments = len(self.shapes.segments(1, self.ops.block_tokens))
        for _, runs in later:
            busy = min(segments, self.each.count)
            amounts["unpatched"].add(self.shapes.n_tokens, segments, runs * busy)
        spent = sum(all_ for all_, _ in self.prepared) + self.advanced
        amounts["layer"].add(n_rows * n_layers, n_layers, max(0.0, self.through - spent))
        amounts["whole"].add(n_rows, 1, max(0.0, total - self.through - self.read))


class _TimedReadOut(ReadOut):
    def __init__(self, wavefront: _Timed, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.wavefront = wavefront

    def read(
        self, ends: EndWeights, x: Tensor, dx: Tensor, rows: Tensor, pair: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read every row as often as it takes to have so many."""
        times = max(1, self.wavefront.reads // max(1, len(rows)))
        rows, pair = rows.repeat_interleave(times, 0), np.repeat(pair, times)
        began, self.distributions = _now(self), 0.0
        found, unpatched = super().read(ends, x, dx, rows, pair)
        seconds = _now(self) - began
        self.wavefront.read = seconds
        amounts = self.wavefront.found.amounts
        blocks = how_many_blocks(len(rows), self.ops.block_tokens, spread=False)
        rest = max(0.0, seconds - self.distributions)
        amounts["read_out"].add(len(rows), blocks, rest * self.each.count)
        amounts["distribution"].add(len(self.shapes.length), 1, self.distributions * self.each.count)
        return found[:, ::times], unpatched

    def _unpatched(self, *arguments: Any) -> tuple[BaseReadout, Tensor]:
        began = _now(self)
        result = super()._unpatched(*arguments)
        self.distributions += _now(self) - began
        return result


def _reading(job: Job) -> tuple[float, float]:
    """Seconds to read a layer of a streamed model, and its ends, as its file is found now."""
    if not job.model.stream:
        return 0.0, 0.0
    began = _now(job)
    done, layer, ends = job.model.read_some(_READ)
    rate = (_now(job) - began) / max(1, done)
    return layer * rate, ends * rate


def _now(of: Any) -> float:
    """The time when a GPU has done all that it was asked for."""
    if of.model.device.type == "cuda":
        torch.cuda.synchronize(of.model.device)
    return time.perf_counter()
