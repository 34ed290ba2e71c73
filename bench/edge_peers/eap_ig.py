"""EAP-IG's exact mode by its definition, written anew: it is not on PyPI.

Its `exact` scores take one edge after the other out of the graph and evaluate the graph. An evaluation is
two forwards of the whole data set, with all logits: the corrupted prompts, of which every sender's output is
kept, and the clean ones, in which the receiver's input gets the sender's corrupted output for its present
one. Only that one input is made anew here, where EAP-IG makes those of all receivers, so this is the faster.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltapatch.bench.edge_peers.base import EdgePeer, Job, Names, apart, letter, place, tokens
from deltapatch.bench.peers.wiring import load
from deltapatch.interventions.nodes import Receiver


class Modules(NamedTuple):
    """Where an architecture of transformers has its parts; those of a layer within it."""

    layers: str
    final: str  # the norm before the logits
    norm1: str
    qkv: tuple[str, ...]  # one that gives all, or three
    out: str
    norm2: str
    mlp: str


MODULES = {
    "gpt2": Modules(
        "transformer.h", "transformer.ln_f", "ln_1", ("attn.c_attn",), "attn.c_proj", "ln_2", "mlp",
    ),
    "gpt_neox": Modules(
        "gpt_neox.layers", "gpt_neox.final_layer_norm", "input_layernorm", ("attention.query_key_value",),
        "attention.dense", "post_attention_layernorm", "mlp",
    ),
    "llama": Modules(
        "model.layers", "model.norm", "input_layernorm",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj", "post_attention_layernorm", "mlp",
    ),
}  # fmt: skip


class Edge(NamedTuple):
    """The edge that is out of the graph: both its ends, and what all senders say in the corrupted run."""

    sender: str
    receiver: Receiver
    other: dict[str, Tensor]


class EapIg(EdgePeer):
    """Transformers' model with hooks; rows of a forward are pairs, as of its data loader."""

    name = "eap-ig"
    what = "EAP-IG's exact mode, by its definition"
    batches = (1, 2, 4)

    dtype = torch.float32

    def prepare(self, job: Job) -> None:
        """Load the model, each query head with keys and values of its own, and put hooks on it."""
        self.job, self.nodes = job, job.nodes(self.keys)
        self.hf = ungrouped(load(job.folder, "cpu", self.dtype))
        self.names = MODULES[self.hf.config.model_type]
        self.said: dict[str, Tensor] = {}  # what was said in the forward at hand
        self.edge: Edge | None = None
        self.layers = list(self.hf.get_submodule(self.names.layers))
        self.layers[0].register_forward_pre_hook(lambda m, args: self._keep("input", args[0]))
        for l, layer in enumerate(self.layers):
            self._watch(l, layer)
        final = self.hf.get_submodule(self.names.final)
        final.register_forward_pre_hook(self._reading("logits", len(self.layers) - 1))

    @torch.no_grad()
    def effects(self, edges: Sequence[Names], batch: int | None) -> np.ndarray:
        """One edge after the other: two forwards of every batch of pairs."""
        clean, corrupted, answers = tokens(self.job)
        size = batch or len(clean)
        out = np.empty((len(clean), len(edges)))
        for start in range(0, len(clean), size):
            rows = slice(start, start + size)
            plain = self._metric(clean[rows], answers[rows])
            for i, (sender, receiver) in enumerate(edges):
                self._metric(corrupted[rows], answers[rows])
                self.edge = Edge(sender, self.nodes.receivers[receiver], self.said)
                out[rows, i] = self._metric(clean[rows], answers[rows]) - plain
                self.edge = None
        return out

    def _metric(self, prompts: Tensor, answers: Tensor) -> np.ndarray:
        """[pair], the logit difference at the end, after a forward with all logits."""
        self.said = {}
        found: np.ndarray = apart(self.hf(prompts, use_cache=False).logits[:, -1], answers).numpy()
        return found

    def _edited(self, what: str, layer: int, x: Tensor) -> Tensor | None:
        """What is read there, [pair, T, d_model], with the edge's change; None where no edge ends."""
        edge = self.edge
        if edge is None or (letter(edge.receiver), edge.receiver.layer) != (what, layer):
            return None
        return x + self._output(edge.sender, edge.other) - self._output(edge.sender, self.said)

    def _output(self, sender: str, said: dict[str, Tensor]) -> Tensor:
        """[pair, T, d_model], what a sender adds to the residual stream."""
        layer, head = place(sender)
        if layer < 0:
            return said["input"]
        if head is None:
            return said[f"m{layer}"]
        out = self.layers[layer].get_submodule(self.names.out)
        weight = out.weight.t() if isinstance(out, torch.nn.Linear) else out.weight  # [heads' width, d_model]
        width = len(weight) // self.nodes.n_heads
        mine = slice(head * width, (head + 1) * width)
        return said[f"z{layer}"][..., mine] @ weight[mine]

    def _watch(self, l: int, layer: Any) -> None:
        """Keep what a layer's senders say, and let its receivers read something else."""
        names = self.names
        norm, out, mlp, norm2 = map(layer.get_submodule, (names.norm1, names.out, names.mlp, names.norm2))
        norm.register_forward_pre_hook(lambda m, args: self._keep(f"x{l}", args[0]))
        for part, name in enumerate(names.qkv):
            layer.get_submodule(name).register_forward_hook(self._projecting(l, part, norm))
        out.register_forward_pre_hook(lambda m, args: self._keep(f"z{l}", args[0]))
        norm2.register_forward_pre_hook(self._reading("mlp", l))
        mlp.register_forward_hook(lambda m, args, y: self._keep(f"m{l}", y))

    def _projecting(self, l: int, part: int, norm: Any) -> Callable[..., Tensor]:
        """A hook on a projection: one head's slice is that of the edited stream, normed anew."""

        def hook(module: Any, args: Any, y: Tensor) -> Tensor:
            for reads in range(3) if len(self.names.qkv) == 1 else (part,):
                x = self._edited("qkv"[reads], l, self.said[f"x{l}"])
                if x is not None:
                    mine = self._slice(reads, y.shape[-1])
                    y = y.clone()
                    y[..., mine] = module.forward(norm.forward(x))[..., mine]
            return y

        return hook

    def _slice(self, reads: int, width: int) -> slice:
        """Where the edge's head has its queries, keys or values in what a projection gives."""
        assert self.edge is not None
        heads, head = self.nodes.n_heads, self.edge.receiver.head
        if len(self.names.qkv) == 3:
            number, each = head, width // heads
        else:
            each = width // (3 * heads)
            number = 3 * head + reads if self.hf.config.model_type == "gpt_neox" else reads * heads + head
        return slice(number * each, (number + 1) * each)

    def _reading(self, what: str, l: int) -> Callable[..., tuple[Tensor] | None]:
        """A hook before a norm: what it reads, edited."""

        def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            x = self._edited(what, l, args[0])
            return None if x is None else (x,)

        return hook

    def _keep(self, name: str, x: Tensor) -> None:
        self.said[name] = x


class EapIgBf16(EapIg):
    """In bfloat16, as MIB's code loads all models but GPT-2."""

    name = "eap-ig-bf16"
    what = "the same in bfloat16, as MIB loads most models"

    dtype = torch.bfloat16


def ungrouped(hf: Any) -> Any:
    """The same function with keys and values for every query head, which EAP-IG insists on."""
    config = copy.deepcopy(hf.config)
    kv_heads = getattr(config, "num_key_value_heads", None)
    if kv_heads in (None, config.num_attention_heads):
        return hf
    config.num_key_value_heads = config.num_attention_heads
    weights = hf.state_dict()
    for name, weight in weights.items():
        if ".k_proj." in name or ".v_proj." in name:
            heads = weight.unflatten(0, (kv_heads, -1))
            weights[name] = heads.repeat_interleave(config.num_attention_heads // kv_heads, 0).flatten(0, 1)
    out = type(hf)(config).to(hf.dtype).eval()
    out.load_state_dict(weights)
    return out
