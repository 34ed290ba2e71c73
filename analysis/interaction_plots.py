"""Interactions as a matrix, parts that interact alike beside each other."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure

from deltapatch.analysis.heatmaps import colour_scale
from deltapatch.analysis.statistics import mean_over_pairs
from deltapatch.analysis.style import folded, wide_ticks
from deltapatch.results.interactions import Interactions
from deltapatch.results.metrics import check_metric

_NAMED = 48  # parts at most that all have their name on the axes


def interaction_matrix(found: Interactions, metric: str) -> Figure:
    """Part by part, mean over prompt pairs, in the order of `cluster_order`; red is positive."""
    measured = found.measured(metric)
    mean = mean_over_pairs(measured.interaction, measured.over)[0]  # [part, part]
    order = cluster_order(mean)
    names, shared = _names(found)
    n = len(order)
    size = float(np.clip(0.17 * n, 2.2, 6.5))
    longest = max(len(name) for name in names)
    figure, axes = plt.subplots(figsize=(size + 0.9 + 0.065 * longest, size + 0.6 + 0.065 * longest))
    colours, norm = colour_scale([mean], metric)
    image = axes.imshow(
        np.ma.masked_invalid(mean[np.ix_(order, order)]), cmap=colours, norm=norm, interpolation="none"
    )
    step = -(-n // _NAMED)
    shown = range(0, n, step)
    labels = [names[order[i]] for i in shown]
    axes.set_xticks(list(shown), labels, rotation=90, parse_math=False)
    axes.set_yticks(list(shown), labels, parse_math=False)
    axes.tick_params(length=0, labelsize=7)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_linewidth(0.5)
    bar = figure.colorbar(image, ax=axes, location="top", shrink=0.9, pad=0.02, aspect=30)
    wide = isinstance(norm, AsinhNorm)
    if wide:
        ticks, told = wide_ticks(float(norm.vmin or 0), float(norm.vmax or 0))
        bar.set_ticks(ticks, labels=told)
        bar.minorticks_off()
    said = f"interaction in {check_metric(metric).title}" + (" (asinh scale)" if wide else "")
    bar.set_label(folded(said, int((figure.get_figwidth() - 0.3) / 0.08)))
    bar.outline.set_linewidth(0.5)
    pairs = "1 pair" if len(found.pairs) == 1 else f"Mean over {len(found.pairs):,} pairs"
    note = f"{pairs}{'; all parts ' + shared if shared else ''}"
    figure.supxlabel(note, fontsize=8, parse_math=False)
    return figure


def cluster_order(matrix: np.ndarray) -> np.ndarray:
    """The leaves of an average-linkage clustering of a symmetric matrix's rows, [part], with NaN as 0.

    The distance of two parts is that of their rows, but for what they have with each other. Each merge puts
    the ends of its clusters together that are closest.
    """
    rows = np.nan_to_num(matrix)
    n = len(rows)
    square = (rows**2).sum(1)
    apart = square[:, None] + square[None] - 2 * rows @ rows.T
    # Where one has the other, the other has itself, which is nothing: that is no difference between them.
    apart = np.sqrt(np.maximum(apart - 2 * rows**2, 0.0))
    own, far = apart.copy(), apart
    np.fill_diagonal(far, np.inf)
    leaves, size = {i: [i] for i in range(n)}, np.ones(n)
    for _ in range(n - 1):
        a, b = sorted(int(i) for i in np.unravel_index(int(far.argmin()), far.shape))
        ways = [(x, y) for x in (leaves[a], leaves[a][::-1]) for y in (leaves[b], leaves[b][::-1])]
        left, right = min(ways, key=lambda way: float(own[way[0][-1], way[1][0]]))
        leaves[a] = left + right
        merged = (size[a] * far[a] + size[b] * far[b]) / (size[a] + size[b])
        far[a] = far[:, a] = merged
        far[b] = far[:, b] = np.inf
        far[a, a] = np.inf
        size[a] += size[b]
    return np.array(leaves[0])


def _names(found: Interactions) -> tuple[list[str], str]:
    """A tick for each part, without the site and position that all share, and these in words."""
    sites, positions = {p.site for p in found.parts}, {p.position for p in found.parts}
    names, shared = found.names, ""
    if len(sites) == 1:
        shared = f"of {found.parts[0].site}"
        names = [name.removeprefix(f"{found.parts[0].site} ") for name in names]
    if len(positions) == 1:
        ends = [name.partition(" @") for name in names]
        shared = f"{shared} at {ends[0][2].split(' ')[0]}".strip()
        names = [begin + (f" {end.split(' ')[1]}" if " " in end else "") for begin, _, end in ends]
    return names, shared
