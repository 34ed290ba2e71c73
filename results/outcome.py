"""Outcomes: what given interventions did, as arrays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deltapatch import markup
from deltapatch.interventions.given import Listed
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.results.effects import import_pandas
from deltapatch.results.folder import Record, reference_tensors
from deltapatch.results.metrics import Direction, Own, Reference, asked_of, compute, metrics_of, terms
from deltapatch.results.result import Result

_SHOWN = 10  # interventions in a notebook


# Labels of interventions in the order in which tables have them; others come behind.
GROUPS = ("sae", "site", "layer", "head", "position", "feature", "direction", "strength")
LABELS = ("pair", *GROUPS, "before", "after")


def in_order(labels: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Labels of interventions as tables have them: a run folder keeps them by name."""
    known = {name: labels[name] for name in LABELS if name in labels}
    return known | {name: array for name, array in labels.items() if name not in known}


@dataclass(repr=False)
class Outcome(Result):
    """What `run` found, one number for each intervention and metric.

    Attributes:
        measured: name (see `metrics.MEASURED`) -> [intervention].
        interventions: what was patched, as arrays.
        pairs: that they act on.
        reference: the unpatched runs of all pairs.
        direction: of the run.
        meta: what was run.
    """

    measured: dict[str, np.ndarray]
    interventions: Listed
    pairs: list[EncodedPair]
    reference: Reference
    direction: Direction
    meta: dict[str, Any] = field(default_factory=dict)
    # Of a run that kept nothing: hashes the model, should it be saved.
    _fingerprint: Callable[[], str | None] | None = field(default=None, compare=False)

    @property
    def pair(self) -> np.ndarray:
        """[intervention], the number of the pair that it acts on."""
        return self.interventions.table_of_all.pair

    @property
    def patches(self) -> np.ndarray:
        """[intervention], how many patches it joins."""
        return np.bincount(self.interventions.table_of_all.row, minlength=self.interventions.n_effects)

    def __len__(self) -> int:
        return len(self.pair)

    @property
    def metrics(self) -> list[str]:
        """The metrics that this run can answer."""
        return metrics_of(self.measured)

    def values(self, metric: str | Own) -> np.ndarray:
        """A metric of every intervention: float64, [intervention].

        Raises:
            DeltapatchError: an unknown metric, or one that was not measured.
        """
        return compute(metric, self.measured, self.reference.of(self.pair), self.direction)

    def terms(self, metric: str | Own) -> tuple[np.ndarray, np.ndarray | None]:
        """A metric as it is averaged, as of `Effects.terms`: [intervention], and [intervention] or None."""
        return terms(metric, self.measured, self.reference.of(self.pair), self.direction)

    def columns(self, metrics: str | Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The long form: intervention (its number), pair, patches (how many), labels and the metrics.

        Args:
            metrics: `recovered` by default, or the first that the run can answer.

        Raises:
            DeltapatchError: an unknown metric, or one that was not measured.
        """
        own = {"intervention": np.arange(len(self)), "pair": self.pair, "patches": self.patches}
        own |= in_order(self.interventions.labels)
        return own | {name: self.values(name) for name in asked_of(self.metrics, metrics)}

    def to_pandas(self, metrics: str | Sequence[str] | None = None) -> Any:
        """A DataFrame of `columns`, a row an intervention. DeltapatchError where pandas is not installed."""
        return import_pandas().DataFrame(self.columns(metrics))

    def record(self) -> Record:
        """What a run folder holds of it."""
        tensors, axes = reference_tensors(self.reference)
        for name, array in self.measured.items():
            tensors[f"measured/{name}"], axes[f"measured/{name}"] = array, "intervention"
        about = {"number": len(self), "measured": list(self.measured)}
        about = {**self.meta, "direction": self.direction, "interventions": about}
        return Record(about, self.pairs, tensors, axes, self.interventions.arrays())

    def _repr_html_(self) -> str:
        said, columns = repr(self).split("\n"), self.columns()
        rows = list(zip(*(_plain(column[:_SHOWN]) for column in columns.values()), strict=True))
        left = [f"and {len(self) - _SHOWN:,} more"] if len(self) > _SHOWN else []
        return markup.table(said[0], rows, tuple(columns), [*left, *said[1:]])

    def __repr__(self) -> str:
        known = ("model", "precision", "backend")
        what = "".join(f", {self.meta[key]}" for key in known if key in self.meta)
        sizes = sorted({int(self.patches.min()), int(self.patches.max())}) if len(self) else [0]
        patches, pairs = " to ".join(map(str, sizes)), len(set(self.pair.tolist()))
        return (
            f"Outcome of {len(self)} intervention(s) of {patches} patch(es) on {pairs} pair(s), "
            f"{self.direction}{what}\n  metrics: {', '.join(self.metrics)}"
        )


def _plain(column: np.ndarray) -> list[str]:
    return [f"{value:.4g}" if isinstance(value, float) else str(value) for value in column.tolist()]
