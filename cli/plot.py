"""`deltapatch plot`: the figures of a run."""

import warnings
from pathlib import Path

import click

from deltapatch.cli.metrics import MetricHelp
from deltapatch.cli.options import as_json, print_json

EXAMPLES = """\b
Examples:
  deltapatch plot RUN
  deltapatch plot RUN --metric logit_diff --out figures
"""


@click.command(cls=MetricHelp, short_help="Draw the figures of a run.", epilog=EXAMPLES)
@click.argument("run", metavar="RUN")
@click.option(
    "--out", type=click.Path(file_okay=False), help="A folder for the figures; RUN/plots unless given."
)
@click.option("--metric", help="What to draw, see below; recovered unless given, or what the run has.")
@as_json
def plot(run: str, out: str | None, metric: str | None, as_json: bool) -> None:
    """Draw the run folder RUN as PNG and PDF, and print the files' paths.

    Heatmaps of layer by position, curves by layer at the last token, heads, and rankings of neurons; of edges
    sender by receiver, and the largest as a graph. Figures of the same name are replaced.
    """
    from deltapatch.analysis.plots import plot_edges, plot_run
    from deltapatch.results.edge_effects import EdgeEffects
    from deltapatch.results.metrics import default_metric
    from deltapatch.results.reading import load_effects, read_run

    found = read_run(run)
    effects = found if isinstance(found, EdgeEffects) else load_effects(run)
    if caveat := effects.caveat():
        warnings.warn(caveat, stacklevel=1)
    metric = metric or default_metric(effects.metrics)
    folder = out or Path(run) / "plots"
    if isinstance(effects, EdgeEffects):
        drawn = plot_edges(effects, folder, metric)
    else:
        drawn = plot_run(effects, folder, metric)
    paths = [str(path) for path in drawn]
    if as_json:
        print_json({"run": run, "metric": metric, "figures": paths})
    else:
        click.echo("\n".join(paths))
