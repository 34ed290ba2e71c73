"""`deltapatch plot`: the figures of a run."""

import warnings
from pathlib import Path

import click

from deltapatch.cli.metrics import MetricHelp
from deltapatch.cli.options import as_json, print_json, read_names
from deltapatch.errors import DeltapatchError

EXAMPLES = """\b
Examples:
  deltapatch plot RUN
  deltapatch plot RUN --metric logit_diff --out figures
  deltapatch plot RUN --site mlp_out,attn_out --pair 3
"""


@click.command(cls=MetricHelp, short_help="Draw the figures of a run.", epilog=EXAMPLES)
@click.argument("run", metavar="RUN")
@click.option(
    "--out", type=click.Path(file_okay=False), help="A folder for the figures; RUN/plots unless given."
)
@click.option("--metric", help="What to draw, see below; recovered unless given, or what the run has.")
@click.option("--site", help="A site, or several with commas; all that were swept unless given.")
@click.option("--pair", type=int, help="A pair, by its number from 0; the mean over pairs unless given.")
@click.option(
    "--dpi",
    type=click.IntRange(50, 1200),
    default=300,
    show_default=True,
    help="Dots an inch of the PNG files.",
)
@as_json
def plot(
    *,
    run: str,
    out: str | None,
    metric: str | None,
    site: str | None,
    pair: int | None,
    dpi: int,
    as_json: bool,
) -> None:
    """Draw the run folder RUN as PNG and PDF, and print the files' paths.

    Heatmaps of layer by position, curves by layer at the last token, heads, and rankings of neurons; of edges
    sender by receiver, and the largest as a graph; of interactions part by part. Figures of the same name are
    replaced.
    """
    from deltapatch.analysis.plots import plot_edges, plot_interactions, plot_run
    from deltapatch.results.edge_effects import EdgeEffects
    from deltapatch.results.interactions import Interactions, is_of_parts
    from deltapatch.results.metrics import default_metric
    from deltapatch.results.outcome import Outcome
    from deltapatch.results.reading import load_effects, read_run

    found = read_run(run)
    of_parts = isinstance(found, Outcome) and is_of_parts(found)
    effects = found if of_parts or isinstance(found, EdgeEffects) else load_effects(run)
    if caveat := effects.caveat():
        warnings.warn(caveat, stacklevel=1)
    metric = metric or default_metric(effects.metrics)
    folder = out or Path(run) / "plots"
    if isinstance(effects, Outcome):
        for given, option in ((site, "--site"), (pair is not None, "--pair")):
            if given:
                raise DeltapatchError(f"{run} is a run of interactions: leave out {option}")
        made = plot_interactions(Interactions(effects), folder, metric, dpi=dpi)
    elif isinstance(effects, EdgeEffects):
        if site:
            raise DeltapatchError(f"{run} is a run of edges: leave out --site")
        made = plot_edges(effects, folder, metric, pair=pair, dpi=dpi)
    else:
        sites = read_names(site) if site else None
        made = plot_run(effects, folder, metric, sites=sites, pair=pair, dpi=dpi)
    paths = [str(path) for path in made]
    if as_json:
        print_json({"run": run, "metric": metric, "figures": paths})
    else:
        click.echo("\n".join(paths))
