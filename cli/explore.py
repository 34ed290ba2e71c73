"""`deltapatch explore`: a run as one page to look at."""

import warnings
from pathlib import Path

import click

from deltapatch.cli.metrics import MetricHelp
from deltapatch.cli.options import as_json, print_json
from deltapatch.errors import DeltapatchError

EXAMPLES = """\b
Examples:
  deltapatch explore RUN
  deltapatch explore RUN --metric recovered,logit_diff --out page.html
  deltapatch explore EDGES --metric logit_diff
"""


@click.command(cls=MetricHelp, short_help="Make a page to look at a run.", epilog=EXAMPLES)
@click.argument("run", metavar="RUN")
@click.option(
    "--out", type=click.Path(dir_okay=False), help="The page to make; RUN/explore.html unless given."
)
@click.option(
    "--metric", help="Metrics that the page can show, with commas; all that the run has unless given."
)
@as_json
def explore(run: str, out: str | None, metric: str | None, as_json: bool) -> None:
    """Make one HTML page of the run folder RUN, and print its path.

    It opens in a browser from the file, without a server or network. Of a sweep of sites: heatmaps of every
    site and metric, of the mean or of a pair; the heads and neurons behind each cell; a ranking to search and
    sort; and the Python that makes the same joint patch. Of a sweep of edges: senders by receivers, the
    largest edges as a graph, the ranking, and the code that makes the same circuit or joint patch. Of runs
    with more than a page can hold the strongest are kept, and the page says so. RUN/explore.html is replaced,
    another file never.
    """
    from deltapatch.explore.page import write_page
    from deltapatch.results.outcome import Outcome
    from deltapatch.results.reading import called, read_run

    effects = read_run(run)
    if isinstance(effects, Outcome):
        raise DeltapatchError(f"{run} is {called(effects)[0]}: explore shows sweeps")
    if caveat := effects.caveat():
        warnings.warn(caveat, stacklevel=1)
    path = Path(out) if out else Path(run) / "explore.html"
    found = write_page(effects, path, metric, run=str(Path(run).resolve()), replace=out is None)
    if as_json:
        print_json({"run": run, "page": str(found), "bytes": found.stat().st_size})
    else:
        click.echo(str(found))
