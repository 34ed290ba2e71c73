"""All figures of a run, written to a folder."""

from os import PathLike
from pathlib import Path

from deltapatch.analysis.circuit import Circuit
from deltapatch.analysis.curves import layer_curves, neuron_ranking
from deltapatch.analysis.edge_plots import DRAWN, circuit_graph, edge_heatmap
from deltapatch.analysis.heatmaps import head_heatmaps, position_heatmaps
from deltapatch.analysis.style import figure_style, save
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.sites import SITES
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.effects import Effects
from deltapatch.results.metrics import check_metric, default_metric


def plot_edges(edges: EdgeEffects, folder: str | PathLike[str], metric: str | None = None) -> list[Path]:
    """Draw a run of edges: sender by receiver, and the largest as a graph where it has all; PNG and PDF each.

    Args:
        metric: what to draw; `recovered` by default, or the first that the run can answer.

    Raises:
        DeltapatchError: an unknown metric or one that was not measured, or a folder that cannot be written.
    """
    metric = default_metric(edges.metrics) if metric is None else metric
    check_metric(metric)
    folder, paths, grid = Path(folder), list[Path](), edges.grid
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with figure_style():
            for effect in grid.effects:
                figure = edge_heatmap(edges, metric, effect)
                paths += save(figure, folder / f"edges_{effect}_{metric}")
            if grid.together and grid.nodes.keys == "query" and len(edges.edges) == grid.nodes.n_edges:
                circuit = Circuit.top(edges, min(DRAWN, len(edges.edges)), metric)
                title = f"the {DRAWN} largest edges by {metric}, those that reach the logits: {len(circuit)}"
                if len(circuit):
                    paths += save(circuit_graph(circuit, title), folder / f"graph_{metric}")
    except OSError as error:
        raise DeltapatchError(f"cannot write figures to {folder}: {error.strerror or error}") from error
    return paths


def plot_run(effects: Effects, folder: str | PathLike[str], metric: str | None = None) -> list[Path]:
    """Draw what a run has: heatmaps and curves of whole vectors, heads, neuron rankings; PNG and PDF each.

    Args:
        metric: what to draw; `recovered` by default, or the first that the run can answer.

    Returns:
        The files, in the order in which a reader wants them. Files of the same names are replaced.

    Raises:
        DeltapatchError: an unknown metric or one that was not measured, or a folder that cannot be written.
    """
    metric = default_metric(effects.metrics) if metric is None else metric
    check_metric(metric)
    folder = Path(folder)
    kinds = {site: SITES[site].index for site in effects.sites}
    vectors = [site for site, kind in kinds.items() if not kind.counts]
    paths: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with figure_style():
            if vectors:
                paths += save(position_heatmaps(effects, metric, vectors), folder / f"heatmap_{metric}")
                curves = layer_curves(effects, metric, vectors)
                paths += save(curves, folder / f"layers_{metric}") if curves else []
            for site, kind in kinds.items():
                if kind.few:
                    figure = head_heatmaps(effects, metric, site)
                    paths += save(figure, folder / f"heads_{site}_{metric}")
                elif kind.counts:
                    figure = neuron_ranking(effects, metric, site)
                    paths += save(figure, folder / f"neurons_{site}_{metric}")
    except OSError as error:
        raise DeltapatchError(f"cannot write figures to {folder}: {error.strerror or error}") from error
    return paths
