"""TransformerLens: attribution patching, from the gradients at its hook points."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltapatch.bench.peers.attribution import estimated
from deltapatch.bench.peers.tlens_patching import TLensPatching
from deltapatch.bench.sides.cells import Cells


class TLensAttribution(TLensPatching):
    """One forward and one backward pass; gradients of weights are not asked for."""

    name = "tlens-attribution"
    what = "TransformerLens, attribution patching"
    exact = False
    joint = True

    estimate: list[Tensor]  # [layer][pair, T(, index)]

    def start(self, site: str) -> None:
        """The clean runs, then the corrupted ones forwards and backwards."""
        parts = [self._some_pairs(site, ids) for ids in torch.arange(len(self.clean)).split(self.batch)]
        self.estimate = [torch.cat(layer) for layer in zip(*parts, strict=True)]

    def batches(self, cells: Cells) -> list[np.ndarray]:
        """All at once: everything was estimated already."""
        return [np.arange(len(cells))]

    def measure(self, cells: Cells) -> np.ndarray:
        """What was estimated of these cells."""
        return estimated(cells, self.estimate, self.work.metric)

    def _some_pairs(self, site: str, pairs: Tensor) -> list[Tensor]:
        """[layer][pair, T(, index)] for some of the pairs."""
        names = [self.hook(site, layer) for layer in range(self.spec.n_layers)]
        kept: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any, name: str) -> None:
            kept[name] = x

        hooks = [(name, partial(keep, name=name)) for name in names]
        with torch.no_grad():
            self.model.run_with_hooks(self.clean[pairs], fwd_hooks=hooks, logits_to_keep=1)
        source = [kept[name] for name in names]
        logits = self.model.run_with_hooks(self.corrupted[pairs], fwd_hooks=hooks, logits_to_keep=1)
        said = logits[:, -1].log_softmax(-1).gather(1, self.answers[pairs])
        slopes = torch.autograd.grad((said[:, 0] - said[:, 1]).sum(), [kept[name] for name in names])
        products = [
            slope * (clean - kept[name].detach())
            for name, slope, clean in zip(names, slopes, source, strict=True)
        ]
        return [product if site == "mlp_post" else product.sum(-1) for product in products]
