"""pyvene: the rows of a batch are interventions of one layer, and the sources were kept."""

import numpy as np
import torch
from torch import Tensor

from deltapatch.bench.peers.base import chunks, in_layer_order
from deltapatch.bench.peers.pyvene_loop import PyveneLoop
from deltapatch.bench.sides.cells import Cells


class PyveneBatched(PyveneLoop):
    """The wrapped model is the backbone, so that only the last position is read out.

    Subspaces that differ between the rows of a batch give wrong effects, in silence (pyvene 0.1.8). So a
    neuron goes in as the base run's whole activation with that neuron replaced.
    """

    name = "pyvene-batched"
    what = "pyvene, in batches, sources kept"
    batched = True

    before: list[Tensor]  # [layer][pair, T, ...], the site's values in the corrupted runs

    @torch.no_grad()
    def start(self, site: str) -> None:
        """Also keep the site's values in the corrupted runs."""
        super().start(site)
        self.before = []
        with self.hooked(site, range(self.spec.n_layers), lambda layer, x: self.before.append(x.clone())):
            self.last(self.corrupted)

    def batches(self, cells: Cells) -> list[np.ndarray]:
        """One layer at a time."""
        order = in_layer_order(cells)
        return chunks(order, cells.first_layer[order], self.batch)

    @torch.no_grad()
    def measure(self, cells: Cells) -> np.ndarray:
        """One call for all these cells."""
        pair = torch.from_numpy(cells.pair)
        layer, position = int(cells.layer[0, 0]), torch.from_numpy(cells.position[:, 0])
        model = self.intervenable(self.backbone, cells.site, layer)
        rows, index = torch.arange(len(cells)), torch.from_numpy(cells.index[:, 0])
        kept = self.source[layer][pair, position]  # [row, width], or [row, head, d_head]
        if cells.site == "z":
            kept = kept[rows, index][:, None]
        elif cells.site == "mlp_post":
            one, kept = kept[rows, index], self.before[layer][pair, position]
            kept[rows, index] = one
        (key,) = model.representations
        out = model(
            {"input_ids": self.corrupted[pair]},
            source_representations={key: kept[:, None]},
            unit_locations=self.where(cells)["unit_locations"],
        )[1]
        return self.changes(out.last_hidden_state[:, -1], pair)
