"""What passes are carried out with, and what carrying one out finds."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from deltapatch.engine.wavefront.pool import Pool
from deltapatch.engine.wavefront.products import taken_in
from deltapatch.kernels.backend import Backend
from deltapatch.kernels.product import Precision
from deltapatch.models.model import Model
from deltapatch.results.metrics import Direction, Function, Reference
from deltapatch.results.probe import Probe


@dataclass(frozen=True)
class Setup:
    """What every pass of a run is carried out with.

    Attributes:
        model: the model.
        precision: of the products of differences; base and source runs are carried in its base dtype.
        ops: the operations.
        pool: does blocks, perhaps side by side.
        functions: metrics that users bring as functions, by name.
        probes: those that are read inside the model, by name.
        narrow_few: take products of few rows in this precision too, as a sample must that judges it.
    """

    model: Model
    precision: Precision
    ops: Backend
    pool: Pool
    functions: Mapping[str, Function] = field(default_factory=dict)
    probes: Mapping[str, Probe] = field(default_factory=dict)
    narrow_few: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether cores share the blocks."""
        return self.model.device.type == "cpu"

    def taken_in(self, n_tokens: int) -> Precision:
        """The precision that products of so many rows are taken in."""
        return self.precision if self.narrow_few else taken_in(self.precision, n_tokens, self.model.device)


@dataclass(frozen=True)
class PassResult:
    """What a pass measured, and the pairs' unpatched runs."""

    measured: dict[str, np.ndarray]  # name -> [intervention]
    unpatched: Reference  # its runs are base and source

    def reference(self, direction: Direction) -> Reference:
        """The unpatched runs as a reader of the results knows them: clean and corrupted."""
        return self.unpatched.runs([1, 0] if direction == "denoise" else [0, 1])
