"""How a table leaves the program: text for a terminal, csv, json or parquet."""

import csv
import io
import json
import math
from typing import Any

import numpy as np

from deltapatch.analysis.tables import Table
from deltapatch.errors import DeltapatchError
from deltapatch.results.metrics import METRICS, OWN

FORMATS = ("table", "csv", "json", "parquet")
WIDTH = 80  # of a table of text, where nothing else is known
_WORD = 24  # of a column of words, where a table would be too wide otherwise
_CHUNK = 65_536  # rows that are turned into Python objects at a time


def as_text(table: Table, title: str | None = None, width: int = WIDTH) -> str:
    """A plain table, numbers to four significant digits.

    One that is wider than `width` is folded: its last columns come below, beside those that name the rows.
    """
    from rich.cells import cell_len

    shown = {name: column for name, column in table.columns.items() if not _empty(name, column)}
    cells = {name: [_short(value) for value in column.tolist()] for name, column in shown.items()}
    numbers = list(shown).index(table.metric) if table.metric in shown else len(shown)
    names, rest = list(shown)[:numbers], list(shown)[numbers:]
    sizes = {name: max(cell_len(text) for text in (name, *own)) + 3 for name, own in cells.items()}
    if sum(sizes[name] for name in (*names, *rest[:1])) >= width:  # long words go over several lines
        sizes |= {name: min(sizes[name], _WORD) for name in names if shown[name].dtype == object}
    parts: list[str] = []
    while rest or not parts:
        n = len(rest)
        while n > 1 and sum(sizes[name] for name in (*names, *rest[:n])) >= width:
            n -= 1
        if n < len(rest):  # better between two metrics
            n = next((i for i in range(n, 0, -1) if rest[i] in {**METRICS, **OWN}), n)
        own = {name: cells[name] for name in (*names, *rest[:n])}
        # Where the names alone are wider, it is wider: a number that is cut off is another number.
        least = sum(min(sizes[name], _WORD) if shown[name].dtype == object else sizes[name] for name in own)
        parts.append(_drawn(own, shown, max(width, least + 2)))
        rest = rest[n:]
    text = "\n".join(parts)
    return f"{title}\n\n{text}" if title else text


def _drawn(cells: dict[str, list[str]], columns: dict[str, np.ndarray], width: int) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD)
    for name in cells:
        words = columns[name].dtype == object
        drawn.add_column(Text(name), justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in zip(*cells.values(), strict=True):
        drawn.add_row(*(Text(value) for value in row))
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, highlight=False).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n") + "\n"


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
    """One object: the metric, and the rows as records; an index of -1 and NaN are null, infinity is text."""
    names = list(table.columns)
    plain = (map(_plain, row) for row in _rows(table, 0, len(table), missing=None))
    rows = [dict(zip(names, row, strict=True)) for row in plain]
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
    frame = pandas.DataFrame(table.columns)
    if "index" in table.columns:
        frame["index"] = frame["index"].astype("Int64").replace(-1, pandas.NA)
    out = io.BytesIO()
    frame.to_parquet(out, index=False)
    return out.getvalue()


def render(table: Table, format: str, width: int = WIDTH) -> bytes:
    """The table in one of FORMATS, as bytes; `width` is that of text."""
    if format == "parquet":
        return as_parquet(table)
    if format not in FORMATS:
        raise DeltapatchError(f"unknown format {format!r}: choose from {', '.join(FORMATS)}")
    if format == "table":
        return as_text(table, width=width).encode()
    return {"csv": as_csv, "json": as_json}[format](table).encode()


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


def _plain(value: Any) -> Any:
    """What JSON has a number for, or else text."""
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _empty(name: str, column: np.ndarray) -> bool:
    """Columns that say nothing here: an index that no site has, a standard error over one pair."""
    if name == "index":
        return bool((column == -1).all())
    return (name == "stderr" or name.endswith("_stderr")) and bool(np.isnan(column).all())


def _short(value: Any, digits: int = 4) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.{digits}g}"
    return "" if value is None else str(value)
