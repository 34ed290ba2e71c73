"""What commands share that make interventions of their own: features, directions, joint patches of parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from deltapatch.cli.loading import Loading, loading
from deltapatch.cli.options import Command, asked, pairs_file, read_asked
from deltapatch.cli.run_folder import RunFolder, run_folder
from deltapatch.cli.screened import of_screen, screen_as_json
from deltapatch.engine.options import Options, ScreenOptions


def listing(command: Command, kind: type[Options] = Options) -> Command:
    """The options of all that a run takes, or more, and of where its results go."""
    return asked(kind)(run_folder(command))


def screening(command: Command) -> Command:
    """The same, and those of screens."""
    return listing(command, ScreenOptions)


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
        sweeping: takes model, pairs and the options of a run, or of a screened one.
        what: it patches, in the plural.
        positions: where, of what is patched at given ones.

    Returns:
        What was found.
    """
    from deltapatch import arguments

    at = {} if positions is None else {"positions": arguments.positions(positions)}
    model = loading.load(quiet=folder.quiet)
    found = sweeping(model, Path(pairs_file), **at, **folder.arguments(), **read_asked(ScreenOptions, given))
    screened = given.get("screen") is not None
    if folder.part is not None:
        folder.tell_part()
    else:
        computed = f"{len(found.verified):,} of " if screened else ""
        folder.say(f"{computed}{len(found):,} {what} patched in {found.meta['seconds']:.1f} s")
        if screened:
            folder.say(of_screen(found))
        more = screen_as_json(found) if screened and folder.as_json else {}
        folder.tell({what: len(found), "pairs": len(found.pairs), **more, "run": found.meta})
    return found
