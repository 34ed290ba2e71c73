"""What commands share that make interventions of their own: features, directions, joint patches of parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from deltapatch.cli.loading import Loading, loading
from deltapatch.cli.options import Command, asked, pairs_file, read_asked
from deltapatch.cli.run_folder import RunFolder, run_folder
from deltapatch.engine.options import Options


def listing(command: Command) -> Command:
    """The options of all that a run takes, and of where its results go."""
    return asked(Options)(run_folder(command))


def at_positions(command: Command) -> Command:
    """--positions, each by itself."""
    return click.option(
        "--positions",
        default="all",
        show_default=True,
        help="all, last, numbers (from the end where negative) and labels, each by itself.",
    )(command)


def of_pairs(command: Command) -> Command:
    """The options that say which model is loaded, and the pairs."""
    return loading(pairs_file(command))


def carry_out(
    sweeping: Callable[..., Any],
    *,
    what: str,
    loading: Loading,
    folder: RunFolder,
    pairs_file: str,
    positions: str | None = None,
    **given: Any,
) -> Any:
    """Load, sweep, and say what was done.

    Args:
        sweeping: takes model, pairs and the options of a run.
        what: it patches, in the plural.
        positions: where, of what is patched at given ones.

    Returns:
        What was found.
    """
    from deltapatch import arguments

    at = {} if positions is None else {"positions": arguments.positions(positions)}
    model = loading.load(quiet=folder.quiet)
    found = sweeping(model, Path(pairs_file), **at, **folder.arguments(), **read_asked(Options, given))
    if folder.part is not None:
        folder.tell_part()
    else:
        folder.say(f"{len(found):,} {what} patched in {found.meta['seconds']:.1f} s")
        folder.tell({what: len(found), "pairs": len(found.pairs), "run": found.meta})
    return found
