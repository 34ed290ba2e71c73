"""The canonical set of weights: one layout for all architectures. Matrices are [out, in], as in the files."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from deltapatch.models.spec import ModelSpec


class Linear(NamedTuple):
    """A matrix product with an optional bias."""

    weight: Tensor  # [out, in]
    bias: Tensor | None = None  # [out]


class Norm(NamedTuple):
    """Scale and shift of a LayerNorm; an RMSNorm has no shift."""

    weight: Tensor  # [d_model]
    bias: Tensor | None = None  # [d_model]


class LayerWeights(NamedTuple):
    """One block.

    `qkv` is (q, k, v), or a single product whose rows are ordered [head, (q, k, v), d_head], as GPT-NeoX
    stores it: keeping the file's order lets a loaded model share its weights.
    """

    norm1: Norm | None  # None: attention reads the residual stream itself
    norm2: Norm | None  # None: the MLP reads norm1's output (GPT-J), or the residual stream itself
    qkv: tuple[Linear, ...]
    out: Linear  # [d_model, n_heads * d_head]
    gate: Linear | None  # [d_mlp, d_model], only where the MLP is gated
    up: Linear  # [d_mlp, d_model]
    down: Linear  # [d_model, d_mlp]
    post1: Norm | None = None  # behind attention
    post2: Norm | None = None  # behind the MLP
    q_norm: Norm | None = None  # [d_head], [n_heads, d_head] or [n_heads * d_head], see `ModelSpec.qk_norm`
    k_norm: Norm | None = None  # the same of key-value heads


class EndWeights(NamedTuple):
    """What comes before the first block and after the last one."""

    embedding: Tensor  # [d_vocab, d_model]
    norm: Norm
    unembedding: Linear  # [d_vocab, d_model]
    positions: Tensor | None = None  # [context, d_model], where they are learned


Weights = TypeVar("Weights", LayerWeights, EndWeights)
Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], Tensor]


def layer_shapes(spec: ModelSpec) -> Shapes:
    """The slots of one block and the shape of each: what a checkpoint has to bring for every layer."""
    d_q, d_kv = spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head
    shapes: Shapes = {}
    for norm in _norms(spec):
        shapes |= _norm(norm, spec)
    shapes |= _head_norms("q_norm", spec, spec.n_heads)
    shapes |= _head_norms("k_norm", spec, spec.n_kv_heads)
    widths = (3 * d_q,) if spec.fused_qkv else (d_q, d_kv, d_kv)
    for i, width in enumerate(widths):
        shapes |= _linear(f"qkv.{i}", width, spec.d_model, spec.qkv_bias)
    shapes |= _linear("out", spec.d_model, d_q, spec.out_bias)
    for name in ("gate", "up") if spec.gated else ("up",):
        shapes |= _linear(name, spec.d_mlp, spec.d_model, spec.mlp_bias)
    shapes |= _linear("down", spec.d_model, spec.d_mlp, spec.mlp_bias)
    return shapes


def end_shapes(spec: ModelSpec) -> Shapes:
    """The slots outside the blocks and the shape of each."""
    shapes: Shapes = {"embedding.weight": (spec.d_vocab, spec.d_model)}
    shapes |= _norm("norm", spec)
    shapes |= _linear("unembedding", spec.d_vocab, spec.d_model, spec.unembedding_bias)
    if spec.learned_positions:
        shapes["positions.weight"] = (spec.context, spec.d_model)
    return shapes


def assemble_layer(spec: ModelSpec, read: Read) -> LayerWeights:
    """One block's weights; `read` gives the tensor of a slot of `layer_shapes`."""
    slots = layer_shapes(spec)

    def norm(name: str) -> Norm | None:
        return Norm(*_parts(name, slots, read)) if f"{name}.weight" in slots else None

    def heads(name: str, count: int) -> Norm | None:
        if spec.qk_norm != "each":
            return norm(name)
        return Norm(torch.stack([read(f"{name}.{h}.weight") for h in range(count)]))

    return LayerWeights(
        norm1=norm("norm1"),
        norm2=norm("norm2"),
        qkv=tuple(Linear(*_parts(f"qkv.{i}", slots, read)) for i in range(1 if spec.fused_qkv else 3)),
        out=Linear(*_parts("out", slots, read)),
        gate=Linear(*_parts("gate", slots, read)) if spec.gated else None,
        up=Linear(*_parts("up", slots, read)),
        down=Linear(*_parts("down", slots, read)),
        post1=norm("post1"),
        post2=norm("post2"),
        q_norm=heads("q_norm", spec.n_heads),
        k_norm=heads("k_norm", spec.n_kv_heads),
    )


def assemble_ends(spec: ModelSpec, read: Read) -> EndWeights:
    """The weights outside the blocks; tied embeddings are one tensor in both places."""
    slots = end_shapes(spec)
    embedding = read("embedding.weight")
    if spec.tied_embeddings:
        bias = read("unembedding.bias") if spec.unembedding_bias else None
        unembedding = Linear(embedding, bias)
    else:
        unembedding = Linear(*_parts("unembedding", slots, read))
    positions = read("positions.weight") if spec.learned_positions else None
    return EndWeights(embedding, Norm(*_parts("norm", slots, read)), unembedding, positions)


def cast(weights: Weights, device: torch.device, dtype: torch.dtype | None) -> Weights:
    """The same weights on a device and in a dtype; tensors that are there already are shared, not copied.

    Without a dtype each tensor keeps its own.
    """
    done: dict[int, Tensor] = {}  # a tensor that is used twice (tied embeddings) is converted once

    def convert(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = tensor.to(device=device, dtype=dtype)
        return done[id(tensor)]

    moved: Weights = map_tensors(weights, convert)
    return moved


def constant(weights: Weights) -> Weights:
    """The same weights, shared, of which no gradient is taken."""
    held: Weights = map_tensors(weights, lambda t: t.clone() if t.is_inference() else t.detach())
    return held


class Converter:
    """Converts layers one after the other into the same memory: fresh memory costs more than converting.

    What the last but one call returned is overwritten; what need not be converted is shared, never written.
    On a GPU, whose memory PyTorch keeps and writes in order, every layer has memory of its own.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._memory: tuple[dict[int, Tensor], ...] = ({}, {})

    def __call__(self, weights: LayerWeights) -> LayerWeights:
        """The same weights in the dtype."""
        if self.device.type != "cpu":
            return cast(weights, self.device, self.dtype)
        self._memory = self._memory[::-1]
        memory, number = self._memory[0], iter(range(1 << 10))

        def convert(tensor: Tensor) -> Tensor:
            i = next(number)
            if tensor.dtype == self.dtype:
                return tensor
            if i not in memory or memory[i].shape != tensor.shape:
                memory[i] = torch.empty_like(tensor, dtype=self.dtype)
            return memory[i].copy_(tensor)

        converted: LayerWeights = map_tensors(weights, convert)
        return converted


def map_tensors(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Weights with every tensor changed, in order."""
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, tuple):
        parts = [map_tensors(p, change) for p in part]
        return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
    return part


def _norms(spec: ModelSpec) -> list[str]:
    """The norms of a block, of d_model coordinates."""
    before = ["norm1"] if spec.shared_norm else ["norm1", "norm2"]
    return [*(before if spec.pre_norm else []), *(["post1", "post2"] if spec.post_norm else [])]


def _norm(name: str, spec: ModelSpec) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (spec.d_model,)}
    if spec.norm == "layer":
        shapes[f"{name}.bias"] = (spec.d_model,)
    return shapes


def _head_norms(name: str, spec: ModelSpec, n_heads: int) -> Shapes:
    """Norms of queries or of keys; heads with weights of their own have a slot each, as files have them."""
    if spec.qk_norm == "none":
        return {}
    if spec.qk_norm == "each":
        return {f"{name}.{h}.weight": (spec.d_head,) for h in range(n_heads)}
    return {f"{name}.weight": (spec.d_head * (n_heads if spec.qk_norm == "width" else 1),)}


def _linear(name: str, n_out: int, n_in: int, bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (n_out, n_in)}
    if bias:
        shapes[f"{name}.bias"] = (n_out,)
    return shapes


def _parts(name: str, slots: Shapes, read: Read) -> tuple[Tensor, Tensor | None]:
    bias = f"{name}.bias"
    return read(f"{name}.weight"), read(bias) if bias in slots else None
