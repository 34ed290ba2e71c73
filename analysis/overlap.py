"""Overlap of the strongest neurons of two tasks or operators, against what chance would give."""

import math
from collections.abc import Mapping

import numpy as np

from deltapatch.analysis.tables import Table
from deltapatch.errors import DeltapatchError


def top_k(mean: np.ndarray, k: int, magnitude: bool = False) -> np.ndarray:
    """The k flat indices of the largest means (of the largest in magnitude), largest first; NaN is never one.

    Raises:
        DeltapatchError: there are fewer than k.
    """
    flat = np.abs(mean.ravel()) if magnitude else mean.ravel()
    known = int((~np.isnan(flat)).sum())
    if not 1 <= k <= known:
        raise DeltapatchError(f"the top {k} of {known:,} cells: ask for 1 to {known:,}")
    order = np.argsort(-np.where(np.isnan(flat), -np.inf, flat), kind="stable")
    return order[:k]


def chance_p(shared: int, k: int, m: int, cells: int) -> float:
    """The probability that two random sets of k and m of `cells` share at least so many (hypergeometric)."""
    most = min(k, m)
    least = max(0, k + m - cells)
    if shared <= least:
        return 1.0
    if shared > most:
        return 0.0
    terms = np.array(
        [_choose(m, i) + _choose(cells - m, k - i) - _choose(cells, k) for i in range(shared, most + 1)]
    )
    largest = terms.max()
    return float(min(1.0, math.exp(largest) * np.exp(terms - largest).sum()))


def overlaps(means: Mapping[str, np.ndarray], k: int, magnitude: bool = False) -> Table:
    """How many of their top k cells each two of some named means share.

    Args:
        means: name -> [...], of one shape: means over pairs of the same cells.

    Returns:
        A table with columns a, b, overlap (the share of k), shared (how many), chance (the share to be
        expected of random sets) and p (the probability of so many or more by chance), a row for each two.

    Raises:
        DeltapatchError: shapes differ, fewer than two, or fewer than k cells.
    """
    names = list(means)
    if len(names) < 2:
        raise DeltapatchError("an overlap is between two or more: give at least two sets of effects")
    shapes = {mean.shape for mean in means.values()}
    if len(shapes) > 1:
        raise DeltapatchError(f"overlaps are of the same cells, but their shapes differ: {sorted(shapes)}")
    cells = int(np.prod(shapes.pop()))
    tops = {name: set(top_k(mean, k, magnitude).tolist()) for name, mean in means.items()}
    two = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    shared = np.array([len(tops[a] & tops[b]) for a, b in two])
    return Table(
        {
            "a": np.array([a for a, _ in two], dtype=object),
            "b": np.array([b for _, b in two], dtype=object),
            "overlap": shared / k,
            "shared": shared,
            "chance": np.full(len(two), k / cells),
            "p": np.array([chance_p(int(n), k, k, cells) for n in shared]),
        },
        "overlap",
    )


def _choose(n: int, k: int) -> float:
    """log of n over k."""
    if not 0 <= k <= n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
