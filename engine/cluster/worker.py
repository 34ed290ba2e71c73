"""What a worker of a Ray cluster does: it loads the model once, and carries out passes.

It never touches the run folder: what a pass found goes to the driver (ray_sweep.py), which keeps it. Nothing
here imports ray.
"""

import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from deltapatch.engine.costs import sweep_cost
from deltapatch.engine.planner import Pass
from deltapatch.engine.pool import threads
from deltapatch.engine.prepare import Options, Prepared, prepare
from deltapatch.interventions.pairs import EncodedPair, PromptPair, encode_pairs
from deltapatch.models.model import load_model
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
        options: of the sweep.
        n_threads: for a worker on CPUs, else None.
    """

    model: str
    loading: dict[str, Any]
    pairs: Sequence[PromptPair]
    names: Sequence[str] | None
    options: Options
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
        self._ready: Prepared | None = None
        self._manifest: Manifest | None = None
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
            encode_pairs(request.pairs, model.tokenizer, model.spec.d_vocab, request.names)
            ready = self._ready = prepare(model, request.pairs, request.options)
        rows, flops = sweep_cost(ready.grid, ready.job.pairs, model.spec)
        told = [str(w.message) for w in said if issubclass(w.category, UserWarning)]
        return Report(repr(model), rows, flops, ready.work.row_layers, told)

    def join(self, request: Request, manifest: Manifest, where: str) -> None:
        """`start`, and `adopt`."""
        self.start(request)
        self.adopt(manifest, where)

    def plan(self, share: int) -> tuple[Manifest, list[EncodedPair]]:
        """Decide the plan, on a machine that so many workers share.

        Raises:
            DeltapatchError: the memory budget has no room for one intervention.
        """
        job = self._sweep.job
        if self._sweep.asked["memory_budget"] is None and job.model.device.type == "cpu":
            job.budget = max(1, job.budget // share)
        return self._sweep.plan(), job.pairs

    def adopt(self, manifest: Manifest, where: str) -> None:
        """Take over the plan of the run in a folder. DeltapatchError where this worker does not fit it."""
        self._sweep.adopt(manifest, where)
        self._manifest = manifest

    def row_layers(self) -> list[int]:
        """Of every pass, what it adds to the progress bar."""
        job, work = self._sweep.job, self._sweep.work
        with self._threads(), job.at_work() as each:
            return [job.row_layers(part) for part in job.parts(work, each)]

    def carry_out(self, number: int) -> PassEffects:
        """What a pass finds.

        Raises:
            DeltapatchError: it is not finite.
        """
        job, work = self._sweep.job, self._sweep.work
        self._done = 0
        with self._threads(), job.at_work() as each:
            if number < self._next:  # passes are cut one after the other
                self._parts, self._next = job.parts(work, each), 0
            part = next(islice(self._parts, number - self._next, None))
            self._next = number + 1
            return job.found(part, each, self._tick, work.describe)

    def progress(self) -> int:
        """How much of the pass at hand is done, as the progress bar counts."""
        return self._done

    @property
    def _sweep(self) -> Prepared:
        assert self._ready is not None
        return self._ready

    def _threads(self) -> AbstractContextManager[None]:
        assert self._manifest is not None
        return threads(self._manifest.settings["threads"])

    def _tick(self, n: int) -> None:
        self._done += n
