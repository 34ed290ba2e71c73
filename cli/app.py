"""The group of commands: how errors, warnings and interruptions reach the user."""

import errno
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import click

from deltapatch.errors import DeltapatchError


class App(click.Group):
    """A click group whose errors are one sentence on stderr, exit code 2, and whose warnings are one line."""

    def main(  # type: ignore[override]  # never returns a value, whatever standalone_mode says
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        """Run the command line and exit: 0, 2 for a user's mistake, 130 when interrupted."""
        extra["standalone_mode"] = False
        _usable_streams()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("once", UserWarning)
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            sys.exit(_exit_code(lambda: super(App, self).main(args, prog_name, **extra)))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of work, not of the alphabet."""
        return list(self.commands)


def _usable_streams() -> None:
    """See that something is there to print to, and that a name which cannot be printed is printed escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # until the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _exit_code(run: Any) -> int:
    try:
        code = run()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except DeltapatchError as error:
        return _fail(str(error))
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt) as error:
        # click puts its own exception in the place of one that may say what is kept
        said = str(error) or str(error.__cause__ or "")
        click.echo(_one_line(said) or "Interrupted.", err=True)
        return 130
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader, `head` for example, has what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")


def _fail(message: str) -> int:
    click.echo(f"Error: {_one_line(message)}", err=True)
    return 2


def _show_warning(message: Warning | str, *rest: Any) -> None:
    click.echo(f"Warning: {_one_line(str(message))}", err=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())
