"""`deltapatch interactions`: what each two of some parts do together beyond what each does alone."""

from functools import partial
from typing import Any

import click

from deltapatch.cli.listed import carry_out, listing, of_pairs
from deltapatch.cli.parts import of_parts, read_parts

EXAMPLES = """\b
Examples:
  deltapatch interactions RUN --top 50 --model MODEL --pairs pairs.jsonl --out INTERACTIONS
  deltapatch interactions RUN --site z --top 30 --model MODEL --pairs pairs.jsonl --out HEADS
  deltapatch interactions --parts parts.jsonl --model MODEL --pairs pairs.jsonl --out INTERACTIONS
  deltapatch effects INTERACTIONS --fdr 0.05
  deltapatch plot INTERACTIONS
"""


@click.command(short_help="Patch parts alone and two by two.", epilog=EXAMPLES)
@of_parts
@of_pairs
@listing
def interactions(
    *,
    run: str | None,
    top: int | None,
    rank_by: str | None,
    site: str | None,
    parts_file: str | None,
    **given: Any,
) -> None:
    """Patch each of some parts alone, each two jointly, and all at once, to see how they interact.

    The interaction of two parts is the effect of both minus the effects of each.

    The parts are the strongest of the sweep in the run folder RUN, or those of a file. Take other pairs than
    those of RUN: what is found is then not the luck by which parts came to the top. --precision auto is
    float32, or float64 where float32 does not keep the interactions, which are second differences.
    """
    parts = read_parts(run, top, rank_by, site, parts_file)
    given["folder"].check()

    from deltapatch.analysis.interactions import interactions as sweeping

    found = carry_out(partial(sweeping, parts=parts), what="interactions", **given)
    noise = found.relative_noise() if given["folder"].part is None and found.metrics else None
    if noise is not None:
        given["folder"].say(f"rounding is about {noise:.0e} of the interactions' own size")
