"""Sides as the comparison holds them: in a worker process, or in this one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from deltapatch.bench.side import Side, in_words

# Nothing is downloaded while it is measured, and nobody draws bars.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


class SideError(Exception):
    """A side failed, with the reason in a few words; the others go on."""


class Held(Protocol):
    """A side that answers requests, named as the methods of `Side`."""

    name: str

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The reply; SideError where there is none."""

    def stop(self) -> None:
        """End it."""


class Remote:
    """A side in a process of its own.

    Args:
        name: of the peer.
        log: a file for what it prints.
        python: the interpreter; this one's unless the peer is isolated.
    """

    def __init__(self, name: str, log: Path, python: str = sys.executable) -> None:
        self.name, self.log, self.python = name, log, python
        self.process: subprocess.Popen[str] | None = None

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the reply; the first one starts the process."""
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise SideError(f"its process ended ({self._last_words()})")
        return _checked(json.loads(line))

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        with open(self.log, "wb") as file:
            return subprocess.Popen(
                [self.python, "-m", "deltapatch.bench.worker", self.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, **QUIET},
                cwd=self.log.parent,
                text=True,
            )

    def _last_words(self) -> str:
        assert self.process is not None
        code = self.process.wait()
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return " ".join(lines[-1].split())[:200] if lines else f"exit code {code}"


class Local:
    """A side in this process: for tests, and where nothing has to be told apart."""

    def __init__(self, side: Side) -> None:
        self.name, self.side = side.name, side

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Call the method."""
        try:
            return _checked(getattr(self.side, do)(**request))
        except Exception as error:
            raise SideError(in_words(error)) from error

    def stop(self) -> None:
        """Nothing to end."""


class Absent:
    """A side that could not even be made."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """What to say in its place."""
        return {"missing": self.reason}

    def stop(self) -> None:
        """Nothing to end."""


def _checked(reply: dict[str, Any]) -> dict[str, Any]:
    if "error" in reply:
        raise SideError(reply["error"])
    return reply
