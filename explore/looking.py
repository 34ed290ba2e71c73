"""What `Effects` shows of itself in Python: figures, the strongest, and the explorer's page in a notebook.

`Effects` calls these by name (see `results.effects`): they read results, and so stand above them.
"""

import html
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from deltapatch.analysis.circuit import Circuit
from deltapatch.analysis.curves import neuron_ranking
from deltapatch.analysis.edge_plots import circuit_graph, edge_heatmap
from deltapatch.analysis.heatmaps import head_heatmaps, position_heatmaps
from deltapatch.analysis.interaction_plots import interaction_matrix
from deltapatch.analysis.interactions import interaction_table
from deltapatch.analysis.select import one_pair, select
from deltapatch.analysis.style import figure_style
from deltapatch.analysis.tables import Table, averages
from deltapatch.errors import DeltapatchError
from deltapatch.explore.page import page, write_page
from deltapatch.interventions.sites import SITES
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.effects import Effects
from deltapatch.results.interactions import Interactions
from deltapatch.results.metrics import check_metric, default_metric


def plot(effects: Effects, metric: str | None = None) -> Figure:
    """Layer by position of all whole vectors; of a run without any, its first site: see `Effects.plot`."""
    whole_vectors = [site for site in effects.sites if not SITES[site].index.counts]
    if not whole_vectors:
        return heatmap(effects, next(iter(effects.sites)), metric)
    metric = _metric(effects, metric)
    return _made(lambda: position_heatmaps(effects, metric, whole_vectors))


def heatmap(
    effects: Effects, site: str | None = None, metric: str | None = None, *, pair: int | None = None
) -> Figure:
    """One site, of a pair or the mean: see `Effects.heatmap`."""
    metric = _metric(effects, metric)
    name = effects.site(site).site
    shown = select(effects, sites=[name])
    if pair is not None:
        shown = one_pair(shown, pair)
    if SITES[name].index.few:
        return _made(lambda: head_heatmaps(shown, metric, name))
    if SITES[name].index.counts:
        return _made(lambda: neuron_ranking(shown, metric, name))
    return _made(lambda: position_heatmaps(shown, metric, [name]))


def top(effects: Effects, n: int = 10, metric: str | None = None, site: str | None = None) -> Table:
    """The n strongest means over pairs: see `Effects.top`."""
    metric = _metric(effects, metric)
    if site is not None:
        sites = [effects.site(site).site]
    elif len(indexed := [name for name in effects.sites if SITES[name].index.counts]) in (
        0,
        len(effects.sites),
    ):
        sites = list(effects.sites)
    else:
        raise DeltapatchError(
            f"whole vectors and {', '.join(indexed)} do not share a ranking: name one site, such as "
            f"top({n}, site={indexed[0]!r})"
        )
    by = ["layer", "position", *(["index"] if SITES[sites[0]].index.counts else [])]
    return averages(effects, metric, by, sites).top(n)


def plot_edges(
    edges: EdgeEffects, metric: str | None = None, effect: str | None = None, *, pair: int | None = None
) -> Figure:
    """Senders by receivers: see `EdgeEffects.plot`."""
    metric = default_metric(edges.metrics) if metric is None else metric
    check_metric(metric)
    chosen = effect or edges.grid.effects[0]
    edges.flat(metric, chosen)  # which says what is wrong
    return _made(lambda: edge_heatmap(edges, metric, chosen, pair))


def top_edges(edges: EdgeEffects, n: int = 10, metric: str | None = None, effect: str | None = None) -> Table:
    """The n strongest means over pairs: see `EdgeEffects.top`."""
    metric = default_metric(edges.metrics) if metric is None else metric
    by = ["sender", "receiver", *([] if edges.grid.together else ["position"])]
    return averages(edges, metric, by, [effect or edges.grid.effects[0]]).top(n)


def plot_interactions(found: Interactions, metric: str | None = None) -> Figure:
    """Part by part: see `Interactions.plot`."""
    metric = default_metric(found.metrics) if metric is None else metric
    found.measured(metric)  # which says what is wrong
    return _made(lambda: interaction_matrix(found, metric))


def top_interactions(found: Interactions, n: int = 10, metric: str | None = None) -> Table:
    """The n strongest means over pairs: see `Interactions.top`."""
    return interaction_table(found, metric).top(n)


def plot_circuit(circuit: Circuit, title: str = "") -> Figure:
    """A graph in layers: see `Circuit.plot`."""
    if not len(circuit):
        raise DeltapatchError("the circuit has no edges to draw: keep more of them")
    return _made(lambda: circuit_graph(circuit, title))


@dataclass(frozen=True, repr=False)
class Explorer:
    """The explorer's page of some effects: shown in a notebook, or saved to open it in a browser."""

    effects: Effects | EdgeEffects
    metrics: Sequence[str] | str | None = None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page. DeltapatchError where the path is taken or cannot be written."""
        return write_page(self.effects, path, self.metrics)

    def __repr__(self) -> str:
        return "The explorer's page: a notebook shows it, and .save('page.html') writes it for a browser"

    def _repr_html_(self) -> str:
        inside = html.escape(page(self.effects, self.metrics))
        return (
            f'<iframe srcdoc="{inside}" style="width:100%;height:900px;border:0" title="explorer"></iframe>'
        )


def _metric(effects: Effects, metric: str | None) -> str:
    metric = default_metric(effects.metrics) if metric is None else metric
    check_metric(metric)
    return metric


def _made(draw: Any) -> Figure:
    """A figure in the house style that a notebook shows once, whatever its backend does with open figures."""
    with figure_style():
        figure = draw()
    plt.close(figure)  # it is the caller's now, and not among pyplot's
    figure._repr_png_ = lambda: _png(figure)
    return figure


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    with figure_style():
        figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
