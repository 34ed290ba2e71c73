"""What commands share that make interventions of their own: features, directions, joint patches of parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from deltapatch.cli.options import (
    Command,
    as_json,
    asked,
    loading,
    print_json,
    quiet,
    read_asked,
    read_shard,
    say,
)
from deltapatch.engine.options import Options


def listing(command: Command) -> Command:
    """The options that say of which model and pairs, where results go, and all that every run takes."""
    for option in (
        quiet,
        as_json,
        click.option(
            "--shard", metavar="I/N", help="Do part I of N only: N processes share --out; then merge."
        ),
        click.option("--resume", is_flag=True, help="Go on with the same run where it was cut off."),
        click.option(
            "--out", required=True, help="The run folder to make; it must not exist, unless resumed."
        ),
        asked(Options),
    ):
        command = option(command)
    return command


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
    return loading(
        click.option("--pairs", "pairs_file", required=True, help="Prompt pairs, one JSON object a line.")(
            command
        )
    )


def carry_out(
    sweeping: Callable[..., Any],
    *,
    what: str,
    model: str,
    revision: str | None,
    device: str,
    dtype: str,
    adapter: str | None,
    stream: bool,
    pairs_file: str,
    positions: str | None = None,
    out: str,
    resume: bool,
    shard: str | None,
    as_json: bool,
    quiet: bool,
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
    from deltapatch.models.load import load_model

    part = read_shard(shard)
    named = {} if revision is None else {"revision": revision}
    loaded = load_model(model, device=device, dtype=dtype, stream=stream, adapter=adapter, **named)
    say(repr(loaded), quiet)
    at = {} if positions is None else {"positions": arguments.positions(positions)}
    found = sweeping(
        loaded,
        Path(pairs_file),
        **at,
        progress=not quiet,
        out=out,
        resume=resume,
        shard=part,
        **read_asked(Options, given),
    )
    if part is not None:
        say(f"part {shard} is done; when all are: deltapatch merge {out}", quiet)
    else:
        say(f"{len(found):,} {what} patched in {found.meta['seconds']:.1f} s", quiet)
    if as_json:
        print_json({"out": out, what: len(found), "pairs": len(found.pairs), "run": found.meta})
    else:
        click.echo(out)
    return found


def check_free(out: str, resume: bool, shard: str | None) -> None:
    """Raise DeltapatchError where the run folder is taken, before anything is loaded."""
    from deltapatch.results.folder import check_output

    if not resume and read_shard(shard) is None:
        check_output(out)
