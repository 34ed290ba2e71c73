"""What passes are carried out with."""

from dataclasses import dataclass

from deltapatch.engine.pool import Pool
from deltapatch.kernels.backend import Backend
from deltapatch.kernels.product import Precision
from deltapatch.models.model import Model


@dataclass(frozen=True)
class Setup:
    """What every pass of a run is carried out with.

    Attributes:
        model: the model.
        precision: of the products of differences; base and source runs are carried in its base dtype.
        ops: the operations.
        pool: does blocks, perhaps side by side.
    """

    model: Model
    precision: Precision
    ops: Backend
    pool: Pool

    @property
    def on_cpu(self) -> bool:
        """Whether cores share the blocks."""
        return self.model.device.type == "cpu"
