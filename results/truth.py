"""The truth of a sample: effects in float64, and how far those of a run are from them (its noise floor)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltapatch.results.metrics import Direction, Reference, check_metric, compute, metrics_of

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Sampled:
    """Measured numbers of the sample, and the unpatched runs of each effect's pair: all [effect, ...]."""

    measured: dict[str, np.ndarray]
    reference: Reference


@dataclass(frozen=True)
class Truth:
    """The sample as it should be.

    Attributes:
        precision: "fp64", or "fp32" where that would take long beside the run, or has no room in memory.
        at: [effect], which they are among all.
        sampled: their numbers.
    """

    precision: str
    at: np.ndarray
    sampled: Sampled

    def noise_floor(
        self, precision: str, measured: Mapping[str, np.ndarray], direction: Direction
    ) -> dict[str, Any] | None:
        """How far the sample's effects, as a run in some precision found them, are from the truth.

        Returns:
            `recomputed`, how many; `precision`, that of the truth; `relative_error`, by metric; `worst`, the
            metric that errs most. None where the run is itself as precise.
        """
        if precision in ("fp64", self.precision):
            return None
        got = {key: values[self.at] for key, values in measured.items()}
        errors = relative_errors(got, self.sampled.measured, self.sampled.reference, direction)
        return {
            "recomputed": len(self.at),
            "precision": self.precision,
            "relative_error": errors,
            "worst": max(
                (n for n in errors if not check_metric(n).yes_or_no), key=lambda n: errors[n], default=None
            ),
        }


def in_words(meta: Mapping[str, Any]) -> str:
    """The precision of a run and its noise floor, or why it has none, from its meta."""
    precision = meta["precision"]
    text = f"precision {precision}" + (" (approximate, for screening)" if precision == "fp8" else "")
    floor = meta.get("noise_floor")
    if floor is None:
        why = meta.get("noise_floor_left_out")
        return text if why is None else f"{text}: no effects were computed again in float64 ({why})"
    exact = {"fp64": "float64", "fp32": "float32"}[floor["precision"]]
    again = f"{text}: {floor['recomputed']} effects computed again in {exact}"
    if floor["worst"] is not None:
        return f"{again} differ by {floor['relative_error'][floor['worst']]:.0e} ({floor['worst']})"
    others = [f"{name} of {share:.0%}" for name, share in floor["relative_error"].items() if share]
    return f"{again} say the same" if not others else f"{again} differ in {', '.join(others)}"


def relative_errors(
    got: Mapping[str, np.ndarray],
    want: Mapping[str, np.ndarray],
    reference: Reference,
    direction: Direction,
) -> dict[str, float]:
    """Of every metric that follows from the measured numbers: norm of the error over norm of what is right.

    Args:
        got, want: name -> [effect].
        reference: of the pair of each effect: [effect, ...].
        direction: of the run.

    Returns:
        metric -> relative error. `recovered` is left out, since it errs as `logit_diff` does; the error of
        what is yes or no is the share of effects that differ.
    """
    out = {}
    for name in metrics_of(got):
        if name == "recovered":
            continue
        metric = check_metric(name)
        a, b = (compute(name, measured, reference, direction) for measured in (got, want))
        if metric.yes_or_no:
            out[name] = float((a != b).mean())
        else:
            off, size = np.linalg.norm(a - b), np.linalg.norm(b)
            error = off / size if size else float(off > 0)
            out[name] = float(error) if np.isfinite(error) else float("inf")
    return out
