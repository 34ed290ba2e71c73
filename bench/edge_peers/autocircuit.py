"""AutoCircuit: a patchable model, a mask for each row of a batch."""

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltapatch.bench.edge_peers.base import EdgePeer, Job, Names, apart, tokens


class AutoCircuit(EdgePeer):
    """Its patchable model of TransformerLens' with its loader's settings, over keys and values of the prefix.

    Rows of a forward are pairs, and with masks in batches, which it calls experimental, edges times pairs.
    """

    name = "auto-circuit"
    what = "AutoCircuit, masks of edges"
    packages = ("torch", "transformers", "transformer-lens", "auto-circuit")
    batches = (4, 16, 64, 256)

    def prepare(self, job: Job) -> None:
        """Load the model and wrap it."""
        from auto_circuit.utils.graph_utils import patchable_model

        self.job, self.nodes = job, job.nodes(self.keys)
        self.model: Any = patchable_model(
            hooked(job.folder), factorized=True, slice_output="last_seq", separate_qkv=True
        )
        self.edges = {(_node(e.src.name), _node(e.dest.name)): e for e in self.model.edges}

    @torch.no_grad()
    def effects(self, edges: Sequence[Names], batch: int | None) -> np.ndarray:
        """Batches of edges, each of all pairs."""
        from auto_circuit.utils.ablation_activations import src_ablations
        from auto_circuit.utils.graph_utils import patch_mode, set_mask_batch_size

        # TransformerLens' cache has room for the key-value heads alone, which are told apart by query heads.
        first = self.job.first_difference if self.job.n_kv_heads == self.job.n_heads else 0
        clean, corrupted, answers = tokens(self.job)
        n, size = len(clean), max(1, (batch or len(clean)) // len(clean))
        self.model.kv_caches = self._prefix(clean[:, :first], {n, n * size, n * (len(edges) % size)})
        clean, corrupted = clean[:, first:], corrupted[:, first:]
        other = src_ablations(self.model, corrupted)  # [sender, pair, T, d_model]
        plain = apart(self._logits(clean), answers)
        out = np.empty((n, len(edges)))
        for start in range(0, len(edges), size):
            some = edges[start : start + size]
            rows = len(some) * n
            with (
                set_mask_batch_size(self.model, rows),
                patch_mode(self.model, other.repeat(1, len(some), 1, 1), edges=()),
            ):
                for row, names in enumerate(some):
                    edge = self.edges[names]
                    edge.patch_mask(self.model)[(slice(row * n, (row + 1) * n), *edge.patch_idx)] = 1
                found = self._logits(clean.repeat(len(some), 1))
            change = apart(found, answers.repeat(len(some), 1)) - plain.repeat(len(some))
            out[:, start : start + len(some)] = change.unflatten(0, (len(some), n)).T.numpy()
        return out

    def _logits(self, tokens: Tensor) -> Tensor:
        """[row, vocabulary], of the last position."""
        found: Tensor = self.model(tokens)[self.model.out_slice]
        return found

    def _prefix(self, tokens: Tensor, rows: set[int]) -> dict[int, Any] | None:
        """Keys and values of what no pair differs in, for each number of rows that will be run."""
        from transformer_lens import HookedTransformerKeyValueCache

        if not tokens.shape[1]:
            return None
        out = {}
        for n in rows - {0}:
            model = self.model.wrapped_model
            out[n] = HookedTransformerKeyValueCache.init_cache(model.cfg, model.cfg.device, n)
            model(tokens.repeat(n // len(tokens), 1), past_kv_cache=out[n])
            out[n].freeze()
        return out


def hooked(folder: str) -> Any:
    """TransformerLens' model of a folder, as AutoCircuit's own loader makes it of a name."""
    from transformer_lens import HookedTransformer, loading_from_pretrained
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    # In the steps of `HookedTransformer.from_pretrained`, which lets known names through alone.
    config = loading_from_pretrained.get_pretrained_model_config(folder, fold_ln=True, device="cpu")
    config.tokenizer_name = None  # one that a later transformers wrote cannot be read
    weights = loading_from_pretrained.get_pretrained_state_dict(folder, config, hf)
    model = HookedTransformer(config)
    model.tokenizer = SimpleNamespace(pad_token_id=-1, padding_side="right")  # no token is padding
    model.load_and_process_state_dict(weights, fold_ln=True, center_writing_weights=True, center_unembed=True)
    model.set_ungroup_grouped_query_attention(True)  # else its masks of keys and values do not fit
    for option in ("use_attn_result", "use_attn_in", "use_split_qkv_input", "use_hook_mlp_in"):
        setattr(model.cfg, option, True)
    return model.eval().requires_grad_(False)


def _node(name: str) -> str:
    """Our name of a node: theirs are such as Resid Start, A3.5, A3.5.Q, MLP 3, Resid End."""
    if name.startswith("Resid"):
        return "input" if name.endswith("Start") else "logits"
    if name.startswith("MLP"):
        return f"m{name.removeprefix('MLP ')}"
    layer, head, reads = re.fullmatch(r"A(\d+)\.(\d+)(?:\.([QKV]))?", name).groups()  # type: ignore[union-attr]
    return f"a{layer}.h{head}" + (f"<{reads.lower()}>" if reads else "")
