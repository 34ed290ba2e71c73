"""`deltapatch merge`: the parts of a sweep that several processes shared, joined and verified."""

import click

from deltapatch.cli.options import quiet, say

EXAMPLES = """\b
Examples:
  deltapatch sweep --model MODEL --pairs pairs.jsonl --out RUN --shard 1/2
  deltapatch sweep --model MODEL --pairs pairs.jsonl --out RUN --shard 2/2
  deltapatch merge RUN
"""


@click.command(short_help="Join the parts of a sweep (--shard).", epilog=EXAMPLES)
@click.argument("run", metavar="RUN")
@quiet
def merge(run: str, quiet: bool) -> None:
    """Join what the parts of a sweep found in the run folder RUN, verify it, and finish the folder.

    The effects have the same bytes as those of one process that does all parts.
    """
    from deltapatch.results.merge import merge as join

    if not join(run):
        say(f"{run} is finished already: nothing to do", quiet)
    click.echo(run)
