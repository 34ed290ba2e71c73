"""Heatmaps: layer by position for whole vectors, layer by head for heads."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import AsinhNorm, Colormap, Normalize
from matplotlib.figure import Figure

from deltapatch.analysis.positions import aligned, peaks
from deltapatch.analysis.statistics import mean_over_pairs
from deltapatch.analysis.style import MISSING, folded, is_wide, metric_label, wide_ticks
from deltapatch.results.effects import Effects
from deltapatch.results.metrics import check_metric

Panel = tuple[str, list[str], np.ndarray, np.ndarray]  # title, column labels, [layer, column], layers

_MOST_TICKS = 32  # beyond, only every second, third, ... label is drawn
_MOST_PANELS = 8
_FAINT = 0.02  # of the largest effect: panels of several sites that stay below it would look blank
_LETTER = 0.07  # inches that one takes in a label
_HIDDEN = 0.1  # of the largest effect that is drawn: what a mean over positions may hide without a word


def position_heatmaps(effects: Effects, metric: str, sites: Sequence[str]) -> Figure:
    """One panel a site: layer (0 at the bottom) by position, mean over pairs, one colour scale for all."""
    return _by_position({site: (effects, site) for site in sites}, metric)


def group_heatmaps(named: Mapping[str, Effects], metric: str, site: str) -> Figure:
    """One panel a group of pairs: layer by position of one site, one colour scale for all."""
    return _by_position({name: (effects, site) for name, effects in named.items()}, metric)


def head_heatmaps(effects: Effects, metric: str, sites: str | Sequence[str]) -> Figure:
    """A panel a position and site, the sites of a position together: layer by head, mean over pairs.

    Of many positions, those where a head has the largest effects, and lines that say what is left out.
    """
    sites = [sites] if isinstance(sites, str) else list(sites)
    grids: dict[tuple[str, str], np.ndarray] = {}  # position, site -> [layer, head]
    classes = {}
    for site in sites:
        labels, values, over = aligned(effects, metric, site)
        mean = mean_over_pairs(values, over)[0]  # [layer, position, head]
        grids |= {(label, site): mean[:, i] for i, label in enumerate(labels)}
        classes[site] = labels, mean, peaks(effects, metric, site)
    size = {at: float(np.abs(np.nan_to_num(grid)).max()) for at, grid in grids.items()}
    chosen, notes = _positions_of_heads(
        size, _MOST_PANELS if len(sites) == 1 else 2 * _MOST_PANELS // len(sites)
    )
    least = _FAINT * max(size.values()) if len(sites) > 1 else 0.0
    here = [(at, site) for at in chosen for site in sites if (at, site) in size]
    drawn = [at for at in here if size[at] > least] or here[-1:]
    blank = [f"{site} at {at}" for at, site in here if (at, site) not in drawn]
    if blank:
        share = f"below {_FAINT:.0%} of the largest" if least else "exactly 0"
        notes.append(f"Not drawn, {share} everywhere: {', '.join(blank)}")
    heads = [[str(head) for head in range(grids[at].shape[1])] for at in drawn]
    panels = [
        (f"{site}, {at}", names, grids[at, site], effects.layers_of(site))
        for (at, site), names in zip(drawn, heads, strict=True)
    ]
    notes = [how_many(effects), *notes, *_within_classes(classes)]
    return layer_panels(panels, metric, "head", rotate=False, note="\n".join(notes))


def _positions_of_heads(size: Mapping[tuple[str, str], float], most: int) -> tuple[list[str], list[str]]:
    """The positions that are drawn, in order, and a line on those that are not.

    Args:
        size: position, site -> the largest magnitude there.
    """
    labels = list(dict.fromkeys(label for label, _ in size))
    largest = np.array([max(n for (at, _), n in size.items() if at == label) for label in labels])
    if len(labels) <= most:
        return labels, []
    most = min(most, max(1, int((largest > 0).sum())))
    # Where nothing has an effect, the last position stands for all.
    chosen = np.sort(np.argsort(-largest[::-1], kind="stable")[:most] * -1 + len(labels) - 1)
    left = np.delete(largest, chosen).max()
    note = (
        f"{most} of {len(labels)} positions, those with the largest effects; at the other "
        f"{len(labels) - most} they are {f'at most {left:.2g}' if left else 'exactly 0'}"
    )
    return [labels[i] for i in chosen.tolist()], [note]


def how_many(effects: Effects) -> str:
    """What a figure says of its pairs."""
    n = len(effects.pairs)
    return "1 pair" if n == 1 else f"Mean over {n:,} pairs"


def _by_position(named: Mapping[str, tuple[Effects, str]], metric: str) -> Figure:
    """A panel for each effects and site."""
    panels, classes = [], {}
    for name, (effects, site) in named.items():
        labels, values, over = aligned(effects, metric, site)
        mean = mean_over_pairs(values, over)[0]
        panels.append((name, labels, mean, effects.layers_of(site)))
        classes[name] = labels, mean, peaks(effects, metric, site)
    counts = {name: how_many(effects) for name, (effects, _) in named.items()}
    same = len(set(counts.values())) == 1
    said = (
        next(iter(counts.values()))
        if same
        else "; ".join(f"{name}: {n.lower()}" for name, n in counts.items())
    )
    note = "\n".join([said, *_within_classes(classes)])
    return layer_panels(panels, metric, "position", rotate=True, note=note)


def _within_classes(named: Mapping[str, tuple[list[str], np.ndarray, np.ndarray | None]]) -> list[str]:
    """A line on the largest effect at a single position that means over classes of positions hide, if any.

    Args:
        named: labels, [layer, label, ...] means, and what `positions.peaks` gives for them.
    """
    drawn = max((float(np.nanmax(np.abs(mean), initial=0)) for _, mean, _ in named.values()), default=0.0)
    hidden: tuple[float, str, str] | None = None
    for name, (labels, _, largest) in named.items():
        if largest is None:
            continue
        column = int(np.unravel_index(int(largest.argmax()), largest.shape)[1])
        if largest.max() > max(_HIDDEN * drawn, hidden[0] if hidden else 0.0):
            hidden = float(largest.max()), labels[column], name
    if hidden is None:
        return []
    size, label, site = hidden
    return [f"A class is the mean over its positions: a single one in {label} of {site} reaches {size:.2g}"]


def colour_scale(grids: Sequence[np.ndarray], metric: str) -> tuple[Colormap, Normalize]:
    """Diverging and centred on zero, asinh where wide; from zero up where nothing is negative."""
    largest = max((float(np.nanmax(np.abs(g))) for g in grids if not np.isnan(g).all()), default=0.0) or 1.0
    if check_metric(metric).never_negative:
        colours, low = plt.get_cmap("Reds"), 0.0
    else:
        colours, low = plt.get_cmap("RdBu_r"), -largest
    if is_wide(metric, largest):
        return colours.with_extremes(bad=MISSING), AsinhNorm(1.0, -largest, largest)
    return colours.with_extremes(bad=MISSING), Normalize(low, largest)


def layer_panels(
    panels: Sequence[Panel],
    metric: str,
    axis: str,
    *,
    rotate: bool,
    label: str | None = None,
    note: str = "",
) -> Figure:
    """Panels side by side as far as they fit; the colour bar says what the metric is, or `label`.

    `note` is lines below, of what the panels do not show.
    """
    columns = max(len(labels) for _, labels, _, _ in panels)
    layers = max(len(p[3]) for p in panels)
    panel_width = float(np.clip((0.27 if columns <= 12 else 0.2) * columns, 1.5, 6.0))
    panel_height = float(np.clip((0.32 if layers <= 10 else 0.16) * layers, 0.8, 5.0))
    across = max(1, min(len(panels), int(7.2 // panel_width)))
    down = -(-len(panels) // across)
    across = -(-len(panels) // down)  # rows of one length, where that can be
    even = [n for n in range(across, (across - 1) // 2, -1) if len(panels) % n == 0]
    across = even[0] if even else across  # better one row more than a place that stays blank
    down = -(-len(panels) // across)
    longest = max(len(label) for _, labels, _, _ in panels for label in labels) if rotate else 1
    colours, norm = colour_scale([mean for _, _, mean, _ in panels], metric)
    wide = isinstance(norm, AsinhNorm)
    said_of = metric_label(metric, wide) if label is None else label + (" (asinh scale)" if wide else "")
    height = down * (panel_height + 0.65 + 0.055 * longest) + 0.6  # with the colour bar
    width = max(across * panel_width + 0.8, min(7.2, _LETTER * len(said_of) + 0.8))
    said = [line for part in note.split("\n") for line in textwrap.wrap(part, int(14 * width))]
    same_layers = all(np.array_equal(panels[0][3], p[3]) for p in panels)
    figure, grid = plt.subplots(
        down, across, figsize=(width, height + 0.17 * len(said)), squeeze=False, sharey=same_layers
    )
    for axes, (title, labels, mean, numbers) in zip(grid.flat, panels, strict=False):
        image = axes.imshow(
            np.ma.masked_invalid(mean),
            origin="lower",
            aspect="auto",
            cmap=colours,
            norm=norm,
            interpolation="none",
        )
        axes.set_title(title, parse_math=False)
        axes.set_xlabel(axis)
        _ticks(axes, labels, numbers, rotate=rotate)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("layer")
    bar = figure.colorbar(
        image,
        ax=list(grid.flat),
        location="top",
        shrink=0.9,
        pad=0.02,
        aspect=0.9 * across * panel_width / 0.12,
    )
    if wide:
        ticks, names = wide_ticks(float(norm.vmin or 0), float(norm.vmax or 0))
        bar.set_ticks(ticks, labels=names)
        bar.minorticks_off()
    bar.set_label(folded(said_of, int((width - 0.7) / _LETTER)))
    bar.outline.set_linewidth(0.5)
    if said:
        figure.supxlabel("\n".join(said), fontsize=8, parse_math=False)
    return figure


def _ticks(axes: Axes, labels: list[str], layers: np.ndarray, *, rotate: bool) -> None:
    step = -(-len(labels) // _MOST_TICKS)
    shown = range(len(labels) - 1, -1, -step)  # from the end, so that the last position has its label
    angle: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if rotate else {}
    axes.set_xticks(list(shown), [labels[i] for i in shown], parse_math=False, **angle)
    step = -(-len(layers) // 16)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_linewidth(0.5)
