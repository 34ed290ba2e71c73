"""Passes: a question's interventions, cut to fit the memory, and what carrying one out finds."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from deltapatch.engine.planning.limit import Limit
from deltapatch.engine.planning.memory import Costs
from deltapatch.engine.planning.planner import Pass, cut
from deltapatch.engine.question import Decided, Question, Tables
from deltapatch.engine.wavefront.loop import Wavefront
from deltapatch.engine.wavefront.pool import Pool, workers
from deltapatch.engine.wavefront.prompts import prompts_of
from deltapatch.engine.wavefront.setup import PassResult, Setup
from deltapatch.engine.wavefront.wired import WiredPass, wired_workspace
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.edges import EdgeGrid, decode
from deltapatch.interventions.given import Listed
from deltapatch.interventions.grid import Grid
from deltapatch.interventions.table import row_layers
from deltapatch.interventions.wirings import Wirings
from deltapatch.kernels.product import Precision
from deltapatch.models.surroundings import undisturbed
from deltapatch.results.measured import PassEffects


@contextmanager
def at_work(question: Question) -> Iterator[Pool]:
    """PyTorch as it is with nothing switched on, and threads; all that computes does so within."""
    with undisturbed(question.model.device), workers(question.model.device) as pool:
        yield pool


def passes(question: Question, decided: Decided, pool: Pool, tables: Tables | None = None) -> Iterator[Pass]:
    """The passes of a question, or of some of its interventions, in the order of the pairs' shapes.

    Raises:
        DeltapatchError: the memory budget has no room for one intervention.
    """
    return cut(
        question.tables() if tables is None else tables,
        question.runs,
        memory_costs(question, decided, pool.count),
        decided.memory_budget,
        question.shares_means,
        work_limit(question, pool.count),
        decided.stream,
    )


def memory_costs(question: Question, decided: Decided, threads: int) -> Costs:
    """What things cost in memory, with so many blocks at once."""
    asked, spec = question.interventions, question.model.spec
    senders = 0
    if isinstance(asked, EdgeGrid):
        senders = len(asked.senders)
    elif isinstance(asked, Wirings):
        senders = asked.nodes.n_senders
    elif isinstance(asked, Listed) and asked.nodes is not None:
        senders = len(np.unique(decode(asked.nodes, asked.table_of_all.index)[0]))
    found = Costs.of(
        question.model,
        decided.precision,
        question.backend.block_tokens,
        n_sources=question.n_sources,
        length=max(max(run.length, run.beside) for run in question.runs),
        threads=threads,
        places=asked.places,
        against_base=question.options.source in ("zero", "mean"),
        stream=decided.stream,
        apart=any(run.beside for run in question.runs),
        n_senders=senders,
    )
    found = replace(found, fixed=found.fixed + question.means_bytes)  # which every pass holds
    if isinstance(asked, Listed | Grid):  # every pass holds what its patches are given
        given = sum(array.size for array in asked.vectors.arrays) * decided.precision.base.itemsize
        features = asked.vectors.features
        found = replace(found, fixed=found.fixed + given + (0 if features is None else features.n_bytes))
    if isinstance(asked, Wirings):  # a row keeps what every sender says
        row = senders * spec.d_model * decided.precision.base.itemsize
        found = replace(
            found, row_token=row, fixed=found.fixed + threads * wired_workspace(decided.precision)
        )
    return found


def work_limit(question: Question, threads: int) -> Limit:
    """How much work a pass may be."""
    return Limit.of(question.model, threads, 1 + question.n_sources)


def carry(
    question: Question,
    part: Pass,
    precision: Precision,
    pool: Pool,
    tick: Callable[[int], None] = lambda n: None,
    *,
    narrow_few: bool = False,
) -> PassResult:
    """Carry a pass out; `narrow_few` as of `Setup`."""
    ops = question.backend
    own = question.functions, question.probes
    setup = Setup(question.model, precision, ops, pool, *own, narrow_few=narrow_few)
    prompts = prompts_of(question, part.pairs)
    asked = question.interventions
    if isinstance(asked, Wirings):
        return WiredPass(setup, prompts, part.table, asked, question.measured, tick).run()
    return Wavefront(
        setup,
        prompts,
        part.table,
        question.measured,
        nodes=asked.nodes if isinstance(asked, EdgeGrid | Listed) else None,
        vectors=asked.vectors if isinstance(asked, Listed | Grid) else None,
        tick=tick,
    ).run()


def run_pass(
    question: Question, part: Pass, precision: Precision, pool: Pool, tick: Callable[[int], None]
) -> PassEffects:
    """What a pass finds.

    Raises:
        DeltapatchError: it is not finite.
    """
    began = time.perf_counter()
    result = carry(question, part, precision, pool, tick)
    check_finite(question, part, result, precision)
    reference = result.reference(question.options.direction)
    seconds = round(time.perf_counter() - began, 3)
    return PassEffects(part.out, np.array(part.pairs), result.measured, reference, seconds)


def progress_of(question: Question, part: Pass) -> int:
    """What a pass adds to the progress bar."""
    runs = [question.runs[pair] for pair in part.pairs]
    return row_layers(part.table, runs, question.model.spec.n_layers)


def check_finite(question: Question, part: Pass, result: PassResult, precision: Precision) -> None:
    """Raise DeltapatchError, which says where, if anything that a pass found is not finite."""
    bad_pairs = ~np.isfinite(result.unpatched.logp).all(axis=(1, 2))
    if bad_pairs.any():
        raise DeltapatchError(
            f"the model's own logits are not finite for pair {part.pairs[int(np.argmax(bad_pairs))]}: "
            "its weights overflow in float32; load it with dtype='float64' or check the checkpoint"
        )
    for name, values in result.measured.items():
        bad = ~np.isfinite(values)
        if bad.any():
            first = question.interventions.describe(int(part.out[np.argmax(bad)]))
            wider = "fp64" if precision.name == "fp32" else "fp32"
            raise DeltapatchError(
                f"{name} is not finite for {int(bad.sum())} intervention(s), the first: {first}; "
                f"try precision={wider!r}"
            )
