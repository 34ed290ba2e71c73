"""How long a sweep will take: the counts of its plan, times what things take on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deltapatch.engine.audit import Audit
from deltapatch.engine.calibration import Rates, calibrate
from deltapatch.engine.job import Job
from deltapatch.engine.layout import how_many_blocks
from deltapatch.engine.plan import Plan, plan
from deltapatch.engine.planner import Used
from deltapatch.engine.pool import Map
from deltapatch.engine.prepare import Options
from deltapatch.engine.readout import reads_held
from deltapatch.engine.work import Work
from deltapatch.interventions.grid import Grid, listed, make_grid
from deltapatch.interventions.pairs import PromptPair
from deltapatch.kernels.product import PRECISIONS, Precision
from deltapatch.models.model import Model

_SIZE = 4  # bytes of a number, mostly
_DOUBLE = 2.0  # times as long as in float32 things take in float64


@dataclass(frozen=True)
class Forecast:
    """A plan and what it will take.

    Attributes:
        plan: rows, passes, FLOPs, memory.
        precision: that the sweep is expected to take.
        seconds: by what they are spent on; None where nothing was timed.
    """

    plan: Plan
    precision: str
    seconds: dict[str, float] | None

    @property
    def total(self) -> float | None:
        """Seconds in all."""
        return None if self.seconds is None else sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """For people and programs."""
        found: dict[str, Any] = {**self.plan.as_dict(), "precision": self.precision}
        if self.seconds is not None:
            parts = {name: round(s, 3) for name, s in self.seconds.items()}
            found |= {"predicted_seconds": round(sum(self.seconds.values()), 3), "seconds_by_part": parts}
        return found


def forecast(
    model: Model,
    pairs: Sequence[PromptPair],
    options: Options,
    timed: bool = True,
    kept: bool = True,
) -> Forecast:
    """What a sweep will do, and how long it will take.

    Args:
        model, pairs, options: as for `sweep`.
        timed: carry out a small piece of the plan, for a second or so, to see how fast this machine is.
        kept: the sweep will write a run folder, and plan before it begins.

    Raises:
        DeltapatchError: bad input, as for `sweep`; also a memory budget without room for one intervention.
    """
    return forecasts(model, pairs, [options], timed, kept)[0]


def forecasts(
    model: Model,
    pairs: Sequence[PromptPair],
    options: Sequence[Options],
    timed: bool = True,
    kept: bool = True,
) -> list[Forecast]:
    """The same for several sweeps that differ only in what they patch: one piece of them all is timed."""
    job = Job.of(model, pairs, **options[0].of_job())
    out = []
    with job.at_work() as each:
        rates = None
        if timed:
            sites = [name for one in options for name in listed(one.sites)]
            every = make_grid(sites, options[0].positions, options[0].layers, job.pairs, model.spec)
            work, precision, _ = _expected(job, every)
            rates = calibrate(job, work, plan(job, every, work, precision, each.count), precision, each)
        for one in options:
            grid = make_grid(one.sites, one.positions, one.layers, job.pairs, model.spec)
            work, precision, audit = _expected(job, grid)
            found = plan(job, grid, work, precision, each.count)
            spent = None if rates is None else seconds(job, found, rates, audit, kept)
            out.append(Forecast(found, precision.name, spent))
    return out


def _expected(job: Job, grid: Grid) -> tuple[Work, Precision, Audit]:
    """Of a sweep: its work, the precision that it will probably take, and its audit."""
    work = Work.of_sweep(grid, job)
    audit = Audit(job, work, Map())
    return work, job.precision or audit.expected(), audit


def seconds(job: Job, plan: Plan, rates: Rates, audit: Audit, kept: bool) -> dict[str, float]:
    """What a sweep spends its time on.

    Args:
        job, plan: the sweep.
        rates: of this machine.
        audit: of the sweep.
        kept: it plans before it begins.
    """
    found = _of_passes(job, plan.passes, plan.entering, rates)
    found["tables"] = (2 if kept else 1) * float(rates.table(plan.rows, plan.pairs))
    found["first pass"] = rates.first
    again = audit.expects()
    sample = audit.sample if again else []
    if sample:
        n = sum(table.n_rows for _, table, _ in sample)
        entering = np.zeros_like(plan.entering)
        # Drawn at random, they are patched in the middle on average.
        entering[len(entering) // 2] = n * plan.entering.sum() / max(1, plan.rows)
        used = replace(
            Used().with_runs([job.runs[pair] for pair, _, _ in sample]),
            rows=n,
            row_reads=sum(table.n_rows * job.runs[pair].reads for pair, table, _ in sample),
            row_tokens=int(entering.sum()),
        )
        once = sum(_of_passes(job, [used], entering, rates).values())
        found["noise floor"] = sum(
            once * (_DOUBLE if PRECISIONS[name].base.itemsize == 8 else 1) for name in again
        )
    return found


def _of_passes(job: Job, passes: list[Used], entering: np.ndarray, rates: Rates) -> dict[str, float]:
    """Seconds of passes, among which so many row tokens that enter are shared out; [1 + layer]."""
    on_cpu = job.model.device.type == "cpu"
    pairs, base, rows = (np.array([getattr(p, n) for p in passes]) for n in ("pairs", "base_tokens", "rows"))
    tokens = np.array([p.row_tokens for p in passes], dtype=float)
    share = (tokens / max(1.0, tokens.sum()))[:, None]
    flying, new = share * np.cumsum(entering)[:-1], share * entering[1:]  # [pass, layer]
    threads, block, n_layers = rates.threads, job.backend.block_tokens, len(entering) - 1

    # Of rows in a layer: seconds of one thread, and how many blocks threads share.
    blocks, new_blocks = (
        np.vectorize(lambda n: how_many_blocks(int(n), block, on_cpu) if n >= 1 else 0, otypes=[int])(count)
        for count in (flying, new)
    )
    work = rates.rows(flying, blocks)
    work[:, -1] = rates.last(flying[:, -1], blocks[:, -1])
    work += rates.entering(new, new_blocks)
    busy = np.clip(blocks + new_blocks, 1, threads)

    # Of the unpatched runs: blocks of whole prompts.
    lengths = np.array([len(p.prompts) for p in passes])
    segments = np.maximum(np.ceil(base / np.maximum(block, base / pairs)), lengths)
    runs = rates.unpatched(base, segments)
    ready = rates.weights + runs / np.minimum(segments, threads)  # [pass]
    layer = ready[:, None] + work / busy
    if threads > 1:  # the next layer is prepared meanwhile
        shared = (rates.weights + runs[:, None] + work) / threads
        layer = np.maximum(np.maximum(ready[:, None], work / busy), shared)
    alone = (ready * n_layers).sum()
    waiting = np.maximum(rates.reading - layer, 0).sum()  # for what is read from the file meanwhile
    waiting += len(passes) * (rates.reading + rates.reading_ends)
    runs_read, rows_read = (np.array([getattr(p, n) for p in passes]) for n in ("reads", "row_reads"))
    blocks_read = np.maximum(1, np.round(rows_read / block))
    held = reads_held(job.model.spec.d_vocab, _SIZE, on_cpu)
    reads = rates.distribution(runs_read, np.ceil(runs_read / held)) + rates.read_out(rows_read, blocks_read)
    packing = rates.layer(rows.sum() * n_layers, n_layers * len(passes))
    return {
        "unpatched runs": float(alone),
        "rows": float(max(0.0, layer.sum() - alone) + packing),
        "waiting for the file": float(waiting),
        "read-out": float(reads.sum() / threads),
        "passes": float(rates.whole(rows, 1).sum()),
    }
