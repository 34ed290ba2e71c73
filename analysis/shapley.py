"""Shapley values of parts: what each adds to the joint effect, averaged over the orders in which they join.

Shapley 1953; sampled over permutations as by Castro, Gomez and Tejada 2009 (doi 10.1016/j.cor.2008.04.004).
"""

import math
from dataclasses import dataclass
from itertools import permutations as all_orders
from typing import Any

import numpy as np

from deltapatch.analysis.interactions import Parts
from deltapatch.analysis.part_sets import PartSets, each_alone, growing
from deltapatch.analysis.statistics import bootstrap, mean_over_pairs
from deltapatch.analysis.tables import Table
from deltapatch.arguments import seed as check_seed
from deltapatch.arguments import whole
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs_file import Pairs
from deltapatch.interventions.parts import Part, names_of
from deltapatch.models.model import Model
from deltapatch.results.metrics import quotient


@dataclass(frozen=True, repr=False)
class Shapley:
    """What `shapley` found.

    Attributes:
        parts: [part], as they were asked for.
        metric: of all values.
        terms: [pair, part], the Shapley values as they are averaged (see `Effects.terms`).
        alone: [pair, part], likewise the effects of each part alone.
        total: [pair], likewise the effect of all parts at once.
        over: [pair], what means are measured by; None where the metric is no ratio.
        stderr: [part], of the mean over pairs, through the sampling of orders; 0 where all were taken.
        orders: how many orders of the parts there were.
        rows: how many joint patches were carried out.
    """

    parts: tuple[Part, ...]
    metric: str
    terms: np.ndarray
    alone: np.ndarray
    total: np.ndarray
    over: np.ndarray | None
    stderr: np.ndarray
    orders: int
    rows: int

    @property
    def values(self) -> np.ndarray:
        """The Shapley values, float64 [pair, part]: in every pair they sum to the effect of all parts."""
        return quotient(self.metric, self.terms, self.over)

    @property
    def together(self) -> np.ndarray:
        """The effect of all parts at once, float64 [pair]."""
        return quotient(self.metric, self.total, self.over)

    @property
    def contrast(self) -> np.ndarray:
        """The effect of all parts at once minus the sum of those of each alone, float64 [pair]."""
        return quotient(self.metric, self.total - self.alone.sum(1), self.over)

    def table(self) -> Table:
        """A row a part, the largest first.

        Returns:
            Columns part (its name), the metric (mean Shapley value over pairs), stderr (of the sampling of
            orders), low, high (95% bootstrap over pairs; NaN of a single pair), alone (mean effect alone).
        """
        mean = mean_over_pairs(self.terms, self.over)[0]
        low, high = bootstrap(self.terms, over=self.over)
        order = np.argsort(-mean, kind="stable")
        columns = {
            "part": np.array(names_of(self.parts), dtype=object),
            self.metric: mean,
            "stderr": self.stderr,
            "low": low,
            "high": high,
            "alone": mean_over_pairs(self.alone, self.over)[0],
        }
        return Table({name: column[order] for name, column in columns.items()}, self.metric)

    def in_words(self) -> str:
        """What all parts do at once, beside the sum of what each does alone."""
        total, single = (
            float(mean_over_pairs(values[:, None], self.over)[0][0])
            for values in (self.total, self.alone.sum(1))
        )
        return (
            f"{self.metric} of all {len(self.parts)} parts at once {total:.4g}; "
            f"sum of each alone {single:.4g}; contrast {total - single:.4g}"
        )

    def __repr__(self) -> str:
        return f"Shapley values over {self.orders:,} orders: {self.in_words()}\n{self.table()!r}"


def shapley(
    model: Model,
    pairs: Pairs,
    parts: Parts,
    *,
    permutations: int = 64,
    metric: str = "recovered",
    **options: Any,
) -> Shapley:
    """The Shapley values of some parts: what each adds on the average of orders in which they are joined.

    In every prompt pair they sum to the effect of all parts at once. A part that a pair does not have adds
    nothing there.

    Args:
        model, pairs: as of `sweep`.
        parts: as of `interactions`.
        permutations: random orders of the parts, drawn by `seed`; where there are no more than so many, all
            orders are taken, and the values are exact.
        metric: one of which effects add up.
        options: those of `run`, such as direction, precision and seed. No run folder is written.

    Raises:
        DeltapatchError: bad input, as of `interactions`; fewer than two permutations.
    """
    permutations = whole(permutations, "permutations must be a whole number")
    if permutations < 2:
        raise DeltapatchError(
            f"permutations must be at least 2, for their standard error, not {permutations}"
        )
    runs = PartSets(model, pairs, parts, metric, options)
    n = len(runs)
    exact = n < 20 and math.factorial(n) <= permutations
    if exact:
        orders = np.array(list(all_orders(range(n))))
    else:
        rng = np.random.default_rng(check_seed(options.get("seed", 0)))
        orders = rng.permuted(np.tile(np.arange(n), (permutations, 1)), axis=1)
    grown = growing(orders)  # [order, step, part]
    # What several orders begin with is carried out once, and so are the single parts.
    sets, which = np.unique(
        np.concatenate([each_alone(n), grown.reshape(-1, n)]), axis=0, return_inverse=True
    )
    effects = runs.effects(sets)[:, which.ravel()]  # [pair, n + order * step]
    joined = effects[:, n:].reshape(len(effects), len(orders), n)
    added = np.empty_like(joined)  # [pair, order, part]
    step = np.diff(joined, axis=2, prepend=0.0)
    np.put_along_axis(added, np.broadcast_to(orders, step.shape), step, axis=2)
    by_order = mean_over_pairs(added, runs.over)[0]  # [order, part]
    stderr = np.zeros(n) if exact else by_order.std(0, ddof=1) / math.sqrt(len(orders))
    return Shapley(
        runs.parts,
        metric,
        added.mean(1),
        effects[:, :n],
        joined[:, 0, -1],
        runs.over,
        stderr,
        len(orders),
        runs.rows,
    )
