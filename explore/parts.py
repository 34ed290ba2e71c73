"""What pages of sites and of edges share: what a run is, tests, the noise floor, arrays as text."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deltapatch.analysis.significance import (
    POOLED_FROM,
    benjamini_hochberg,
    least_p,
    out_of_reach,
    sign_flip_test,
)
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.effects import Effects
from deltapatch.results.metrics import check_metric, default_metric, quotient

RATE = 0.05  # false-discovery rate from which on an effect counts as an accident of the pairs
NUMBERS = 400_000  # of the page, about; each takes five letters
PAIRS = 48  # that are shown one by one, at most
DRAWS = 1000  # of intervals, and of the test of many cells, which share them
_FEW = 12  # pairs; with so few, p is coarse
_TEST_DRAWS = 10_000  # of the test of few cells


def about(effects: Effects | EdgeEffects, metrics: Sequence[str], run: str, n_pairs: int) -> dict[str, Any]:
    """What a page says of a run, whatever it patched; `n_pairs` can be seen one by one."""
    known = ("model", "revision", "adapter", "source", "seed", "readout", "noise_scale", "precision", "date")
    return {
        "run": run,
        "about": {key: effects.meta[key] for key in known if effects.meta.get(key) is not None},
        "direction": effects.direction,
        "metrics": [_metric(name) for name in metrics],
        "default": default_metric(list(metrics)),
        "rate": RATE,
        "n_pairs": len(effects.pairs),
        "pairs": [_pair(pair) for pair in effects.pairs[:n_pairs]],
    }


def can_test(effects: Effects | EdgeEffects) -> bool:
    """Whether there are pairs enough for any effect to be significant."""
    return not out_of_reach(len(effects.pairs), RATE, DRAWS, pooled=True)


def notes_of(effects: Effects | EdgeEffects, n_pairs: int) -> list[str]:
    """What a reader has to know of any run."""
    notes: list[str] = []
    if n_pairs < len(effects.pairs):
        notes.append(
            f"Means are over {len(effects.pairs)} pairs; the first {n_pairs} can be seen one by one."
        )
    if out_of := out_of_reach(len(effects.pairs), RATE, DRAWS, pooled=True):
        notes.append(f"No effect is marked as significant or not: {out_of}.")
    elif len(effects.pairs) <= _FEW:
        notes.append(
            f"With {len(effects.pairs)} pairs the test of many cells is coarse: it cannot tell of an effect "
            "that has neither a mark nor a q."
        )
    if caveat := effects.caveat():
        notes.append(f"Mind: {caveat}.")
    return notes


def rates(cells: np.ndarray, tested: bool) -> np.ndarray:
    """The false-discovery rate of every cell of a site; NaN where no test can tell.

    So it is with a cell whose p is as small as so few pairs can make it, if among so many cells that is not
    small enough: it may well be no accident.
    """
    if not tested:
        return np.full(cells.shape[1:], np.nan)
    pooled = cells[0].size >= POOLED_FROM
    draws = DRAWS if pooled else _TEST_DRAWS
    p = sign_flip_test(cells, draws, pooled=pooled)
    q = benjamini_hochberg(p)
    q[(q > RATE) & (p <= least_p(len(cells), draws, pooled) * (1 + 1e-9))] = np.nan
    return q


def floor(meta: Mapping[str, Any], metric: str, cells: np.ndarray, over: np.ndarray | None) -> float | None:
    """How far rounding moves an effect: the run's error against float64, which is relative to the norm."""
    known = meta.get("noise_floor")
    errors = known.get("relative_error", {}) if isinstance(known, dict) else {}
    # A pair's ratio is as far off as the number that it is made of.
    error = errors.get(metric, errors.get("logit_diff") if metric == "recovered" else None)
    if not isinstance(error, int | float) or not np.isfinite(error):
        return None
    each = quotient(metric, cells, over)
    size = float(np.sqrt(np.nanmean(each**2))) if np.isfinite(each).any() else 0.0
    return float(error) * size


def _pair(pair: EncodedPair) -> dict[str, Any]:
    """Both prompts, their answers, and which positions have no equal counterpart in the other prompt."""
    changed: tuple[list[int], list[int]] = [], []
    for at, there in pair.columns:
        if at is None or there is None or pair.clean[at] != pair.corrupted[there]:
            for positions, position in zip(changed, (at, there), strict=True):
                positions += [] if position is None else [position]
    return {
        "clean": pair.clean_text,
        "corrupted": pair.corrupted_text,
        "changed": changed,
        "answers": [pair.clean_answer_text, pair.corrupted_answer_text],
    }


def _metric(name: str) -> dict[str, Any]:
    metric = check_metric(name)
    return {
        "name": name,
        "label": metric.label,
        "equation": metric.equation,
        "from_zero": metric.never_negative,
        "skewed": metric.skewed,
    }


def f32(values: np.ndarray) -> str:
    """Base64 of little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def i32(values: np.ndarray) -> str:
    """Base64 of little-endian int32."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<i4").tobytes()).decode()
