"""How a table leaves the program: text for a terminal, csv, json or parquet."""

import csv
import io
import json
import math
from typing import Any

import numpy as np

from deltapatch.analysis.tables import Table
from deltapatch.errors import DeltapatchError

FORMATS = ("table", "csv", "json", "parquet")
_CHUNK = 65_536  # rows that are turned into Python objects at a time


def as_text(table: Table, title: str | None = None) -> str:
    """A plain table, numbers to four significant digits."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD)
    shown = {name: column for name, column in table.columns.items() if not _empty(name, column)}
    for name, column in shown.items():
        drawn.add_column(name, justify="left" if column.dtype == object else "right", no_wrap=True)
    for row in zip(*(column.tolist() for column in shown.values()), strict=True):
        drawn.add_row(*(Text(_short(value)) for value in row))
    out = io.StringIO()
    Console(file=out, width=200, color_system=None, highlight=False).print(drawn)
    text = "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n") + "\n"
    return f"{title}\n\n{text}" if title else text


def as_markdown(table: Table) -> str:
    """A table for a Markdown page, numbers to three significant digits; missing ones are left empty."""
    shown = {name: column for name, column in table.columns.items() if not _empty(name, column)}
    ends = ["---" if column.dtype == object else "--:" for column in shown.values()]
    lines = [list(shown), ends]
    for row in zip(*(column.tolist() for column in shown.values()), strict=True):
        lines.append([_short(value, 3).replace("|", "\\|") for value in row])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def as_csv(table: Table) -> str:
    """Comma-separated values with a header; an index of -1 and NaN are left empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    for start in range(0, len(table), _CHUNK):
        writer.writerows(_rows(table, start, start + _CHUNK, missing=""))
    return out.getvalue()


def as_json(table: Table) -> str:
    """One object: the metric, and the rows as records; an index of -1 and NaN are null."""
    names = list(table.columns)
    rows = [dict(zip(names, row, strict=True)) for row in _rows(table, 0, len(table), missing=None)]
    return json.dumps({"metric": table.metric, "rows": rows}, ensure_ascii=False) + "\n"


def as_parquet(table: Table) -> bytes:
    """A parquet file, through pandas and pyarrow; DeltapatchError where they are not installed."""
    try:
        import pandas
        import pyarrow  # noqa: F401 - to_parquet needs it, and would say so at length
    except ImportError as error:
        raise DeltapatchError(
            "parquet needs pandas and pyarrow, which are not installed: pip install 'deltapatch[parquet]'"
        ) from error
    columns: dict[str, Any] = dict(table.columns)
    for name, column in columns.items():
        if column.dtype == object and not all(isinstance(value, str) for value in column):
            columns[name] = [str(value) for value in column]  # labels and numbers in one column
    frame = pandas.DataFrame(columns)
    if "index" in columns:
        frame["index"] = frame["index"].astype("Int64").replace(-1, pandas.NA)
    out = io.BytesIO()
    frame.to_parquet(out, index=False)
    return out.getvalue()


def render(table: Table, format: str) -> bytes:
    """The table in one of FORMATS, as bytes."""
    if format == "parquet":
        return as_parquet(table)
    if format not in FORMATS:
        raise DeltapatchError(f"unknown format {format!r}: choose from {', '.join(FORMATS)}")
    return {"table": as_text, "csv": as_csv, "json": as_json}[format](table).encode()


def _rows(table: Table, start: int, stop: int, missing: Any) -> list[tuple[Any, ...]]:
    columns = []
    for name, column in table.columns.items():
        values = column[start:stop].tolist()
        if name == "index":
            values = [missing if value == -1 else value for value in values]
        elif column.dtype.kind == "f":
            values = [missing if math.isnan(value) else value for value in values]
        columns.append(values)
    return list(zip(*columns, strict=True))


def _empty(name: str, column: np.ndarray) -> bool:
    """Columns that say nothing here: an index that no site has, a standard error over one pair."""
    if name == "index":
        return bool((column == -1).all())
    return name == "stderr" and bool(np.isnan(column).all())


def _short(value: Any, digits: int = 4) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.{digits}g}"
    return "" if value is None else str(value)
