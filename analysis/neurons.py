"""Single neurons and coordinates: every index of a site at one position, layer by layer.

A large model has hundreds of thousands of them, and runs have hundreds of pairs: what is worked out here for
all of them needs the memory of one layer, and intervals are drawn for those that are shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deltapatch.analysis.select import select
from deltapatch.analysis.significance import (
    POOL,
    POOLED_FROM,
    benjamini_hochberg,
    pooled_null,
    sign_flip_test,
)
from deltapatch.analysis.statistics import bootstrap, mean_over_pairs, median_over_pairs
from deltapatch.analysis.tables import Table, component
from deltapatch.errors import DeltapatchError
from deltapatch.results.effects import Effects, SiteEffects
from deltapatch.results.metrics import check_metric


@dataclass(frozen=True)
class Screen:
    """All indices of a site, tested.

    Attributes:
        layers: [layer].
        mean, stderr: [layer, index], over pairs.
        p: [layer, index], of a sign-flip test that the mean is zero, pooled where they are many.
        q: [layer, index], its false-discovery rate over all of them.
        pairs: how many pairs.
    """

    site: str
    metric: str
    layers: np.ndarray
    mean: np.ndarray
    stderr: np.ndarray
    p: np.ndarray
    q: np.ndarray
    pairs: int

    def strongest(self, k: int) -> np.ndarray:
        """The flat indices of the k largest means in magnitude, largest first."""
        return np.argsort(-np.abs(self.mean).ravel(), kind="stable")[:k]

    def found(self, rate: float) -> int:
        """How many have a q of at most the rate."""
        return int((self.q <= rate).sum())

    def cells(self) -> Table:
        """Layer, index, mean and q of every one."""
        layer, index = (a.ravel() for a in np.indices(self.mean.shape))
        columns = {"layer": self.layers[layer], "index": index}
        columns |= {self.metric: self.mean.ravel(), "p": self.p.ravel(), "q": self.q.ravel()}
        return Table(columns, self.metric)


def screen(effects: Effects, metric: str, site: str, draws: int = 1000, seed: int = 0) -> Screen:
    """Test every index of a site that was swept at one position.

    Raises:
        DeltapatchError: a site without an index, or swept at several positions; a single pair.
    """
    swept = _one_position(effects, site)
    if len(effects.pairs) < 2:
        raise DeltapatchError("tests are over pairs, and this run has one pair only")
    n_layers, total = len(swept.layers), swept.shape[1] * swept.shape[3]
    null = None
    if total >= POOLED_FROM:
        step = -(-total // POOL)
        some = [_layer(effects, metric, site, row)[0][:, row % step :: step] for row in range(n_layers)]
        null = pooled_null(np.concatenate(some, axis=1), draws, seed)
    rows = []
    for row in range(n_layers):
        values, over = _layer(effects, metric, site, row)
        p = sign_flip_test(values, draws, seed) if null is None else null.p(values)
        rows.append((*mean_over_pairs(values, over)[:2], p))
    mean, stderr, p = (np.stack(column) for column in zip(*rows, strict=True))
    return Screen(
        swept.site, metric, swept.layers, mean, stderr, p, benjamini_hochberg(p), len(effects.pairs)
    )


def group_means(
    effects: Effects, metric: str, site: str, members: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The means over several groups of pairs: name -> [layer, index]."""
    swept = _one_position(effects, site)
    rows = [
        [
            mean_over_pairs(values[numbers], None if over is None else over[numbers])[0]
            for numbers in members.values()
        ]
        for values, over in (_layer(effects, metric, site, row) for row in range(len(swept.layers)))
    ]
    return {name: np.stack([row[i] for row in rows]) for i, name in enumerate(members)}


def strongest_table(
    effects: Effects,
    tested: Screen,
    k: int,
    metrics: Sequence[str],
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Table:
    """The k strongest of a screen: several metrics with their bootstrap intervals over pairs, p and q.

    Returns:
        columns name (short), layer, index, for each metric its mean, <metric>_median where a few pairs can
        make most of that, <metric>_low and <metric>_high, then p, q and pairs.
    """
    best = tested.strongest(k)
    row, index = np.unravel_index(best, tested.mean.shape)
    layer = tested.layers[row]
    names = [component(tested.site, *where) for where in zip(layer.tolist(), index.tolist(), strict=True)]
    columns: dict[str, np.ndarray] = {"name": np.array(names, dtype=object), "layer": layer, "index": index}
    for metric in metrics:
        values = np.empty((len(effects.pairs), len(best)))
        for one in np.unique(row).tolist():
            here = row == one
            found, over = _layer(effects, metric, tested.site, one)
            values[:, here] = found[:, index[here]]
        low, high = bootstrap(values, level, draws, seed, over)
        columns[metric] = mean_over_pairs(values, over)[0]
        if check_metric(metric).skewed:
            columns[f"{metric}_median"] = median_over_pairs(values)
        columns |= {f"{metric}_low": low, f"{metric}_high": high}
    columns |= {name: getattr(tested, name).ravel()[best] for name in ("p", "q")}
    return Table(columns | {"pairs": np.full(len(best), tested.pairs)}, tested.metric)


def _one_position(effects: Effects, site: str) -> SiteEffects:
    swept = effects.site(site)
    if len(swept.shape) < 4 or swept.shape[2] != 1:
        raise DeltapatchError(f"{site} is not a site with an index that was swept at one position")
    return swept


def _layer(effects: Effects, metric: str, site: str, row: int) -> tuple[np.ndarray, np.ndarray | None]:
    """A metric's terms at one row of the layer axis: [pair, index], and [pair] or None."""
    values, over = select(effects, layers=np.array([row]), sites=[site]).terms(metric, site)
    return values[:, 0, 0], over
