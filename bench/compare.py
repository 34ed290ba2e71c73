"""A comparison: every side on the same sweeps in turn, judged by the oracle before any speed is told."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from deltapatch.bench.limits import limits
from deltapatch.bench.runs import Columns, tell_shares, together
from deltapatch.bench.sides.agreement import disagreement
from deltapatch.bench.sides.cells import Cells
from deltapatch.bench.sides.job import Job, Options
from deltapatch.bench.sides.judge import Judge
from deltapatch.bench.sides.process import Lines
from deltapatch.bench.sides.quiet import quiet
from deltapatch.bench.sides.workload import Workload
from deltapatch.models.load import load_model
from deltapatch.models.memory import available
from deltapatch.results.folder import environment

MakeSide = Callable[[str, Job], Lines]  # of a peer's name


class SideError(Exception):
    """A side failed, with the reason in a few words; the others go on."""


def compare(
    work: Workload,
    sweeps: Sequence[tuple[str, Cells]],
    names: Sequence[str],
    make_side: MakeSide,
    options: Options,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure all sides on all sweeps.

    Args:
        work: the model and the pairs.
        sweeps: names and cells.
        names: of the peers.
        make_side: starts the side of a name on a job, and gives its lines.
        options: how.
        say: takes lines of progress.

    Returns:
        What `results.py` describes, without the kind.
    """
    if work.threads:
        torch.set_num_threads(work.threads)
    work = replace(work, threads=torch.get_num_threads())
    model = load_model(work.folder, device=work.device)
    with tempfile.TemporaryDirectory(prefix="deltapatch-bench-") as folder:
        job, judges = Job(folder, work, options), []
        for name, cells in sweeps:
            say(f"{name}: {len(cells):,} interventions, exact effects")
            judges.append(Judge(model, work, options, cells))
            job.add(cells, judges[-1].checked)
        rates = limits(model.spec.d_model, work.device)
        runs = []
        for i in range(options.runs):
            of = f"run {i + 1} of {options.runs}, " if options.runs > 1 else ""
            with ExitStack() as stack:
                sides = {name: stack.enter_context(closing(make_side(name, job))) for name in names}
                run = _Run(job, sides, lambda text, of=of: say(of + text))  # type: ignore[misc]
                for number, (name, _) in enumerate(sweeps):
                    run.sweep(number, name, judges[number])
                runs.append(run)
    measured = [
        {
            "name": name,
            "site": cells.site,
            "interventions": len(cells),
            "patches": cells.patches,
            "necessary_flops": cells.necessary_flops(model.spec, work.length),
            "oracle": judge.oracle,
            "columns": together([run.columns[number] for run in runs]),
        }
        for number, ((name, cells), judge) in enumerate(zip(sweeps, judges, strict=True))
    ]
    about = runs[0].about
    for sweep in measured:
        tell_shares(sweep, about, rates["products"])
    return {
        **environment(),
        "model": {"name": model.name, **asdict(model.spec)},
        "workload": {
            "pairs": len(work.clean),
            "length": work.length,
            "metric": work.metric,
            "batches": list(work.batches),
            "device": work.device,
        },
        "options": asdict(options),
        "limits": rates,
        "quiet": quiet(measured),
        "sides": about,
        "sweeps": measured,
    }


class _Run:
    """All sides on all sweeps once, each in one process.

    Attributes:
        about: what there is to know of each side.
        columns: of each sweep.
    """

    def __init__(self, job: Job, sides: dict[str, Lines], say: Callable[[str], None]) -> None:
        self.job, self.sides, self.say = job, sides, say
        self.columns: list[Columns] = []
        self.about: dict[str, dict[str, Any]] = {}
        self.most = 0  # bytes that a process took to load
        for name, side in sides.items():
            say(f"loading {name}")
            self.about[name] = self._load(side)

    def _load(self, side: Lines) -> dict[str, Any]:
        """What there is to know of a side, once its model is loaded; all processes hold theirs at once."""
        about: dict[str, Any] = {"missing": None}
        free = available()
        if free < 2 * self.most:
            return {"missing": "not started: there is no memory for one more process; give fewer --peers"}
        try:
            about |= _heard(side)
            if about["missing"] is None:
                about |= _heard(side)
        except SideError as error:
            about["missing"] = f"failed: {error}"
        self.most = max(self.most, free - available())
        return about

    def sweep(self, number: int, name: str, judge: Judge) -> None:
        """One more sweep: first results, then repeats in turn, then what is told of each side."""
        columns: Columns = {}
        for side in self.sides:
            self.say(f"{name}: first result of {side}")
            columns[side] = self._begin(side)
        for i in range(self.job.options.rounds):
            self.say(f"{name}: round {i + 1} of {self.job.options.rounds}")
            for side, column in columns.items():
                if column["status"] == "measured":
                    try:
                        for key, value in _heard(self.sides[side]).items():
                            column.setdefault(key, []).append(value)
                    except SideError as error:
                        columns[side] = {"status": "failed", "reason": str(error)}
        for side, column in columns.items():
            if column["status"] == "measured":
                columns[side] = self._end(side, column, number, judge)
        self.columns.append(columns)

    def _begin(self, side: str) -> dict[str, Any]:
        """The first result, and which cells will be measured."""
        if self.about[side]["missing"]:
            return {"status": "missing", "reason": self.about[side]["missing"]}
        try:
            column = _heard(self.sides[side])
        except SideError as error:
            return {"status": "failed", "reason": str(error)}
        lacks = column.pop("lacks")
        if lacks:
            return {"status": "lacks", "reason": lacks}
        return {"status": "measured", **column}

    def _end(self, side: str, column: dict[str, Any], number: int, judge: Judge) -> dict[str, Any]:
        """Judge the effects, and only then say how fast they came."""
        try:
            column |= _heard(self.sides[side])
        except SideError as error:
            return {"status": "failed", "reason": str(error)}
        with np.load(self.job.effects(side, number)) as effects:
            found = column["agreement"] = judge.judge(effects["checked"], effects["timed"])
            n = len(effects["timed"])
        about = self.about[side]
        wrong = disagreement(found, about["precision"], about["difference_form"]) if about["exact"] else None
        if column.pop("not_finite"):
            wrong = "results are not finite"
        if wrong:
            kept = ("cells", "batches", "sampled", "agreement", "peak_bytes", "device_peak_bytes")
            return {"status": "disagrees", "reason": wrong, **{k: column[k] for k in kept}}
        column["rates"] = [n / seconds for seconds in column["seconds"]]
        column["rate"] = float(np.median(column["rates"]))
        return column


def _heard(side: Lines) -> dict[str, Any]:
    """What a side says next; SideError where that is what went wrong."""
    line = next(side, {"error": "its process ended"})
    if "error" in line:
        raise SideError(line["error"])
    return line
