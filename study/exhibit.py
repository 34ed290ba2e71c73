"""An exhibit: a table or a figure or both, with the sentence that says what they show."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from deltapatch.analysis.render import as_csv, as_markdown
from deltapatch.analysis.style import figure_style, save
from deltapatch.analysis.tables import Table

TABLES, FIGURES = "tables", "figures"


@dataclass(frozen=True)
class Exhibit:
    """A table or a figure or both.

    Attributes:
        name: of its files.
        title: what it is.
        caption: what is shown, over which pairs, and what its null value and its interval are.
        table: the numbers.
        figure: draws it.
        shown: how many rows of the table a report shows; the file has all.
        columns: which of its columns a report shows; all by default.
        drawn: there is a figure in its file.
    """

    name: str
    title: str
    caption: str
    table: Table | None = None
    figure: Callable[[], Figure] | None = None
    shown: int = 12
    columns: tuple[str, ...] | None = None
    drawn: bool = False

    def write(self, folder: Path) -> "Exhibit":
        """Write its files: tables/NAME.csv and .md, figures/NAME.png and .pdf.

        Returns:
            the exhibit without what it takes to draw it, which may be a whole run.
        """
        if self.table is not None:
            (folder / TABLES).mkdir(parents=True, exist_ok=True)
            (folder / TABLES / f"{self.name}.csv").write_text(as_csv(self.table), encoding="utf-8")
            (folder / TABLES / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")
        if self.figure is not None:
            (folder / FIGURES).mkdir(parents=True, exist_ok=True)
            with figure_style():
                save(self.figure(), folder / FIGURES / self.name)
        return replace(self, figure=None, drawn=self.figure is not None)

    def markdown(self) -> str:
        """The table as a report shows it."""
        if self.table is None:
            return ""
        names = self.columns or tuple(self.table.columns)
        shown = {name: self.table.columns[name][: self.shown] for name in names}
        return as_markdown(Table(shown, self.table.metric))

    def numbers(self) -> dict[str, Any]:
        """What a JSON file says of it."""
        columns = {} if self.table is None else self.table.columns
        plain = {name: [_plain(value) for value in column.tolist()] for name, column in columns.items()}
        return {"title": self.title, "caption": self.caption, "table": plain}


def _plain(value: Any) -> Any:
    """NaN is null in JSON; infinite numbers are text."""
    if isinstance(value, float) and not np.isfinite(value):
        return None if np.isnan(value) else str(value)
    return value
