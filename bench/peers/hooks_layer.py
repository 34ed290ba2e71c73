"""Hooks in batches that start at the patched layer: the layers before it are the base run's."""

import numpy as np
import torch
from torch import Tensor

from deltapatch.bench.peers import wiring
from deltapatch.bench.peers.base import chunks, in_layer_order
from deltapatch.bench.peers.hooks import Hooks
from deltapatch.bench.sides.cells import Cells


class HooksLayer(Hooks):
    """The base run's hidden states are kept, and a batch goes through the layers that remain."""

    name = "hooks-layer"
    what = "hooks, in batches, from the patched layer on"
    batched = True

    hidden: list[Tensor]  # [layer][pair, T, d_model], what goes into each layer of the corrupted runs

    @torch.no_grad()
    def start(self, site: str) -> None:
        """Also keep what goes into each layer of the corrupted runs."""
        super().start(site)
        self.hidden = []
        handles = [
            block.register_forward_pre_hook(
                lambda m, args, kwargs: self.hidden.append((args or tuple(kwargs.values()))[0].clone()),
                with_kwargs=True,
            )
            for block in self.blocks
        ]
        self.last(self.corrupted)
        for handle in handles:
            handle.remove()

    def batches(self, cells: Cells) -> list[np.ndarray]:
        """One layer at a time."""
        order = in_layer_order(cells)
        return chunks(order, cells.first_layer[order], self.batch)

    @torch.no_grad()
    def measure(self, cells: Cells) -> np.ndarray:
        """These cells in one batch, from the first layer that any of them patches."""
        pair = torch.from_numpy(cells.pair).to(self.work.device)
        first = int(cells.first_layer.min())
        with (
            self.hooked(cells.site, np.unique(cells.layer).tolist(), self.swap(cells)),
            wiring.only_from(self.model, self.spec, first),
        ):
            out = self.backbone(inputs_embeds=self.hidden[first][pair], use_cache=False)
        return self.changes(out.last_hidden_state[:, -1], pair)
