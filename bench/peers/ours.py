"""deltapatch itself, in one of its precisions."""

from functools import cached_property
from typing import Any

import numpy as np

from deltapatch.bench.peers.base import SITES, Peer
from deltapatch.bench.sides.cells import ALONG, EDITS, FEATURE, Cells
from deltapatch.bench.sides.workload import Workload
from deltapatch.models.spec import ModelSpec

PREFIX = "deltapatch-"


class Ours(Peer):
    """`deltapatch.sweep` for whole sweeps, `deltapatch.run` for anything else."""

    difference_form = True
    sites: tuple[str, ...] = (*SITES, *EDITS)
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
        found: Any
        if cells.grid is not None and cells.site == FEATURE:
            found = self._features(cells, options)
        elif cells.grid is not None:
            layers, positions = (list(axis) for axis in cells.grid)
            if cells.site == ALONG:
                options["directions"] = {"resid_post": np.array([self.work.direction])}
            found = sweep(
                self.model, self.work.pairs, sites=cells.site, positions=positions, layers=layers, **options
            )
        else:
            interventions = self._edits(cells) if cells.site in EDITS else cells.interventions()
            found = run(self.model, self.work.pairs, interventions, **options)
        return np.stack([found.values(name).ravel() for name in self.work.columns], axis=1)

    @cached_property
    def sae(self) -> Any:
        """The autoencoder, read once: what is timed begins with it in memory."""
        from deltapatch.models.autoencoder import load_sae

        return load_sae(self.work.autoencoder)

    def _features(self, cells: Cells, options: dict[str, Any]) -> Any:
        """All features that change, which are those of the cells."""
        from deltapatch.analysis.features import sweep_features

        assert cells.grid is not None
        positions = list(cells.grid.positions)
        found = sweep_features(self.model, self.work.pairs, self.sae, positions=positions, **options)
        assert np.array_equal(found.columns()["feature"], cells.index[:, 0])
        return found

    def _edits(self, cells: Cells) -> list[Any]:
        """Given interventions of one patch each."""
        from deltapatch.interventions.given import Intervention, Patch

        if cells.site == ALONG:
            whats: list[dict[str, Any]] = [{"along": np.array(self.work.direction)}] * len(cells)
        else:
            whats = [{"feature": (self.sae, int(j))} for j in cells.index[:, 0]]
        where = np.stack([cells.pair, cells.layer[:, 0], cells.position[:, 0]], axis=1).tolist()
        return [
            Intervention(pair, [Patch("resid_post", layer, position, **what)])
            for (pair, layer, position), what in zip(where, whats, strict=True)
        ]
