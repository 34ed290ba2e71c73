"""What things take on this machine: a small piece of a plan, carried out by the engine itself and timed.

The piece is some rows of some pairs through at most three layers: rows enter in the first, pass through the
second, and are read after the third. Done in two sizes, it tells what a block, a token or a row takes.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from deltapatch.engine.costs import layer_parameters
from deltapatch.engine.job import Job
from deltapatch.engine.plan import Plan
from deltapatch.engine.planner import join
from deltapatch.engine.pool import Map
from deltapatch.engine.timed import Amount, Piece, TimedWavefront, now
from deltapatch.engine.work import Work
from deltapatch.interventions.runs import RunShape
from deltapatch.interventions.table import PatchTable, first_positions, take
from deltapatch.kernels.product import Precision

LAYERS = 3
_FLOPS = {"cpu": 1e10, "cuda": 4e12}  # that a layer of the larger piece takes, more or less
_BLOCKS = 2  # of each thread in the larger piece, where the plan has as many
_SMALLER = 8  # times, the smaller piece
# Tokens of the smaller and the larger piece, where the plan has as many, whatever they take. Reading a matrix
# costs as much as tens of tokens do, so the sizes must lie apart; very few are multiplied in another way.
_FEWEST, _FEW = 8, 32
_STARTS = 4  # positions of a pair that rows are taken from
_QUICK = 0.3  # seconds: a piece that takes less is timed again
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
    began = now(job)
    small, first = piece(small_size), 0.0
    took = now(job) - began
    if took < _QUICK:  # else what a process does only once hardly matters
        began = now(job)
        small = small.faster(piece(small_size))
        first = max(0.0, took - (now(job) - began))
    large = piece(size)
    if large.total < _QUICK:
        large, small = large.faster(piece(size)), small.faster(piece(small_size))
    reading, reading_ends = _reading(job)
    return Rates(
        threads=each.count,
        weights=min(small.weights, large.weights),
        **{name: Line.through(small.amounts[name], large.amounts[name]) for name in large.amounts},
        reading=reading,
        reading_ends=reading_ends,
        first=first,
    )


@dataclass(frozen=True)
class _Size:
    base_tokens: int
    row_tokens: int
    reads: int  # positions that rows are read at
    distributions: int  # that are made of unpatched runs

    @property
    def length(self) -> int:
        """Tokens of a prompt, at most: what is longer is cut off at its beginning."""
        return max(2, self.base_tokens)


def _sizes(job: Job, plan: Plan, threads: int) -> tuple[_Size, _Size]:
    """Of the smaller and the larger piece: as a layer of the plan, but not more than takes a moment."""
    spec, room = job.model.spec, _BLOCKS * threads * job.backend.block_tokens
    in_layer = int(_flops(job) / (2 * layer_parameters(spec)))
    read = int(_flops(job) / (2 * spec.d_model * spec.d_vocab))

    def two(planned: int, room: int, affordable: int) -> tuple[int, int]:
        large = min(planned, room, max(affordable, _FEW))
        return min(large, max(large // _SMALLER, _FEWEST)), large

    runs, passes = 2 + (job.partner is not None), len(plan.passes)
    tokens = int(plan.in_flight.sum() / len(plan.in_flight) / passes)
    rows = two(max(tokens, int(plan.entering.max() / passes), 1), room, in_layer)
    base = two(sum(used.base_tokens for used in plan.passes) // passes, room // runs, in_layer // runs)
    reads = two(sum(used.row_reads for used in plan.passes) // passes, room, read)
    distributions = 1, min(sum(used.reads for used in plan.passes) // passes, _FEWEST)
    small, large = (_Size(base[i], rows[i], reads[i], distributions[i]) for i in range(2))
    return small, large


def _flops(job: Job) -> float:
    return _FLOPS.get(job.model.device.type, _FLOPS["cpu"])


def _timed(job: Job, work: Work, precision: Precision, each: Map, size: _Size) -> Piece:
    """Carry a piece out."""
    found = Piece()
    spec = job.model.spec
    excerpt = job.model.first_layers(LAYERS)
    numbers = _some_pairs(job, work, size)
    pairs, length = list(job.pairs), job.length.copy()
    parts = []
    for i in numbers:
        began = now(job)
        table, out = work.table_of(i)
        found.amounts["table"].add(table.n_rows, 1, now(job) - began)
        cut_off = max(0, int(length[i]) - size.length)
        own = job.pairs[i]
        pairs[i] = replace(own, clean=own.clean[cut_off:], corrupted=own.corrupted[cut_off:])
        length[i] -= cut_off
        table = _through(table, spec.n_layers, excerpt.spec.n_layers, cut_off)
        run = job.continued[i].shape(int(length[i]))
        rows = _some_rows(table, run, size.row_tokens // len(numbers))
        parts.append((i, take(table, rows), out[rows]))
    partner = None if job.partner is None else np.arange(len(pairs))
    mine = replace(job, model=excerpt, pairs=pairs, length=length, partner=partner)
    began = now(job)
    part = join(parts, mine.runs, share_lengths=False)
    prompts = mine.prompts(part.pairs)
    wavefront = TimedWavefront(
        found,
        size.reads,
        size.distributions,
        excerpt,
        prompts,
        part.table,
        job.measured,
        precision,
        job.backend,
        each,
    )
    wavefront.run()
    found.total = now(job) - began
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


def _some_rows(table: PatchTable, run: RunShape, tokens: int) -> np.ndarray:
    """Rows with about so many tokens in all, from a few positions that lie evenly among them, ascending."""
    first = first_positions(table)
    last = table.layer.max(initial=0)
    early = np.full(table.n_rows, True)
    early[table.row[table.layer == last]] = last == table.layer.min(initial=0)
    rows = np.flatnonzero((first < run.prompt) & early)
    if not len(rows):
        return np.arange(min(1, table.n_rows))
    starts, counts = np.unique(first[rows], return_counts=True)
    weight = np.cumsum((run.length - starts) * counts)
    n = max(1, min(_STARTS, len(starts), tokens // int(max(1, (run.length - starts).mean()))))
    chosen = np.unique(np.searchsorted(weight, (np.arange(n) + 0.5) / n * weight[-1]))
    out = []
    for start in starts[chosen].tolist():
        here = rows[first[rows] == start]
        many = max(1, tokens // (len(chosen) * (run.length - start)))
        out.append(here[:: max(1, len(here) // many)][:many])
    return np.sort(np.concatenate(out))


def _reading(job: Job) -> tuple[float, float]:
    """Seconds to read a layer of a streamed model, and its ends, as its file is found now."""
    if not job.model.stream:
        return 0.0, 0.0
    began = now(job)
    done, layer, ends = job.model.read_some(_READ)
    rate = (now(job) - began) / max(1, done)
    return layer * rate, ends * rate
