"""A comparison: every side on the same sweeps in turn, judged by the oracle before any speed is told."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltapatch.bench.agreement import compare as agreement
from deltapatch.bench.agreement import disagreement
from deltapatch.bench.cells import Cells
from deltapatch.bench.limits import best_of, limits
from deltapatch.bench.oracle import oracle_values
from deltapatch.bench.peers.ours import PREFIX, Ours
from deltapatch.bench.remote import Held, SideError
from deltapatch.bench.workload import Workload
from deltapatch.errors import DeltapatchError
from deltapatch.models.load import load_model
from deltapatch.models.model import Model
from deltapatch.results.folder import environment

_ORACLE = 1e-7  # deltapatch in float64 against plain forwards in float64, relative
_ROUNDING = 1e-13  # what those leave of an effect that is exactly zero, in log-probability


@dataclass(frozen=True)
class Options:
    """How a comparison is measured.

    Attributes:
        rounds: repeats of every side, in turn.
        limit: seconds; a side that would take longer for a sweep is measured on a sample of it.
        sample: seconds that such a sample takes.
        check: cells that every side is judged by, whatever it was measured on.
        reference: the most cells whose exact effects are computed, beside those that are checked.
        seed: of the cells that are checked.
    """

    rounds: int = 5
    limit: float = 60.0
    sample: float = 10.0
    check: int = 64
    reference: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check them."""
        if self.rounds < 1 or self.check < 1 or self.limit <= 0 or self.sample <= 0:
            raise DeltapatchError("rounds, check, limit and sample must be at least 1 and more than 0")


def compare(
    work: Workload,
    sweeps: Sequence[tuple[str, Cells]],
    names: Sequence[str],
    make_side: Callable[[str, Path], Held],
    options: Options,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure all sides on all sweeps.

    Args:
        work: the model and the pairs.
        sweeps: names and cells.
        names: of the peers.
        make_side: makes the side of a name; it may keep files in the folder that it gets.
        options: how.
        say: takes lines of progress.

    Returns:
        What `results.py` describes, without the kind.
    """
    if work.threads:
        torch.set_num_threads(work.threads)  # of the oracle and of the limits; sides set their own
    model = load_model(work.folder, device=work.device)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deltapatch-bench-")))
        judge = Judge(model, work, options)
        run = _Run(folder, work, options, judge, say)
        sides = {}
        for name in names:
            sides[name] = make_side(name, folder)
            stack.callback(sides[name].stop)
        about = run.greet(sides)
        measured = [run.sweep(name, cells, sides, about) for name, cells in sweeps]
        for sweep in measured:  # now that the limits were measured in every round
            run.tell_shares(sweep, about)
    return {
        **environment(),
        "model": {"name": model.name, **asdict(model.spec)},
        "workload": {
            "pairs": len(work.clean),
            "length": work.length,
            "metric": work.metric,
            "batch": work.batch,
            "device": work.device,
        },
        "options": asdict(options),
        "limits": run.limits,
        "sides": about,
        "sweeps": measured,
    }


class Judge:
    """The exact effects of a sweep: deltapatch in float64, itself judged by plain float64 forwards."""

    def __init__(self, model: Model, work: Workload, options: Options) -> None:
        self.model, self.work, self.options = model, work, options
        self.ours = Ours("fp64")
        self.ours.work, self.ours.spec, self.ours.model = work, model.spec, model

    def open(self, cells: Cells) -> dict[str, Any]:
        """Begin a sweep; what was checked, and how well the reference agrees with plain forwards."""
        rng = np.random.default_rng(self.options.seed)
        n = min(self.options.check, len(cells))
        self.checked = np.sort(rng.choice(len(cells), n, replace=False))
        plain = oracle_values(self.model, self.work, cells[self.checked])
        self.exact = np.full((len(cells), plain.shape[1]), np.nan)
        whole = len(cells) <= self.options.reference
        known: Any = slice(None) if whole else self.checked
        self.exact[known] = self.ours.measure(cells if whole else cells[known])
        found = agreement(self.work, self.exact[self.checked], plain)
        if not (found["error"] <= _ORACLE or found["difference"] <= _ROUNDING):
            raise DeltapatchError(
                f"deltapatch in float64 is off by {found['error']:.1e} from plain float64 forwards: "
                "there is nothing to compare with"
            )
        return {"checked": n, "exact": int(np.isfinite(self.exact[:, 0]).sum()), "error": found["error"]}

    def judge(self, checked: np.ndarray, values: np.ndarray) -> dict[str, Any]:
        """How well a side agrees: on the cells that all are checked by, and on those that it measured."""
        got = values.copy()
        got[self.checked] = checked
        exact = np.isfinite(self.exact[:, 0])
        timed = exact & ~np.isnan(values).any(axis=1)
        known = exact & ~np.isnan(got).any(axis=1)
        known[self.checked] = True
        found = agreement(self.work, got[known], self.exact[known])
        # what was timed must be right too, where it was replaced by what was checked
        if timed.any():
            own = agreement(self.work, values[timed], self.exact[timed])
            found["difference"] = max(found["difference"], own["difference"])
            found["error"] = max(found["error"], own["error"])
        return found


class _Run:
    """One comparison under way."""

    def __init__(
        self, folder: Path, work: Workload, options: Options, judge: Judge, say: Callable[[str], None]
    ) -> None:
        self.folder, self.work, self.options, self.judge, self.say = folder, work, options, judge, say
        self.width = judge.model.spec.d_model
        self.limits = limits(self.width, work.device)

    def greet(self, sides: dict[str, Held]) -> dict[str, Any]:
        """Import and load, one side after the other: what there is to know of each."""
        path = self.folder / "workload.json"
        self.work.save(path)
        about: dict[str, Any] = {}
        for name, side in sides.items():
            self.say(f"loading {name}")
            try:
                about[name] = side.ask("hello")
                if about[name]["missing"] is None:
                    about[name] |= side.ask("load", workload=str(path))
            except SideError as error:
                about[name] = {**about.get(name, {}), "missing": f"failed: {error}"}
        return about

    def sweep(self, name: str, cells: Cells, sides: dict[str, Held], about: dict[str, Any]) -> dict[str, Any]:
        """All sides on one sweep."""
        self.say(f"{name}: {len(cells):,} interventions, exact effects")
        oracle = self.judge.open(cells)
        files = {"cells": self.folder / "cells.npz", "checked": self.folder / "checked.npz"}
        cells.save(files["cells"])
        cells[self.judge.checked].save(files["checked"])
        columns: dict[str, dict[str, Any]] = {}
        for side in sides:
            self.say(f"{name}: first result of {side}")
            columns[side] = self._begin(sides[side], about[side], files)
        running = [side for side in sides if columns[side]["status"] == "measured"]
        for i in range(self.options.rounds):
            self.say(f"{name}: round {i + 1} of {self.options.rounds}")
            self.limits = best_of(self.limits, limits(self.width, self.work.device))
            for side in list(running):
                try:
                    reply = sides[side].ask("repeat")
                    columns[side]["seconds"].append(reply["seconds"])
                    columns[side]["measured_seconds"].append(reply["measured_seconds"])
                except SideError as error:
                    columns[side] = {"status": "failed", "reason": str(error)}
                    running.remove(side)
        for side in running:
            columns[side] = self._end(sides[side], about[side], columns[side], len(cells))
        return {
            "name": name,
            "site": cells.site,
            "interventions": len(cells),
            "patches": cells.patches,
            "necessary_flops": cells.necessary_flops(self.judge.model.spec, self.work.length),
            "oracle": oracle,
            "columns": columns,
        }

    def _begin(self, side: Held, about: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
        """The first result, and the cells that are checked."""
        if about["missing"]:
            return {"status": "missing", "reason": about["missing"]}
        out = self.folder / f"{side.name}-checked.npy"
        try:
            column = side.ask(
                "open", cells=str(files["cells"]), limit=self.options.limit, sample=self.options.sample
            )
            lacks = column.pop("lacks")
            if lacks:
                return {"status": "lacks", "reason": lacks}
            side.ask("check", cells=str(files["checked"]), out=str(out))
        except SideError as error:
            return {"status": "failed", "reason": str(error)}
        return {"status": "measured", **column, "seconds": [], "measured_seconds": []}

    def _end(self, side: Held, about: dict[str, Any], column: dict[str, Any], n: int) -> dict[str, Any]:
        """Judge the effects, and only then say how fast they came."""
        out = self.folder / f"{side.name}-values.npy"
        try:
            column |= side.ask("close", out=str(out))
        except SideError as error:
            return {"status": "failed", "reason": str(error)}
        found = self.judge.judge(np.load(self.folder / f"{side.name}-checked.npy"), np.load(out))
        column["agreement"] = found
        wrong = disagreement(found, about["precision"], about["difference_form"]) if about["exact"] else None
        if column.pop("not_finite"):
            wrong = "results are not finite"
        if wrong:
            kept = ("cells", "batches", "sampled", "agreement", "peak_bytes", "device_peak_bytes")
            return {"status": "disagrees", "reason": wrong, **{k: column[k] for k in kept}}
        rates = [n / s for s in column["seconds"]]
        column["rates"] = rates
        column["rate"] = float(np.median(rates))
        column["spread"] = [min(rates), max(rates)]
        return column

    def tell_shares(self, sweep: dict[str, Any], about: dict[str, Any]) -> None:
        """What share of the product rate each side reached; not of approximations, which do less."""
        for name, column in sweep["columns"].items():
            if column["status"] == "measured":
                product = self.limits["products"].get(about[name]["precision"])
                done = column["rate"] / sweep["interventions"] * sweep["necessary_flops"]
                known = product and about[name]["exact"]
                column["of_product_rate"] = done / product if known else None


def fastest_peer(sweep: dict[str, Any]) -> str | None:
    """The side with the highest rate among those that are exact and not deltapatch."""
    rates = {
        name: column["rate"]
        for name, column in sweep["columns"].items()
        if column["status"] == "measured" and not name.startswith(PREFIX) and name != "attribution"
    }
    return max(rates, key=lambda name: rates[name]) if rates else None
