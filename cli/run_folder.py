"""Which run folder a command makes, and how what it found is said: five options, one record."""

import re
from dataclasses import dataclass
from typing import Any

import click

from deltapatch.cli.options import as_json, as_record, print_json, quiet, say
from deltapatch.errors import DeltapatchError

OPTIONS = (
    click.option("--out", help="The run folder to make; it must not exist, unless a run is resumed."),
    click.option(
        "--resume",
        is_flag=True,
        help="Go on with the same run where it was cut off: only what is missing or damaged is computed.",
    ),
    click.option(
        "--shard",
        metavar="I/N",
        help="Do part I of N only: N processes share the folder --out, and `deltapatch merge` finishes it.",
    ),
    as_json,
    quiet,
)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run folder to be made.

    Attributes:
        out: its path; None where none is made.
        resume: go on with what is there.
        shard: 2/8, the second of eight parts; None for all.
        as_json: print one object instead of the path.
        quiet: say no progress.
    """

    out: str | None
    resume: bool
    shard: str | None
    as_json: bool
    quiet: bool

    @property
    def part(self) -> tuple[int, int] | None:
        """Which of how many parts, from 1; None for all. Raises DeltapatchError where the text is none."""
        if self.shard is None:
            return None
        match = re.fullmatch(r"\s*(\d{1,9})/(\d{1,9})\s*", self.shard)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise DeltapatchError(f"--shard {self.shard!r} is not a part such as 2/8, from 1/8 to 8/8")
        return int(match[1]), int(match[2])

    def check(self, instead: str = "") -> None:
        """Raise DeltapatchError where no folder is named or it is taken, before anything is loaded.

        Args:
            instead: what makes no folder, for the sentence.
        """
        from deltapatch.results.folder import check_output

        if not self.out:
            raise DeltapatchError(f"Missing option '--out': the run folder to make{instead}")
        if self.part is None and not self.resume:
            check_output(self.out)

    def arguments(self) -> dict[str, Any]:
        """Those of a sweep that say the same."""
        return {"out": self.out, "resume": self.resume, "shard": self.part, "progress": not self.quiet}

    def say(self, text: str) -> None:
        """A line of progress, on stderr."""
        say(text, self.quiet)

    def tell_part(self) -> None:
        """Say that a part is done, and what remains to do."""
        self.say(f"part {self.shard} is done; when all are: deltapatch merge {self.out}")
        self.tell({"part": self.shard})

    def tell(self, found: dict[str, Any]) -> None:
        """Print the folder's path, or it and what was found as one object."""
        if self.as_json:
            print_json({"out": self.out, **found})
        else:
            click.echo(self.out)


#: The options that say where a run goes; the command gets them as its argument `folder`.
run_folder = as_record(RunFolder, "folder", OPTIONS)
