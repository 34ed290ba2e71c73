"""Which parts commands join: the strongest of a sweep, or those of a file."""

from typing import TYPE_CHECKING, Any

import click

from deltapatch.cli.options import Command, read_names
from deltapatch.errors import DeltapatchError

if TYPE_CHECKING:
    from deltapatch.interventions.given import Patch
    from deltapatch.interventions.parts import Part


def of_parts(command: Command) -> Command:
    """The options that say which parts."""
    for option in (
        click.option(
            "--parts",
            "parts_file",
            help='A file of parts, one JSON object a line: {"site": "z", "layer": 3, "position": "last", '
            '"index": 2}. Instead of RUN.',
        ),
        click.option(
            "--site", help="Of RUN: a site, or several with commas; all that were swept unless given."
        ),
        click.option("--rank-by", help="Of RUN: the metric of the ranking; recovered unless given."),
        click.option(
            "--top", type=click.IntRange(2), help="Of RUN: how many parts, the largest mean effects."
        ),
        click.argument("run", metavar="[RUN]", required=False),
    ):
        command = option(command)
    return command


def read_parts(
    run: str | None, top: int | None, rank_by: str | None, site: str | None, parts_file: str | None
) -> "list[Patch] | list[Part]":
    """The parts that were asked for. DeltapatchError where it is not said which, or twice."""
    if (run is None) == (parts_file is None):
        raise DeltapatchError(
            "say which parts: a run folder RUN with --top N, or a file of them with --parts"
        )
    if parts_file is not None:
        given: dict[str, Any] = {"--top": top, "--rank-by": rank_by, "--site": site}
        for option, value in given.items():
            if value is not None:
                raise DeltapatchError(f"{option} is of a run folder RUN: leave it out beside --parts")
        from deltapatch.interventions.parts import load_parts

        return load_parts(parts_file)
    if top is None:
        raise DeltapatchError("say how many of the run's parts are taken: --top N")
    from deltapatch.analysis.interactions import top_parts
    from deltapatch.results.reading import load_effects

    assert run is not None
    return top_parts(load_effects(run), top, rank_by, read_names(site) if site else None)
