"""Hooks in batches that start at the patched layer: the layers before it are the base run's."""

import numpy as np
import torch
from torch import Tensor

from deltapatch.bench.peers import wiring
from deltapatch.bench.peers.base import chunks, in_layer_order
from deltapatch.bench.peers.hooks import Hooks
from deltapatch.bench.sides.cells import EDITS, Cells


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
        first, hidden, layers = self.enter(cells)
        with (
            self.hooked(cells.site, layers, self.swap(cells)),
            wiring.only_from(self.model, self.spec, first),
        ):
            out = self.backbone(inputs_embeds=hidden, use_cache=False)
        return self.changes(out.last_hidden_state[:, -1], pair)

    def enter(self, cells: Cells, start: int = 0) -> tuple[int, Tensor, list[int]]:
        """The layer that these cells start with, what goes into it, and the layers whose hooks act.

        What goes in is [row, T - start, d_model]; what an edit changes behind a layer goes into the next.
        """
        pair = torch.from_numpy(cells.pair).to(self.work.device)
        layers: list[int] = np.unique(cells.layer).tolist()
        first = layers[0]
        if cells.site not in EDITS or first + 1 == self.spec.n_layers:
            return first, self.hidden[first][pair, start:], layers
        hidden = self.hidden[first + 1][pair, start:]
        self.swap(cells, start)(first, hidden)
        return first + 1, hidden, layers[1:]
