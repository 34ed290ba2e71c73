"""Random effects of edges, which no model had to make."""

from collections.abc import Callable

import numpy as np
import pytest

from deltapatch.interventions.edges import EdgeGrid
from deltapatch.interventions.nodes import Nodes
from deltapatch.interventions.roles import Roles
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.metrics import MEASURED


@pytest.fixture
def make_edges(make_effects) -> Callable[..., EdgeEffects]:
    """Builds random effects of all edges of a model of 3 layers and 4 heads, total and direct."""

    def make(
        n_pairs=5, shape=(3, 4), positions=("together",), receivers=None, keys="query", measured=MEASURED
    ):
        rng, like = np.random.default_rng(0), make_effects(lengths=(8,) * n_pairs)
        layers, heads = shape
        nodes = Nodes(layers, heads, 2 if keys == "kv" else heads, False, keys)
        grid = EdgeGrid(
            nodes,
            list(range(nodes.n_senders)),
            list(nodes.receivers) if receivers is None else receivers,
            list(positions),
            ("total", "direct"),
            Roles("noise"),
            n_pairs,
        )
        found = {name: rng.normal(size=grid.shape).astype(np.float32) for name in measured}
        return EdgeEffects(
            grid, found, like.pairs, like.reference, "noise", {**like.meta, "source": "counterpart"}
        )

    return make
