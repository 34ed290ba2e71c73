"""How the result of a benchmark is handed over, and how its sizes are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from deltapatch.cli.options import print_json, read_names
from deltapatch.errors import DeltapatchError

out_file = click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write the result, a JSON file; one of that name is replaced.",
)


def read_sizes(option: str, text: str) -> list[int]:
    """8,16,32."""
    if not read_names(text) or not all(item.isdigit() and int(item) for item in read_names(text)):
        raise DeltapatchError(f"{option} {text!r} is not a list of sizes such as 8,16,32")
    return [int(item) for item in read_names(text)]


def deliver(
    kind: str, result: dict[str, Any], out: Path | None, as_json: bool, table: Callable[[Any], str]
) -> None:
    """Write the file; print the table, or the object on the last line."""
    from deltapatch.bench.results import stamp, write

    result = stamp(kind, result)
    if out is not None:
        write(out, result)
    click.echo(table(result), err=as_json, nl=False)
    if as_json:
        print_json(result)
