"""All figures of a run, written to a folder."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from matplotlib.figure import Figure

from deltapatch.analysis.circuit import Circuit
from deltapatch.analysis.curves import layer_curves, neuron_ranking
from deltapatch.analysis.edge_plots import DRAWN, check_pair, circuit_graph, edge_heatmap
from deltapatch.analysis.heatmaps import head_heatmaps, position_heatmaps
from deltapatch.analysis.interaction_plots import interaction_matrix
from deltapatch.analysis.select import one_pair
from deltapatch.analysis.style import figure_style, save
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.sites import SITES
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.effects import Effects
from deltapatch.results.interactions import Interactions
from deltapatch.results.metrics import check_metric, default_metric


def plot_edges(
    edges: EdgeEffects,
    folder: str | PathLike[str],
    metric: str | None = None,
    *,
    pair: int | None = None,
    dpi: int = 300,
) -> list[Path]:
    """Draw a run of edges: sender by receiver, and the largest as a graph where it has all; PNG and PDF each.

    Args:
        metric: what to draw; `recovered` by default, or the first that the run can answer.
        pair: of which; the mean over all by default, which the graph always is of.
        dpi: of the PNG files.

    Raises:
        DeltapatchError: an unknown metric or one that was not measured, no such pair, or a folder that cannot
            be written.
    """
    check_pair(edges, pair)
    metric = default_metric(edges.metrics) if metric is None else metric
    check_metric(metric)
    folder, paths, grid = Path(folder), list[Path](), edges.grid
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with figure_style():
            for effect in grid.effects:
                figure = edge_heatmap(edges, metric, effect, pair)
                paths += save(figure, folder / f"edges_{effect}_{metric}", dpi)
            if grid.together and grid.nodes.keys == "query" and len(edges.edges) == grid.nodes.n_edges:
                circuit = Circuit.top(edges, min(DRAWN, len(edges.edges)), metric)
                title = f"the {DRAWN} largest edges by {metric}, those that reach the logits: {len(circuit)}"
                if len(circuit) and pair is None:
                    paths += save(circuit_graph(circuit, title), folder / f"graph_{metric}", dpi)
    except OSError as error:
        raise DeltapatchError(f"cannot write figures to {folder}: {error.strerror or error}") from error
    return paths


def plot_interactions(
    found: Interactions, folder: str | PathLike[str], metric: str | None = None, *, dpi: int = 300
) -> list[Path]:
    """Draw interactions, part by part; PNG and PDF.

    Args:
        metric: what to draw; `recovered` by default, or the first that the run can answer.
        dpi: of the PNG file.

    Raises:
        DeltapatchError: as of `Interactions.measured`; a folder that cannot be written.
    """
    metric = default_metric(found.metrics) if metric is None else metric
    folder = Path(folder)
    found.measured(metric)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with figure_style():
            return save(interaction_matrix(found, metric), folder / f"interactions_{metric}", dpi)
    except OSError as error:
        raise DeltapatchError(f"cannot write figures to {folder}: {error.strerror or error}") from error


def plot_run(
    effects: Effects,
    folder: str | PathLike[str],
    metric: str | None = None,
    *,
    sites: Sequence[str] | None = None,
    pair: int | None = None,
    dpi: int = 300,
) -> list[Path]:
    """Draw what a run has: heatmaps and curves of whole vectors, heads, neuron rankings; PNG and PDF each.

    Args:
        metric: what to draw; `recovered` by default, or the first that the run can answer.
        sites: all that were swept by default.
        pair: the number of a pair, rather than the mean over pairs.
        dpi: dots an inch of the PNG files.

    Returns:
        The files, in the order in which a reader wants them. Files of the same names are replaced; those of a
        pair are called so.

    Raises:
        DeltapatchError: an unknown metric, site or pair, or one that was not measured or swept; a folder that
            cannot be written.
    """
    metric = default_metric(effects.metrics) if metric is None else metric
    check_metric(metric)
    folder = Path(folder)
    names = [effects.site(name).site for name in sites] if sites else list(effects.sites)
    end = metric if pair is None else f"{metric}_pair{pair}"
    effects = effects if pair is None else one_pair(effects, pair)
    kinds = {name: SITES[name].index for name in names}
    vectors = [name for name, kind in kinds.items() if not kind.counts]
    heads = sorted((name for name, kind in kinds.items() if kind.few), key=list(SITES).index)
    paths: list[Path] = []

    def keep(figure: Figure | None, name: str) -> None:
        if figure is not None:
            paths.extend(save(figure, folder / f"{name}_{end}", dpi))

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with figure_style():
            if vectors:
                keep(position_heatmaps(effects, metric, vectors), "heatmap")
                keep(layer_curves(effects, metric, vectors), "layers")
            if heads:
                keep(head_heatmaps(effects, metric, heads), f"heads_{'-'.join(heads)}")
            for name, kind in kinds.items():
                if kind.counts and not kind.few:
                    keep(neuron_ranking(effects, metric, name), f"neurons_{name}")
    except OSError as error:
        raise DeltapatchError(f"cannot write figures to {folder}: {error.strerror or error}") from error
    return paths
