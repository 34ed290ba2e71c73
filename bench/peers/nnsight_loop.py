"""nnsight: one trace for each intervention."""

from typing import Any

import numpy as np
import torch

from deltapatch.bench.peers import wiring
from deltapatch.bench.peers.base import SITES
from deltapatch.bench.peers.hooks import Hooks
from deltapatch.bench.sides.cells import Cells
from deltapatch.bench.sides.workload import Workload
from deltapatch.models.spec import ModelSpec


class NNsightLoop(Hooks):
    """The unpatched runs are made with hooks on the model that nnsight holds."""

    name = "nnsight"
    what = "nnsight, one trace each"
    sites = SITES
    package = extra = "nnsight"
    modules = ("torch", "transformers", "nnsight")

    traced: Any

    def prepare(self, work: Workload, spec: ModelSpec) -> None:
        """Load the model and wrap it."""
        from nnsight.modeling.transformers import TransformersModel
        from transformers import AutoTokenizer

        super().prepare(work, spec)
        tokenizer = AutoTokenizer.from_pretrained(work.folder, local_files_only=True, trust_remote_code=False)
        self.traced = TransformersModel(self.model, task="text-generation", tokenizer=tokenizer)

    @torch.no_grad()
    def measure(self, cells: Cells) -> np.ndarray:
        """One cell."""
        pair = torch.from_numpy(cells.pair)
        with self.traced.trace(self.corrupted[pair], use_cache=False, logits_to_keep=1):
            self.patch(cells, 0)
            logits = self.traced.output.logits[:, -1].save()
        return self.of_logits(logits, pair)

    def patch(self, cells: Cells, row: int) -> None:
        """Within a trace or an invoke of one prompt: write a cell's values, in the order of layers."""
        pair = int(cells.pair[row])
        for patch in np.argsort(cells.layer[row], kind="stable"):
            layer, position, index = (int(a[row, patch]) for a in (cells.layer, cells.position, cells.index))
            names, before = wiring.path(self.spec, cells.site, layer)
            module = self.traced
            for name in names:
                module = module[int(name)] if name.isdigit() else getattr(module, name)
            x = module.input if before else module.output
            at = (0, position) if index < 0 else (0, position, index)
            wiring.indexed(x, self.spec, cells.site)[at] = self.source[layer][(pair, *at[1:])]

    def of_logits(self, logits: torch.Tensor, pair: torch.Tensor) -> np.ndarray:
        """Changes from the base run, [row, column], of read-out logits [row, vocab]."""
        found = logits.float().log_softmax(-1).gather(1, self.answers[pair])
        if self.work.metric == "logit_diff":
            found = found[:, :1] - found[:, 1:]  # the normaliser is the same for both
        return (found - self.base[pair]).double().cpu().numpy()
