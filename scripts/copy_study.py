"""Copy what docs/study.md shows out of a study's folder: figures, the numbers behind them, and its tables.

    deltapatch reproduce --model builtin:gpt-neox-study --max-number 99 --out study
    python scripts/copy_study.py study

Figures become docs/figures/study_*.png, the numbers docs/study.json, and the tables of the page, between
comments that name their exhibits, are written anew.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from deltapatch.analysis.render import as_markdown
from deltapatch.analysis.tables import Table

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, RESULT, FIGURES = "study.md", "study.json", "figures"
_FIGURE = re.compile(r"\(figures/study_([\w.-]+?)__(\w+)\.png\)")  # experiment (or all) and exhibit
# experiment (or all), exhibit, and perhaps its columns and a value that a column has in the rows
_TABLE = re.compile(
    r"(<!-- table (\S+) (\S+)(?: columns=(\S+))?(?: where=(\w+):(\S+))? -->\n).*?(<!-- end -->)", re.DOTALL
)


def shown(page: str) -> list[tuple[str, str]]:
    """The exhibits that the page shows: (experiment or all, exhibit)."""
    figures = [found.groups() for found in _FIGURE.finditer(page)]
    tables = [found.group(2, 3) for found in _TABLE.finditer(page)]
    return sorted({(str(a), str(b)) for a, b in (*figures, *tables)})


def with_tables(page: str, result: dict[str, Any]) -> str:
    """The page with the tables of a result; a comment says which, and of which rows and columns."""

    def table(found: re.Match[str]) -> str:
        start, experiment, exhibit, columns, key, value, end = found.groups()
        own = result["exhibits"][f"{experiment}/{exhibit}"]["table"]
        rows = [i for i in range(len(own[next(iter(own))])) if key is None or str(own[key][i]) == value]
        names = columns.split(",") if columns else list(own)
        kept = {name: _column([own[name][i] for i in rows]) for name in names}
        return start + as_markdown(Table(kept, names[0])) + end

    return _TABLE.sub(table, page)


def copy(study: Path, docs: Path) -> None:
    """Copy figures and numbers, and write the page's tables."""
    page = (docs / PAGE).read_text(encoding="utf-8")
    numbers = json.loads((study / RESULT).read_text(encoding="utf-8"))
    exhibits = {}
    for experiment, exhibit in shown(page):
        section = numbers["summary"] if experiment == "all" else numbers["sections"][experiment]
        exhibits[f"{experiment}/{exhibit}"] = section["exhibits"][exhibit]
    about = ("model", "fingerprint", "versions", "settings", "layer", "failures")
    result = {**{name: numbers[name] for name in about}, "exhibits": exhibits}
    (docs / RESULT).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for experiment, exhibit in (found.groups() for found in _FIGURE.finditer(page)):
        folder = study if experiment == "all" else study / experiment
        target = docs / FIGURES / f"study_{experiment}__{exhibit}.png"
        shutil.copyfile(folder / FIGURES / f"{exhibit}.png", target)
    (docs / PAGE).write_text(with_tables(page, result), encoding="utf-8")


def _column(values: list[Any]) -> np.ndarray:
    kinds = {type(value) for value in values}
    if str in kinds:
        return np.array(values, dtype=object)
    return np.array(values) if kinds == {int} else np.array([np.nan if v is None else v for v in values])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    copy(Path(sys.argv[1]), DOCS)
