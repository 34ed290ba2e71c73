"""Figures of results: rates side by side, growth on log axes, effects in every precision."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from deltapatch.analysis.style import COLOURS, QUIET, figure_style, save
from deltapatch.bench.growth import AXES
from deltapatch.bench.peers.ours import PREFIX
from deltapatch.bench.peers.registry import ESTIMATES
from deltapatch.bench.results import cases, read_all
from deltapatch.bench.sides.cells import SWEEPS
from deltapatch.errors import DeltapatchError
from deltapatch.results.metrics import METRICS


def draw_all(sources: Sequence[Path], folder: Path) -> list[Path]:
    """Draw every result in files and folders; each figure is named after its file.

    Raises:
        DeltapatchError: no results, or a folder that cannot be written.
    """
    draw = {"compare": rates, "growth": growth, "precision": precision}
    paths: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with figure_style():
            for path, result in read_all(sources):
                figure = draw[result["kind"]](result) if result["kind"] in draw else None
                if figure is not None:
                    paths += save(figure, folder / f"bench_{path.stem}")
    except OSError as error:
        raise DeltapatchError(f"cannot write figures to {folder}: {error.strerror or error}") from error
    return paths


def rates(result: dict[str, Any]) -> Figure | None:
    """Interventions per second, a panel a sweep, a bar a side; only sides that agree with the oracle."""
    found = cases(result)
    # Of several models, which have the same sweeps, each has a column.
    sweeps = [
        (f"{case['model']['name']}:\n" if len(found) > 1 else "", sweep)
        for own in zip(*(case["sweeps"] for case in found), strict=True)
        for case, sweep in zip(found, own, strict=True)
        if any(column["status"] == "measured" for column in sweep["columns"].values())
    ]
    if not sweeps:
        return None
    n_columns = len(found) if len(found) > 1 else min(3, len(sweeps))
    n_rows = -(-len(sweeps) // n_columns)
    most = max(len(sweep["columns"]) for _, sweep in sweeps)
    size = (3.4 * n_columns, n_rows * (0.9 + 0.17 * most))
    figure, grid = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False)
    for axes in grid.flat[len(sweeps) :]:
        axes.set_visible(False)
    for axes, (model, sweep) in zip(grid.flat, sweeps, strict=False):
        shown = {
            n: c for n, c in sweep["columns"].items() if c["status"] == "measured" and n not in ESTIMATES
        }
        names = list(shown)[::-1]
        middle = np.array([shown[n]["rate"] for n in names])
        ends = np.array([shown[n]["spread"] for n in names]).T
        colours = [COLOURS[0] if n.startswith(PREFIX) else QUIET for n in names]
        axes.hlines(range(len(names)), *ends, color=colours, lw=1.2)
        axes.scatter(middle, range(len(names)), color=colours, s=22, zorder=2)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.grid(axis="x", color="0.9", lw=0.6)
        axes.set_axisbelow(True)
        axes.set_xscale("log")
        axes.set_xlim(*_decades(ends.min(), ends.max()))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(model + SWEEPS.get(sweep["name"], sweep["name"]).replace(", ", ",\n"))
        axes.set_xlabel("interventions per second")
    return figure


def growth(result: dict[str, Any]) -> Figure | None:
    """Seconds for a sweep against each size, a line a side, on log axes."""
    axes_of = result["axes"]
    if not axes_of:
        return None
    figure, grid = plt.subplots(1, len(axes_of), figsize=(2.6 * len(axes_of) + 1.2, 2.7), squeeze=False)
    names = list(result["sides"])
    for axes, (axis, points) in zip(grid[0], axes_of.items(), strict=True):
        for name, colour in zip(names, COLOURS * len(names), strict=False):
            own = [
                (p["value"], float(np.median(p["columns"][name]["seconds"])))
                for p in points
                if p["columns"][name]["status"] == "measured"
            ]
            if own:
                x, y = zip(*own, strict=True)
                axes.plot(x, y, color=colour, marker="o", markersize=3, lw=1.2, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(AXES[axis])
        seconds = [s for p in points for c in p["columns"].values() for s in c.get("seconds", ())]
        if seconds:
            axes.set_ylim(*_decades(min(seconds), max(seconds)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    grid[0][0].set_ylabel("seconds for the sweep")
    handles, labels = grid[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper")
    return figure


def precision(result: dict[str, Any]) -> Figure | None:
    """Each method's effects against the exact ones, on axes that are linear near zero."""
    methods = {n: m for n, m in result["methods"].items() if "effects" in m}
    exact = np.array(result["exact"])
    if not methods or not np.isfinite(exact).all():
        return None
    n_columns = min(4, len(methods))
    n_rows = -(-len(methods) // n_columns)
    figure, grid = plt.subplots(
        n_rows, n_columns, figsize=(2.2 * n_columns, 2.3 * n_rows), squeeze=False, sharex=True, sharey=True
    )
    width = max(float(np.quantile(np.abs(exact), 0.5)), 1e-12)
    for axes in grid.flat[len(methods) :]:
        axes.set_visible(False)
    for number, (axes, (name, found)) in enumerate(zip(grid.flat, methods.items(), strict=False)):
        got = np.array(found["effects"], dtype=float)
        line = [exact.min(), exact.max()]
        axes.plot(line, line, color=QUIET, lw=0.7, zorder=0)
        axes.scatter(exact, got, s=3, color=COLOURS[0], alpha=0.4, lw=0, rasterized=True)
        ticks = _powers(width, max(abs(exact.min()), abs(exact.max())))
        ticks = [t for t in ticks if 2 * exact.min() <= t <= 2 * exact.max()]
        names = [f"$10^{{{np.log10(t):.0f}}}$" if t > 0 else _negative(t) for t in ticks]
        axes.set_xscale("asinh", linear_width=width)
        axes.set_yscale("asinh", linear_width=width)
        axes.set_xticks(ticks, names)
        axes.set_yticks(ticks, names)
        axes.minorticks_off()
        axes.tick_params(labelbottom=number + n_columns >= len(methods))
        axes.set_title(f"{name}\nranks {found['rank_correlation']:.4f}")
    figure.supxlabel(f"exact {METRICS[result['metric']].title}", fontsize=9)
    figure.supylabel("as measured", fontsize=9)
    return figure


def _decades(low: float, high: float) -> tuple[float, float]:
    """Limits of a log axis that hold both ends with room, and a whole decade at least to have a tick."""
    low, high = low / 1.4, high * 1.4
    if np.floor(np.log10(high)) < np.ceil(np.log10(low)):
        low = 10 ** np.floor(np.log10(low))
    return float(low), float(high)


def _powers(width: float, largest: float) -> list[float]:
    """Zero and a few powers of ten either way, none so small that it would crowd the zero."""
    first, last = int(np.ceil(np.log10(width))) + 1, int(np.floor(np.log10(largest)))
    powers = [10.0**k for k in range(last, first - 1, -max(1, -(-(last - first + 1) // 3)))]
    return sorted([0.0, *powers, *(-p for p in powers)])


def _negative(tick: float) -> str:
    return f"$-10^{{{np.log10(-tick):.0f}}}$" if tick else "0"
