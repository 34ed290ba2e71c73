"""The order of parts in the figure of interactions."""

import numpy as np
import pytest

from deltapatch.analysis.interaction_plots import cluster_order


@pytest.mark.parametrize("seed", range(3))
def test_parts_that_interact_alike_come_together(seed):
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat([0, 1, 2], 4))
    between = np.array([[-3.0, 0.0, 1.0], [0.0, 2.0, 0.5], [1.0, 0.5, -1.0]])
    noise = 0.05 * rng.normal(size=(12, 12))
    matrix = between[group][:, group] + noise + noise.T
    np.fill_diagonal(matrix, np.nan)
    order = cluster_order(matrix)
    assert sorted(order.tolist()) == list(range(12))
    assert (np.diff(group[order]) != 0).sum() == 2  # each group lies together


def test_few_parts_and_parts_that_do_nothing():
    assert sorted(cluster_order(np.full((2, 2), np.nan)).tolist()) == [0, 1]
    assert sorted(cluster_order(np.zeros((5, 5))).tolist()) == list(range(5))
