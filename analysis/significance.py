"""Which effects are no accident of the pairs: sign-flip permutation tests and a false-discovery cut."""

import math
from dataclasses import dataclass

import numpy as np

from deltapatch.analysis.statistics import divide, parts
from deltapatch.arguments import seed as check_seed
from deltapatch.errors import DeltapatchError

_EXACT = 12  # up to that many pairs, all patterns of signs are gone through
_BINS = 1 << 16  # of the pooled null
POOLED_FROM = 1000  # cells from which a p-value has to be finer than one cell's own sign patterns make it
POOL = 1 << 14  # cells that make it up: with a thousand sign patterns, p as small as 1e-7


def sign_flip_test(
    values: np.ndarray, draws: int = 10_000, seed: int = 0, pooled: bool = False
) -> np.ndarray:
    """Two-sided p-values that the mean over pairs is zero, [pair, ...] -> [...].

    If patching does nothing on average, an effect is as likely as its negative: the signs of the pairs are
    flipped, and p is the share of sign patterns whose mean is at least as large. NaN is left out; a cell
    without values has no p; where all effects are exactly zero p is 1.

    Up to 12 pairs, all patterns are gone through and p is exact. Beyond, `draws` random ones are, the
    observed one counted among them, so that p is at least 1 / (draws + 1). Over very many cells that is too
    coarse for a false-discovery cut that keeps few of them: then `pooled` compares each cell with the sign
    patterns of all cells (of 16,384 spread evenly among them where there are more), each in units of its own
    root of summed squares, which a flip does not change. That takes the cells' null distributions to be
    alike, as they are for a dozen pairs and more unless a few pairs hold most of an effect. The pooled p is
    rounded up, by at most 1 / 65,536 of the scale.
    """
    if pooled:
        return pooled_null(values.reshape(len(values), -1), draws, seed).p(values)
    n = len(values)
    cells = np.where(np.isnan(values), 0.0, values).reshape(n, -1)
    exact = n <= _EXACT
    signs = _signs(n, draws, seed)
    p = np.empty(cells.shape[1])
    for part in parts(cells.shape[1], len(signs)):
        null = np.abs(signs @ cells[:, part])
        # Sums in another order differ in their last bits; what is equal has to count.
        least = np.abs(cells[:, part].sum(axis=0)) * (1 - 1e-12)
        count = (null >= least).sum(axis=0)
        p[part] = count / len(signs) if exact else (count + 1) / (len(signs) + 1)
    return _without_values(p, values, cells)


@dataclass(frozen=True)
class PooledNull:
    """How often sign patterns give a statistic of at least so much, over many cells together.

    Attributes:
        above: [bin], how many lie in a bin or beyond.
        pairs: how many pairs the cells have.
    """

    above: np.ndarray
    pairs: int

    def p(self, values: np.ndarray) -> np.ndarray:
        """Each cell's p-value, [pair, ...] -> [...]: see `sign_flip_test`."""
        cells = np.where(np.isnan(values), 0.0, values).reshape(len(values), -1)
        found = (self.above[_bin(_statistic(cells), self.pairs)] + 1) / (self.above[0] + 1)
        return _without_values(found, values, cells)


def pooled_null(values: np.ndarray, draws: int = 10_000, seed: int = 0) -> PooledNull:
    """The null of [pair, cell], all of the cells or those that stand for them.

    Cells of several arrays that have the same pairs may be tested against one null: of a large model each
    layer, against cells of all of them.
    """
    n = len(values)
    cells, signs = np.where(np.isnan(values), 0.0, values), _signs(n, draws, seed)
    scale = np.sqrt((cells**2).sum(axis=0))
    counts = np.zeros(_BINS, dtype=np.int64)
    pool = np.flatnonzero(scale > 0)
    pool = pool[:: -(-len(pool) // POOL) or 1]
    for part in parts(len(pool), len(signs)):
        null = np.abs(signs @ (cells[:, pool[part]] / scale[pool[part]]))
        counts += np.bincount(_bin(null, n).ravel(), minlength=_BINS)
    return PooledNull(np.cumsum(counts[::-1])[::-1], n)


def least_p(pairs: int, draws: int, pooled: bool = False) -> float:
    """The smallest p that `sign_flip_test` can give a cell whose pairs all agree; pooled, about none."""
    return 1 / len(_all_signs(pairs)) if pairs <= _EXACT else 0.0 if pooled else 1 / (draws + 1)


def out_of_reach(pairs: int, rate: float, draws: int, pooled: bool = False) -> str | None:
    """A sentence where tests over so few pairs, or with so few draws, can find nothing at a rate; or None.

    With up to 12 pairs every p is at least one in the number of sign patterns. So is every q of a pooled test
    then, since the patterns of each cell, that of its own signs among them, are in the pool.
    """
    least = least_p(pairs, draws, pooled)
    if pairs <= _EXACT:
        more = f"{1 + math.ceil(math.log2(1 / rate))} pairs"
    else:
        more = f"{math.ceil(1 / rate) - 1:,} draws"
    if least <= rate:
        return None
    number = f"{pairs} pair{'' if pairs == 1 else 's'}"
    given = number if pairs <= _EXACT else f"{number} and {draws:,} draw{'' if draws == 1 else 's'}"
    return (
        f"with {given} no p-value can be below {least:.2g}, and so no q can be {rate:g} or less, whatever "
        f"the effects are: take at least {more}"
    )


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """p-values -> adjusted ones (q), of the same shape: q <= r are the discoveries of which a share r may be
    false. NaN stays and does not count.
    """
    flat = p.ravel()
    q = np.full(flat.shape, np.nan)
    known = np.flatnonzero(~np.isnan(flat))
    order = known[np.argsort(flat[known], kind="stable")]
    ranked = flat[order] * len(order) / np.arange(1, len(order) + 1)
    # The least of what follows, so that q never falls as p rises.
    q[order] = np.minimum(np.minimum.accumulate(ranked[::-1])[::-1], 1.0)
    return q.reshape(p.shape)


def _statistic(cells: np.ndarray) -> np.ndarray:
    """|sum| in units of the root of the sum of squares, [cell]: from 0 to the root of the number of pairs."""
    return np.nan_to_num(divide(np.abs(cells.sum(axis=0)), np.sqrt((cells**2).sum(axis=0))))


def _all_signs(n: int) -> np.ndarray:
    """Every pattern of n signs, but for the sign of all: the first is fixed, since tests are two-sided."""
    bits = (np.arange(1 << max(0, n - 1))[:, None] >> np.arange(n)) & 1  # the last column is all zeros
    return 1.0 - 2.0 * bits


def _signs(n: int, draws: int, seed: int) -> np.ndarray:
    """[pattern, pair], all of them where they are few."""
    if draws < 1:
        raise DeltapatchError(f"a permutation test needs at least one draw, not {draws}")
    rng = np.random.default_rng(check_seed(seed))
    return _all_signs(n) if n <= _EXACT else rng.choice([-1.0, 1.0], size=(draws, n))


def _without_values(p: np.ndarray, values: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """The p-values, 1 where all effects are zero and NaN where there are none."""
    p[(cells == 0).all(axis=0)] = 1.0
    p[np.isnan(values.reshape(len(values), -1)).all(axis=0)] = np.nan
    return p.reshape(values.shape[1:])


def _bin(statistic: np.ndarray, n: int) -> np.ndarray:
    return np.minimum(statistic * (_BINS / np.sqrt(n)), _BINS - 1).astype(np.int64)
