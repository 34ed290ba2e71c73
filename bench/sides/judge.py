"""The judge of a comparison: how far a side's effects are from the exact ones."""

from typing import Any

import numpy as np

from deltapatch.bench.peers.ours import Ours
from deltapatch.bench.sides.agreement import compare as agreement
from deltapatch.bench.sides.cells import Cells
from deltapatch.bench.sides.job import Options
from deltapatch.bench.sides.oracle import oracle_values
from deltapatch.bench.sides.workload import Workload
from deltapatch.errors import DeltapatchError
from deltapatch.models.model import Model

_ORACLE = 1e-7  # deltapatch in float64 against plain forwards in float64, relative
_ROUNDING = 1e-13  # what those leave of an effect that is exactly zero, in log-probability


class Judge:
    """The exact effects of a sweep: deltapatch in float64, itself judged by plain float64 forwards."""

    checked: np.ndarray  # [check], the cells that all sides are judged by
    exact: np.ndarray  # [n, column], NaN where it was not computed
    oracle: dict[str, Any]  # what was checked, and how well the reference agrees with plain forwards

    def __init__(self, model: Model, work: Workload, options: Options, cells: Cells) -> None:
        self.work = work
        ours = Ours("fp64")
        ours.work, ours.spec, ours.model = work, model.spec, model
        n = min(options.check, len(cells))
        rng = np.random.default_rng(options.seed)
        self.checked = np.sort(rng.choice(len(cells), n, replace=False))
        plain = oracle_values(model, work, cells[self.checked])
        self.exact = np.full((len(cells), plain.shape[1]), np.nan)
        whole = len(cells) <= options.reference
        known: Any = slice(None) if whole else self.checked
        self.exact[known] = ours.measure(cells if whole else cells[known])
        found = agreement(work, self.exact[self.checked], plain)
        if not (found["error"] <= _ORACLE or found["difference"] <= _ROUNDING):
            raise DeltapatchError(
                f"deltapatch in float64 is off by {found['error']:.1e} from plain float64 forwards: "
                "there is nothing to compare with"
            )
        self.oracle = {"checked": n, "exact": len(cells) if whole else n, "error": found["error"]}

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
