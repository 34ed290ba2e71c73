"""Necessary FLOPs, counted by hand on a small shape."""

import numpy as np
import pytest

from deltapatch.engine.planning.costs import layer_parameters, necessary_flops, parameters, rows, sweep_cost
from deltapatch.interventions.grid import Grid, SiteGrid
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.roles import Roles
from deltapatch.interventions.sites import SITES
from deltapatch.models.spec import ModelSpec, RopeSpec

SPEC = ModelSpec(
    architecture="llama",
    n_layers=3,
    d_model=8,
    n_heads=2,
    n_kv_heads=1,
    d_head=4,
    d_mlp=16,
    d_vocab=100,
    context=32,
    norm="rms",
    norm_eps=1e-6,
    parallel=False,
    gated=True,
    activation="silu",
    rope=RopeSpec(4),
)
LAYER = 8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 8 * 16  # q, k and v, output, gate and up and down


def test_parameters():
    assert layer_parameters(SPEC) == LAYER
    assert parameters(SPEC) == 3 * LAYER + 2 * 100 * 8


@pytest.mark.parametrize(
    ("site", "positions", "n_rows", "row_layers", "depth"),
    [
        ("mlp_out", [-1], 3, 1, 2 + 1 + 0),
        ("mlp_out", [0, 1, 4], 9, 5 + 4 + 1, 2 + 1 + 0),
        ("resid_pre", [4], 3, 1, 3 + 2 + 1),
        ("mlp_post", [-1], 48, 16, 2 + 1 + 0),
        ("k", [-2], 3, 2, 2 + 1 + 0),
    ],
)
def test_necessary_flops(site, positions, n_rows, row_layers, depth):
    assert rows(SPEC, site, range(3), positions) == n_rows
    expected = 2 * LAYER * row_layers * depth + 2 * 8 * 100 * n_rows
    assert necessary_flops(SPEC, site, range(3), positions, length=5) == expected


def test_what_answers_add_is_counted():
    """Three positions from the patch on, two more for the answers; read at the end and at both."""
    expected = 2 * LAYER * (3 + 2) * (2 + 1 + 0) + 2 * 8 * 100 * 3 * (1 + 2)
    assert necessary_flops(SPEC, "mlp_out", range(3), [2], length=5, continued=2) == expected
    columns = (np.arange(3), [2], 0, 0, Roles())
    grid = Grid([SiteGrid(SITES["mlp_out"], *columns)], 1, 3)
    ids = [1, 2, 3, 4, 5]
    pair = EncodedPair(ids, ids, [7, 8], [9, 8], {}, {}, [], [], "", "")
    assert sweep_cost(grid, [pair], SPEC) == (3, expected)
