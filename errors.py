"""The one error that a user's mistake raises: a sentence that names what is wrong and what to do."""

import os
from pathlib import Path

_LONGEST = 1000  # characters of a message


class DeltapatchError(ValueError):
    """Bad input: a file, an option or an argument. The message is one clear sentence for the user.

    The command line prints the message and exits with code 2; Python users see an ordinary exception.
    Whatever a file had put into the message, it stays one line of readable length.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(str(message).splitlines())
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST - 300]} ... {line[-290:]}")


def path_of(value: object, what: str) -> Path:
    """The path that an argument is. DeltapatchError where it is none."""
    if not isinstance(value, str | os.PathLike):
        raise DeltapatchError(f"{what} must be a path, not {shown(value)}")
    return Path(value)


def shown(value: object, most: int = 80) -> str:
    """A value as a sentence shows it: its repr, cut where it is long."""
    text = repr(value[:most] if isinstance(value, str) else value)
    return text if len(text) <= most + 2 else f"{text[:most]}..."
