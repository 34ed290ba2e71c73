"""Tables: effects cell by cell, or averages with standard errors; the top K of either."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from deltapatch.analysis.positions import by_class, class_table
from deltapatch.analysis.statistics import mean_over, mean_over_pairs
from deltapatch.engine.effects import AXES, Effects
from deltapatch.engine.sites import SITES
from deltapatch.errors import DeltapatchError

BY = ("pair", "layer", "position", "class", "index")


@dataclass(frozen=True)
class Table:
    """Named columns of equal length, and what they are about."""

    columns: dict[str, np.ndarray]
    metric: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def top(self, k: int | None) -> "Table":
        """The k rows whose metric is largest in magnitude, largest first; all rows as they are for None."""
        if k is None:
            return self
        if k < 1:
            raise DeltapatchError(f"top {k}: ask for at least one row")
        values = self.columns[self.metric]
        order = np.argsort(-np.abs(np.nan_to_num(values, nan=-0.0)), kind="stable")[:k]
        return Table({name: column[order] for name, column in self.columns.items()}, self.metric)


def cells(effects: Effects, metric: str, sites: Sequence[str] | None = None) -> Table:
    """Every cell: columns pair, site, layer, position, index (-1 where a site has none) and the metric."""
    return Table(effects.columns(metric, sites), metric)


def averages(effects: Effects, metric: str, by: Iterable[str], sites: Sequence[str] | None = None) -> Table:
    """Means over pairs of each group of cells, with their standard errors.

    Args:
        by: what to keep apart, of BY: `class` is the position class. Everything else is averaged, within
            each pair first, so that every pair weighs the same. With `pair` in it there is no standard error.
        sites: all sites that were swept unless named.

    Returns:
        A table with columns site, the names in `by`, the metric and, over pairs, stderr (NaN for a single
        pair) and pairs (how many).

    Raises:
        DeltapatchError: `by` names something else, or `index` of a site without one.
    """
    by = check_groups(by)
    parts = [_site_averages(effects, metric, by, site) for site in sites or effects.sites]
    return Table({name: np.concatenate([p[name] for p in parts]) for name in parts[0]}, metric)


def check_groups(by: Iterable[str]) -> tuple[str, ...]:
    """`by` as a tuple; DeltapatchError where it names what is not in BY, or both position and class."""
    by = tuple(by)
    for name in by:
        if name not in BY:
            raise DeltapatchError(f"cannot group by {name!r}: choose from {', '.join(BY)}")
    if {"position", "class"} <= set(by):
        raise DeltapatchError("group by position or by class, not by both")
    return by


def component(site: str, layer: int, index: int) -> str:
    """A short name: L3.N17 for a neuron, L3.H2 for a head, L3.D5 for a coordinate, L3 for a whole vector."""
    letter = {"neuron": "N", "coordinate": "D", "head": "H", "kv_head": "H", "none": ""}[SITES[site].index]
    return f"L{layer}.{letter}{index}" if letter else f"L{layer}"


def grouped(
    effects: Effects, metric: str, by: tuple[str, ...], site: str
) -> tuple[np.ndarray, list[str], dict[str, np.ndarray]]:
    """The values [pair, group axes...] of a site, averaged within each pair over what is not in `by`.

    Returns:
        the values, the names of their axes after the first, and the coordinates on each of these and of pair.
    """
    values = effects.values(metric, site)
    swept = effects.site(site)
    positions: list[int | str] = list(swept.positions)
    if "class" in by:
        classes, table = class_table(effects, site)
        values, positions = by_class(values, classes, table), list(classes)
    kept = [("position" if name == "class" else name) for name in by]
    if "index" in kept and values.ndim < 4:
        raise DeltapatchError(f"site {swept.site} has no index: group by layer and position")
    drop = tuple(i for i, axis in enumerate(AXES[: values.ndim]) if axis not in (*kept, "pair"))
    if drop:
        values = mean_over(values, drop)
    labelled = any(isinstance(p, str) for p in positions)
    coordinates = {
        "pair": np.arange(len(values)),
        "layer": np.asarray(effects.layers_of(site), dtype=np.int64),
        "position": np.array(positions, dtype=object if labelled else np.int64),
        "index": np.arange(values.shape[-1]),
    }
    return values, [axis for axis in AXES[1:] if axis in kept], coordinates


def as_columns(
    numbers: dict[str, np.ndarray],
    axes: list[str],
    coordinates: dict[str, np.ndarray],
    by: Sequence[str],
    site: str,
) -> dict[str, np.ndarray]:
    """Columns site, the names in `by` and the numbers, a row for each cell in which the first number is."""
    where = np.nonzero(np.atleast_1d(~np.isnan(next(iter(numbers.values())))))
    found = {axis: coordinates[axis][where[i]] for i, axis in enumerate(axes)}
    columns = {"site": np.full(len(where[0]), site, dtype=object)}
    for name in by:
        columns[name] = found["position" if name == "class" else name]
    return columns | {name: np.atleast_1d(array)[where] for name, array in numbers.items()}


def _site_averages(effects: Effects, metric: str, by: tuple[str, ...], site: str) -> dict[str, np.ndarray]:
    values, axes, coordinates = grouped(effects, metric, by, site)
    if "pair" in by:
        numbers, axes = {metric: values}, ["pair", *axes]
    else:
        mean, stderr, n = mean_over_pairs(values)
        numbers = {metric: mean, "stderr": stderr, "pairs": n}
    return as_columns(numbers, axes, coordinates, by, effects.site(site).site)
