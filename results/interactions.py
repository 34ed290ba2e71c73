"""Interactions: what two parts do together beyond what each does alone, out of a run of joint patches."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from deltapatch import markup
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.parts import Part, names_of
from deltapatch.results.effects import import_pandas, looking
from deltapatch.results.metrics import (
    Direction,
    Function,
    asked_of,
    check_metric,
    default_metric,
    name_of,
    quotient,
)
from deltapatch.results.outcome import Outcome

# Labels of an outcome: -1 in the second of one part alone, in both of all parts at once.
PAIR_OF_PARTS = ("first", "second")


class Measured(NamedTuple):
    """The effects of one metric, as they are averaged.

    Attributes:
        alone: [pair, part].
        both: [pair, part, part], symmetric, the diagonal NaN.
        together: [pair], of all parts at once.
        over: [pair], what means are measured by; None where the metric is no ratio.
    """

    alone: np.ndarray
    both: np.ndarray
    together: np.ndarray
    over: np.ndarray | None

    @property
    def interaction(self) -> np.ndarray:
        """[pair, part, part]."""
        return self.both - (self.alone[:, :, None] + self.alone[:, None, :])


@dataclass(frozen=True, repr=False)
class Interactions:
    """What `interactions` found. `values` is the way in.

    Attributes:
        outcome: the effects of every part alone, of every two, and of all.
    """

    outcome: Outcome

    def __post_init__(self) -> None:
        listed = self.outcome.interventions
        if not is_of_parts(self.outcome):
            raise DeltapatchError("this run has no interactions: `interactions` makes those that do")
        for name in PAIR_OF_PARTS:
            label = listed.labels[name]
            if label.dtype.kind != "i" or label.min() < -1 or label.max() >= len(listed.parts):
                raise DeltapatchError(f"the run is damaged: its labels {name} count other parts than it has")

    @property
    def parts(self) -> tuple[Part, ...]:
        """[part], as they were asked for."""
        return self.outcome.interventions.parts

    @property
    def names(self) -> list[str]:
        """[part], a short name of each."""
        return names_of(self.parts)

    @property
    def pairs(self) -> list[EncodedPair]:
        """The prompt pairs."""
        return self.outcome.pairs

    @property
    def direction(self) -> Direction:
        """Of the run."""
        return self.outcome.direction

    @property
    def meta(self) -> dict[str, Any]:
        """What was run."""
        return self.outcome.meta

    @property
    def metrics(self) -> list[str]:
        """The metrics that it can answer: those of which effects add up."""
        return [name for name in self.outcome.metrics if check_metric(name).additive]

    def __len__(self) -> int:
        """How many pairs of parts there are."""
        return len(self.parts) * (len(self.parts) - 1) // 2

    def measured(self, metric: str | Function | None = None) -> Measured:
        """The effects of a metric, as they are averaged (see `Effects.terms`).

        Args:
            metric: `recovered` by default, or the first that the run can answer.

        Raises:
            DeltapatchError: an unknown metric, one that was not measured, or one of which effects do not add
                up.
        """
        metric = default_metric(self.metrics) if metric is None else metric
        check_additive(metric)
        values, _ = self.outcome.terms(metric)
        over = check_metric(metric).over
        first, second = (self.outcome.interventions.labels[name] for name in PAIR_OF_PARTS)
        n, pair = len(self.parts), self.outcome.pair
        alone, both = np.full((len(self.pairs), n), np.nan), np.full((len(self.pairs), n, n), np.nan)
        together = np.full(len(self.pairs), np.nan)
        one, two = (second < 0) & (first >= 0), second >= 0
        alone[pair[one], first[one]] = values[one]
        both[pair[two], first[two], second[two]] = both[pair[two], second[two], first[two]] = values[two]
        together[pair[first < 0]] = values[first < 0]
        return Measured(
            alone, both, together, None if over is None else over(self.outcome.reference, self.direction)
        )

    def values(self, metric: str | Function | None = None) -> np.ndarray:
        """The effect of both minus the effects of each: float64, [pair, part, part].

        Symmetric; the diagonal is NaN, and so is what a pair does not have. The scale is that of the metric:
        of `recovered` 1 is the whole way from base to source run, of `logit_diff` it is logits, of `dlogp_*`
        and `entropy` nats, of `dp_*` and `prob_diff` probability. An interaction belongs to its scale: what
        adds up in logits does not in probabilities. Negative beside two positive effects: each does in part
        what the other does (redundant, or a backup). Positive: each needs the other (a gate).

        Raises:
            DeltapatchError: as of `measured`.
        """
        found = self.measured(metric)
        return quotient(self._name(metric), found.interaction, found.over)

    def alone(self, metric: str | Function | None = None) -> np.ndarray:
        """The effect of each part alone: float64, [pair, part]. Raises what `measured` raises."""
        found = self.measured(metric)
        return quotient(self._name(metric), found.alone, found.over)

    def together(self, metric: str | Function | None = None) -> np.ndarray:
        """The effect of all parts at once: float64, [pair]. Raises what `measured` raises."""
        found = self.measured(metric)
        return quotient(self._name(metric), found.together, found.over)

    def contrast(self, metric: str | Function | None = None) -> np.ndarray:
        """The effect of all parts at once minus the sum of those of each alone: float64, [pair].

        It is the sum of all interactions of two parts, and of those of three and more, which `values` does
        not tell. Raises what `measured` raises.
        """
        return self.together(metric) - self.alone(metric).sum(1)

    def noise(self, metric: str | Function | None = None) -> float | None:
        """About how far one interaction is off through rounding (root of the mean square).

        An interaction is made of three effects, each with the error that the run found when it computed a
        sample again (`meta["noise_floor"]`): 3 ** 0.5 times that. Errors which cancel make it less. None
        where nothing was computed again, and of functions. Raises what `measured` raises.
        """
        name, found = self._name(metric), self.measured(metric)
        errors = (self.meta.get("noise_floor") or {}).get("relative_error", {})
        relative = errors.get("logit_diff" if name == "recovered" else name)
        if relative is None:
            return None
        upper = found.both[:, *np.triu_indices(len(self.parts), 1)]
        size = _rms(np.concatenate([found.alone.ravel(), upper.ravel()]))
        scale = 1.0 if found.over is None else abs(float(np.mean(found.over)))
        return math.sqrt(3) * relative * size / scale if scale else None

    def relative_noise(self, metric: str | Function | None = None) -> float | None:
        """`noise` over the root mean square of the interactions; None where there is none."""
        noise, found = self.noise(metric), self.measured(metric)
        scale = 1.0 if found.over is None else abs(float(np.mean(found.over)))
        size = _rms(found.interaction) / scale if scale else 0.0
        return None if noise is None else noise / size if size else math.inf if noise else 0.0

    def columns(self, metrics: str | Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The long form: pair, first, second (names of parts) and the interaction in each metric.

        One entry for each two parts that a pair has.

        Raises:
            DeltapatchError: as of `measured`.
        """
        asked = asked_of(self.metrics, metrics)
        first, second = np.triu_indices(len(self.parts), 1)
        values = {name: self.values(name)[:, first, second] for name in asked}
        there = ~np.isnan(self.measured(asked[0]).both[:, first, second])
        pair, cell = np.nonzero(there)
        names = np.array(self.names, dtype=object)
        own = {"pair": pair, "first": names[first[cell]], "second": names[second[cell]]}
        return own | {name: array[there] for name, array in values.items()}

    def to_pandas(self, metrics: str | Sequence[str] | None = None) -> Any:
        """A DataFrame of `columns`. DeltapatchError where pandas is not installed."""
        return import_pandas().DataFrame(self.columns(metrics))

    def top(self, n: int = 10, metric: str | None = None) -> Any:
        """The n interactions whose means over pairs are largest in magnitude, as a table.

        With intervals and tests where there are several pairs: see `analysis.interactions.interaction_table`.
        Raises what `measured` raises.
        """
        return looking().top_interactions(self, n, metric)

    def plot(self, metric: str | None = None) -> Any:
        """A matplotlib Figure: part by part, mean over pairs, parts that interact alike beside each other.

        Raises what `measured` raises.
        """
        return looking().plot_interactions(self, metric)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a run folder, which `load_interactions` reads. DeltapatchError where the path is taken."""
        self.outcome.save(path)

    def _name(self, metric: str | Function | None) -> str:
        return name_of(default_metric(self.metrics) if metric is None else metric)

    def _repr_html_(self) -> str:
        title, *lines = repr(self).split("\n")
        best = self.top(5)
        rows = zip(*(column.tolist() for column in best.columns.values()), strict=True)
        shown = [[f"{v:.4g}" if isinstance(v, float) else v for v in row] for row in rows]
        return markup.table(title, shown, tuple(best.columns), [line.strip() for line in lines])

    def __repr__(self) -> str:
        what = "".join(f", {self.meta[key]}" for key in ("model", "precision", "backend") if key in self.meta)
        lines = [
            f"Interactions of {len(self.parts)} parts, {len(self):,} pairs of them, on {len(self.pairs)} "
            f"prompt pair(s), {self.direction}{what}",
            f"  metrics: {', '.join(self.metrics)}",
        ]
        caveat = self.outcome.caveat()
        return "\n".join([*lines, *([f"  {caveat}"] if caveat else [])])


def is_of_parts(outcome: Outcome) -> bool:
    """Whether an outcome is what `interactions` makes."""
    listed = outcome.interventions
    return bool(listed.parts) and set(PAIR_OF_PARTS) <= set(listed.labels)


def check_additive(metric: str | Function) -> None:
    """Raise DeltapatchError where the effects of a metric do not add up even without interactions."""
    if not check_metric(metric).additive:
        raise DeltapatchError(
            f"effects in {name_of(metric)} do not add up, whatever parts do: take a metric that is how far "
            "one quantity moves, such as recovered, logit_diff, dlogp_clean or dp_clean"
        )


def _rms(values: np.ndarray) -> float:
    """The root mean square of what is not NaN; 0 of nothing."""
    known = values[~np.isnan(values)]
    return float(np.sqrt(np.mean(known**2))) if known.size else 0.0
