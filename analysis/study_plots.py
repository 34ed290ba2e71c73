"""Figures that compare: relative importance by task, overlap of top neurons, faithfulness, predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from deltapatch.analysis.importance import RelativeImportance
from deltapatch.analysis.statistics import bootstrap, mean_over_pairs
from deltapatch.analysis.style import (
    COLOURS,
    MARKERS,
    MISSING,
    NEGATIVE,
    POSITIVE,
    QUIET,
    is_wide,
    metric_label,
    widen,
)
from deltapatch.analysis.tables import Table
from deltapatch.errors import DeltapatchError
from deltapatch.results.metrics import check_metric


def importance_bars(found: Mapping[str, RelativeImportance], others: np.ndarray | None = None) -> Figure:
    """A row a task: relative importance with its 95% interval, and a mark at its null value.

    Args:
        others: [task], what others report, as points; NaN where they do not.
    """
    names = list(found)
    figure, axes = plt.subplots(figsize=(4.6, 0.75 + 0.28 * len(names)))
    y = np.arange(len(names))
    values = np.array([r.value for r in found.values()])
    axes.barh(y, values, height=0.62, color=COLOURS[0], alpha=0.75, lw=0)
    ends = np.array([(r.low, r.high) for r in found.values()])
    axes.hlines(y, ends[:, 0], ends[:, 1], color="black", lw=1.2)
    null = np.array([r.null for r in found.values()])
    axes.vlines(null, y - 0.42, y + 0.42, color=COLOURS[1], lw=1.6, label="all cells alike")
    if others is not None:
        axes.plot(others, y, color="black", marker="D", markersize=4, lw=0, label="in the paper")
    axes.set_yticks(y, names, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(left=min(0.0, float(np.nanmin([*values, *ends[:, 0]], initial=0.0))))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("relative importance, upper layers at the last token")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def overlap_matrix(table: Table) -> Figure:
    """Names by names: the share of top neurons in common, chance in the title; `table` is of `overlaps`."""
    names = list(dict.fromkeys([*table.columns["a"].tolist(), *table.columns["b"].tolist()]))
    grid = np.full((len(names), len(names)), np.nan)
    for a, b, share in zip(*(table.columns[c].tolist() for c in ("a", "b", "overlap")), strict=True):
        grid[names.index(b), names.index(a)] = share
    grid = grid[1:, :-1]  # below the diagonal
    side = 0.9 + 0.55 * len(grid)
    figure, axes = plt.subplots(figsize=(side + 0.6, side))
    colours = plt.get_cmap("Blues").with_extremes(bad="white")
    axes.imshow(np.ma.masked_invalid(grid), cmap=colours, vmin=0, vmax=1, interpolation="none")
    for (i, j), share in np.ndenumerate(grid):
        if not np.isnan(share):
            shade = "white" if share > 0.55 else "black"
            axes.text(j, i, f"{share:.0%}", ha="center", va="center", color=shade, fontsize=8)
    tilt: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    short = max(len(name) for name in names) <= 5
    axes.set_xticks(range(len(grid)), names[:-1], parse_math=False, **({} if short else tilt))
    axes.set_yticks(range(len(grid)), names[1:], parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"in common; chance {float(table.columns['chance'][0]):.1%}", loc="left")
    return figure


def faithfulness_curves(curves: Mapping[str, Table]) -> Figure:
    """One panel a curve (a direction, say): the top k and random sets of equal size, with 95% bands."""
    figure, grid = plt.subplots(
        1, len(curves), figsize=(0.9 + 2.7 * len(curves), 2.6), squeeze=False, sharey=True
    )
    for axes, (name, table) in zip(grid[0], curves.items(), strict=True):
        c = table.columns
        rows = [(table.metric, "low", "high", COLOURS[0], MARKERS[0], "top k"),
                ("random", "random_low", "random_high", COLOURS[1], MARKERS[1], "random k")]  # fmt: skip
        for mean, low, high, colour, marker, line in rows:
            if np.isnan(c[mean]).all():
                continue
            axes.plot(c["size"], c[mean], color=colour, marker=marker, markersize=3, lw=1.4, label=line)
            axes.fill_between(c["size"], c[low], c[high], color=colour, alpha=0.18, lw=0)
        axes.axhline(0, color=QUIET, lw=0.7, zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("patched together, k")
        axes.set_title(name, loc="left", parse_math=False)
    metric = next(iter(curves.values())).metric
    grid[0, 0].set_ylabel(metric_label(metric, False, 32))
    grid[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def prediction_curves(
    layers: np.ndarray, changes: Mapping[str, tuple[np.ndarray, np.ndarray]], seed: int = 0
) -> Figure:
    """Shares of predictions changed by layer, with 95% bands over pairs: a panel for each site.

    Args:
        changes: site -> desired and undesired, [pair, layer] of 0 and 1 each.
    """
    figure, grid = plt.subplots(
        1, len(changes), figsize=(1.6 + 2.5 * len(changes), 2.5), squeeze=False, sharey=True
    )
    for axes, (title, both) in zip(grid[0], changes.items(), strict=True):
        styles = zip(COLOURS, MARKERS, ("desired", "undesired"), strict=False)
        for values, (colour, marker, label) in zip(both, styles, strict=False):
            line_with_band(axes, layers, values, colour, label, seed, marker)
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("layer")
        axes.set_title(title, loc="left", parse_math=False)
    grid[0, 0].set_ylabel("predictions changed")
    grid[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def group_curves(
    layers: np.ndarray, named: Mapping[str, np.ndarray], metric: str, title: str, seed: int = 0
) -> Figure:
    """Effects by layer, a line a group of pairs, with 95% bands over its pairs.

    Args:
        named: name -> [pair, layer].

    Raises:
        DeltapatchError: a metric whose mean over pairs is not that of the pairs' own values.
    """
    if check_metric(metric).over is not None:
        raise DeltapatchError(
            f"{metric} is a ratio of means, and these curves are means of each pair's values"
        )
    figure, axes = plt.subplots(figsize=(5.0, 2.8))
    ends: list[np.ndarray] = []
    styles = zip(COLOURS * len(named), MARKERS * len(named), strict=True)
    for (name, values), (colour, marker) in zip(named.items(), styles, strict=False):
        ends += line_with_band(axes, layers, values, colour, name, seed, marker)
    axes.axhline(0, color=QUIET, lw=0.7, zorder=0)
    axes.set_xlabel("layer")
    low = float(np.nanmin(np.concatenate(ends), initial=0))
    high = float(np.nanmax(np.concatenate(ends), initial=0))
    wide = is_wide(metric, max(high, -low))
    if wide:
        widen(axes, "y", low, high)
    axes.set_ylabel(metric_label(metric, wide, 36))
    axes.set_title(title, loc="left", parse_math=False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def line_with_band(
    axes: Axes,
    layers: np.ndarray,
    values: np.ndarray,
    colour: str,
    label: str,
    seed: int = 0,
    marker: str = "o",
) -> list[np.ndarray]:
    """The mean over pairs of [pair, layer] by layer and its 95% band, which it returns as mean, low, high."""
    mean = mean_over_pairs(values)[0]
    low, high = bootstrap(values, seed=seed)
    axes.plot(layers, mean, color=colour, marker=marker, markersize=3.5, lw=1.4, label=label)
    axes.fill_between(layers, low, high, color=colour, alpha=0.18, lw=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return [mean, low, high]


def discovery_plot(table: Table, rate: float = 0.05) -> Figure:
    """Every row of a table of magnitudes: its mean against its q, those within the rate in colour."""
    mean, q = table.columns[table.metric], table.columns["q"]
    floor = float(np.nanmin(q[q > 0], initial=1.0)) if len(q) else 1.0
    height = -np.log10(np.maximum(q, floor))
    found = q <= rate
    figure, axes = plt.subplots(figsize=(4.2, 2.8))
    # Points in their hundreds of thousands would make a PDF unreadable as vectors.
    axes.scatter(mean[~found], height[~found], s=4, color=MISSING, lw=0, rasterized=True)
    axes.scatter(
        mean[found],
        height[found],
        s=5,
        color=np.where(mean[found] >= 0, POSITIVE, NEGATIVE).tolist(),
        lw=0,
        rasterized=True,
    )
    axes.axhline(-np.log10(rate), color=QUIET, lw=0.8, ls="--")
    axes.axvline(0, color=QUIET, lw=0.7, zorder=0)
    axes.set_xlabel(f"mean {metric_label(table.metric, False, 40)}")
    axes.set_ylabel("-log10 q")
    axes.set_title(f"{int(found.sum()):,} of {len(q):,} at a false-discovery rate of {rate:.0%}", loc="left")
    return figure


def importance_table(found: Mapping[str, RelativeImportance]) -> Table:
    """The same numbers as `importance_bars`, as a table with a row each."""
    names: Sequence[str] = list(found)
    columns: dict[str, np.ndarray] = {"name": np.array(names, dtype=object)}
    for key, name in (("value", "importance"), ("null", "null"), ("low", "low"), ("high", "high")):
        columns[name] = np.array([getattr(r, key) for r in found.values()])
    for key in ("chosen", "cells"):
        columns[key] = np.array([getattr(r, key) for r in found.values()])
    columns["floor"] = np.array([np.nan if r.floor is None else r.floor for r in found.values()])
    return Table(columns, "importance")
