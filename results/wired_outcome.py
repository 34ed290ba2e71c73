"""What wired runs found: circuits, paths, patches that only some receivers see."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.wirings import Wirings
from deltapatch.results.metrics import Direction, Reference, compute


@dataclass
class WiredOutcome:
    """One number for each run and metric.

    Attributes:
        measured: name (see `metrics.MEASURED`) -> [run].
        runs: of which pair, with which wiring.
        pairs: of prompts.
        reference: their unpatched runs.
        direction: of the runs.
        meta: what was run.
    """

    measured: dict[str, np.ndarray]
    runs: Wirings
    pairs: list[EncodedPair]
    reference: Reference
    direction: Direction
    meta: dict[str, Any] = field(default_factory=dict)

    def values(self, metric: str) -> np.ndarray:
        """A metric of every run: float64, [run]. DeltapatchError where it is unknown or was not measured."""
        return compute(metric, self.measured, self.reference.of(self.runs.pair), self.direction)
