"""Means, standard errors and bootstrap intervals against numpy and against known cases."""

import numpy as np
import pytest

from deltapatch.analysis.statistics import (
    bootstrap,
    mean_over,
    mean_over_pairs,
    median_over_pairs,
    pair_counts,
)


def test_mean_and_standard_error():
    values = np.random.default_rng(0).normal(size=(7, 3))
    mean, stderr, n = mean_over_pairs(values)
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose(stderr, values.std(0, ddof=1) / np.sqrt(7))
    assert n.tolist() == [7, 7, 7]


def test_nan_is_left_out():
    values = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
    mean, stderr, n = mean_over_pairs(values)
    np.testing.assert_array_equal(mean, [2, 5, np.nan])
    np.testing.assert_array_equal(stderr, [1, np.nan, np.nan])
    assert n.tolist() == [2, 1, 0]
    np.testing.assert_array_equal(mean_over(values, (1,)), [1, 4])


def test_bootstrap_is_seeded_and_covers_the_mean():
    values = np.random.default_rng(1).normal(size=(40, 5)) + 2
    low, high = bootstrap(values)
    assert (low < values.mean(0)).all()
    assert (values.mean(0) < high).all()
    width = 2 * 1.96 * values.std(0) / np.sqrt(40)
    np.testing.assert_allclose(high - low, width, rtol=0.15)
    np.testing.assert_array_equal(low, bootstrap(values)[0])
    assert not np.array_equal(low, bootstrap(values, seed=1)[0])


def test_bootstrap_of_one_pair_says_nothing():
    low, high = bootstrap(np.ones((1, 2)))
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_bootstrap_leaves_nan_out():
    values = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, np.nan], [4.0, np.nan]])
    low, high = bootstrap(values)
    assert 1 <= low[0] <= high[0] <= 4
    assert np.isnan(low[1])


def test_a_ratio_of_means_against_loops():
    rng = np.random.default_rng(0)
    values, over = rng.normal(size=(6, 4)), rng.uniform(1, 3, 6) * -1
    values[0, 1] = values[3, 1] = values[:, 3] = np.nan
    mean, stderr, n = mean_over_pairs(values, over)
    low, high = bootstrap(values, draws=50, seed=3, over=over)
    counts = pair_counts(6, 50, 3)
    assert n.tolist() == [6, 4, 6, 0]
    for cell in range(3):
        there = ~np.isnan(values[:, cell])
        v, w = values[there, cell], over[there]
        assert mean[cell] == pytest.approx(v.mean() / w.mean())
        rest = v - mean[cell] * w
        assert stderr[cell] == pytest.approx(np.sqrt((rest**2).sum() / (len(v) - 1) / len(v)) / abs(w.mean()))
        drawn = [(c[there] * v).sum() / (c[there] * w).sum() for c in counts]
        assert [low[cell], high[cell]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
    assert np.isnan([mean[3], stderr[3], low[3]]).all()
    # Measured by the same in every pair, it is the plain mean.
    for got, want in zip(mean_over_pairs(values, np.ones(6)), mean_over_pairs(values), strict=True):
        np.testing.assert_allclose(got, want)


def test_a_ratio_with_nothing_to_measure_by():
    with pytest.warns(UserWarning, match=r"undefined \(NaN\) for 2 mean\(s\) over pairs"):
        mean, stderr, _ = mean_over_pairs(np.ones((2, 2)), np.array([1.0, -1.0]))
    assert np.isnan([mean, stderr]).all()


def test_medians():
    values = np.array([[1.0, np.nan, np.nan], [5.0, 2.0, np.nan], [90.0, 4.0, np.nan]])
    np.testing.assert_array_equal(median_over_pairs(values), [5, 3, np.nan])
