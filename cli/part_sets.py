"""`deltapatch shapley` and `deltapatch smallest-set`: what sets of parts do jointly."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltapatch.cli.listed import of_pairs
from deltapatch.cli.loading import Loading
from deltapatch.cli.options import asked, quiet, read_asked, say
from deltapatch.cli.parts import of_parts, read_parts
from deltapatch.cli.printed import Printed, table_format, table_out
from deltapatch.engine.options import Options

if TYPE_CHECKING:
    from deltapatch.models.model import Model

SHAPLEY_EXAMPLES = """\b
Examples:
  deltapatch shapley RUN --top 20 --model MODEL --pairs pairs.jsonl
  deltapatch shapley RUN --top 20 --permutations 200 --model MODEL --pairs pairs.jsonl --format csv
"""
SMALLEST_EXAMPLES = """\b
Examples:
  deltapatch smallest-set RUN --top 100 --model MODEL --pairs pairs.jsonl
  deltapatch smallest-set RUN --top 100 --share 0.8 --beam 4 --model MODEL --pairs pairs.jsonl --format json
"""


@click.command(short_help="Share a joint effect out among parts.", epilog=SHAPLEY_EXAMPLES)
@of_parts
@click.option(
    "--permutations",
    type=click.IntRange(2),
    default=64,
    show_default=True,
    help="Random orders of the parts; all of them where there are no more.",
)
@click.option("--metric", default="recovered", show_default=True, help="One of which effects add up.")
@of_pairs
@asked(Options, without=("metrics",))
@table_format
@table_out
@quiet
def shapley(
    *,
    permutations: int,
    metric: str,
    loading: Loading,
    format_: str,
    out: str | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Shapley values: what each part adds on the average of random orders in which parts are joined.

    They sum to the effect of all parts at once. `stderr` is that of the sampling of orders, low and high are
    the ends of a 95% bootstrap interval over prompt pairs, `alone` is the mean effect alone.
    """
    parts, model, options = _given(given, loading, quiet)

    from deltapatch.analysis.shapley import shapley as find

    found = find(model, Path(given["pairs_file"]), parts, permutations=permutations, metric=metric, **options)
    say(f"{found.rows:,} joint patches, {found.orders:,} orders; {found.in_words()}", quiet)
    Printed(format_, out, None).show(found.table())


@click.command("smallest-set", short_help="Search which parts are enough.", epilog=SMALLEST_EXAMPLES)
@of_parts
@click.option("--share", default=0.9, show_default=True, help="Of the logit difference, to be recovered.")
@click.option("--beam", type=click.IntRange(1), default=1, show_default=True, help="Sets that are followed.")
@click.option("--most", type=click.IntRange(1), help="The largest size that is tried; all unless given.")
@of_pairs
@asked(Options, without=("metrics",))
@table_format
@table_out
@quiet
def smallest_set(
    *,
    share: float,
    beam: int,
    most: int | None,
    loading: Loading,
    format_: str,
    out: str | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Search for the smallest set of parts whose joint patch recovers a share of the logit difference.

    Printed is what the best set of each size recovers: of the parts with the largest single effects (top), of
    the search, and of what is left when parts that are not needed are taken out again (pruned). csv, json and
    parquet name the parts of each set.
    """
    parts, model, options = _given(given, loading, quiet)

    from deltapatch.analysis.smallest_set import smallest_set as find

    found = find(model, Path(given["pairs_file"]), parts, share=share, beam=beam, most=most, **options)
    say(f"{found.rows:,} joint patches\n{found!r}", quiet)
    Printed(format_, out, None).show(found.table(parts=format_ != "table"))


def _given(given: dict[str, Any], loading: Loading, quiet: bool) -> tuple[Any, "Model", dict[str, Any]]:
    """The parts, the model, and the options of the runs."""
    names = ("run", "top", "rank_by", "site", "parts_file")
    parts = read_parts(*(given[name] for name in names))
    return parts, loading.load(quiet=quiet), read_asked(Options, given) | {"progress": not quiet}
