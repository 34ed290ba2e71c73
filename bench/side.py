"""A side of a comparison: one peer at work, timed in the process that it runs in."""

import importlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from deltapatch.bench.cells import Cells
from deltapatch.bench.memory import device_peak_bytes, peak_bytes, reset_peaks
from deltapatch.bench.peers.base import Peer
from deltapatch.bench.workload import Workload
from deltapatch.errors import DeltapatchError

_TRIAL_SECONDS = 0.5  # spent on finding out how long a sweep would take


class Side:
    """What a comparison asks of a peer, in the order in which it asks.

    Every method takes and returns what JSON can carry; arrays go through files.
    """

    peer: Peer
    cells: Cells
    batches: list[np.ndarray]
    values: np.ndarray  # [n, column], NaN where nothing was measured

    def __init__(self, name: str, began: float | None = None, peer: Peer | None = None) -> None:
        self.name, self.began, self.given = name, began, peer

    def hello(self) -> dict[str, Any]:
        """Import what the peer runs on: what it is, whether it can run here, how long the import took."""
        began = time.perf_counter() if self.began is None else self.began
        if self.given is None:
            from deltapatch.bench.peers.registry import make_peer

            self.peer = make_peer(self.name)
        else:
            self.peer = self.given
        missing = self.peer.missing()
        if missing:
            return {"missing": missing, "what": self.peer.what}
        for module in self.peer.modules:
            importlib.import_module(module)
        return {
            "missing": None,
            "what": self.peer.what,
            "import_seconds": time.perf_counter() - began,
            "versions": self.peer.versions(),
            "precision": self.peer.precision,
            "difference_form": self.peer.difference_form,
            "exact": self.peer.exact,
        }

    def load(self, workload: str) -> dict[str, Any]:
        """Load the model."""
        import torch

        from deltapatch.models.config import Config
        from deltapatch.models.folder import read_json
        from deltapatch.models.registry import read_config

        self.work = Workload.load(Path(workload))
        if self.work.threads:
            torch.set_num_threads(self.work.threads)
        path = Path(self.work.folder) / "config.json"
        spec = read_config(Config(read_json(path), str(path)))[1]
        self.architecture = spec.architecture
        began = time.perf_counter()
        self.peer.prepare(self.work, spec)
        return {"load_seconds": time.perf_counter() - began, "threads": torch.get_num_threads()}

    def open(self, cells: str, limit: float, sample: float) -> dict[str, Any]:
        """Begin a sweep: the first result, and which batches will be measured.

        Args:
            cells: the file of the sweep.
            limit: seconds; a sweep that would take longer is measured on a sample.
            sample: seconds that the sample should take.
        """
        self.cells = Cells.load(Path(cells))
        lacks = self.peer.lacks(self.architecture, self.cells.site, self.cells.patches)
        if lacks:
            return {"lacks": lacks}
        reset_peaks()
        self.values = np.full((len(self.cells), len(self.work.columns)), np.nan)
        began = self._now()
        self.peer.start(self.cells.site)
        every = self.peer.batches(self.cells)
        self._measure(every[0])
        first = self._now() - began

        starting = self._timed_start()
        self.batches = _spread(every, self._affordable(every, starting, limit, sample))
        return {
            "lacks": None,
            "first_seconds": first,
            "cells": sum(len(b) for b in self.batches),
            "batches": len(self.batches),
            "sampled": len(self.batches) < len(every),
        }

    def check(self, cells: str, out: str) -> dict[str, Any]:
        """Effects of some cells of the same sweep, untimed, into a file."""
        some = Cells.load(Path(cells))
        values = np.full((len(some), len(self.work.columns)), np.nan)
        self.peer.start(some.site)
        for batch in self.peer.batches(some):
            values[batch] = self.peer.measure(some[batch])
        np.save(out, values)
        return {}

    def repeat(self) -> dict[str, Any]:
        """The sweep once more, or its sample scaled to the whole."""
        start = self._timed_start()
        began = self._now()
        for batch in self.batches:
            self._measure(batch)
        seconds = self._now() - began
        scale = len(self.cells) / sum(len(b) for b in self.batches)
        return {"seconds": start + seconds * scale, "measured_seconds": start + seconds}

    def close(self, out: str) -> dict[str, Any]:
        """End the sweep: its effects into a file, and the memory that it took."""
        np.save(out, self.values)
        measured = self.values[np.concatenate(self.batches)]
        return {
            "not_finite": int((~np.isfinite(measured)).any(axis=1).sum()),
            "peak_bytes": peak_bytes(),
            "device_peak_bytes": device_peak_bytes(),
        }

    def _affordable(self, every: list[np.ndarray], starting: float, limit: float, sample: float) -> int:
        """How many of the batches to measure: all where that takes no longer than the limit."""
        trial = _spread(every, min(len(every), 8))
        began, cells, spent = self._now(), 0, 0.0
        for batch in trial:
            self._measure(batch)
            cells, spent = cells + len(batch), self._now() - began
            if spent > min(_TRIAL_SECONDS, sample):
                break
        per_cell = spent / cells
        if starting + per_cell * len(self.cells) <= limit:
            return len(every)
        return min(len(every), max(4, int(sample / (per_cell * len(self.cells) / len(every)))))

    def _measure(self, batch: np.ndarray) -> None:
        whole = len(batch) == len(self.cells) and (np.diff(batch) == 1).all()
        self.values[batch] = self.peer.measure(self.cells if whole else self.cells[batch])

    def _timed_start(self) -> float:
        began = self._now()
        self.peer.start(self.cells.site)
        return self._now() - began

    def _now(self) -> float:
        """The time when everything that was asked of a GPU is done."""
        torch = sys.modules.get("torch")
        if self.work.device.startswith("cuda") and torch is not None:
            torch.cuda.synchronize()
        return time.perf_counter()


def in_words(error: Exception) -> str:
    """An error in a line, with its kind unless it is meant for users as it is."""
    kind = "" if isinstance(error, DeltapatchError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}"[:300]


def _spread(items: list[np.ndarray], n: int) -> list[np.ndarray]:
    """n of the items, evenly apart: batches are in order of layers, and these cost differently."""
    if n >= len(items):
        return items
    return [items[i] for i in ((np.arange(n) + 0.5) * len(items) / n).astype(int)]
