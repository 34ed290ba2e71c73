"""Screened lists of interventions, such as features: estimates of all, exact effects of some."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deltapatch.results.effects import import_pandas
from deltapatch.results.estimated import Choice, Estimated
from deltapatch.results.metrics import Own, asked_of
from deltapatch.results.outcome import Outcome, in_order

_LABEL = "label/"  # begins the names of arrays in a file


class ScreenedOutcome(Estimated):
    """What a screen of given interventions found: one number for each.

    Args:
        verified, estimates, choice, by: as of `Estimated`.
        labels: name -> [intervention], what is said of all that were screened; `pair` among them.

    Attributes:
        labels: the same.
    """

    def __init__(
        self,
        verified: Outcome,
        labels: Mapping[str, np.ndarray],
        estimates: np.ndarray,
        choice: Choice,
        by: str,
    ) -> None:
        super().__init__(verified, estimates, choice, by)
        self.labels = labels

    def __len__(self) -> int:
        return len(self._estimates)

    def values(self, metric: str | Own) -> np.ndarray:
        """Exact effects: float64, [intervention]; NaN where none was verified.

        What is verified is chosen by its estimate, so means over what is here are no means over all.

        Raises:
            DeltapatchError: an unknown metric, or one that was not measured.
        """
        out = np.full(len(self), np.nan)
        out[self._effect] = self.verified.values(metric)
        return out

    def estimate(self, metric: str | None = None) -> np.ndarray:
        """First-order estimates: float64, [intervention].

        Args:
            metric: of `estimated`; what was screened by, unless told.

        Raises:
            DeltapatchError: a metric that does not follow from what was estimated.
        """
        return self._estimated(self.by if metric is None else metric)

    def is_verified(self) -> np.ndarray:
        """[intervention], whether its effect is exact here."""
        return np.isin(np.arange(len(self)), self._effect)

    def is_drawn(self) -> np.ndarray:
        """[intervention], whether it was verified as one of the random sample."""
        return self.is_verified() & (self._stratum >= 0)

    def columns(self, metrics: str | Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The long form of what was verified: pair and other labels, `estimate`, `drawn` and the metrics.

        `estimate` is of what was screened by; `drawn` says that it was by chance, not by its estimate.

        Args:
            metrics: `recovered` by default, or the first that can be answered.

        Raises:
            DeltapatchError: an unknown metric, or one that was not measured.
        """
        columns = {name: array[self._effect] for name, array in in_order(self.labels).items()}
        columns["estimate"] = self.estimates_of_verified()
        columns["drawn"] = self._stratum[self._effect] >= 0
        return columns | {name: self.verified.values(name) for name in asked_of(self.metrics, metrics)}

    def to_pandas(self, metrics: str | Sequence[str] | None = None) -> Any:
        """A DataFrame of `columns`. DeltapatchError where pandas is not installed."""
        return import_pandas().DataFrame(self.columns(metrics))

    def _scale(self, flat: np.ndarray, factor: np.ndarray) -> None:
        flat *= factor[self.labels["pair"]]

    def _as_file(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        return {f"{_LABEL}{name}": array for name, array in self.labels.items()}, {}


def labels_of_file(arrays: Mapping[str, np.ndarray], verified: Outcome, n: int) -> dict[str, np.ndarray]:
    """The labels of n interventions that a file has. ValueError or KeyError where they make no sense."""
    labels = {name.removeprefix(_LABEL): a for name, a in arrays.items() if name.startswith(_LABEL)}
    pair, effect = labels["pair"], verified.interventions.labels["effect"]
    if pair.dtype != np.int64 or any(array.shape != (n,) for array in labels.values()):
        raise ValueError("labels")
    if (pair < 0).any() or (pair >= len(verified.pairs)).any() or (pair[effect] != verified.pair).any():
        raise ValueError("pairs")
    return {"pair": pair} | labels
