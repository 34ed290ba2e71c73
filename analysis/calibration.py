"""Calibration: how far the estimates of a screened sweep agree with what was verified."""

import numpy as np

from deltapatch.analysis.tables import Table
from deltapatch.results.screened import Screened
from deltapatch.results.screened_edges import ScreenedEdges
from deltapatch.results.screened_outcome import ScreenedOutcome


def calibration(
    screened: Screened | ScreenedOutcome | ScreenedEdges, metric: str | None = None, *, by_layer: bool = False
) -> Table:
    """Correlation and slope of estimates against exact effects, over all that was screened.

    It is told by site, of features by autoencoder, and of edges by what receivers read.

    What was verified stands for all: each effect that was drawn counts as many times as the draws of its
    stratum stand for, those of the top once.

    Args:
        metric: of `Screened.estimated`; what was screened by, unless told.
        by_layer: also apart by layer.

    Returns:
        Columns site (or sae, or reads), layer where asked for, verified (how many effects), pearson,
        spearman, and slope: the s for which estimates are closest to s times the exact effects, which is 1
        where they are right. NaN where fewer than three are known or nothing varies.

    Raises:
        DeltapatchError: a metric that was not estimated.
    """
    name = screened.by if metric is None else metric
    columns, weight = screened.columns(name), screened.weights()
    estimate = screened.estimates_of_verified(name)
    if isinstance(screened, ScreenedEdges):
        of = "reads"
        reads, columns["layer"] = screened.kinds()
        known, kind = np.unique(reads.astype(str), return_inverse=True)
    elif isinstance(screened, Screened):
        of, known = "site", np.array(screened.sites, dtype=object)
        kind = np.array([screened.sites.index(one) for one in columns["site"]])
    else:
        of = "sae"
        known, kind = np.unique(columns["sae"], return_inverse=True)
    keys = np.stack([kind, columns["layer"] if by_layer else 0 * kind], 1)
    groups, group = np.unique(keys, axis=0, return_inverse=True)
    found: dict[str, list[float]] = {"verified": [], "pearson": [], "spearman": [], "slope": []}
    for number in range(len(groups)):
        mine = (group.ravel() == number) & ~np.isnan(columns[name])
        x, y, w = columns[name][mine], estimate[mine], weight[mine]
        found["verified"].append(len(x))
        found["pearson"].append(_correlation(x, y, w))
        found["spearman"].append(_correlation(_ranks(x, w), _ranks(y, w), w))
        found["slope"].append(float((w * x * y).sum() / (w * x * x).sum()) if x.any() else float("nan"))
    told: dict[str, np.ndarray] = {of: known[groups[:, 0]]}
    if by_layer:
        told["layer"] = groups[:, 1]
    return Table(told | {key: np.array(column) for key, column in found.items()}, "pearson")


def _correlation(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    """Pearson's, with weights."""
    if len(x) < 3:
        return float("nan")
    x, y = (a - np.average(a, weights=weight) for a in (x, y))
    scale = np.sqrt((weight * x * x).sum() * (weight * y * y).sum())
    return float((weight * x * y).sum() / scale) if scale > 0 else float("nan")


def _ranks(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The weight of what is smaller, and half of what is equal."""
    _, which = np.unique(x, return_inverse=True)
    each = np.bincount(which, weight)
    return (np.cumsum(each) - each / 2)[which]
