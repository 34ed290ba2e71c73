"""The subject of a study: a model, a folder for what is found, and how to speak to whoever waits for it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from deltapatch.errors import DeltapatchError
from deltapatch.models.model import Model
from deltapatch.results.folder import RUN
from deltapatch.results.wholefile import write_whole
from deltapatch.study.published import Published
from deltapatch.study.settings import Settings

TIMES = "times.json"
_TIMED = ("date", "seconds")  # what a run says of itself that is never the same twice


class StudyStopped(DeltapatchError):
    """What ends a study, rather than one exhibit of it: a full disk, for example."""


@dataclass
class Subject:
    """A model and what a study keeps of it.

    Attributes:
        folder: where its experiments lie, each in a folder of its own.
        root: the study's folder, where times are kept.
        say: a line of progress.
        progress: show bars on stderr where that is a terminal.
        paper: what the paper reports of this model.
        layer: whose MLP's output coordinates are patched; chosen by the first experiment unless given.
    """

    model: Model
    folder: Path
    root: Path
    settings: Settings
    say: Callable[[str], None]
    progress: bool = True
    paper: Published | None = None
    layer: int | None = None
    adapter: str | None = None
    times: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The model as tables and figures call it."""
        return self.model.title + (f" + {self.adapter}" if self.adapter else "")

    @property
    def short(self) -> str:
        """The model as a legend calls it."""
        names = [self.model.name, *([self.adapter] if self.adapter else [])]
        own, *adapter = (PurePath(name).name for name in names)
        at = f" at {self.model.revision}" if self.model.revision else ""
        return " + ".join([own + at, *adapter])

    @contextmanager
    def stopping(self, what: str) -> Iterator[None]:
        """An error inside ends the study, whatever exhibit asked for it; the message says where it was."""
        try:
            yield
        except DeltapatchError as error:
            raise StudyStopped(f"{what}: {error}") from error

    def take_times(self, run: Path) -> None:
        """Move the date and the seconds of a finished run into times.json: the rest is the same each time."""
        about = json.loads((run / RUN).read_text(encoding="utf-8"))
        own = {name: about.pop(name) for name in _TIMED if name in about}
        if not own:
            return
        path = self.root / TIMES
        times = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        times[run.relative_to(self.root).as_posix()] = own
        write_text(path, json.dumps(times, indent=1) + "\n")
        write_text(run / RUN, json.dumps(about, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))
