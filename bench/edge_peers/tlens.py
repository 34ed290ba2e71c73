"""TransformerLens: hooks on what receivers read, a row of a batch for each edge and pair."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltapatch.bench.edge_peers.base import EdgePeer, Job, Names, apart, grouped, letter, place, tokens
from deltapatch.interventions.nodes import Receiver

HOOKS = {"q": "hook_q_input", "k": "hook_k_input", "v": "hook_v_input", "mlp": "hook_mlp_in"}


class TLens(EdgePeer):
    """The bridge, nothing folded. Keys and values are read once for each key-value head, as it has them."""

    name = "tlens"
    what = "TransformerLens, hooks on what is read"
    packages = ("torch", "transformers", "transformer-lens")
    keys = "kv"
    batches = (4, 16, 64, 256)

    def prepare(self, job: Job) -> None:
        """Load the model into a bridge that splits what receivers read."""
        from transformer_lens.model_bridge import TransformerBridge

        self.job, self.nodes = job, job.nodes(self.keys)
        self.model: Any = TransformerBridge.boot_transformers(job.folder, device="cpu", dtype=torch.float32)
        self.model.set_use_split_qkv_input(True)
        self.model.set_use_hook_mlp_in(True)

    @torch.no_grad()
    def effects(self, edges: Sequence[Names], batch: int | None) -> np.ndarray:
        """Caches of both runs, then batches of edges, each of all pairs."""
        clean, corrupted, answers = tokens(self.job)
        n = len(clean)
        self.model.set_use_attn_result(True)
        caches = [self.model.run_with_cache(ids, names_filter=_says)[1] for ids in (clean, corrupted)]
        self.model.set_use_attn_result(False)  # from here on heads need not be told apart
        message = torch.stack([_said(caches[1], s) - _said(caches[0], s) for s in self.nodes.senders])
        plain = apart(self.model(clean)[:, -1], answers)
        out = np.empty((n, len(edges)))
        for some in grouped(edges, self.nodes, max(1, (batch or n) // n)):
            hooks: dict[str, list[tuple[int, Receiver, Tensor]]] = {}
            for row, (_, sender, receiver) in enumerate(some):
                hooks.setdefault(_hook(receiver), []).append((row, receiver, message[sender]))
            found = self.model.run_with_hooks(
                clean.repeat(len(some), 1),  # [edge and pair, T]
                fwd_hooks=[(name, partial(_add, rows=rows, n=n)) for name, rows in hooks.items()],
                logits_to_keep=1,
            )
            change = apart(found[:, -1], answers.repeat(len(some), 1)) - plain.repeat(len(some))
            out[:, [i for i, *_ in some]] = change.unflatten(0, (len(some), n)).T.numpy()
        return out


def _says(name: str) -> bool:
    """Whether a hook is one of a sender."""
    return name.endswith(("hook_result", "hook_mlp_out")) or name == "blocks.0.hook_resid_pre"


def _said(cache: Any, sender: str) -> Tensor:
    """[pair, T, d_model], what a sender adds."""
    layer, head = place(sender)
    if layer < 0:
        return cache["blocks.0.hook_resid_pre"]
    if head is None:
        return cache[f"blocks.{layer}.hook_mlp_out"]
    return cache[f"blocks.{layer}.attn.hook_result"][:, :, head]


def _hook(receiver: Receiver) -> str:
    """The name of the hook of what a receiver reads."""
    return f"blocks.{receiver.layer}.{HOOKS.get(letter(receiver), 'hook_resid_post')}"


def _add(x: Tensor, hook: Any, rows: list[tuple[int, Receiver, Tensor]], n: int) -> Tensor:
    """Add each row's message to what its receiver reads: [row, T, d_model], of heads [row, T, head, d_model].

    In a copy: the bridge's `hook_mlp_in` gets the residual stream itself, not what the MLP alone reads.
    """
    x = x.clone()
    for row, receiver, message in rows:
        mine = x[row * n : (row + 1) * n]
        (mine[:, :, receiver.head] if x.ndim == 4 else mine).add_(message)
    return x
