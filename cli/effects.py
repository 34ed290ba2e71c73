"""`deltapatch effects`: what a run found, as a table, csv, json or parquet."""

import sys

import click

from deltapatch.cli.options import SEED, read_names
from deltapatch.errors import DeltapatchError

EXAMPLES = """\b
Examples:
  deltapatch effects RUN --site mlp_out --metric ie
  deltapatch effects RUN --site mlp_post --top 20
  deltapatch effects RUN --site attn_out --by layer,class
  deltapatch effects RUN --site mlp_post --by layer,index --fdr 0.05 --format csv
  deltapatch effects RUN --site mlp_out --format csv > effects.csv
"""


@click.command(short_help="Print the effects of a run.", epilog=EXAMPLES)
@click.argument("run", metavar="RUN")
@click.option("--site", help="A site, or several with commas; all that were swept unless given.")
@click.option("--metric", default="ie", show_default=True, help="What to say of each intervention.")
@click.option(
    "--by",
    help="Average over pairs and over everything but these: pair, layer, position, class (of the position), "
    "index. 'none' lists every cell. Tables are by layer, position and index unless told; other formats "
    "list every cell.",
)
@click.option(
    "--interval",
    is_flag=True,
    help="Beside each mean its 95% bootstrap interval over pairs (low, high), the p of a sign-flip test that "
    "it is zero, and its false-discovery rate q over all rows.",
)
@click.option(
    "--fdr", type=float, help="As --interval, and only the rows with q at most this, 0.05 for example."
)
@click.option("--draws", default=1000, show_default=True, help="Of the bootstrap and the test.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the bootstrap and the test.")
@click.option("--top", type=int, help="Only the K rows with the largest magnitude.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    default="table",
    show_default=True,
)
@click.option("--out", type=click.Path(dir_okay=False), help="A file to write, rather than stdout.")
def effects(
    run: str,
    site: str | None,
    metric: str,
    by: str | None,
    interval: bool,
    fdr: float | None,
    draws: int,
    seed: int,
    top: int | None,
    format_: str,
    out: str | None,
) -> None:
    """Print the effects in the run folder RUN.

    Without --by, csv, json and parquet have a row for each pair and intervention, with the columns pair,
    site, layer, position, index and the metric. With it, means over pairs, their standard errors and how
    many pairs.
    """
    from deltapatch.analysis.magnitudes import discoveries, magnitudes
    from deltapatch.analysis.render import render
    from deltapatch.analysis.tables import averages, cells
    from deltapatch.engine.effects import load_effects

    found = load_effects(run)
    sites = read_names(site) if site else list(found.sites)
    tested = interval or fdr is not None
    if tested and by == "none":
        raise DeltapatchError(
            "--interval and --fdr are about means over pairs, and --by none lists every cell"
        )
    if by is None and (format_ == "table" or tested):
        indexed = [found.site(name).axes[-1] == "index" for name in sites]
        if any(indexed) and not all(indexed):
            raise DeltapatchError("name one site: whole vectors and sites with an index do not share a table")
        groups = ["layer", "position", *(["index"] if all(indexed) else [])]
    else:
        groups = [] if by in (None, "none") else read_names(by or "")
    if tested:
        table = magnitudes(found, metric, groups, sites, draws=draws, seed=seed)
        if fdr is not None:
            whole, table = len(table), discoveries(table, fdr)
            click.echo(f"{len(table):,} of {whole:,} rows have q <= {fdr:g}.", err=True)
    else:
        listed = by == "none" or (by is None and format_ != "table")
        table = cells(found, metric, sites) if listed else averages(found, metric, groups, sites)
    cut = 40 if top is None and format_ == "table" and len(table) > 200 else None
    data = render(table.top(top if top is not None else cut), format_)
    if cut:
        click.echo(f"The top {cut} of {len(table):,} rows; --top K shows more.", err=True)
    if out:
        _write(out, data)
    elif format_ == "parquet" and sys.stdout.isatty():
        raise DeltapatchError("parquet is not text: give a file with --out, or redirect stdout")
    else:
        sys.stdout.buffer.write(data)


def _write(path: str, data: bytes) -> None:
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError as error:
        raise DeltapatchError(f"output path {path} is taken: choose another or remove it") from error
