"""`deltapatch effects`: what a run found, as a table, csv, json or parquet."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deltapatch.cli.metrics import MetricHelp
from deltapatch.cli.options import SEED, read_names
from deltapatch.cli.printed import Printed, table_format, table_out
from deltapatch.errors import DeltapatchError

if TYPE_CHECKING:
    from deltapatch.analysis.tables import Table
    from deltapatch.results.edge_effects import EdgeEffects
    from deltapatch.results.effects import Effects
    from deltapatch.results.interactions import Interactions
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
  deltapatch effects INTERACTIONS --top 20
"""


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
@table_format
@table_out
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
    from deltapatch.analysis.magnitudes import magnitudes
    from deltapatch.analysis.tables import averages, cells, having
    from deltapatch.results.edge_effects import EdgeEffects
    from deltapatch.results.estimated import ESTIMATES
    from deltapatch.results.interactions import Interactions, is_of_parts
    from deltapatch.results.metrics import default_metric
    from deltapatch.results.outcome import Outcome
    from deltapatch.results.reading import read_run

    found = read_run(run)
    names = (
        [name for text in metric for name in read_names(text)] if metric else [default_metric(found.metrics)]
    )
    printed = Printed(format_, out, top)
    if isinstance(found, Outcome) and is_of_parts(found):
        no_such = {"--site": site, "--effect": effect, "--mean-of-ratios": mean_of_ratios}
        _leave_out(no_such, f"{run} is a run of interactions")
        if caveat := found.caveat():
            warnings.warn(caveat, stacklevel=1)
        printed.show(_of_interactions(Interactions(found), names, by, fdr, draws=draws, seed=seed))
        return
    if isinstance(found, Outcome):
        asked = {"--site": site, "--effect": effect, "--interval": interval, "--fdr": fdr}
        _leave_out(asked | {"--mean-of-ratios": mean_of_ratios}, f"{run} is a run of given interventions")
        if (Path(run) / ESTIMATES).is_file():
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
    printed.show(table if fdr is None else _discovered(table, fdr, draws))


def _discovered(table: "Table", rate: float, draws: int) -> "Table":
    """The rows of a table that are discoveries at a rate; says how many."""
    from deltapatch.analysis.magnitudes import discoveries

    kept = discoveries(table, rate, draws)
    click.echo(f"{len(kept):,} of {len(table):,} rows have q <= {rate:g}.", err=True)
    return kept


def _leave_out(given: Mapping[str, object], why: str) -> None:
    """Raise DeltapatchError where an option was given that makes no sense here."""
    for option, value in given.items():
        if value:
            raise DeltapatchError(f"{why}: leave out {option}")


def _of_interactions(
    found: "Interactions", metrics: list[str], by: str | None, fdr: float | None, *, draws: int, seed: int
) -> "Table":
    """The table of a run of interactions: means over prompt pairs, or each with --by none."""
    from deltapatch.analysis.interactions import interaction_table
    from deltapatch.analysis.tables import Table

    if by == "none":
        _leave_out({"--fdr": fdr is not None}, "--by none lists every cell")
        return Table(found.columns(metrics), metrics[0])
    if by is not None:
        raise DeltapatchError("interactions are told by both parts: leave out --by, or say --by none")
    if len(metrics) > 1:
        raise DeltapatchError("interactions are tested in one metric at a time: name one, or say --by none")
    if fdr is not None and len(found.pairs) < 2:
        raise DeltapatchError("intervals and tests are over pairs, and this run has one pair only")
    noise = found.noise(metrics[0])
    if noise is not None:
        click.echo(f"Rounding is about {noise:.1e}: interactions of that size are nothing else.", err=True)
    table = interaction_table(found, metrics[0], draws=draws, seed=seed)
    return table if fdr is None else _discovered(table, fdr, draws)


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
