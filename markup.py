"""HTML that notebooks show of results, pairs and models: tables in which every text is text."""

import sys
from collections.abc import Iterable, Sequence
from html import escape

_CELL = "text-align:left;padding:2px 10px"


def table(
    title: str, rows: Iterable[Sequence[object]], header: Sequence[str] = (), notes: Sequence[str] = ()
) -> str:
    """A line, a table below it, and lines below that."""
    head = "".join(f'<th style="{_CELL}">{escape(name)}</th>' for name in header)
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    said = "".join(f"<div>{escape(note)}</div>" for note in notes)
    return (
        f"<div><b>{escape(title)}</b><table>{f'<thead><tr>{head}</tr></thead>' if head else ''}"
        f"<tbody>{body}</tbody></table>{said}</div>"
    )


def in_notebook() -> bool:
    """Whether this program is the kernel of a notebook."""
    if "IPython" not in sys.modules:
        return False
    from IPython.core.getipython import get_ipython

    return hasattr(get_ipython(), "kernel")  # that ipykernel is imported says nothing: nbclient imports it


def _cell(value: object) -> str:
    return f'<td style="{_CELL}">{escape(str(value))}</td>'
