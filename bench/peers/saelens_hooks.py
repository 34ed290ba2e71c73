"""SAELens: its transformer of TransformerLens' with an autoencoder spliced in, features set by hooks."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltapatch.bench.peers import wiring
from deltapatch.bench.peers.base import Peer, chunks
from deltapatch.bench.sides.cells import FEATURE, Cells
from deltapatch.bench.sides.workload import Workload
from deltapatch.models.spec import ModelSpec


class SaeLensHooks(Peer):
    """Each row of a batch sets one feature to what the clean run has; the error term is kept.

    Nothing is folded or centred, and only the last position is read out.
    """

    name = "sae-lens"
    what = "SAELens, hooks on features in batches"
    package = "sae_lens"
    extra = "sae-lens"
    sites = (FEATURE,)
    architectures = ("gpt_neox", "llama")  # TransformerLens has GPT-J's MLP four times as wide as the model
    joint = False
    batched = True
    modules = ("torch", "transformers", "sae_lens")

    model: Any
    source: Tensor  # [pair, T, feature], of the clean runs
    base: Tensor  # [pair, column], the corrupted runs

    def prepare(self, work: Workload, spec: ModelSpec) -> None:
        """Load the model and the autoencoder."""
        from sae_lens import SAE, HookedSAETransformer
        from transformer_lens import loading_from_pretrained

        self.work, self.spec = work, spec
        # In the steps of `HookedTransformer.from_pretrained`, which lets known names through alone.
        config = loading_from_pretrained.get_pretrained_model_config(
            work.folder, fold_ln=False, device=work.device
        )
        config.tokenizer_name = None
        weights = loading_from_pretrained.get_pretrained_state_dict(
            work.folder, config, wiring.load(work.folder, work.device)
        )
        self.model = HookedSAETransformer(config)
        self.model.load_and_process_state_dict(
            weights, fold_ln=False, center_writing_weights=False, center_unembed=False,
            fold_value_biases=False,
        )  # fmt: skip
        self.sae = SAE.load_from_disk(work.autoencoder, device=work.device)
        self.hook = f"{self.sae.cfg.metadata.hook_name}.hook_sae_acts_post"
        self.model.add_sae(self.sae, use_error_term=True)
        self.clean, self.corrupted, self.answers = (
            torch.tensor(ids, device=work.device) for ids in (work.clean, work.corrupted, work.answers)
        )

    @torch.no_grad()
    def start(self, site: str) -> None:
        """Features of the clean runs, and the corrupted runs."""
        _, cache = self.model.run_with_cache(self.clean, names_filter=self.hook, prepend_bos=False)
        self.source = cache[self.hook]
        self.base = self._columns(self._last(self.corrupted, []), self.answers)

    def batches(self, cells: Cells) -> list[np.ndarray]:
        """All at one layer."""
        return chunks(np.arange(len(cells)), None, self.batch)

    @torch.no_grad()
    def measure(self, cells: Cells) -> np.ndarray:
        """One run of hooks for all these cells."""
        pair = torch.from_numpy(cells.pair)
        last = self._last(self.corrupted[pair], [(self.hook, partial(self._set, cells=cells))])
        change = self._columns(last, self.answers[pair]) - self.base[pair]
        return change.double().cpu().numpy()

    def _set(self, features: Tensor, hook: Any, cells: Cells) -> Tensor:
        """Write each row's feature: [row, T, feature]."""
        pair, position, index = (
            torch.from_numpy(a) for a in (cells.pair, cells.position[:, 0], cells.index[:, 0])
        )
        features[torch.arange(len(cells)), position, index] = self.source[pair, position, index]
        return features

    def _last(self, ids: Tensor, hooks: list[Any]) -> Tensor:
        """[row, vocab], logits of the last position, of [row, T]."""
        stream = self.model.run_with_hooks(
            ids, fwd_hooks=hooks, stop_at_layer=self.spec.n_layers, prepend_bos=False
        )  # [row, T, d_model]
        logits: Tensor = self.model.unembed(self.model.ln_final(stream[:, -1:]))[:, 0]
        return logits

    def _columns(self, logits: Tensor, answers: Tensor) -> Tensor:
        """What the metric needs, [row, column]."""
        found = logits.log_softmax(-1).gather(1, answers)
        return found[:, :1] - found[:, 1:] if self.work.metric == "logit_diff" else found
