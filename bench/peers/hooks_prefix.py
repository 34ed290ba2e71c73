"""The best that hooks can do: batches from the patched layer and position on, over cached keys and values."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from deltapatch.bench.peers import wiring
from deltapatch.bench.peers.base import chunks
from deltapatch.bench.peers.hooks_layer import HooksLayer
from deltapatch.bench.sides.cells import Cells


class Prefix(DynamicCache):
    """The base runs' keys and values before a position: nothing that is added to it is kept."""

    def __init__(self, kept: list[tuple[Tensor, Tensor]], length: int) -> None:
        super().__init__()
        self.kept, self.length = kept, length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **more: Any
    ) -> Any:
        """Keys and values of all positions, the last ones as given."""
        k, v = self.kept[layer_idx]
        return torch.cat([k, key_states], dim=2), torch.cat([v, value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions come before."""
        return self.length


class HooksPrefix(HooksLayer):
    """Rows that start at one position go together, whatever their layers."""

    name = "hooks-prefix"
    what = "hooks, in batches, from the patched layer and position on"

    keys: list[tuple[Tensor, Tensor]]  # [layer], [pair, head, T, d_head] of the corrupted runs

    @torch.no_grad()
    def start(self, site: str) -> None:
        """Also keep the keys and values of the corrupted runs."""
        super().start(site)
        cache = DynamicCache()
        self.backbone(self.corrupted, use_cache=True, past_key_values=cache)
        self.keys = [(layer.keys, layer.values) for layer in cache.layers]

    def batches(self, cells: Cells) -> list[np.ndarray]:
        """One position at a time, its layers in order."""
        order = np.lexsort((cells.pair, cells.first_layer, cells.first_position))
        return chunks(order, cells.first_position[order], self.batch)

    @torch.no_grad()
    def measure(self, cells: Cells) -> np.ndarray:
        """These cells in one batch, all from one position on."""
        pair = torch.from_numpy(cells.pair).to(self.work.device)
        start = int(cells.first_position.min())
        layer, hidden, layers = self.enter(cells, start)  # [row, T - start, d_model]
        if (cells.pair == cells.pair[0]).all():
            kept = [(k[pair[:1], :, :start].expand(len(pair), -1, -1, -1),
                     v[pair[:1], :, :start].expand(len(pair), -1, -1, -1)) for k, v in self.keys]  # fmt: skip
        else:
            kept = [(k[pair, :, :start], v[pair, :, :start]) for k, v in self.keys]
        with (
            self.hooked(cells.site, layers, self.swap(cells, start)),
            wiring.only_from(self.model, self.spec, layer),
        ):
            out = self.backbone(
                inputs_embeds=hidden,
                past_key_values=Prefix(kept, start),
                position_ids=torch.arange(start, self.work.length, device=hidden.device)[None],
                attention_mask=self._mask(hidden, start),
                use_cache=True,
            )
        return self.changes(out.last_hidden_state[:, -1], pair)

    def _mask(self, hidden: Tensor, start: int) -> Tensor:
        """What each query may not see, [1, 1, T - start, T]: whatever comes after it."""
        width = hidden.shape[1]
        future = torch.ones(width, start + width, device=hidden.device, dtype=torch.bool).triu(start + 1)
        mask = torch.zeros(1, 1, width, start + width, device=hidden.device, dtype=hidden.dtype)
        return mask.masked_fill(future, torch.finfo(hidden.dtype).min)
