"""A measured side as a process: it prints one JSON object a line, and waits for a newline before the next.

Each line is made when it is asked for, so that sides whose lines are seconds can take turns. A process has
import times and a peak of memory of its own, and its Python may be another environment's. It keeps to as many
CPUs as it has threads, where the system can pin it. What libraries print goes to stderr.

A module says what is printed: it has a function `lines` that takes the arguments and yields the objects. Both
ends are here: `lines_of` starts such a process and yields what it prints; `main` is what runs in it.
"""

import time

BEGAN = time.perf_counter()  # before anything that takes long is imported

import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Generator  # noqa: E402
from contextlib import suppress  # noqa: E402
from importlib import import_module  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from deltapatch.errors import DeltapatchError  # noqa: E402

Lines = Generator[dict[str, Any], None, None]

# Nothing is downloaded while it is measured, and nobody draws bars.
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}

_CORE = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def lines_of(python: str, threads: int, module: str, *arguments: str, log: Path) -> Lines:
    """What a process prints, from its start on; closing the iterator ends it.

    Args:
        python: the interpreter.
        threads: how many it has.
        module: whose `lines` it prints, with these arguments.
        log: a file for its stderr.
    """
    begin = f"from {__name__} import main; main()"
    command = [python, "-c", begin, str(threads), module, *arguments]
    many = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        open(log, "wb") as file,
        subprocess.Popen(
            command, stderr=file, env=os.environ | _QUIET | many, cwd=log.parent, **pipes
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
                with suppress(OSError):  # it has ended: no line follows
                    process.stdin.write("\n")
                    process.stdin.flush()
            code = process.wait()
        finally:
            process.kill()
            with suppress(OSError):
                process.stdin.close()
    if code:
        words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        why = " ".join(words[-1].split())[:200] if words else f"exit code {code}"
        yield {"error": f"its process ended ({why})"}


def told(lines: Lines) -> Lines:
    """The lines; an exception is one more, {"error": what went wrong}, and the last."""
    try:
        yield from lines
    except Exception as error:
        traceback.print_exc()
        yield {"error": in_words(error)}


def in_words(error: Exception) -> str:
    """An error in a line, with its kind unless it is meant for users as it is."""
    kind = "" if isinstance(error, DeltapatchError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}"[:300]


def pinned() -> list[int] | None:
    """The CPUs that this process may use; None where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def of_cores(cpus: list[int], n: int) -> list[int]:
    """n of these CPUs, of as many cores as there are: two CPUs of one core share what they compute with."""
    firsts = {_core(cpu): cpu for cpu in reversed(cpus)}.values()  # the lowest of each core
    return [*sorted(firsts), *(cpu for cpu in cpus if cpu not in firsts)][:n]


def _core(cpu: int) -> str:
    """What the CPUs of a core have in common; its own number where the system does not say."""
    try:
        return Path(_CORE.format(cpu)).read_text()
    except OSError:
        return str(cpu)


def main() -> None:
    """Print the lines of a module, as the arguments say: threads, module, and what it is given."""
    threads, module, *arguments = sys.argv[1:]
    cpus = pinned()
    if cpus is not None:  # before there are threads, which all do as this one
        os.sched_setaffinity(0, of_cores(cpus, int(threads)))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in told(import_module(module).lines(*arguments)):
        print(json.dumps(line), file=out, flush=True)
        sys.stdin.readline()  # at its end, too, the work goes on: whoever cannot ask only reads
