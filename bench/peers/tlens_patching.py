"""TransformerLens: its patching functions, one run of hooks for each intervention."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltapatch.bench.peers.base import Peer, chunks
from deltapatch.bench.sides.cells import Cells
from deltapatch.bench.sides.workload import Workload
from deltapatch.models.spec import ModelSpec

NAMES = {"mlp_out": "mlp_out", "attn_out": "attn_out", "z": "z", "mlp_post": "post"}


class TLensPatching(Peer):
    """`generic_activation_patch`, with its own setters where it has one for the site.

    Weights are as they are: the bridge folds and centres nothing unless asked to.
    """

    name = "tlens-patching"
    what = "TransformerLens, patching functions"
    package = "transformer_lens"
    extra = "transformer-lens"
    joint = False
    modules = ("torch", "transformers", "transformer_lens")

    model: Any
    caches: list[Any]  # [pair], of the clean runs
    base: Tensor  # [pair, column], the corrupted runs

    def prepare(self, work: Workload, spec: ModelSpec) -> None:
        """Load the model into a bridge."""
        from transformer_lens.model_bridge import TransformerBridge

        self.work, self.spec = work, spec
        self.model = TransformerBridge.boot_transformers(work.folder, device=work.device, dtype=torch.float32)
        self.clean, self.corrupted, self.answers = (
            torch.tensor(ids, device=work.device) for ids in (work.clean, work.corrupted, work.answers)
        )

    @torch.no_grad()
    def start(self, site: str) -> None:
        """Caches of the clean runs, and the corrupted runs."""
        names = [self.hook(site, layer) for layer in range(self.spec.n_layers)]
        self.caches = [
            self.model.run_with_cache(ids[None], names_filter=lambda name: name in names)[1]
            for ids in self.clean
        ]
        self.base = self.columns(self.model(self.corrupted)[:, -1], self.answers)

    def batches(self, cells: Cells) -> list[np.ndarray]:
        """One call for each pair, cut so that it can be sampled."""
        order = np.lexsort((cells.index[:, 0], cells.position[:, 0], cells.layer[:, 0], cells.pair))
        return chunks(order, cells.pair[order], self.batch)

    @torch.no_grad()
    def measure(self, cells: Cells) -> np.ndarray:
        """One call of the patching function: these cells are of one pair."""
        import pandas
        from transformer_lens import patching

        pair = int(cells.pair[0])
        found: list[Tensor] = []

        def metric(logits: Tensor) -> Tensor:
            found.append(self.columns(logits[:, -1], self.answers[pair : pair + 1]) - self.base[pair])
            return found[-1][0, 0]

        axes = {"layer": cells.layer[:, 0], "pos": cells.position[:, 0]}
        setter = patching.layer_pos_patch_setter
        if cells.site == "z":
            axes["head_index"], setter = cells.index[:, 0], patching.layer_pos_head_vector_patch_setter
        elif cells.site == "mlp_post":
            axes["neuron"], setter = cells.index[:, 0], _neuron_setter
        patching.generic_activation_patch(
            self.model,
            self.corrupted[pair][None],
            self.caches[pair],
            metric,
            setter,
            NAMES[cells.site],
            index_df=pandas.DataFrame(axes),
        )
        return torch.cat(found).double().cpu().numpy()

    def hook(self, site: str, layer: int) -> str:
        """The name of a hook point."""
        from transformer_lens.utilities import get_act_name

        name: str = get_act_name(NAMES[site], layer)
        return name

    def columns(self, logits: Tensor, answers: Tensor) -> Tensor:
        """What the metric needs of read-out logits [row, vocab]: [row, column]."""
        found = logits.log_softmax(-1).gather(1, answers)
        return found[:, :1] - found[:, 1:] if self.work.metric == "logit_diff" else found


def _neuron_setter(corrupted: Tensor, index: Any, clean: Tensor) -> Tensor:
    """As `layer_pos_head_vector_patch_setter`, for one hidden neuron."""
    _, position, neuron = index
    corrupted[:, position, neuron] = clean[:, position, neuron]
    return corrupted
