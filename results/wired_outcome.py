"""What wired runs found: circuits, paths, patches that only some receivers see."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.wirings import Wirings
from deltapatch.results.metrics import METRICS, Direction, Reference, compute, terms


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
    _fingerprint: Callable[[], str | None] | None = field(default=None, compare=False)

    @property
    def metrics(self) -> list[str]:
        """The metrics that can be asked for."""
        return [name for name, metric in METRICS.items() if set(metric.needs) <= set(self.measured)]

    def values(self, metric: str) -> np.ndarray:
        """A metric of every run: float64, [run]. DeltapatchError where it is unknown or was not measured."""
        return compute(metric, self.measured, self.reference.of(self.runs.pair), self.direction)

    def terms(self, metric: str) -> tuple[np.ndarray, np.ndarray | None]:
        """A metric as it is averaged, as of `Effects.terms`: [run], and [run] or None."""
        return terms(metric, self.measured, self.reference.of(self.runs.pair), self.direction)
