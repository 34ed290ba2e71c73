"""`deltapatch effects`: what a run found, as a table, csv, json or parquet."""

import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from deltapatch.cli.metrics import MetricHelp
from deltapatch.cli.options import SEED, read_names
from deltapatch.errors import DeltapatchError

if TYPE_CHECKING:
    from deltapatch.analysis.tables import Table
    from deltapatch.results.edge_effects import EdgeEffects
    from deltapatch.results.effects import Effects
    from deltapatch.results.outcome import Outcome

EXAMPLES = """\b
Examples:
  deltapatch effects RUN --site mlp_out
  deltapatch effects RUN --site mlp_post --by neuron --top 20
  deltapatch effects RUN --site attn_out --by layer,class --metric recovered,ie
  deltapatch effects RUN --site z --by head,position --format json
  deltapatch effects RUN --site mlp_post --by neuron --fdr 0.05 --format csv
  deltapatch effects RUN --site mlp_out --format csv > effects.csv
  deltapatch effects EDGES --by sender,receiver --top 50
  deltapatch effects FEATURES --by layer,feature --top 20
"""
_LONG, _CUT = 200, 40  # a table of more rows than the first is cut to the second


@click.command(cls=MetricHelp, short_help="Print the effects of a run.", epilog=EXAMPLES)
@click.argument("run", metavar="RUN")
@click.option(
    "--site",
    help="A site, or several with commas; unless given all that were swept, and that have the index of --by.",
)
@click.option("--effect", help="Of a run of edges: total or direct; what was measured unless given.")
@click.option(
    "--metric",
    multiple=True,
    help="What to say of each intervention, see below; several with commas, or the option again. recovered "
    "unless given, or what the run has.",
)
@click.option(
    "--by",
    help="Average over pairs and over everything but these: pair, layer, position, class (of the position), "
    "index, or head, neuron, coordinate for the index of such sites, layers apart; of edges sender, "
    "receiver, position; of features sae, layer, position, feature. 'none' lists every cell. By layer, "
    "position and index (edges by sender and receiver) unless told; but csv, json and parquet of a whole "
    "run list every cell.",
)
@click.option(
    "--mean-of-ratios",
    is_flag=True,
    help="Beside a mean that is a ratio of means over pairs (recovered), the mean of the pairs' own ratios.",
)
@click.option(
    "--interval",
    is_flag=True,
    help="Beside each mean its 95% bootstrap interval over pairs (low, high), the p of a sign-flip test that "
    "it is zero, and its false-discovery rate q over all rows.",
)
@click.option(
    "--fdr",
    type=float,
    help="As --interval, and only the rows with q (of the first metric) at most this, 0.05 for example.",
)
@click.option("--draws", default=1000, show_default=True, help="Of the bootstrap and the test.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the bootstrap and the test.")
@click.option(
    "--top",
    type=int,
    help="Only the K rows with the largest magnitude of the (first) metric: of the means, in every format, "
    "unless --by none says of single cells.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    default="table",
    show_default=True,
)
@click.option("--out", type=click.Path(dir_okay=False), help="A file to write, rather than stdout.")
def effects(
    *,
    run: str,
    site: str | None,
    effect: str | None,
    metric: tuple[str, ...],
    by: str | None,
    mean_of_ratios: bool,
    interval: bool,
    fdr: float | None,
    draws: int,
    seed: int,
    top: int | None,
    format_: str,
    out: str | None,
) -> None:
    """Print the effects in the run folder RUN.

    A table has means over pairs, their standard errors and how many pairs; so do csv, json and parquet with
    --by, --top, --interval or --fdr. Without these they have a row for each pair and intervention, with the
    columns pair, site, layer, position, index and the metrics.

    Of several metrics the columns beside each are called METRIC_stderr and so on. Beside the mean of ie
    stands its median, since a few pairs can make most of such a mean.
    """
    from deltapatch.analysis.magnitudes import discoveries, magnitudes
    from deltapatch.analysis.tables import averages, cells, having
    from deltapatch.results.edge_effects import EdgeEffects
    from deltapatch.results.metrics import default_metric
    from deltapatch.results.outcome import Outcome
    from deltapatch.results.reading import read_run
    from deltapatch.results.screened import ESTIMATES

    found = read_run(run)
    names = (
        [name for text in metric for name in read_names(text)] if metric else [default_metric(found.metrics)]
    )
    printed = _Printed(format_, out, top)
    screened = isinstance(found, Outcome) and (Path(run) / ESTIMATES).is_file()
    if isinstance(found, Outcome):
        asked = {"--site": site, "--effect": effect, "--interval": interval, "--fdr": fdr}
        for option, value in {**asked, "--mean-of-ratios": mean_of_ratios}.items():
            if value:
                raise DeltapatchError(f"{run} is a run of given interventions: leave out {option}")
        if screened:
            printed.show(_of_screen(run, names, by))
        else:
            printed.show(_of_interventions(found, names, by, whole=top is None and format_ != "table"))
        return
    edges = isinstance(found, EdgeEffects)
    for given, option, has in (
        (site and edges, "--site", "edges"),
        (effect and not edges, "--effect", "sites"),
    ):
        if given:
            raise DeltapatchError(f"{run} is a run of {has}: leave out {option}")
    if caveat := found.caveat():
        warnings.warn(caveat, stacklevel=1)
    there: list[str] = [*found.grid.effects] if isinstance(found, EdgeEffects) else [*found.sites]
    sites = read_names(chosen) if (chosen := site or effect) else there
    tested = interval or fdr is not None
    for given, option in (
        (tested, "--interval and --fdr"),
        (mean_of_ratios, "the ratios of --mean-of-ratios"),
    ):
        if given and by == "none":
            raise DeltapatchError(f"--by none lists every cell, and {option} ask for means: leave one out")
    if tested and mean_of_ratios:
        raise DeltapatchError("--mean-of-ratios and --interval do not go together: leave one out")
    whole = not (tested or mean_of_ratios or top is not None)  # nothing is asked of means
    if by == "none" or (by is None and format_ != "table" and whole):
        table = cells(found, names, sites)
    else:
        groups = _default_groups(found, sites) if by is None else read_names(by)
        if site is None and not edges:
            sites = having(groups, sites)
        if tested:
            table = magnitudes(found, names, groups, sites, draws=draws, seed=seed)
        else:
            table = averages(found, names, groups, sites, mean_of_ratios=mean_of_ratios)
    if fdr is not None:
        n_rows, table = len(table), discoveries(table, fdr, draws)
        click.echo(f"{len(table):,} of {n_rows:,} rows have q <= {fdr:g}.", err=True)
    printed.show(table)


class _Printed(NamedTuple):
    """How a table is printed, or written."""

    format: str
    out: str | None
    top: int | None

    def show(self, table: "Table") -> None:
        """Print a table, the top of it where that was asked for or it is long."""
        from deltapatch.analysis.render import render

        cut = _CUT if self.top is None and self.format == "table" and len(table) > _LONG else None
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() and not self.out else 80
        data = render(table.top(self.top if self.top is not None else cut), self.format, width)
        if cut:
            click.echo(f"The top {cut} of {len(table):,} rows; --top K shows more.", err=True)
        if self.out:
            _write(self.out, data)
        elif self.format == "parquet" and sys.stdout.isatty():
            raise DeltapatchError("parquet is not text: give a file with --out, or redirect stdout")
        else:
            sys.stdout.buffer.write(data)


def _of_interventions(found: "Outcome", metrics: list[str], by: str | None, whole: bool) -> "Table":
    """The table of a run of given interventions: of features means over pairs, unless each is asked for."""
    from deltapatch.analysis.outcomes import default_groups, outcome_averages, outcome_cells

    groups = default_groups(found) if by is None else read_names(by)
    if by == "none" or (by is None and (whole or not groups)):
        return outcome_cells(found, metrics)
    return outcome_averages(found, metrics, groups)


def _of_screen(run: str, metrics: list[str], by: str | None) -> "Table":
    """What a screened sweep verified, each by itself: it was chosen by its estimate, so means say nothing."""
    from deltapatch.analysis.tables import Table
    from deltapatch.results.screened import load_screened

    if by not in (None, "none"):
        raise DeltapatchError(
            f"{run} is a screened sweep: what was verified was chosen by its estimate, and means over it are "
            "none over all; leave out --by"
        )
    return Table(load_screened(run).columns(metrics), metrics[0])


def _default_groups(found: "Effects | EdgeEffects", sites: list[str]) -> list[str]:
    """What means are told by unless --by says."""
    from deltapatch.results.edge_effects import EdgeEffects

    if isinstance(found, EdgeEffects):
        return ["sender", "receiver", *([] if found.grid.together else ["position"])]
    indexed = [found.site(name).axes[-1] == "index" for name in sites]
    if any(indexed) and not all(indexed):
        raise DeltapatchError("name one site: whole vectors and sites with an index do not share a table")
    return ["layer", "position", *(["index"] if all(indexed) else [])]


def _write(path: str, data: bytes) -> None:
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError as error:
        raise DeltapatchError(f"output path {path} is taken: choose another or remove it") from error
