"""TransformerLens: custom hooks, many interventions a forward."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltapatch.bench.peers.base import chunks, in_layer_order
from deltapatch.bench.peers.tlens_patching import TLensPatching
from deltapatch.bench.sides.cells import Cells


class TLensHooks(TLensPatching):
    """Each row of a batch is one intervention; only the last position is read out."""

    name = "tlens-hooks"
    what = "TransformerLens, custom hooks in batches"
    batched = True
    joint = True

    source: list[Tensor]  # [layer][pair, T, ...]

    @torch.no_grad()
    def start(self, site: str) -> None:
        """The clean runs' values of the site, stacked, and the corrupted runs."""
        super().start(site)
        names = [self.hook(site, layer) for layer in range(self.spec.n_layers)]
        self.source = [torch.cat([cache[name] for cache in self.caches]) for name in names]

    def batches(self, cells: Cells) -> list[np.ndarray]:
        """As hooks in batches."""
        return chunks(in_layer_order(cells), None, self.batch)

    @torch.no_grad()
    def measure(self, cells: Cells) -> np.ndarray:
        """One run of hooks for all these cells."""
        pair = torch.from_numpy(cells.pair)
        layers = np.unique(cells.layer).tolist()
        hooks = [(self.hook(cells.site, l), partial(self._write, cells=cells, layer=l)) for l in layers]
        logits = self.model.run_with_hooks(self.corrupted[pair], fwd_hooks=hooks, logits_to_keep=1)
        change = self.columns(logits[:, -1], self.answers[pair]) - self.base[pair]
        return change.double().cpu().numpy()

    def _write(self, x: Tensor, hook: Any, cells: Cells, layer: int) -> Tensor:
        row, patch = np.nonzero(cells.layer == layer)
        arrays = (row, cells.pair[row], cells.position[row, patch], cells.index[row, patch])
        rows, pair, position, index = (torch.from_numpy(a) for a in arrays)
        if arrays[3][0] < 0:
            x[rows, position] = self.source[layer][pair, position]
        else:
            x[rows, position, index] = self.source[layer][pair, position, index]
        return x
