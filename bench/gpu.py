"""All that is to be measured on a GPU, in one command that ends within its time.

    python -m deltapatch.bench.gpu --out gpu.json
    python -m deltapatch.bench.gpu --tests --out gpu_tests.json

The first measures, the most valuable first: half a minute of smoke, all neurons of GPT-J-6B, hooks on the
same, the limits of the machine; then fp8, other shapes, each kernel, and the built-in models' effects in
every precision. Each part is a process of its own with a limit of its own, and every number is in the file
as soon as it is found: what fails, hangs or takes too long is an entry that says so, and the rest goes on.
The second runs the tests that need a GPU, on all cores. docs/gpu.md says more.

`--tiny` measures toy shapes anywhere, in Triton's interpreter, so that the command itself can be tested.

On a machine where deltapatch is not installed, a link to this repository is enough:

    mkdir -p /tmp/site && ln -sfn "$PWD" /tmp/site/deltapatch
    PYTHONPATH=/tmp/site python -m deltapatch.bench.gpu
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click

from deltapatch.results.wholefile import write_whole

Report = dict[str, Any]
_LEAST = 5.0  # seconds that a part is begun for
_TAIL = 3000  # characters of what a process said that are kept


@dataclass(frozen=True)
class Part:
    """A process that measures.

    Attributes:
        command: what it is started with; it writes a line of JSON to stdout for every number.
        limit: seconds that it may take.
    """

    command: Sequence[str]
    limit: float


# In the order in which they are done.
LIMITS = {
    "smoke": 90,
    "gptj": 200,
    "fp8": 90,
    "llama": 120,
    "pythia": 120,
    "edges": 60,
    "kernels": 150,
    "precision": 120,
}


def measure(
    parts: Mapping[str, Part], out: Path, seconds: float, say: Callable[[str], None], env: Mapping[str, str]
) -> Report:
    """Carry out parts, one after the other, until the time is over.

    Args:
        parts: what to measure.
        out: receives what is known after every number, whole.
        seconds: for all parts together.
        say: takes lines of progress.
        env: of the processes.

    Returns:
        What is in the file: `machine`, and of each part `steps` (name -> what was found), `ended` ("done", or
        why it did not come to its end) and `took_seconds`.
    """
    report: Report = {"machine": None, "parts": {}}
    until = time.monotonic() + seconds
    for name, part in parts.items():
        began = time.monotonic()
        entry: Report = {"ended": "running", "took_seconds": 0.0, "steps": {}}
        report["parts"][name] = entry
        limit = min(part.limit, until - began)
        if limit < min(_LEAST, part.limit):
            entry["ended"] = "not begun: no time was left"
        else:
            say(f"{name}: at most {limit:.0f} s")
            for line in _carried_out(part.command, limit, entry, env):
                if "machine" in line:
                    report["machine"] = report["machine"] or line["machine"]
                else:
                    entry["steps"][line["step"]] = line["found"]
                    say(f"  {time.monotonic() - began:6.1f} s  {line['step']}: {_in_short(line['found'])}")
                entry["took_seconds"] = round(time.monotonic() - began, 1)
                _write(out, report)
            say(f"  {entry['ended']} after {time.monotonic() - began:.0f} s")
        entry["took_seconds"] = round(time.monotonic() - began, 1)
        _write(out, report)
    return report


def _carried_out(
    command: Sequence[str], limit: float, entry: Report, env: Mapping[str, str]
) -> Iterator[Report]:
    """The lines of a process as they come, until its time is over; `entry` receives how it ended."""
    until = time.monotonic() + limit
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, env=dict(env), start_new_session=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process, lines))
        reader.start()
        try:
            while (text := lines.get(timeout=max(0.0, until - time.monotonic()))) is not None:
                yield json.loads(text)
            code = process.wait(timeout=max(0.0, until - time.monotonic()))
            entry["ended"] = "done" if not code else f"failed with exit code {code}"
        except (queue.Empty, subprocess.TimeoutExpired):
            entry["ended"] = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join()
            assert process.stdout is not None
            process.stdout.close()
        if entry["ended"] != "done":
            said.seek(0)
            entry["said"] = said.read()[-_TAIL:]


def _read(process: Any, lines: "queue.Queue[str | None]") -> None:
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _write(out: Path, report: Report) -> None:
    text = json.dumps(report, indent=1) + "\n"
    write_whole(out, lambda draft: draft.write_text(text))


def failures(report: Report) -> list[str]:
    """What did not come to its end, in words."""
    out = []
    for name, part in report["parts"].items():
        for step, found in part["steps"].items():
            if "failed" in found:
                out.append(f"{name}, {step}: {found['failed']}")
            elif found.get("compiled_meanwhile"):
                out.append(
                    f"{name}, {step}: compiled {', '.join(found['compiled_meanwhile'])} while it was timed"
                )
        if part["ended"] != "done":
            out.append(f"{name}: {part['ended']}")
    return out


def table(report: Report) -> list[str]:
    """A line for each whole sweep, and one for each way to do the same with hooks."""
    out = []
    for name, part in report["parts"].items():
        for step, found in part["steps"].items():
            if "rows_s" in found:
                share = found["of_product_rate"]
                of_rate = "" if share is None else f", {share:.0%} of the product rate"
                text = (
                    f"{found['seconds']:.2f} s ({found['seconds_with_noise_floor']:.2f} with the noise floor)"
                )
                out.append(f"{name:<8} {step:<16} {text}, {found['rows_s']:,.0f} rows/s{of_rate}")
            if step == "hooks" and "failed" not in found:
                for kind, told in found.items():
                    ratio = told["deltapatch_over_it"]
                    times = "" if ratio is None else f"; deltapatch {ratio:.1f} times that"
                    text = f"{told['rows_s']:,.0f} rows/s in batches of {told['batch']}{times}"
                    out.append(f"{name:<8} hooks, {kind}: {text}")
    return out


def _in_short(found: Report) -> str:
    text = found.get("failed") or json.dumps(found)
    return text if len(text) <= 160 else text[:157] + "..."


def test_commands(workers: int | None) -> dict[str, tuple[list[str], dict[str, str]]]:
    """What runs the tests that need a GPU, and its environment: on all cores, warnings shown and not raised.

    Those of the kernels are elsewhere run in Triton's interpreter, and do not say that they need a GPU.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    if find_spec("xdist") is not None:
        command += ["--numprocesses", str(workers or os.cpu_count() or 1), "--dist", "worksteal"]
    kernels = [f"tests/kernels/interpreted{which}.py" for which in ("", "_attention")]
    return {
        "kernels": (
            [*command, "-m", "slow or not slow", *kernels],
            {"TRITON_INTERPRET": "0", "DELTAPATCH_TEST_DEVICE": "cuda"},
        ),
        "sweeps": ([*command, "-m", "gpu"], {}),
    }


def run_tests(commands: Mapping[str, tuple[list[str], dict[str, str]]], out: Path | None) -> bool:
    """Run tests, and write how many passed and which did not; whether all did."""
    report: Report = {"machine": None, "tests": {}}
    for name, (command, env) in commands.items():
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder, "tests.xml")
            subprocess.run(
                [*command, f"--junitxml={told}"], cwd=Path(__file__).parents[1], env=os.environ | env
            )
            report["tests"][name] = counted(told.read_bytes()) if told.exists() else {"failed": ["all"]}
        if out is not None:
            import torch

            from deltapatch.bench.gpu_parts import machine

            on = "cuda" if torch.cuda.is_available() else "cpu"
            report["machine"] = report["machine"] or machine(on)
            _write(out, report)
    return not any(found["failed"] for found in report["tests"].values())


def counted(xml: bytes) -> Report:
    """Of pytest's report: tests that passed and were skipped, names of those that failed, and seconds."""
    suite = next(ElementTree.fromstring(xml).iter("testsuite"))
    n, errors, failures, skipped = (
        int(suite.get(key, 0)) for key in ("tests", "errors", "failures", "skipped")
    )
    return {
        "passed": n - errors - failures - skipped,
        "skipped": skipped,
        "failed": [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if {part.tag for part in case} & {"failure", "error"}
        ],
        "seconds": float(suite.get("time", 0)),
    }


def _environment(tiny: bool) -> dict[str, str]:
    """Of the processes that measure."""
    env = dict(os.environ)
    # Blocks of PyTorch's memory grow in place, so that rows of every layer's sizes share them.
    env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if tiny:
        env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return env


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="Toy shapes: whether the command works, not how fast anything is.")
@click.option("--only", help=f"Parts to do, with commas: {', '.join(LIMITS)}.")
@click.option(
    "--seconds", default=540.0, show_default=True, help="For everything; what is not begun by then is left."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Receives every number as it is found.  [default: gpu.json; of --tests no file]",
)
@click.option("--tests", is_flag=True, help="Run the tests that need a GPU instead, on all cores.")
def main(device: str, tiny: bool, only: str | None, seconds: float, out: Path | None, tests: bool) -> None:
    """Measure on a GPU, the most valuable first, or run the tests that need one."""
    if tests:
        sys.exit(0 if run_tests(test_commands(None), out) else 1)
    out = out or Path("gpu.json")
    wanted = only.split(",") if only else list(LIMITS)
    for name in wanted:
        if name not in LIMITS:
            raise click.BadParameter(f"unknown part {name!r}: choose from {', '.join(LIMITS)}")
    if not out.parent.is_dir():
        raise click.BadParameter(f"the folder of --out {out} is not there: make it first")
    options = ["--device", "cpu" if tiny else device, *(["--tiny"] if tiny else [])]
    parts = {
        name: Part([sys.executable, "-m", "deltapatch.bench.gpu_parts", name, *options], LIMITS[name])
        for name in wanted
    }
    report = measure(parts, out, seconds, lambda text: click.echo(text, err=True), _environment(tiny))
    for line in table(report):
        click.echo(line)
    failed = failures(report)
    for line in failed:
        click.echo(f"FAILED {line}")
    click.echo(f"everything is in {out}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
