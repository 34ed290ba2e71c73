"""Relative importance (Stolfo et al. 2023): the late MLPs' share of all effect, at the last token."""

from dataclasses import dataclass

import numpy as np

from deltapatch.analysis.positions import by_class, class_table
from deltapatch.analysis.statistics import pair_counts, resampled_means
from deltapatch.errors import DeltapatchError
from deltapatch.results.effects import Effects

PAPER_FLOOR = 0.1


@dataclass(frozen=True)
class RelativeImportance:
    """A relative importance and what to hold it against.

    Attributes:
        value: the sum of log(effect + 1) over the chosen cells, over that of all cells.
        null: what it would be if every cell had the same effect, none with a floor among them.
        low, high: the interval of the bootstrap over pairs; NaN for one pair.
        chosen, cells: how many cells (position class, layer) were chosen, of how many.
        floor: what each cell's mean effect was raised to; None for none.
        draws: [draw], the bootstrap's values, for differences between runs.
    """

    value: float
    null: float
    low: float
    high: float
    chosen: int
    cells: int
    floor: float | None
    draws: np.ndarray

    def minus(self, other: "RelativeImportance", level: float = 0.95) -> tuple[float, float, float]:
        """The difference from another run's, and its interval.

        Runs of the same pairs, as of two checkpoints, drew the same pairs in each draw if they had the same
        seed: the interval is then of the difference within pairs.
        """
        if len(self.draws) != len(other.draws):
            raise DeltapatchError("relative importances of different numbers of draws cannot be compared")
        low, high = _interval(self.draws - other.draws, level)
        return self.value - other.value, low, high


def relative_importance(
    effects: Effects,
    site: str = "mlp_out",
    metric: str = "ie",
    floor: float | None = PAPER_FLOOR,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> RelativeImportance:
    """The relative importance of the upper half of layers at the last token.

    It is their share among all position classes and layers. A cell is the mean effect of a class of positions
    (operands, entity or subject, and what lies around them) in a layer: over the positions of each pair, then
    over pairs. The upper half of an odd number of layers is the larger one.

    Args:
        site: one that patches whole vectors, swept at all positions and layers.
        floor: each cell's mean effect is at least this. The paper's code has 0.1; with it, effects that are
            all smaller than 0.1 give the null value and no more. None takes the effects as they are.

    Raises:
        DeltapatchError: a site with an index, no last position, a single layer, or effects of -1 and less.
    """
    values, over = effects.terms(metric, site)
    if values.ndim != 3:
        raise DeltapatchError(f"relative importance is about whole vectors: {site} has an index")
    if values.shape[1] < 2:
        raise DeltapatchError("relative importance compares layers, and this run has one only")
    classes, table = class_table(effects, site, paper=True)
    cells = by_class(values, classes, table)  # [pair, layer, class]
    if "last" not in classes:
        raise DeltapatchError("relative importance needs the last position, which was not swept")
    upper = np.arange(cells.shape[1]) >= cells.shape[1] // 2
    chosen = upper[:, None] & (np.array(classes) == "last")
    there = ~np.isnan(cells).all(axis=0)  # [layer, class]
    flat, chosen = cells[:, there], chosen[there]
    n = len(flat)
    value = float(_share(resampled_means(flat, np.ones((1, n)), over), chosen, floor)[0])
    every = np.full(draws, np.nan)
    if n > 1:
        every = _share(resampled_means(flat, pair_counts(n, draws, seed), over), chosen, floor)
    null = float(chosen.sum() / len(chosen))
    return RelativeImportance(
        value, null, *_interval(every, level), int(chosen.sum()), len(chosen), floor, every
    )


def _share(means: np.ndarray, chosen: np.ndarray, floor: float | None) -> np.ndarray:
    """[draw, cell] -> [draw]; cells that a draw has no pair of are left out."""
    if floor is not None:
        means = np.maximum(means, floor)
    if np.nanmin(means) <= -1:
        raise DeltapatchError(
            "relative importance takes log(effect + 1), and there are effects of -1 or less: choose the "
            "metric ie, or a floor"
        )
    weight = np.nan_to_num(np.log1p(means))
    total = weight.sum(axis=1)
    return np.divide(weight[:, chosen].sum(axis=1), total, out=np.full(len(total), np.nan), where=total != 0)


def _interval(draws: np.ndarray, level: float) -> tuple[float, float]:
    known = draws[~np.isnan(draws)]
    if not len(known):
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)
