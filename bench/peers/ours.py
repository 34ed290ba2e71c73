"""deltapatch itself, in one of its precisions."""

from typing import Any

import numpy as np

from deltapatch.bench.peers.base import Peer
from deltapatch.bench.sides.cells import Cells
from deltapatch.bench.sides.workload import Workload
from deltapatch.models.spec import ModelSpec

PREFIX = "deltapatch-"


class Ours(Peer):
    """`deltapatch.sweep` for whole sweeps, `deltapatch.run` for anything else."""

    difference_form = True
    modules = ("deltapatch.engine.sweep",)

    model: Any

    def __init__(self, precision: str) -> None:
        self.name = f"{PREFIX}{precision}"
        self.precision = precision
        self.what = f"deltapatch, precision={precision!r}"

    def prepare(self, work: Workload, spec: ModelSpec) -> None:
        """Load the model."""
        from deltapatch.models.load import load_model

        self.work, self.spec = work, spec
        self.model = load_model(work.folder, device=work.device)

    def batches(self, cells: Cells) -> list[np.ndarray]:
        """All at once: it plans for itself."""
        return [np.arange(len(cells))]

    def measure(self, cells: Cells) -> np.ndarray:
        """One call of the public interface."""
        from deltapatch.engine.sweep import run, sweep

        options: Any = {"precision": self.precision, "metrics": self.work.metric, "progress": False}
        options["noise_sample"] = 0  # as the others, which check nothing
        columns: list[np.ndarray]
        if cells.grid is not None:
            layers, positions = (list(axis) for axis in cells.grid)
            found = sweep(
                self.model, self.work.pairs, sites=cells.site, positions=positions, layers=layers, **options
            )
            columns = [found.values(name).ravel() for name in self.work.columns]
        else:
            outcome = run(self.model, self.work.pairs, cells.interventions(), **options)
            columns = [outcome.values(name) for name in self.work.columns]
        return np.stack(columns, axis=1)
