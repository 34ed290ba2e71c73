"""Tests against enumeration, known null distributions, and the definition of the procedures."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltapatch.analysis import statistics
from deltapatch.analysis.significance import benjamini_hochberg, sign_flip_test
from deltapatch.analysis.statistics import bootstrap
from deltapatch.errors import DeltapatchError


def enumerated(values: np.ndarray) -> np.ndarray:
    """p by every sign pattern, written plainly."""
    seen = abs(values.sum())
    sums = [abs(np.dot(s, values)) for s in itertools.product((1, -1), repeat=len(values))]
    return np.mean(np.array(sums) >= seen - 1e-9)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=7))
@settings(deadline=None, max_examples=40)
def test_few_pairs_are_exact(values: list[int]) -> None:
    array = np.array(values, dtype=float)
    assert sign_flip_test(array[:, None])[0] == pytest.approx(enumerated(array))


def test_many_pairs_come_near_the_exact_p() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 1, size=(14, 6))
    exact = np.array([enumerated(column) for column in values.T])
    drawn = sign_flip_test(values, draws=20_000)
    np.testing.assert_allclose(drawn, exact, atol=4 * np.sqrt(0.25 / 20_000))
    np.testing.assert_array_equal(drawn, sign_flip_test(values, draws=20_000))


def test_under_the_null_p_is_uniform() -> None:
    values = np.random.default_rng(1).normal(size=(30, 4000))
    for pooled in (False, True):
        p = sign_flip_test(values, draws=400, pooled=pooled)
        for share in (0.01, 0.05, 0.2, 0.5):
            assert (p <= share).mean() == pytest.approx(share, abs=4 * np.sqrt(share / 4000))


def test_pooling_sees_beyond_one_cells_draws() -> None:
    values = np.random.default_rng(2).normal(size=(40, 3000))
    values[:, :5] += 2
    alone, pooled = (sign_flip_test(values, draws=200, pooled=p) for p in (False, True))
    assert alone.min() == pytest.approx(1 / 201)
    assert (pooled[:5] < 1e-5).all()
    assert (benjamini_hochberg(alone) <= 0.05).sum() <= 8
    assert (np.flatnonzero(benjamini_hochberg(pooled) <= 0.01) == np.arange(5)).all()


def test_nothing_and_missing() -> None:
    values = np.array([[0.0, np.nan, 1.0], [0.0, np.nan, np.nan], [0.0, np.nan, 2.0]])
    for pooled in (False, True):
        p = sign_flip_test(values, pooled=pooled)
        assert p[0] == 1
        assert np.isnan(p[1])
        assert p[2] == pytest.approx(0.5, abs=0.2 if pooled else 1e-12)  # two pairs: ++ and -- of four
    assert sign_flip_test(values.reshape(3, 1, 3)).shape == (1, 3)
    with pytest.raises(DeltapatchError, match="at least one draw"):
        sign_flip_test(values, draws=0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 1))
def test_the_false_discovery_cut_is_benjamini_and_hochbergs(p: list[float], rate: float) -> None:
    ranked = sorted(p)
    passed = [i for i, x in enumerate(ranked, start=1) if x * len(p) / i <= rate]
    wanted = max(passed, default=0)
    q = benjamini_hochberg(np.array(p))
    assert (q <= rate).sum() >= wanted
    assert (q <= rate).sum() == max(
        (i for i, x in enumerate(ranked, 1) if x <= ranked[wanted - 1]), default=0
    ) * (wanted > 0)
    order = np.argsort(p, kind="stable")
    assert (np.diff(q[order]) >= 0).all()


def test_adjusted_p_values_of_an_example() -> None:
    q = benjamini_hochberg(np.array([[0.01, 0.04, np.nan], [0.03, 0.5, 0.02]]))
    np.testing.assert_allclose(q, [[0.05, 0.05, np.nan], [0.05, 0.5, 0.05]])


def test_parts_do_not_change_the_bootstrap(monkeypatch) -> None:
    values = np.random.default_rng(3).normal(size=(9, 7, 5))
    values[2:4, 1] = np.nan
    whole = bootstrap(values, draws=50)
    monkeypatch.setattr(statistics, "_CHUNK_BYTES", 8 * 50 * 3)
    for a, b in zip(bootstrap(values, draws=50), whole, strict=True):
        assert a.shape == (7, 5)
        np.testing.assert_allclose(a, b, rtol=1e-12)
