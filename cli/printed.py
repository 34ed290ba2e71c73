"""How a table is printed, or written to a file: as text, csv, json or parquet."""

import shutil
import sys
from typing import TYPE_CHECKING, NamedTuple

import click

from deltapatch.errors import DeltapatchError

if TYPE_CHECKING:
    from deltapatch.analysis.tables import Table

_LONG, _CUT = 200, 40  # a table of more rows than the first is cut to the second

table_format = click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    default="table",
    show_default=True,
)
table_out = click.option(
    "--out", type=click.Path(dir_okay=False), help="A file to write, rather than stdout."
)


class Printed(NamedTuple):
    """How a table is printed, or written."""

    format: str
    out: str | None
    top: int | None

    def show(self, table: "Table") -> None:
        """Print a table, the top of it where that was asked for or it is long."""
        from deltapatch.analysis.render import render

        cut = _CUT if self.top is None and self.format == "table" and len(table) > _LONG else None
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() and not self.out else 80
        data = render(table.top(self.top if self.top is not None else cut), self.format, width)
        if cut:
            click.echo(f"The top {cut} of {len(table):,} rows; --top K shows more.", err=True)
        if self.out:
            _write(self.out, data)
        elif self.format == "parquet" and sys.stdout.isatty():
            raise DeltapatchError("parquet is not text: give a file with --out, or redirect stdout")
        else:
            sys.stdout.buffer.write(data)


def _write(path: str, data: bytes) -> None:
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError as error:
        raise DeltapatchError(f"output path {path} is taken: choose another or remove it") from error
