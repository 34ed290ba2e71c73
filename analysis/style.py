"""How figures look, and how they are written: the same bytes for the same effects, as PNG and as PDF."""

import math
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np

if "matplotlib.pyplot" not in sys.modules and "ipykernel" not in sys.modules:
    matplotlib.use("Agg")  # files need no display; who draws figures of their own has chosen already

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deltapatch.results.metrics import check_metric

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # letters stay letters, as journals ask
    "svg.hashsalt": "deltapatch",
    "figure.constrained_layout.use": True,
}
# Okabe and Ito's colours, told apart by everyone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # beside the colours, for prints in black and white
POSITIVE, NEGATIVE, QUIET = "#B2182B", "#2166AC", "0.55"
MISSING = "0.82"  # a cell that has no value


def is_wide(metric: str, largest: float) -> bool:
    """Whether a figure needs a scale that is linear near zero and logarithmic beyond (asinh).

    The indirect effect divides by a probability: where a model is sure of its answer it reaches millions, and
    on a linear scale all but one cell would be white.
    """
    return check_metric(metric).skewed and largest > 30


def metric_label(metric: str, wide: bool, most: int = 80) -> str:
    """What an axis or colour bar says, in lines of at most so many letters."""
    return folded(check_metric(metric).label + (" (asinh scale)" if wide else ""), most)


def folded(text: str, most: int) -> str:
    """A label in lines of at most so many letters; what it has in brackets begins a line, if it must fold."""
    if len(text) <= most:
        return text
    return "\n".join(
        line for part in text.replace(" (", "\n(").split("\n") for line in textwrap.wrap(part, most)
    )


def wide_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """A few powers of ten and zero between two ends of an asinh scale, and their labels."""
    top = int(np.log10(max(abs(low), abs(high), 10)))
    step = math.ceil((top + 1) / 4)
    powers = range(top, 0 if top > 2 else -1, -step)  # one beside a zero would only crowd it
    named = {0.0: "0"}
    for power in powers:
        name = str(10**power) if power < 3 else f"10^{{{power}}}"
        named |= {10.0**power: f"${name}$", -(10.0**power): f"$-{name}$"}
    ticks = sorted(tick for tick in named if low <= tick <= high)
    return ticks, [named[tick] for tick in ticks]


def widen(axes: Axes, which: Literal["x", "y"], low: float, high: float) -> None:
    """Give one axis of a figure the asinh scale, from a little below `low` to a little above `high`."""
    ends = np.arcsinh([min(low, 0.0), max(high, 0.0)])
    room = 0.05 * (ends[1] - ends[0])
    limits = np.sinh([ends[0] - room, ends[1] + room]).tolist()
    ticks, names = wide_ticks(*limits)
    if which == "x":
        axes.set_xscale("asinh", linear_width=1.0)
        axes.set_xticks(ticks, names)
        axes.set_xlim(*limits)
    else:
        axes.set_yscale("asinh", linear_width=1.0)
        axes.set_yticks(ticks, names)
        axes.set_ylim(*limits)
    axes.minorticks_off()


@contextmanager
def figure_style() -> Iterator[None]:
    """Figures made inside look alike, and nothing of the caller's settings changes."""
    with plt.rc_context(STYLE):
        yield


def save(figure: Figure, stem: Path, dpi: int | None = None) -> list[Path]:
    """Write stem.png, of so many dots an inch, and stem.pdf, without dates, and close the figure."""
    paths = [stem.parent / f"{stem.name}.{kind}" for kind in ("png", "pdf")]
    with warnings.catch_warnings():
        # A token in a script that the font lacks is drawn as a box; the figure is still right.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(paths[0], dpi=dpi or STYLE["savefig.dpi"], metadata={"Software": None})
        figure.set_layout_engine("none")  # it stays as it is: laying out takes longer than drawing
        figure.savefig(paths[1], metadata={"CreationDate": None})
    plt.close(figure)
    return paths
