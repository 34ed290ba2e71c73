"""A side of a comparison: one peer at work, timed in the process that it runs in, told line by line."""

import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltapatch.bench.limits import product_rate
from deltapatch.bench.peers.base import Peer
from deltapatch.bench.peers.registry import make_peer
from deltapatch.bench.sides.batch_size import choose, spread
from deltapatch.bench.sides.cells import Cells
from deltapatch.bench.sides.job import Job, Options
from deltapatch.bench.sides.memory import device_peak_bytes, peak_bytes, reset_peaks
from deltapatch.bench.sides.process import BEGAN, Lines, pinned, told
from deltapatch.bench.sides.quiet import Others
from deltapatch.models.config import Config
from deltapatch.models.folder import read_json
from deltapatch.models.registry import read_config

_TRIAL_SECONDS = 0.5  # spent on finding out how long a sweep would take


def lines(name: str, job: str) -> Lines:
    """What the process of a peer prints: see `carry_out`."""
    yield from carry_out(make_peer(name), Job.load(Path(job)), BEGAN)


def about(peer: Peer) -> dict[str, Any]:
    """What a peer is, and why it cannot run here where it cannot."""
    return {"missing": peer.missing(), "what": peer.what}


def carry_out(peer: Peer, job: Job, began: float | None = None) -> Lines:
    """All sweeps by one peer.

    Yields one object about it, and one more when the model is loaded; then of each sweep those of `_sweep`,
    of which one with an `error` is the last.

    Args:
        peer: at work.
        job: the sweeps.
        began: when its process did.
    """
    began = time.perf_counter() if began is None else began
    yield from told(_ready(peer, job, began))
    if not peer.missing():
        for number in range(len(job.checked)):
            yield from told(_sweep(peer, job, number))


def _ready(peer: Peer, job: Job, began: float) -> Lines:
    """Import what the peer runs on, and load the model."""
    if peer.missing():
        yield about(peer)
        return
    for module in peer.modules:
        importlib.import_module(module)
    seconds = time.perf_counter() - began
    yield {
        **about(peer),
        "import_seconds": seconds,
        "versions": peer.versions(),
        "precision": peer.precision,
        "difference_form": peer.difference_form,
        "exact": peer.exact,
    }
    if job.work.threads:
        torch.set_num_threads(job.work.threads)
    path = Path(job.work.folder) / "config.json"
    spec = read_config(Config(read_json(path), str(path)))[1]
    began = time.perf_counter()
    peer.work, peer.spec = job.work, spec
    peer.prepare(job.work, spec)
    seconds = time.perf_counter() - began
    yield {"load_seconds": seconds, "threads": torch.get_num_threads(), "cpus": pinned()}


def _sweep(peer: Peer, job: Job, number: int) -> Lines:
    """One sweep: what the peer lacks for it, or what will be measured; its repeats; the memory it took."""
    cells = job.cells(number)
    lacks = peer.lacks(peer.spec.architecture, cells.site, cells.patches)
    if lacks:
        yield {"lacks": lacks}
        return
    timed = Timed(peer, cells, time.process_time if job.options.processor else time.perf_counter)
    if peer.batched:
        peer.batch = min(job.work.batches)
    first = timed.first()
    trials = timed.choose_batch(job.work.batches, job.options.sample)
    reset_peaks()
    scale = timed.choose(job.options)
    some = cells[np.array(job.checked[number])]
    checked = np.full((len(some), len(job.work.columns)), np.nan)
    peer.start(cells.site)
    for batch in peer.batches(some):
        checked[batch] = peer.measure(some[batch])
    batches = timed.batches
    yield {
        "lacks": None,
        "first_seconds": first,
        "batch": peer.batch if peer.batched else None,
        "trials": {str(size): seconds for size, seconds in trials.items()},
        "cells": sum(len(b) for b in batches),
        "batches": len(batches),
        "sampled": scale > 1,
    }
    for _ in range(job.options.rounds):
        others = Others()
        start, seconds = timed.repeat()
        yield {
            "seconds": start + seconds * scale,
            "measured_seconds": start + seconds,
            "product_rate": product_rate(peer.precision, peer.spec.d_model, job.work.device),
            "others": others.share(),
        }
    np.savez(job.effects(peer.name, number), checked=checked, timed=timed.values)
    yield {
        "not_finite": int((~np.isfinite(timed.values[np.concatenate(batches)])).any(axis=1).sum()),
        "peak_bytes": peak_bytes(),
        "device_peak_bytes": device_peak_bytes(),
    }


class Timed:
    """A peer on the cells of one sweep, with a clock."""

    batches: list[np.ndarray]  # those that are measured

    def __init__(self, peer: Peer, cells: Cells, clock: Callable[[], float] = time.perf_counter) -> None:
        self.peer, self.cells, self.clock = peer, cells, clock
        self.values = np.full((len(cells), len(peer.work.columns)), np.nan)  # [n, column]

    def first(self) -> float:
        """Seconds to the first result, plain runs included."""
        began = self._now()
        self.peer.start(self.cells.site)
        self._measure(self.peer.batches(self.cells)[0])
        return self._now() - began

    def choose_batch(self, sizes: Sequence[int], longest: float) -> dict[int, float]:
        """Find the peer's best batch size: seconds a cell of those that were tried."""
        return choose(self.peer, self.cells, sizes, longest, self._now)

    def choose(self, options: Options) -> float:
        """Choose the batches that are measured: how many times as many cells there are in all."""
        every = self.peer.batches(self.cells)
        if len(every) == 1:  # there is no smaller sample
            self.batches = every
            return 1.0
        starting = self._start()
        trial = spread(every, 8)
        began, cells, spent = self._now(), 0, 0.0
        for batch in trial:
            self._measure(batch)
            cells, spent = cells + len(batch), self._now() - began
            if spent > min(_TRIAL_SECONDS, options.sample):
                break
        whole = spent / cells * len(self.cells)  # seconds
        n = len(every)
        if starting + whole > options.limit:
            n = max(4, int(options.sample / (whole / n)))
        self.batches = spread(every, n)
        return len(self.cells) / sum(len(b) for b in self.batches)

    def repeat(self) -> tuple[float, float]:
        """The sweep once more, or its sample: seconds of the plain runs, and of all others."""
        start = self._start()
        began = self._now()
        for batch in self.batches:
            self._measure(batch)
        return start, self._now() - began

    def _measure(self, batch: np.ndarray) -> None:
        whole = len(batch) == len(self.cells) and (np.diff(batch) == 1).all()
        self.values[batch] = self.peer.measure(self.cells if whole else self.cells[batch])

    def _start(self) -> float:
        began = self._now()
        self.peer.start(self.cells.site)
        return self._now() - began

    def _now(self) -> float:
        """The time when everything that was asked of a GPU is done."""
        if self.peer.work.device.startswith("cuda"):
            torch.cuda.synchronize()
        return self.clock()
