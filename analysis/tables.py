"""Tables: effects cell by cell, or averages with standard errors; the top K of either."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltapatch import markup
from deltapatch.analysis.positions import by_class, class_table
from deltapatch.analysis.statistics import mean_over, mean_over_pairs, median_over_pairs
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.sites import COUNTED, SITES
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.effects import AXES, Effects, import_pandas, is_labelled, position_column
from deltapatch.results.metrics import METRICS, check_metric, quotient

OF_EDGES = ("pair", "sender", "receiver", "position")
BY = ("pair", "layer", "position", "class", "index", *COUNTED, "sender", "receiver")
_SHOWN = 60  # rows that Python prints
Numbers = Callable[[str, np.ndarray, np.ndarray | None], dict[str, np.ndarray]]


@dataclass(frozen=True, repr=False)
class Table:
    """Named columns of equal length, and what they are about."""

    columns: dict[str, np.ndarray]
    metric: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __repr__(self) -> str:
        rows = [tuple(self.columns), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(text.rjust(n) for text, n in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, *self._left()])

    def _repr_html_(self) -> str:
        return markup.table(f"{len(self):,} rows", self._rows(), tuple(self.columns), self._left())

    def _rows(self) -> list[tuple[str, ...]]:
        """The first rows as text."""
        columns = [column[:_SHOWN].tolist() for column in self.columns.values()]
        shown = ([f"{v:.4g}" if isinstance(v, float) else str(v) for v in column] for column in columns)
        return list(zip(*shown, strict=True))

    def _left(self) -> list[str]:
        return [f"and {len(self) - _SHOWN:,} more rows"] if len(self) > _SHOWN else []

    def to_pandas(self) -> Any:
        """A DataFrame of the columns. DeltapatchError where pandas is not installed."""
        return import_pandas().DataFrame(self.columns)

    def top(self, k: int | None) -> "Table":
        """The k rows whose metric is largest in magnitude, largest first; all rows as they are for None."""
        if k is None:
            return self
        if k < 1:
            raise DeltapatchError(f"top {k}: ask for at least one row")
        values = self.columns[self.metric]
        order = np.argsort(-np.abs(np.nan_to_num(values, nan=-0.0)), kind="stable")[:k]
        return Table({name: column[order] for name, column in self.columns.items()}, self.metric)


def cells(
    effects: Effects | EdgeEffects, metrics: str | Sequence[str], sites: Sequence[str] | None = None
) -> Table:
    """Every cell: columns pair, site, layer, position, index (-1 where a site has none) and the metrics.

    Of edges: pair, effect, sender, receiver, position and the metrics; `sites` are "total" and "direct".
    """
    if isinstance(effects, EdgeEffects):
        parts = []
        for effect in sites or effects.grid.effects:
            columns = effects.columns(metrics, effect)
            pair = columns.pop("pair")
            parts.append({"pair": pair, "effect": np.full(len(pair), effect, dtype=object)} | columns)
        return Table(
            {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, as_names(metrics)[0]
        )
    return Table(effects.columns(metrics, sites), as_names(metrics)[0])


def averages(
    effects: Effects | EdgeEffects,
    metrics: str | Sequence[str],
    by: Iterable[str],
    sites: Sequence[str] | None = None,
    *,
    mean_of_ratios: bool = False,
) -> Table:
    """Means over pairs of each group of cells, with their standard errors.

    Args:
        metrics: one, or several, the first of which is what `Table.top` goes by.
        by: what to keep apart, of BY: `class` is the position class; `head`, `neuron` and `coordinate` are
            the index of sites that have them, and keep layers apart too. Everything else is averaged, within
            each pair first, so that every pair weighs the same. With `pair` in it there is no standard error.
        sites: all sites that were swept unless named.
        mean_of_ratios: beside a mean that is a ratio of means (`recovered`), the mean of the pairs' ratios.

    Returns:
        A table with columns site, the names in `by`, the metric; over pairs, median (where a few pairs can
        make most of the mean, as of `ie`), mean_of_ratios if asked for, stderr (NaN for a single pair); and
        pairs (how many). Of several metrics these columns are called <metric>_median and so on.

    Raises:
        DeltapatchError: `by` names something else, or an index that a site does not have; a mean of ratios of
            metrics that are none.
    """
    by = check_groups(by)
    if mean_of_ratios and not any(check_metric(m).over for m in as_names(metrics)):
        ratios = ", ".join(name for name, metric in METRICS.items() if metric.over)
        raise DeltapatchError(
            f"a mean of ratios is of {ratios} only: the means of {', '.join(as_names(metrics))} are no ratios"
        )

    def numbers(metric: str, values: np.ndarray, over: np.ndarray | None) -> dict[str, np.ndarray]:
        if "pair" in by:
            return {metric: quotient(metric, values, over)}
        mean, stderr, n = mean_over_pairs(values, over)
        found = {metric: mean} | medians(metric, values)
        if mean_of_ratios and over is not None:
            found["mean_of_ratios"] = mean_over_pairs(quotient(metric, values, over))[0]
        return found | {"stderr": stderr, "pairs": n}

    return collect(effects, metrics, by, sites, numbers)


def medians(metric: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """The median over pairs, by its column's name, of metrics whose mean a few pairs can make."""
    return {"median": median_over_pairs(values)} if check_metric(metric).skewed else {}


def collect(
    effects: Effects | EdgeEffects,
    metrics: str | Sequence[str],
    by: tuple[str, ...],
    sites: Sequence[str] | None,
    numbers: Numbers,
) -> Table:
    """A row for each group of cells that exists, of each site: columns site, the names in `by`, the numbers.

    Args:
        numbers: gets a metric and its terms (see `Effects.terms`), averaged within each pair, and gives the
            metric's own column, the columns beside it and pairs.
    """
    if isinstance(effects, EdgeEffects):
        return _collect_edges(effects, as_names(metrics), by, list(sites or effects.grid.effects), numbers)
    metrics, sites = as_names(metrics), list(sites or effects.sites)
    labelled = "class" in by or any(is_labelled(effects.positions(site)) for site in sites)
    parts = []
    for site in sites:
        columns: dict[str, np.ndarray] = {}
        for metric in metrics:
            values, over, axes, coordinates = _grouped(effects, metric, by, site, labelled)
            found, pairs = _beside(metric, numbers(metric, values, over), alone=len(metrics) == 1)
            columns |= found
        exists = ~np.isnan(values)
        if "pair" in by:
            axes = ["pair", *axes]
        else:
            exists = exists.any(axis=0)
        where = np.nonzero(np.atleast_1d(exists))
        at = {axis: coordinates[axis][where[i]] for i, axis in enumerate(axes)}
        part = {"site": np.full(len(where[0]), effects.site(site).site, dtype=object)}
        part |= {name: at[_AXIS.get(name, name)] for name in by}
        parts.append(part | {name: np.atleast_1d(n)[where] for name, n in (columns | pairs).items()})
    return Table({name: np.concatenate([p[name] for p in parts]) for name in parts[0]}, metrics[0])


def _beside(
    metric: str, found: dict[str, np.ndarray], *, alone: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The columns of one metric, named so that those of several can stand side by side; and those of all."""
    pairs = {"pairs": found.pop("pairs")} if "pairs" in found else {}
    if not alone:
        found = {name if name == metric else f"{metric}_{name}": n for name, n in found.items()}
    return found, pairs


def _collect_edges(
    edges: EdgeEffects, metrics: list[str], by: tuple[str, ...], effects: list[str], numbers: Numbers
) -> Table:
    """As `collect`, of edges: columns effect, the names in `by`, the numbers."""
    wrong = [name for name in by if name not in OF_EDGES]
    if wrong:
        raise DeltapatchError(f"edges have no {wrong[0]}: group by {', '.join(OF_EDGES)}")
    if "position" in by and edges.grid.together:
        raise DeltapatchError("these edges were patched at all positions together: leave position out")
    # Every edge and position is a column of its own until it is known which go together.
    names = np.array(edges.edges, dtype=object)  # [edge, (sender, receiver)]
    positions = position_column(edges.positions, is_labelled(edges.positions))
    edge, at = (a.ravel() for a in np.indices((len(names), len(positions))))
    coordinates = {"sender": names[edge, 0], "receiver": names[edge, 1], "position": positions[at]}
    kept = [name for name in by if name != "pair"]
    keys = (
        np.stack([_numbered(coordinates[name]) for name in kept]) if kept else np.zeros((1, len(edge)), int)
    )
    _, first, group = np.unique(keys, axis=1, return_index=True, return_inverse=True)
    order = np.argsort(first)  # groups in the order in which they come
    group = np.argsort(order)[group.ravel()]
    first = first[order]
    parts = []
    for effect in effects:
        columns: dict[str, np.ndarray] = {}
        for metric in metrics:
            values, over = edges.terms(metric, effect)
            grouped = _group_means(values.reshape(len(values), -1), group, len(first))
            found, pairs = _beside(metric, numbers(metric, grouped, over), alone=len(metrics) == 1)
            columns |= found
        exists = ~np.isnan(grouped)
        where = np.nonzero(exists if "pair" in by else exists.any(0))
        column = first[where[-1]]
        part: dict[str, np.ndarray] = {"effect": np.full(len(column), effect, dtype=object)}
        for name in by:
            part[name] = where[0] if name == "pair" else coordinates[name][column]
        parts.append(part | {name: n[where] for name, n in (columns | pairs).items()})
    return Table({name: np.concatenate([p[name] for p in parts]) for name in parts[0]}, metrics[0])


def _numbered(values: np.ndarray) -> np.ndarray:
    """The same as numbers, equal where they are equal."""
    found: np.ndarray = np.unique(values.astype(str), return_inverse=True)[1]
    return found


def _group_means(values: np.ndarray, group: np.ndarray, n: int) -> np.ndarray:
    """Means of [pair, cell] over the cells of each group, [pair, group]; NaN where a pair has none."""
    out = np.full((len(values), n), np.nan)
    for pair, row in enumerate(values):
        there = ~np.isnan(row)
        count = np.bincount(group[there], minlength=n)
        total = np.bincount(group[there], row[there], minlength=n)
        out[pair, count > 0] = total[count > 0] / count[count > 0]
    return out


_AXIS = {"class": "position"} | dict.fromkeys(COUNTED, "index")


def as_names(metrics: str | Sequence[str]) -> list[str]:
    """One name or several, as a list without repeats.

    Raises:
        DeltapatchError: there is none.
    """
    names = [metrics] if isinstance(metrics, str) else list(dict.fromkeys(metrics))
    if not names:
        raise DeltapatchError(f"there is no metric: choose from {', '.join(METRICS)}")
    return names


def check_groups(by: Iterable[str]) -> tuple[str, ...]:
    """`by` as a tuple, with `layer` before a head, neuron or coordinate.

    Raises:
        DeltapatchError: it names what is not in BY, or one thing in two ways.
    """
    by = tuple(dict.fromkeys(by))
    for name in by:
        if name not in BY:
            raise DeltapatchError(f"cannot group by {name!r}: choose from {', '.join(BY)}")
    for same in (("position", "class"), ("index", *COUNTED)):
        both = [name for name in by if name in same]
        if len(both) > 1:
            raise DeltapatchError(f"group by {both[0]} or by {both[1]}, not by both")
    counted = next((i for i, name in enumerate(by) if name in COUNTED), None)
    if counted is not None and "layer" not in by:
        by = (*by[:counted], "layer", *by[counted:])
    return by


def component(site: str, layer: int, index: int) -> str:
    """A short name: L3.N17 for a neuron, L3.H2 for a head, L3.D5 for a coordinate, L3 for a whole vector."""
    letter = SITES[site].index.letter
    return f"L{layer}.{letter}{index}" if letter else f"L{layer}"


def _grouped(
    effects: Effects, metric: str, by: tuple[str, ...], site: str, labelled: bool
) -> tuple[np.ndarray, np.ndarray | None, list[str], Mapping[str, np.ndarray]]:
    """A site's terms [pair, group axes...], averaged within each pair over what is not in `by`.

    Returns:
        the terms, the names of the first one's axes after the pair, and the coordinates on each of these and
        of pair; positions as text where `labelled`.
    """
    values, over = effects.terms(metric, site)
    swept = effects.site(site)
    positions: list[int | str] = list(swept.positions)
    if "class" in by:
        classes, table = class_table(effects, site)
        values, positions = by_class(values, classes, table), list(classes)
    _check_index(by, swept.site)
    kept = [_AXIS.get(name, name) for name in by]
    drop = tuple(i for i, axis in enumerate(AXES[: values.ndim]) if axis not in (*kept, "pair"))
    if drop:
        values = mean_over(values, drop)
    coordinates = {
        "pair": np.arange(len(values)),
        "layer": np.asarray(effects.layers_of(site), dtype=np.int64),
        "position": position_column(positions, labelled),
        "index": np.arange(values.shape[-1]),
    }
    return values, over, [axis for axis in AXES[1:] if axis in kept], coordinates


def having(by: Iterable[str], sites: Sequence[str]) -> list[str]:
    """Those of some sites that have the index which `by` names; all of them where none has or is named."""
    kinds = {kind for name in by for kind in (COUNTED if name == "index" else (name,))}
    return [site for site in sites if SITES[site].index.counts in kinds] or list(sites)


def _check_index(by: tuple[str, ...], site: str) -> None:
    """Raise DeltapatchError where a site does not have the index that is grouped by."""
    own = SITES[site].index.counts
    for name in by:
        if name == "index" and not own:
            raise DeltapatchError(f"site {site} has no index: group by layer and position")
        if name in COUNTED and name != own:
            rest = f"its index counts {own}s: group by {own}" if own else "group by layer and position"
            raise DeltapatchError(f"site {site} has no {name}s: {rest}")
