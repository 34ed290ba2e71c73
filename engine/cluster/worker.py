"""What a worker of a Ray cluster does: it loads the model once, and carries out passes.

It never touches the run folder: what a pass found goes to the driver (sweep.py), which keeps it. Nothing
here imports ray.
"""

import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from deltapatch.engine.options import Options
from deltapatch.engine.passes import at_work, passes, progress_of, run_pass
from deltapatch.engine.planning.planner import Pass
from deltapatch.engine.question import Decided, Question, ask
from deltapatch.engine.sweep import adopt, given_arrays, plan
from deltapatch.engine.wavefront.pool import Pool, threads
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.given import Intervention
from deltapatch.interventions.pairs import EncodedPair, PromptPair
from deltapatch.models.load import load_model
from deltapatch.results.manifest import Manifest
from deltapatch.results.measured import PassEffects


@dataclass(frozen=True)
class Request:
    """What a worker is to do.

    Attributes:
        model: a path that every machine sees, or a hub id.
        loading: the other arguments of `load_model`.
        pairs: prompt pairs.
        names: what errors call each pair.
        options: of the run.
        interventions: given ones; None for a sweep, whose options have its grid.
        n_threads: for a worker on CPUs, else None.
    """

    model: str
    loading: dict[str, Any]
    pairs: Sequence[PromptPair]
    names: Sequence[str] | None
    options: Options
    interventions: Sequence[Intervention] | None
    n_threads: int | None


@dataclass(frozen=True)
class Report:
    """What a worker says once it has loaded the model.

    Attributes:
        model: in words.
        rows: interventions of the sweep.
        flops: that they need.
        row_layers: what the progress bar counts.
        warnings: what there was to warn of.
    """

    model: str
    rows: int
    flops: float
    row_layers: int
    warnings: list[str]


class Worker:
    """One worker. Its methods are called one after the other, except `progress`."""

    def __init__(self) -> None:
        self._question: Question | None = None
        self._decided: Decided | None = None
        self._parts: Iterator[Pass] = iter(())
        self._next = sys.maxsize  # the pass that `_parts` gives next
        self._done = 0

    def where(self) -> str:
        """Its machine and process, for messages."""
        return f"{platform.node()} (process {os.getpid()})"

    def start(self, request: Request) -> Report:
        """Load the model and check the sweep.

        Raises:
            DeltapatchError: something is wrong with them.
        """
        if request.n_threads is not None:
            torch.set_num_threads(request.n_threads)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            model = load_model(request.model, **request.loading)
            encode_pairs(
                request.pairs, model.tokenizer, model.spec.d_vocab, request.names, request.options.align
            )
            question = ask(model, request.pairs, request.options, request.interventions)
        self._question = question
        told = [str(w.message) for w in said if issubclass(w.category, UserWarning)]
        return Report(repr(model), question.n_rows, question.flops, question.row_layers, told)

    def join(self, request: Request, manifest: Manifest, where: str) -> None:
        """`start`, and `adopt`."""
        self.start(request)
        self.adopt(manifest, where)

    def plan(self, share: int) -> tuple[Manifest, list[EncodedPair], dict[str, np.ndarray] | None]:
        """Decide the plan, on a machine that so many workers share: it, the pairs, and what is given.

        Raises:
            DeltapatchError: the memory budget has no room for one intervention.
        """
        question, budget = self._asked, None
        if question.options.memory_budget is None and question.model.device.type == "cpu":
            budget = max(1, question.memory_budget // share)
        return plan(question, budget), question.pairs, given_arrays(question)

    def adopt(self, manifest: Manifest, where: str) -> None:
        """Take over the plan of the run in a folder. DeltapatchError where this worker does not fit it."""
        self._decided = adopt(self._asked, manifest, where)

    def row_layers(self) -> list[int]:
        """Of every pass, what it adds to the progress bar."""
        question = self._asked
        with self._at_work() as (decided, pool):
            return [progress_of(question, part) for part in passes(question, decided, pool)]

    def carry_out(self, number: int) -> PassEffects:
        """What a pass finds.

        Raises:
            DeltapatchError: it is not finite.
        """
        self._done = 0
        with self._at_work() as (decided, pool):
            if number < self._next:  # passes are cut one after the other
                self._parts, self._next = passes(self._asked, decided, pool), 0
            part = next(islice(self._parts, number - self._next, None))
            self._next = number + 1
            return run_pass(self._asked, part, decided.precision, pool, self._tick)

    def progress(self) -> int:
        """How much of the pass at hand is done, as the progress bar counts."""
        return self._done

    @property
    def _asked(self) -> Question:
        assert self._question is not None
        return self._question

    @contextmanager
    def _at_work(self) -> Iterator[tuple[Decided, Pool]]:
        assert self._decided is not None
        with threads(self._decided.threads), at_work(self._asked) as pool:
            yield self._decided, pool

    def _tick(self, n: int) -> None:
        self._done += n
