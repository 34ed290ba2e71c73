"""Hooks on transformers, many interventions a forward: as a skilled user would."""

import numpy as np

from deltapatch.bench.peers.base import chunks, in_layer_order
from deltapatch.bench.peers.hooks import Hooks
from deltapatch.bench.sides.cells import Cells


class HooksBatched(Hooks):
    """Each row of a batch is one intervention; a hook in each layer writes into its rows."""

    name = "hooks-batched"
    what = "hooks, in batches"
    batched = True

    def batches(self, cells: Cells) -> list[np.ndarray]:
        """In the order of layers, so that few hooks act in a batch."""
        return chunks(in_layer_order(cells), None, self.batch)
