"""How well effects agree with the oracle's, and whether that is within a side's precision."""

from typing import Any

import numpy as np

# Of methods that carry differences: the error of what was measured, relative to its norm.
RELATIVE = {"fp64": 1e-8, "fp32": 1e-4, "tf32": 2e-3, "fp16": 1e-2, "bf16": 1e-2, "fp8": 1e-1}
# Of methods that subtract two runs, rounding is relative to the logits, and effects are small beside them.
ABSOLUTE, OF_EFFECTS = 1e-4, 5e-2


def compare(work: Any, got: np.ndarray, want: np.ndarray, top: int = 50) -> dict[str, Any]:
    """Figures of merit of measured values against the oracle's.

    Args:
        work: the Workload, whose metric the effects are of.
        got, want: [n, column], the same cells.
        top: how many of the strongest effects should be found again.
    """
    effect, exact = work.effect(got), work.effect(want)
    return {
        "cells": len(want),
        "difference": float(np.abs(got - want).max()),
        "error": _relative(got, want),
        "effect_error": _relative(effect, exact),
        "rank_correlation": rank_correlation(effect, exact),
        "top_overlap": top_overlap(effect, exact, top),
    }


def disagreement(found: dict[str, Any], precision: str, difference_form: bool) -> str | None:
    """Why results are not those of the oracle within their precision; None where they are."""
    if not np.isfinite(found["error"]):
        return "results are not finite"
    if difference_form:
        bound = RELATIVE.get(precision, 1e-2)
        return (
            None if found["error"] <= bound else f"off by {found['error']:.1e} of the norm, over {bound:.0e}"
        )
    if found["difference"] > ABSOLUTE:
        return f"off by {found['difference']:.1e} in log-probability, over {ABSOLUTE:.0e}"
    if found["error"] > OF_EFFECTS:
        return f"off by {found['error']:.1e} of the norm, over {OF_EFFECTS:.0e}"
    return None


def rank_correlation(got: np.ndarray, want: np.ndarray) -> float:
    """Spearman's, over cells that have an effect: a patch that changes nothing has no rank."""
    moved = np.abs(want) > 1e-12
    if moved.sum() < 2 or not np.isfinite(got[moved]).all():
        return float("nan")
    a, b = _ranks(got[moved]), _ranks(want[moved])
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm else float("nan")


def top_overlap(got: np.ndarray, want: np.ndarray, k: int) -> float:
    """The share of the k largest effects (in magnitude) that are also found among the k largest."""
    k = min(k, len(want))
    best = [set(np.argsort(-np.abs(x), kind="stable")[:k].tolist()) for x in (got, want)]
    return len(best[0] & best[1]) / k


def _relative(got: np.ndarray, want: np.ndarray) -> float:
    norm = float(np.linalg.norm(want))
    return float(np.linalg.norm(got - want)) / norm if norm else float(np.abs(got).max())


def _ranks(x: np.ndarray) -> np.ndarray:
    """From 0, equal values sharing the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[inverse]
