"""Sets of parts, carried out: the effects of their joint patches in every prompt pair, sweep by sweep."""

from typing import Any

import numpy as np

from deltapatch.analysis.statistics import bootstrap, mean_over_pairs
from deltapatch.engine.options import Options
from deltapatch.engine.sweep import run_listed
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.given import Listed
from deltapatch.interventions.joint import Joint, checked_parts
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.pairs_file import Pairs, lasting
from deltapatch.interventions.parts import Part
from deltapatch.models.model import Model
from deltapatch.models.spec import ModelSpec
from deltapatch.results.interactions import check_additive
from deltapatch.results.metrics import check_metric


class PartSets:
    """Some parts, of which any sets are patched jointly in some pairs. A part that a pair lacks adds nothing.

    Args:
        parts: as of `checked_parts`.
        metric: what is told of each set.
        options: of `run`, but for metrics and those of a run folder.

    Raises:
        DeltapatchError: bad input; a metric of which effects do not add up; options of a run folder.
    """

    def __init__(
        self, model: Model, pairs: Pairs, parts: object, metric: str, options: dict[str, Any]
    ) -> None:
        check_additive(metric)
        for name in ("out", "resume", "shard", "metrics"):
            if options.get(name):
                raise DeltapatchError(
                    f"sets of parts are carried out in memory, by one metric: leave out `{name}`"
                )
        self.model, self.metric = model, metric
        self.pairs = lasting(pairs)
        self.given = checked_parts(parts)
        self.options = options | {"metrics": [metric]}
        self.asked = Options(**self.options)
        self.roles = self.asked.roles
        self.rows = 0  # that were carried out
        self.meta: dict[str, Any] = {}  # of the last sweep
        self._joint: Joint | None = None
        self._over: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.given)

    @property
    def parts(self) -> tuple[Part, ...]:
        """As they were asked for, known once some were patched."""
        assert self._joint is not None
        return self._joint.parts

    @property
    def over(self) -> np.ndarray | None:
        """[pair], what means are measured by; None where the metric is no ratio. Known as `parts` is."""
        return self._over

    def effects(self, sets: np.ndarray) -> np.ndarray:
        """The terms (see `Effects.terms`) of sets, [set, part] bool, in one sweep: [pair, set].

        Raises:
            DeltapatchError: as of `run`.
        """
        labels = {"set": np.arange(len(sets))}

        def make(spec: ModelSpec, encoded: list[EncodedPair]) -> Listed:
            if self._joint is None:
                self._joint = Joint.of(self.given, encoded, spec, self.roles)
            return self._joint.listed(sets, labels)

        outcome = run_listed(self.model, self.pairs, make, **self.options)
        out = np.zeros((len(outcome.pairs), len(sets)))
        out[outcome.pair, outcome.interventions.labels["set"]] = outcome.terms(self.metric)[0]
        over = check_metric(self.metric).over
        if over is not None and self._over is None:
            self._over = over(outcome.reference, outcome.direction)
        self.rows += len(outcome)
        self.meta = outcome.meta
        return out

    def mean(self, values: np.ndarray) -> np.ndarray:
        """The mean over pairs of terms, [pair, ...] -> [...]; of a ratio that of means."""
        return mean_over_pairs(values, self.over)[0]

    def interval(self, values: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Low and high end of the mean's 95% bootstrap interval over pairs."""
        return bootstrap(values, seed=seed, over=self.over)


def each_alone(n: int) -> np.ndarray:
    """The sets of one part, [n, n]."""
    return np.eye(n, dtype=bool)


def growing(orders: np.ndarray) -> np.ndarray:
    """The sets of the first 1, 2, ... n parts of some orders: [order, n] -> [order, n, part]."""
    count, n = orders.shape
    out = np.zeros((count, n, n), dtype=bool)
    for step in range(n):
        out[np.arange(count), step:, orders[:, step]] = True
    return out
