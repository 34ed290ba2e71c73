"""The sample of what was not verified: how it is drawn, and that its bound holds as often as it says."""

import math

import numpy as np
import pytest

from deltapatch import DeltapatchError
from deltapatch.results.strata import Strata, cut, draw, upper

SEEDS = 200


def test_clopper_and_pearson():
    assert upper(0, 100, 0.05) == pytest.approx(1 - 0.05**0.01)
    assert upper(5, 5, 0.05) == 1
    rng = np.random.default_rng(0)
    for x, n, alpha in ((1, 7, 0.05), (13, 400, 0.01), (399, 400, 0.1)):
        p = upper(x, n, alpha)
        below = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(x + 1))
        assert below == pytest.approx(alpha, rel=1e-6)
    for _ in range(20):
        n = int(rng.integers(2, 3000))
        x = int(rng.integers(0, n))
        assert x / n < upper(x, n, 0.05) <= upper(x, n, 0.01) <= 1


def test_every_stratum_is_drawn_from_as_densely_and_never_twice():
    rng = np.random.default_rng(1)
    size, group = rng.exponential(size=4000), rng.choice([0, 0, 0, 0, 0, 0, 0, 3], size=4000)
    size[:500] = 0.0  # ties
    stratum = cut(size, group)
    strata, drawn = draw(stratum, 400, seed=2)
    assert np.array_equal(np.bincount(stratum), strata.size)
    assert np.array_equal(np.bincount(stratum[drawn], minlength=len(strata.size)), strata.drawn)
    assert len(np.unique(drawn)) == len(drawn)
    assert strata.unseen == 4000 - len(drawn)
    assert (strata.drawn / strata.size >= 0.1).all()
    assert len(drawn) < 400 + len(strata.size)
    for one in range(len(strata.size)):  # of one group, next to each other in size
        mine = stratum == one
        assert len(np.unique(group[mine])) == 1
        others = (group == group[mine][0]) & ~mine
        between = others & (size > size[mine].min()) & (size < size[mine].max())
        assert not between.any()
    again = draw(stratum, 400, seed=2)[1]
    assert np.array_equal(again, drawn)
    assert not np.array_equal(draw(stratum, 400, seed=3)[1], drawn)


def test_small_sets():
    none = np.empty(0), np.empty(0, dtype=np.int64)
    stratum = cut(*none)
    strata, drawn = draw(stratum, 10, seed=0)
    assert len(stratum) == len(drawn) == strata.unseen == strata.at_most(np.empty(0, np.int64), 0.95) == 0
    strata, drawn = draw(cut(np.arange(3.0), np.zeros(3, np.int64)), 10, seed=0)
    assert drawn.tolist() == [0, 1, 2]
    assert strata.at_most(np.array([1, 1, 1]), 0.95) == 0  # all of them were seen
    strata, drawn = draw(cut(np.arange(300.0), np.zeros(300, np.int64)), 0, seed=0)
    assert not len(drawn)
    assert strata.at_most(np.zeros(5, np.int64), 0.95) == 300  # nothing is known
    for confidence in (1, 0.3, math.nan):
        with pytest.raises(DeltapatchError, match="confidence must be"):
            strata.at_most(np.zeros(5, np.int64), confidence)


def populations():
    """(estimates, group, which are large): where large effects are hardest to see, and where they are not."""
    rng = np.random.default_rng(5)
    estimate, group = rng.exponential(size=3000), (np.arange(3000) < 60).astype(np.int64)
    low = np.argsort(estimate)
    for n_large in (0, 12, 45, 1500):
        for where in (low, rng.permutation(3000), np.flatnonzero(group)):
            large = np.zeros(3000, dtype=bool)
            large[where[:n_large]] = True
            yield estimate, group, large


@pytest.mark.parametrize("confidence", [0.95, pytest.param(0.6, marks=pytest.mark.slow)])
def test_the_bound_holds_at_least_as_often_as_it_says(confidence):
    cases = list(populations())
    holds = np.zeros(len(cases))
    stratum = cut(*cases[0][:2])
    for seed in range(SEEDS):
        strata, drawn = draw(stratum, 150, seed)
        for i, (_, _, large) in enumerate(cases):
            counts = np.bincount(stratum[drawn][large[drawn]], minlength=len(strata.size))
            bound = strata.at_most(counts, confidence)
            holds[i] += bound >= large.sum() - counts.sum()
            # It is of use: three in so many that one was drawn of each, where there is nothing to see.
            assert large.any() or bound <= 3.1 / 150 * 3000
    slack = 3 * np.sqrt(confidence * (1 - confidence) / SEEDS)
    assert (holds / SEEDS >= confidence - slack).all()


def test_what_is_drawn_unevenly_is_shared_out_in_the_worst_way():
    strata = Strata(np.array([1000, 1000]), np.array([100, 10]))
    nothing = strata.at_most(np.array([0, 0]), 0.95)
    mean = 110 * upper(0, 110, 0.05)
    assert nothing == int(mean / 0.01)  # all of them in the one that was hardly looked at
    rng = np.random.default_rng(3)
    holds = 0
    for _ in range(500):
        large = rng.permutation(1000) < 240
        seen = int(large[:10].sum())
        holds += strata.at_most(np.array([0, seen]), 0.95) >= 240 - seen
    assert holds / 500 >= 0.92
