"""Progress of long work: a bar with rate and time left, on a terminal's stderr, or in a notebook."""

import html
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deltapatch.markup import in_notebook


@contextmanager
def progress_bar(label: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances the bar by so many units; a no-op where nobody watches."""
    if shown and in_notebook():
        with _notebook_bar(label, total) as advance:
            yield advance
        return
    if not shown or not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """Row-layers a second."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.speed or 0:,.0f}/s", style="progress.data.speed")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


@contextmanager
def _notebook_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """The same below a notebook's cell, at most five times a second; it goes when the work is done."""
    from IPython.display import HTML, display

    done, start, last = 0, time.monotonic(), 0.0
    place = display(HTML(html.escape(label)), display_id=True)

    def advance(n: int) -> None:
        nonlocal done, last
        done, now = done + n, time.monotonic()
        if now - last > 0.2:
            last, left = now, (total - done) * (now - start) / max(done, 1)
            bar = f'<progress value="{done}" max="{total}"></progress>'
            place.update(HTML(f"{html.escape(label)} {bar} {done / max(total, 1):.0%}, {left:.0f} s left"))

    try:
        yield advance
    finally:
        place.update(HTML(""))
