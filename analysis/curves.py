"""Curves and rankings: effects by layer at the last token, and the neurons with the largest ones."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deltapatch.analysis.positions import aligned
from deltapatch.analysis.statistics import bootstrap, mean_over_pairs
from deltapatch.analysis.style import COLOURS, NEGATIVE, POSITIVE, QUIET, is_wide, metric_label, widen
from deltapatch.analysis.tables import component
from deltapatch.results.effects import Effects


def last_position(effects: Effects, metric: str, site: str) -> np.ndarray | None:
    """[pair, layer(, index)] at the last token, pair by pair; None where it was not swept."""
    return at_last(effects, site, effects.values(metric, site))


def at_last(effects: Effects, site: str, values: np.ndarray) -> np.ndarray | None:
    """[pair, layer, position(, index)] of a site -> [pair, layer(, index)] at the last token, if swept."""
    for i, position in enumerate(effects.positions(site)):
        if position in (-1, "last"):
            return values[:, :, i]
    places = [p for p in effects.positions(site) if isinstance(p, int)]
    ends = [len(pair.clean) - 1 for pair in effects.pairs]
    if not set(ends) <= set(places):
        return None
    columns = [effects.positions(site).index(end) for end in ends]
    return values[np.arange(len(ends)), :, columns]


def _last_terms(effects: Effects, metric: str, site: str) -> tuple[np.ndarray, np.ndarray | None] | None:
    """A metric's terms at the last token; None where it was not swept."""
    values, over = effects.terms(metric, site)
    last = at_last(effects, site, values)
    return None if last is None else (last, over)


def layer_curves(effects: Effects, metric: str, sites: Sequence[str], seed: int = 0) -> Figure | None:
    """The last token's effect by layer, a line a site, with 95% bootstrap bands; None where not swept."""
    lines = [(site, *terms) for site in sites if (terms := _last_terms(effects, metric, site)) is not None]
    if not lines:
        return None
    single = all(len(effects.layers_of(site)) == 1 for site, *_ in lines)
    figure, axes = plt.subplots(figsize=(5.0, 2.8))
    ends: list[np.ndarray] = []
    for i, ((site, values, over), colour) in enumerate(zip(lines, COLOURS * len(lines), strict=False)):
        layers = effects.layers_of(site)
        mean = mean_over_pairs(values, over)[0]
        low, high = bootstrap(values, seed=seed, over=over)
        if not single:
            axes.plot(layers, mean, color=colour, marker="o", markersize=3.5, lw=1.4, label=site)
            axes.fill_between(layers, low, high, color=colour, alpha=0.18, lw=0)
        else:  # a point with its interval; sites stand side by side, each on its own tick
            axes.plot([i], mean, color=colour, marker="o", markersize=4, lw=0, label=site)
            axes.vlines([i], low, high, color=colour, lw=1.4)
        ends += [mean, low, high]
    axes.axhline(0, color=QUIET, lw=0.7, zorder=0)
    if single:
        axes.set_xticks([])
        axes.set_xlim(-1, len(lines))
        own = sorted({int(effects.layers_of(site)[0]) for site, *_ in lines})
        axes.set_xlabel(f"layer {', '.join(map(str, own))}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("layer")
    lowest, highest = (
        float(np.nanmin(np.concatenate(ends), initial=0)),
        float(np.nanmax(np.concatenate(ends), initial=0)),
    )
    wide = is_wide(metric, max(highest, -lowest))
    if wide:
        widen(axes, "y", lowest, highest)
    axes.set_ylabel(metric_label(metric, wide, 36))
    several = len(effects.pairs) > 1
    left = [site for site in sites if site not in {name for name, *_ in lines}]
    title = (
        f"last token, mean and 95% interval over {len(effects.pairs):,} pairs"
        if several
        else "last token, 1 pair"
    )
    axes.set_title(title + (f"\nnot swept there: {', '.join(left)}" if left else ""), loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside the lines, never on them
    return figure


def neuron_ranking(effects: Effects, metric: str, site: str, top: int = 20, seed: int = 0) -> Figure:
    """Left: the top neurons or coordinates with 95% intervals. Right: all of them by rank, in magnitude."""
    labels, values, over = aligned(effects, metric, site)
    layers = effects.layers_of(site)
    mean = mean_over_pairs(values, over)[0]  # [layer, position, index]
    flat = mean.ravel()
    order = np.argsort(-np.abs(np.nan_to_num(flat)), kind="stable")
    order = order[~np.isnan(flat[order])]
    best = order[:top]
    low, high = bootstrap(values.reshape(len(values), -1)[:, best], seed=seed, over=over)
    row, place, index = np.unravel_index(best, mean.shape)
    names = [
        component(effects.site(site).site, int(layers[r]), int(i)) for r, i in zip(row, index, strict=True)
    ]
    if len(labels) > 1:
        names = [f"{name}, {labels[p]}" for name, p in zip(names, place, strict=True)]
    ends = flat[best], low, high
    n = len(effects.pairs)
    title = f"{site}: top {len(best)} of {len(order):,}, {n:,} pair{'s' if n > 1 else ''}"
    return ranking_figure(title, names, *ends, flat[order], metric)


def ranking_figure(
    title: str,
    names: Sequence[str],
    mean: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    every: np.ndarray,
    metric: str,
) -> Figure:
    """The strongest with their intervals, and how fast the magnitude of all falls.

    Args:
        title: of the left half.
        names, mean, low, high: [shown], the strongest first.
        every: [all], the means of all of them.
    """
    height = max(1.6, 0.19 * len(names) + 0.75)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, height), width_ratios=(1.25, 1))
    y = np.arange(len(names))
    colours = [POSITIVE if m >= 0 else NEGATIVE for m in mean]
    left.hlines(y, low, high, color=colours, lw=1.2)  # the interval; its ends have caps
    for end in (low, high):
        left.scatter(end, y, s=26, color=colours, marker="|", lw=1.2)
    left.scatter(mean, y, s=18, color=colours, zorder=3)
    left.axvline(0, color=QUIET, lw=0.7, zorder=0)
    left.set_yticks(y, names, parse_math=False)
    left.tick_params(axis="y", length=0)
    left.set_ylim(len(names) - 0.4, -0.6)
    ends = [mean, low, high]
    lowest, highest = (
        float(np.nanmin(np.concatenate(ends), initial=0)),
        float(np.nanmax(np.concatenate(ends), initial=0)),
    )
    wide = is_wide(metric, max(highest, -lowest))
    if wide:
        widen(left, "x", lowest, highest)
    left.set_xlabel(metric_label(metric, wide, 56))
    left.set_title(title, loc="left", parse_math=False)

    magnitude = np.sort(np.abs(every))[::-1]
    # Of many, some at even steps of the scale: hundreds of thousands of points would make a PDF unreadable.
    n = len(magnitude)
    rank = np.arange(n) if n <= 1000 else np.unique(np.geomspace(1, n, 1000).round().astype(int)) - 1
    right.plot(rank + 1, magnitude[rank], color=COLOURS[0], lw=1.4, marker="o", markersize=2)
    right.set_xscale("log")
    if (magnitude > 0).any():
        right.set_yscale("log")
    right.set_xlabel("rank")
    right.set_ylabel("magnitude")
    nothing = int((magnitude == 0).sum())
    if 0 < nothing < n:
        right.text(0.03, 0.03, f"{nothing:,} are exactly 0", transform=right.transAxes, fontsize=8)
    total = magnitude.sum()
    if total > 0:
        half = int(np.searchsorted(np.cumsum(magnitude), total / 2)) + 1
        right.axvline(half, color=QUIET, lw=0.8, ls="--")
        right.set_title(f"half of the sum in the top {half:,}", loc="left")
    return figure
