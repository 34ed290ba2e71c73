"""Attribution patching: gradient times difference, which estimates every effect from one backward pass."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltapatch.bench.peers import wiring
from deltapatch.bench.peers.base import SITES
from deltapatch.bench.peers.hooks import Hooks
from deltapatch.bench.sides.cells import Cells
from deltapatch.bench.sides.workload import Workload
from deltapatch.models.spec import ModelSpec


class Attribution(Hooks):
    """The linear estimate of the change of log P(clean answer) - log P(corrupted answer).

    Its gradient is also that of the indirect effect, times two: one estimate ranks for both metrics.
    """

    name = "attribution"
    what = "attribution patching: gradient times difference"
    sites = SITES
    exact = False

    estimate: list[Tensor]  # [layer][pair, T(, index)]

    def prepare(self, work: Workload, spec: ModelSpec) -> None:
        """Gradients are of activations: those of weights are never asked for."""
        super().prepare(work, spec)
        self.model.requires_grad_(False)

    def start(self, site: str) -> None:
        """The clean runs, then the corrupted ones forwards and backwards."""
        super().start(site)
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
        kept: list[Tensor] = []

        def keep(layer: int, x: Tensor) -> None:
            x.retain_grad()
            kept.append(x)

        embedded = self.model.get_input_embeddings()(self.corrupted[pairs]).requires_grad_()
        with self.hooked(site, range(self.spec.n_layers), keep):
            h = self.backbone(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, -1]
        logp = self.head(h).log_softmax(-1).gather(1, self.answers[pairs])
        (logp[:, 0] - logp[:, 1]).sum().backward()
        out = []
        for source, x in zip(self.source, kept, strict=True):
            assert x.grad is not None
            product = wiring.indexed(x.grad, self.spec, site) * (
                source[pairs] - wiring.indexed(x.detach(), self.spec, site)
            )
            # of a neuron it is the product itself, of a vector or a head the sum over its coordinates
            out.append((product if site == "mlp_post" else product.sum(-1)).cpu())
        return out


def estimated(cells: Cells, estimate: list[Tensor], metric: str) -> np.ndarray:
    """What the metric needs of cells, [n, column], of [layer][pair, T(, index)]; joint patches add up."""
    total, values = np.zeros(len(cells)), torch.stack(estimate).numpy()  # [layer, pair, T(, index)]
    for patch in range(cells.patches):
        layer, position, index = (a[:, patch] for a in (cells.layer, cells.position, cells.index))
        at: Any = (layer, cells.pair, position)
        total += values[at] if index[0] < 0 else values[(*at, index)]
    return of_answers(total, metric)


def of_answers(total: np.ndarray, metric: str) -> np.ndarray:
    """Half of the estimate for each answer, since they are apart by it: [n, column] of [n]."""
    return total[:, None] if metric == "logit_diff" else np.stack([total / 2, -total / 2], axis=1)
