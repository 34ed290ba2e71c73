"""Writes the explorer's page: one HTML file that needs no server and no network.

The charts are plotly's: its Python package carries the whole library as one script under the MIT licence, so
that a page can hold it (4.8 MB) and nothing has to be fetched. Vega would take three scripts, and a fourth
not to compile expressions, which the page's content policy forbids.

Texts of a run are data. They travel as JSON without a letter that could end the script which holds them,
reach the page as text nodes, and the charts with what plotly takes for markup escaped.
"""

import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from deltapatch.errors import DeltapatchError, path_of
from deltapatch.explore.collect import collect
from deltapatch.explore.collect_edges import collect_edges
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.effects import Effects
from deltapatch.results.metrics import metric_names, name_of


def page(effects: Effects | EdgeEffects, metrics: str | Sequence[str] | None = None, run: str = "RUN") -> str:
    """The page of a run of sites or of edges, as HTML.

    Args:
        metrics: that it can show; all that the run can answer unless named.
        run: the run folder, as the copied Python names it.

    Raises:
        DeltapatchError: plotly is not installed; an unknown metric or one that was not measured.
    """
    plotly = _plotly()
    names = list(effects.metrics if metrics is None else map(name_of, metric_names(metrics)))
    if isinstance(effects, EdgeEffects):
        kind, content = "edges", collect_edges(effects, names, run)
    else:
        kind, content = "sites", collect(effects, names, run)
    here = files("deltapatch.explore")
    html = (here / "frame.html").read_text(encoding="utf-8")
    parts = {
        "@STYLE@": (here / "page.css").read_text(encoding="utf-8"),
        "@BODY@": (here / f"{kind}.html").read_text(encoding="utf-8"),
        "@CONTENT@": as_script(content),
        "@CODE@": "\n".join(
            (here / name).read_text(encoding="utf-8") for name in ("code.js", "shared.js", f"{kind}.js")
        ),
        "@PLOTLY@": plotly,
    }
    # One after the other over what the template says, never over what was filled in.
    out = []
    for piece in html.split("\n"):
        out.append(parts.get(piece.strip(), piece))
    return "\n".join(out)


def write_page(
    effects: Effects | EdgeEffects,
    path: str | os.PathLike[str],
    metrics: str | Sequence[str] | None = None,
    *,
    run: str = "RUN",
    replace: bool = False,
) -> Path:
    """Write the page of a run; arguments are those of `page`. `replace` writes over a file that is there.

    Raises:
        DeltapatchError: as of `page`; the path is taken or cannot be written.
    """
    path = path_of(path, "a page")
    if path.exists() and not replace:  # said before the work
        raise DeltapatchError(f"output path {path} is taken: choose another or remove it")
    html = page(effects, metrics, run)
    try:
        with open(path, "w" if replace else "x", encoding="utf-8") as file:
            file.write(html)
    except OSError as error:
        raise DeltapatchError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def as_script(content: Any) -> str:
    """JSON that can stand inside a script element: ASCII, and without <, > and &."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"), default=str)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _plotly() -> str:
    """Plotly's script. DeltapatchError where the package is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise DeltapatchError(
            "the explorer needs plotly, which is not installed: pip install 'deltapatch[explore]'"
        ) from error
    return str(get_plotlyjs())
