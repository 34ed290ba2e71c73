"""Strata: what a random sample of unseen effects says, at a stated confidence, of all that was not looked at.

What an estimate ranks low is cut into strata of similar estimates, and some of each are drawn at random. Of
the draws, X turn out to be large. Each stratum's count is a hypergeometric number, which is a sum of
independent yes-or-no trials (Vatutin and Mikhailov 1982), and so is X, of n trials in all. Hoeffding (1956,
theorem 4) shows that among such sums with one mean m the binomial one is likeliest to be small:
P(X <= x) <= P(Binomial(n, m / n) <= x) for x <= m - 1. So the upper bound of Clopper and Pearson for x of n
holds for the mean of X, whatever the strata are, without a bound for each and a union of these, which would
cost a factor of their number. A stratum of which one in k was drawn adds a kth of its large effects to that
mean; the worst way to share it out says how many there can be. Where there is one stratum, the hypergeometric
numbers themselves give the bound (Buonaccorsi 1987), which is smaller where much was drawn.
"""

import math
from dataclasses import dataclass

import numpy as np

from deltapatch.errors import DeltapatchError

_STRATA = 5  # of each group
_LEAST = 2  # drawn from each


@dataclass(frozen=True)
class Strata:
    """Sizes of strata, and how many were drawn from each at random.

    Attributes:
        size, drawn: [stratum].
    """

    size: np.ndarray
    drawn: np.ndarray

    @property
    def unseen(self) -> int:
        """How many were not drawn."""
        return int((self.size - self.drawn).sum())

    def at_most(self, large: np.ndarray, confidence: float) -> int:
        """An upper bound on how many of those that were not drawn are large, true with this confidence.

        Args:
            large: [stratum], how many of the draws are.
            confidence: between 0.5 and 1.

        Raises:
            DeltapatchError: a confidence out of these bounds.
        """
        if not 0.5 <= confidence < 1:
            raise DeltapatchError(f"confidence must be from 0.5 to below 1, not {confidence:g}")
        some = (self.drawn < self.size) & (self.size > 0)  # what is all seen leaves nothing to chance
        if not some.any():
            return 0
        size, drawn, seen = self.size[some], self.drawn[some], large[some]
        if not drawn.all():
            return self.unseen
        x, n = int(seen.sum()), int(drawn.sum())
        if len(size) == 1:
            return most_large(x, n, int(size[0]), 1 - confidence) - x
        mean = max(n * upper(x, n, 1 - confidence), x + 1)
        fraction = drawn / size
        left = mean - float((fraction * seen).sum())  # of the mean, for those that were not drawn
        total = 0
        for stratum in np.argsort(fraction, kind="stable"):
            most = int(size[stratum] - drawn[stratum])
            here = min(most, math.floor(left / fraction[stratum] + 1e-9))
            total, left = total + here, left - here * fraction[stratum]
        return total


def cut(size: np.ndarray, group: np.ndarray) -> np.ndarray:
    """[item], the stratum of each: items of one group whose sizes are next to each other.

    Args:
        size: [item].
        group: [item], a number; no stratum has two.
    """
    stratum = np.zeros(len(size), dtype=np.int64)
    count = 0
    for one in np.unique(group):
        mine = np.flatnonzero(group == one)
        for part in np.array_split(mine[np.argsort(size[mine], kind="stable")], min(_STRATA, len(mine))):
            stratum[part] = count
            count += 1
    return stratum


def draw(stratum: np.ndarray, n: int, seed: int) -> tuple[Strata, np.ndarray]:
    """Draw a sample, from each stratum as densely.

    Args:
        stratum: [item], as `cut` gives it.
        n: how many to draw, a few more where strata are many: at least two of each.
        seed: of the draws.

    Returns:
        The strata, and the items that were drawn, ascending.
    """
    sizes = np.bincount(stratum)
    share = np.ceil(n / max(1, len(stratum)) * sizes).astype(np.int64)
    wanted = np.minimum(np.maximum(share, _LEAST) if n else share, sizes)
    rng = np.random.default_rng(seed)
    parts = np.split(np.argsort(stratum, kind="stable"), np.cumsum(sizes)[:-1])
    drawn = [
        part[rng.choice(len(part), k, replace=False)]
        for part, k in zip(parts, wanted.tolist(), strict=False)  # of no items there is one empty part
    ]
    return Strata(sizes, wanted), np.sort(np.concatenate([np.empty(0, np.int64), *drawn]))


def upper(x: int, n: int, alpha: float) -> float:
    """The upper bound of Clopper and Pearson (1934): the p at which x or fewer of n come with chance alpha.

    Args:
        x: of n.
        alpha: one less the confidence.
    """
    if x >= n:
        return 1.0
    k = np.arange(x + 1)
    ways = np.cumsum([0.0, *(math.log((n - i) / (i + 1)) for i in range(x))])  # log of n over k
    low, high = x / n, 1.0
    for _ in range(60):
        p = (low + high) / 2
        if p in (low, high):
            break
        terms = ways + k * math.log(p) + (n - k) * math.log1p(-p)
        chance = math.exp(terms.max()) * np.exp(terms - terms.max()).sum()
        low, high = (p, high) if chance > alpha else (low, p)
    return high


def most_large(x: int, n: int, size: int, alpha: float) -> int:
    """How many of some items can be large, where x of n that were drawn are: with chance alpha it is more.

    Args:
        x: of n.
        size: how many items there are, n of which were drawn, none twice.
        alpha: one less the confidence.
    """
    low, high = x, size - n + x + 1  # that can be, and what cannot
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if chance(x, n, middle, size) > alpha else (low, middle)
    return low


def chance(x: int, n: int, large: int, size: int) -> float:
    """The chance that x or fewer of n draws are large: the hypergeometric distribution.

    Args:
        large: of all items.
        size: how many items there are.
    """
    k = np.arange(max(0, n - (size - large)), min(x, n, large) + 1)
    if not len(k):
        return 0.0
    first = int(k[0])
    ways = _log_choose(large, first) + _log_choose(size - large, n - first) - _log_choose(size, n)
    before = k[:-1]
    grows = (large - before) * (n - before) / ((before + 1.0) * (size - large - n + before + 1))
    terms = ways + np.cumsum(np.log(np.append(1.0, grows)))
    return min(1.0, math.exp(terms.max()) * float(np.exp(terms - terms.max()).sum()))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
