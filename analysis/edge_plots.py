"""Figures of edges: sender by receiver, and a circuit as a graph in layers."""

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from deltapatch.analysis.circuit import Circuit
from deltapatch.analysis.heatmaps import colour_scale
from deltapatch.analysis.style import COLOURS, figure_style, metric_label
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.nodes import Nodes
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.folder import plain_errors

_MOST_TICKS = 48
_MOST_NODES = 150  # of senders or receivers; beyond, the heads of a layer share a cell
_LINEAR = 50  # of the largest effect, up to which the scale is linear
DRAWN = 60  # edges of a graph, where no circuit says which
_READS = {"q": COLOURS[0], "k": COLOURS[2], "v": COLOURS[1], "m": COLOURS[3], "l": COLOURS[6]}
_WHAT = {"q": "queries", "k": "keys", "v": "values", "m": "MLP", "l": "logits"}
_NODE = re.compile(r"([am])(\d+)(?:\.(?:h|kv)(\d+))?")


def check_pair(edges: EdgeEffects, pair: int | None) -> None:
    """Raise DeltapatchError where a run has no such pair."""
    if pair is not None and not 0 <= pair < len(edges.pairs):
        raise DeltapatchError(f"pair {pair} does not exist: this run has 0 to {len(edges.pairs) - 1}")


def edge_heatmap(edges: EdgeEffects, metric: str, effect: str, pair: int | None = None) -> Figure:
    """Senders by receivers, mean over pairs or of one; edges that are not there are grey. Lines part layers.

    Of edges at single positions each cell is the sum over positions. Of many nodes heads of a layer share a
    cell, which is the effect of the edge between them that is largest in magnitude. The scale is linear near
    zero and logarithmic beyond: a few edges are far larger than all others.
    """
    check_pair(edges, pair)
    mean = edges.mean(metric, effect) if pair is None else edges.flat(metric, effect)[pair]
    title = f"{effect} effects of edges, {edges.direction}, "
    title += f"mean of {len(edges.pairs)} pairs" if pair is None else f"pair {pair}"
    if not edges.grid.together:
        mean = np.nansum(mean, axis=1)
    grid = np.full((len(edges.senders), len(edges.receivers)), np.nan)
    sender, receiver = edges.grid.edges.T
    grid[np.searchsorted(edges.grid.senders, sender), receiver] = mean
    rows, columns = edges.senders, edges.receivers
    if max(grid.shape) > _MOST_NODES:
        grid, rows, columns = _by_layer(grid, rows, columns)
        title += "\neach cell the largest effect of its heads"
    colours, linear = colour_scale([grid], metric)
    most = float(np.nanmax(np.abs(grid))) or 1.0
    norm = AsinhNorm(most / _LINEAR, linear.vmin, linear.vmax)
    height, width = (max(3.0, min(9.0, 0.11 * n + 1.5)) for n in grid.shape)
    figure, axes = plt.subplots(figsize=(max(4.5, width), height))
    image = axes.pcolormesh(grid, cmap=colours, norm=norm, rasterized=grid.size > 10_000)
    for which, names in (("y", rows), ("x", columns)):
        starts = _layer_starts(names)
        if len(names) <= _MOST_TICKS:
            at, labels = np.arange(len(names)) + 0.5, list(names)
        else:
            at, labels = np.array([start + 0.5 for start, _ in starts]), [name for _, name in starts]
        if which == "y":
            axes.set_yticks(at, labels)
        else:
            axes.set_xticks(at, labels, rotation=90)
        for start, _ in starts[1:]:
            (axes.axhline if which == "y" else axes.axvline)(start, color="0.6", linewidth=0.4)
    axes.tick_params(length=0, labelsize=6)
    axes.set_ylabel("sender")
    axes.set_xlabel("receiver")
    axes.set_title(title)
    bar = figure.colorbar(image, ax=axes, label=metric_label(metric, wide=True, most=44))
    powers = [most * 10.0**-p for p in range(2)]
    ticks = [0.0, *powers, *(-t for t in powers)]
    bar.set_ticks([t for t in ticks if (linear.vmin or 0.0) <= t], labels=[
        f"{t:.2g}" for t in ticks if (linear.vmin or 0.0) <= t
    ])  # fmt: skip
    return figure


def _by_layer(
    grid: np.ndarray, rows: Sequence[str], columns: Sequence[str]
) -> tuple[np.ndarray, list[str], list[str]]:
    """The same with the heads of a layer together: of each cell what is largest in magnitude."""
    row_names, column_names = (
        [re.sub(r"\.(h|kv)\d+", "", name) for name in names] for names in (rows, columns)
    )
    of_row, of_column = (list(dict.fromkeys(names)) for names in (row_names, column_names))
    out = np.full((len(of_row), len(of_column)), np.nan)
    row = np.array([of_row.index(name) for name in row_names])
    column = np.array([of_column.index(name) for name in column_names])
    there = np.argwhere(~np.isnan(grid))
    values = grid[tuple(there.T)]
    for at in np.argsort(np.abs(values), kind="stable"):  # the largest is written last
        i, j = there[at]
        out[row[i], column[j]] = values[at]
    return out, of_row, of_column


def _layer_starts(names: Sequence[str]) -> list[tuple[int, str]]:
    """Where each layer's nodes begin, and what is written there."""
    out: list[tuple[int, str]] = []
    for i, name in enumerate(names):
        match = _NODE.match(name)
        label = f"layer {match[2]}" if match else name
        if not out or out[-1][1] != label:
            out.append((i, label))
    return out


def circuit_graph(circuit: Circuit, title: str = "") -> Figure:
    """A circuit from the input at the bottom to the logits at the top; the width of an edge is its score.

    Colours tell what reads: queries, keys, values, MLP or logits; dashed edges speak against.
    """
    nodes = circuit.nodes
    where = _places(nodes, {name for edge in circuit.edges for name in (edge[0], edge[1].split("<")[0])})
    levels = len({y for _, y in where.values()})
    size = max(5.0, min(11.0, 0.55 * nodes.n_heads + 3)), max(3.0, min(11.0, 1.2 + 0.42 * levels))
    figure, axes = plt.subplots(figsize=size)
    kept = np.argwhere(circuit.kept)
    scores = np.array([circuit.scores[s, r] for s, r in kept])
    largest = np.abs(scores).max(initial=0) or 1.0
    receivers = list(nodes.receivers)
    for (s, r), score in sorted(zip(kept.tolist(), scores.tolist(), strict=True), key=lambda e: abs(e[1])):
        sender, receiver = nodes.senders[s], receivers[r]
        kind = receiver[-2] if receiver.endswith(">") else receiver[0]
        share = abs(score) / largest
        arrow = FancyArrowPatch(
            where[sender], where[receiver.split("<")[0]], connectionstyle=f"arc3,rad={_bend(receiver)}",
            arrowstyle="-|>", mutation_scale=5, shrinkA=7, shrinkB=7, color=_READS[kind],
            linewidth=0.4 + 2.6 * share, alpha=0.35 + 0.6 * share, linestyle="--" if score < 0 else "-",
        )  # fmt: skip
        axes.add_patch(arrow)
    for name, (x, y) in where.items():
        axes.text(
            x, y, name, ha="center", va="center", fontsize=6.5, zorder=3,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "0.3", "linewidth": 0.6},
        )  # fmt: skip
    xs, ys = zip(*where.values(), strict=True)
    axes.set_xlim(min(xs) - 0.8, max(xs) + 0.8)
    axes.set_ylim(min(ys) - 0.6, max(ys) + 0.6)
    axes.axis("off")
    handles = [Line2D([], [], color=_READS[kind], label=_WHAT[kind], linewidth=2) for kind in _READS]
    handles.append(Line2D([], [], color="0.4", linestyle="--", label="against", linewidth=1.2))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    axes.set_title(title or f"{len(circuit)} of {nodes.n_edges:,} edges")
    return figure


def _places(nodes: Nodes, names: set[str]) -> dict[str, tuple[float, float]]:
    """Where the nodes of a graph are drawn: heads of a layer side by side, its MLP above and to the right.

    Layers that have none take no room.
    """
    there = [match for name in nodes.senders[1:] if name in names and (match := _NODE.fullmatch(name))]
    above = not nodes.parallel
    levels = sorted({(int(match[2]), above and match[1] == "m") for match in there})
    height = {level: 1.0 + i for i, level in enumerate(levels)}
    middle = (nodes.n_heads - 1) / 2
    out = {"input": (middle, 0.0), "logits": (middle, 1.0 + len(levels))}
    for match in there:
        x = float(match[3]) if match[1] == "a" else nodes.n_heads + 0.3
        out[match[0]] = x, height[int(match[2]), above and match[1] == "m"]
    return out


def _bend(receiver: str) -> float:
    """How an arrow bends, so that those between the same nodes for q, k and v lie apart."""
    return {"q": -0.16, "k": 0.0, "v": 0.16}.get(receiver[-2] if receiver.endswith(">") else "", 0.08)


def draw_circuit(circuit: Circuit, path: Path) -> None:
    """Write a circuit's graph as .png or .pdf.

    Raises:
        DeltapatchError: the circuit is empty, or the file cannot be written.
    """
    if not len(circuit):
        raise DeltapatchError("the circuit has no edges to draw: keep more of them")
    with figure_style(), plain_errors(path):
        figure = circuit_graph(circuit)
        figure.savefig(path)
        plt.close(figure)
