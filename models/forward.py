"""The plain forward, one for all architectures, in the pieces that the engine uses.

Shapes: B prompts of one length T; H heads, K key-value heads, C = d_head. Everything is computed in the
dtype of its input: float64 activations and weights stay float64 throughout.
"""

import math
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from deltapatch.kernels.product import by_matrix
from deltapatch.kernels.segments import Fork, in_prompt
from deltapatch.kernels.softcap import softcap
from deltapatch.models.spec import ModelSpec, RopeSpec, Scores
from deltapatch.models.weights import EndWeights, LayerWeights, Linear, Norm, map_tensors

# Attention scores that exist at once; queries are cut so that long prompts stay within it: on a CPU what its
# cache holds, on a GPU 64 MiB in float32.
_MAX_SCORES, _MAX_SCORES_ON_CPU = 1 << 24, 1 << 20

_TOKENS = 1 << 14  # of the vocabulary, whose part of the unembedding is taken at a time

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class Activations(NamedTuple):
    """Everything that a block computes on its way, under the names of the sites."""

    resid_pre: Tensor  # [B, T, d_model]
    q: Tensor  # [B, T, H, C], before rotary, bias included
    k: Tensor  # [B, T, K, C], before rotary, bias included
    v: Tensor  # [B, T, K, C]
    q_rotated: Tensor  # [B, T, H, C]
    k_rotated: Tensor  # [B, T, K, C]
    pattern: Tensor | None  # [B, T, H, T], attention probabilities; None where not asked for
    z: Tensor  # [B, T, H, C]
    attn_raw: Tensor | None  # [B, T, d_model], before a norm behind attention; None where there is none
    attn_out: Tensor  # [B, T, d_model], what is added to the residual stream
    resid_mid: Tensor | None  # [B, T, d_model]; None for parallel blocks
    gate: Tensor | None  # [B, T, d_mlp], before the activation; None where the MLP is not gated
    up: Tensor  # [B, T, d_mlp]; without a gate it is the activation's argument
    mlp_post: Tensor  # [B, T, d_mlp], the input of down
    mlp_raw: Tensor | None  # [B, T, d_model], before a norm behind the MLP; None where there is none
    mlp_out: Tensor  # [B, T, d_model], what is added to the residual stream
    resid_post: Tensor  # [B, T, d_model]


def widths(spec: ModelSpec, length: int) -> dict[str, tuple[int, ...]]:
    """The shape of each of a model's `Activations` at one token of a run of at most `length` tokens."""
    whole, hidden = (spec.d_model,), (spec.d_mlp,)
    queries, keys = (spec.n_heads, spec.d_head), (spec.n_kv_heads, spec.d_head)
    shapes = {
        "resid_pre": whole, "q": queries, "k": keys, "v": keys, "q_rotated": queries, "k_rotated": keys,
        "pattern": (spec.n_heads, length), "z": queries, "attn_raw": whole, "attn_out": whole,
        "resid_mid": whole, "gate": hidden, "up": hidden, "mlp_post": hidden, "mlp_raw": whole,
        "mlp_out": whole, "resid_post": whole,
    }  # fmt: skip
    there = {
        "resid_mid": not spec.parallel, "gate": spec.gated, "attn_raw": spec.post_norm,
        "mlp_raw": spec.post_norm,
    }  # fmt: skip
    return {name: shape for name, shape in shapes.items() if there.get(name, True)}


def rope_tables(
    rope: RopeSpec, n_positions: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 .. n_positions - 1, each [n_positions, rope.dim // 2].

    They are computed in float64 and then rounded, without the attention factor (see `rotate`). `n_positions`
    is the length of the prompt: dynamic scaling and longrope have other frequencies for prompts beyond the
    original context, so there the tables of a longer prompt do not begin with those of a shorter one (see
    `RopeSpec.depends_on_length`).
    """
    position = torch.arange(n_positions, dtype=torch.float64)
    angle = position[:, None] * _frequencies(rope, n_positions)  # [n_positions, dim/2]
    return angle.cos().to(device=device, dtype=dtype), angle.sin().to(device=device, dtype=dtype)


def _frequencies(rope: RopeSpec, n_positions: int) -> Tensor:
    """Radians a position, [dim/2]."""
    base, beyond = rope.base, rope.depends_on_length(n_positions)
    if rope.scaling == "dynamic" and beyond:
        stretch = rope.factor * n_positions / rope.original_context - (rope.factor - 1)
        base *= stretch ** (rope.dim / (rope.dim - 2))
    power = torch.arange(0, rope.dim, 2, dtype=torch.float64) / rope.dim
    frequency = base**-power  # [dim/2], radians per position
    if rope.scaling == "linear":
        return frequency / rope.factor
    if rope.scaling == "longrope":
        factors = rope.long_factors if beyond else rope.short_factors
        return frequency / torch.tensor(factors, dtype=torch.float64)
    if rope.scaling == "yarn":
        return _yarn(rope, frequency)
    if rope.scaling != "llama3":
        return frequency
    # Wavelengths shorter than the original context / high_freq_factor stay, those longer than the original
    # context / low_freq_factor are stretched by factor, those between are blended.
    turns = rope.original_context * frequency / (2 * math.pi)  # full turns within the original context
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / rope.factor)


def _yarn(rope: RopeSpec, frequency: Tensor) -> Tensor:
    """Coordinates that turn often within the original context keep their frequency, others are stretched.

    Between them is a ramp over the numbers of the coordinates (arXiv 2309.00071, section 3.2).
    """

    def coordinate(turns: float) -> float:
        """The number of the coordinate that turns so often within the original context, as a fraction."""
        return rope.dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = coordinate(rope.high_freq_factor), coordinate(rope.low_freq_factor)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # as transformers does, so that the ramp has a slope
    number = torch.arange(rope.dim // 2, dtype=torch.float64)
    stretched = ((number - low) / (high - low)).clamp(0, 1)
    return frequency * (1 - stretched) + frequency / rope.factor * stretched


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: RopeSpec) -> Tensor:
    """Turn queries or keys by their position, times the attention factor: linear in x.

    Args:
        x: [..., position, head, d_head].
        cos, sin: [..., position, rope.dim // 2], the rows of `rope_tables` for x's positions.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [..., position, 1, dim/2]
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    if rope.interleaved:
        first, second = slice(0, rope.dim, 2), slice(1, rope.dim, 2)
    else:
        first, second = slice(0, rope.dim // 2), slice(rope.dim // 2, rope.dim)
    a, b = x[..., first], x[..., second]
    turned[..., first] = a * cos - b * sin
    turned[..., second] = b * cos + a * sin
    if rope.attention_factor != 1:
        turned[..., : rope.dim] *= rope.attention_factor
    turned[..., rope.dim :] = x[..., rope.dim :]
    return turned


def norm_scale(norm: Norm, spec: ModelSpec) -> Tensor:
    """What a norm multiplies by, [width], in the dtype of its weight."""
    return norm.weight + 1 if spec.unit_offset else norm.weight


def normalise(x: Tensor, norm: Norm | None, spec: ModelSpec) -> Tensor:
    """LayerNorm or RMSNorm of the last axis, [..., width]; x itself where there is no norm."""
    if norm is None:
        return x
    if spec.norm == "layer" and norm.weight.dim() > 1:  # [head, d_head]: each head has weights of its own
        return F.layer_norm(x, x.shape[-1:], eps=spec.norm_eps) * norm.weight
    if spec.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, spec.norm_eps)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.norm_eps)
    return x * scale * norm_scale(norm, spec)


def normalise_heads(x: Tensor, norm: Norm | None, spec: ModelSpec) -> Tensor:
    """Queries or keys, [..., head, d_head], after the norm of each head or of all together."""
    if spec.qk_norm == "width":
        return normalise(x.flatten(-2), norm, spec).view(x.shape)
    return normalise(x, norm, spec)


def spoken(x: Tensor, post: Norm | None, spec: ModelSpec) -> Tensor:
    """What is added to the residual stream, of what attention or MLP give, [..., d_model]."""
    normed = normalise(x, post, spec)
    return normed if spec.residual_scale == 1 else normed * spec.residual_scale


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function of that name (see `spec.Activation`)."""
    return _ACTIVATIONS[name]


def linear(x: Tensor, part: Linear) -> Tensor:
    """x [..., in] -> [..., out]."""
    out = by_matrix(x, part.weight)
    return out if part.bias is None else out.add_(part.bias)


def project_qkv(x: Tensor, layer: LayerWeights, spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x [..., d_model], before rotary, biases included (see `split_qkv`)."""
    return split_qkv([linear(x, part) for part in layer.qkv], spec)


def split_qkv(parts: list[Tensor], spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    """What the products of `LayerWeights.qkv` gave, each [..., out], as heads.

    Returns:
        q [..., n_heads, d_head], k and v [..., n_kv_heads, d_head].
    """
    if len(parts) == 1:
        q, k, v = parts[0].unflatten(-1, (spec.n_heads, 3, spec.d_head)).unbind(-2)
        return q, k, v
    q, k, v = (part.unflatten(-1, (-1, spec.d_head)) for part in parts)
    return q, k, v


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores_as: Scores,
    fork: Fork | None = None,
    pattern: Tensor | None = None,
) -> Tensor:
    """Causal attention: q [B, T, H, C] and k, v [B, T, K, C], both rotated -> z [B, T, H, C].

    With a fork the tokens are a trunk and two branches, which begin at these two positions, and the second
    branch does not attend to the first. Softmax and products are in the inputs' dtype. Queries go in chunks,
    so memory grows with T, not T². `pattern`, [B, T, H, T], receives the probabilities of the keys up to each
    query.
    """
    n_batch, length, n_heads, d_head = q.shape
    n_kv = k.shape[2]
    group = n_heads // n_kv  # query heads that share a key-value head
    q = q.reshape(n_batch, length, n_kv, group, d_head).permute(0, 2, 3, 1, 4)  # [B, K, group, T, C]
    k = k.permute(0, 2, 3, 1)  # [B, K, C, T]
    v = v.transpose(1, 2)  # [B, K, T, C]
    z = q.new_empty(n_batch, length, n_heads, d_head)
    most = _MAX_SCORES_ON_CPU if q.device.type == "cpu" else _MAX_SCORES
    chunk = max(1, most // (n_batch * n_heads * length))
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        rows = q[:, :, :, start:end].reshape(n_batch, n_kv, group * (end - start), d_head) * scores_as.scale
        scores = rows @ k[..., :end]  # [B, K, group * chunk, end]
        scores = softcap(scores, scores_as.softcap).view(n_batch, n_kv, group, end - start, end)
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        scores[..., start:].masked_fill_(future, -math.inf)
        if fork is not None:
            scores[..., max(0, fork[1] - start) :, fork[0] : fork[1]] = -math.inf
        if scores_as.window is not None:
            position = in_prompt(torch.arange(length, device=q.device), fork)
            passed = position[start:end, None] - position[:end] >= scores_as.window
            scores.masked_fill_(passed, -math.inf)
        weights = scores.softmax(-1)
        if pattern is not None:
            by_head = weights.view(n_batch, n_heads, end - start, end)
            pattern[:, start:end, :, :end] = by_head.transpose(1, 2)
        mixed = weights.view(n_batch, n_kv, group * (end - start), end) @ v[:, :, :end]
        mixed = mixed.view(n_batch, n_heads, end - start, d_head)
        z[:, start:end] = mixed.transpose(1, 2)
    return z


class LayerContext(NamedTuple):
    """What a block needs beside its weights and its input.

    Attributes:
        spec: of the model.
        scores: how scores become probabilities in this layer.
        rope: the layer's rotary embedding.
        rope_tables: cosines and sines of each token's position, as `rope_tables` gives them; positions are
            0 .. T-1 but for branches.
        fork: see `attend`.
    """

    spec: ModelSpec
    scores: Scores
    rope: RopeSpec
    rope_tables: tuple[Tensor, Tensor]
    fork: Fork | None = None


def contexts(
    spec: ModelSpec, length: int, dtype: torch.dtype, device: torch.device | str
) -> list[LayerContext]:
    """The context of every layer, for prompts of that length."""
    tables = {rope: rope_tables(rope, length, dtype, device) for rope in spec.all_ropes()}
    ropes = [spec.rope_of(l) for l in range(spec.n_layers)]
    return [LayerContext(spec, spec.scores(l), rope, tables[rope]) for l, rope in enumerate(ropes)]


class Attended(NamedTuple):
    """A block's attention, under the names of `Activations`."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_rotated: Tensor
    k_rotated: Tensor
    pattern: Tensor | None
    z: Tensor
    attn_raw: Tensor | None
    attn_out: Tensor


class Hidden(NamedTuple):
    """A block's MLP, under the names of `Activations`."""

    gate: Tensor | None
    up: Tensor
    mlp_post: Tensor
    mlp_raw: Tensor | None
    mlp_out: Tensor


Asked = TypeVar("Asked")
Input = TypeVar("Input")
Matrix = TypeVar("Matrix")
Product = TypeVar("Product")
Found = TypeVar("Found")
# A part of a block that asks for its products: it yields x [..., in] and the weights, and is sent what
# `linear` makes of them. Others may carry out theirs together with these.
Steps = Generator[tuple[Tensor, Linear], Tensor, None]
Keep = Callable[..., None]  # is given activations by name, each as soon as it is there


def carry_out(
    steps: Generator[tuple[Input, Matrix], Product, Found], multiply: Callable[[Input, Matrix], Product]
) -> Found:
    """Do what is asked for, one product after the other; what comes of it."""
    try:
        asked = next(steps)
        while True:
            asked = steps.send(multiply(*asked))
    except StopIteration as end:
        found: Found = end.value
        return found


def sent(steps: Generator[Asked, Product, Any], done: Product) -> Asked | None:
    """What is asked for once this is done; None: nothing more."""
    try:
        return steps.send(done)
    except StopIteration:
        return None


def attention(x: Tensor, layer: LayerWeights, context: LayerContext, *, pattern: bool = False) -> Attended:
    """The attention of one block over whole prompts, [B, T, d_model].

    With `pattern` the attention probabilities are kept, [B, T, H, T].
    """
    seen: dict[str, Any] = {}
    carry_out(attention_steps(x, layer, context, seen.update, pattern=pattern), linear)
    return Attended(**seen)


def attention_steps(
    x: Tensor, layer: LayerWeights, context: LayerContext, keep: Keep, *, pattern: bool = False
) -> Steps:
    """The same in steps."""
    spec, cos, sin = context.spec, *(table[: x.shape[1]] for table in context.rope_tables)
    normed, parts = normalise(x, layer.norm1, spec), []
    for part in layer.qkv:
        parts.append((yield normed, part))
    q, k, v = split_qkv(parts, spec)
    q_rotated, k_rotated = (
        rotate(normalise_heads(heads, norm, spec), cos, sin, context.rope)
        for heads, norm in ((q, layer.q_norm), (k, layer.k_norm))
    )
    kept = x.new_zeros(*q.shape[:3], q.shape[1]) if pattern else None
    z = attend(q_rotated, k_rotated, v, context.scores, context.fork, kept)
    keep(q=q, k=k, v=v, q_rotated=q_rotated, k_rotated=k_rotated, pattern=kept, z=z)
    raw = yield z.flatten(-2), layer.out
    keep(attn_raw=raw if spec.post_norm else None, attn_out=spoken(raw, layer.post1, spec))


def mlp(x: Tensor, attn_out: Tensor, layer: LayerWeights, spec: ModelSpec) -> Hidden:
    """The MLP of one block, of any tokens: x [..., d_model] before the block, attn_out likewise."""
    seen: dict[str, Any] = {}
    carry_out(mlp_steps(x, attn_out, layer, spec, seen.update), linear)
    return Hidden(**seen)


def mlp_steps(x: Tensor, attn_out: Tensor, layer: LayerWeights, spec: ModelSpec, keep: Keep) -> Steps:
    """The same in steps."""
    norm = layer.norm1 if spec.shared_norm else layer.norm2
    normed = normalise(x if spec.parallel else x + attn_out, norm, spec)
    act = activation(spec.activation)
    up = yield normed, layer.up
    gate = None if layer.gate is None else (yield normed, layer.gate)
    mlp_post = act(up) if gate is None else act(gate) * up
    keep(gate=gate, up=up, mlp_post=mlp_post)
    raw = yield mlp_post, layer.down
    keep(mlp_raw=raw if spec.post_norm else None, mlp_out=spoken(raw, layer.post2, spec))


def block(x: Tensor, layer: LayerWeights, context: LayerContext, *, pattern: bool = False) -> Activations:
    """One block over whole prompts, x [B, T, d_model]. No padding: a batch holds prompts of one length.

    With `pattern` the attention probabilities are kept, [B, T, H, T].
    """
    attended = attention(x, layer, context, pattern=pattern)
    hidden = mlp(x, attended.attn_out, layer, context.spec)
    mid = x + attended.attn_out
    return Activations(
        resid_pre=x,
        **attended._asdict(),
        resid_mid=None if context.spec.parallel else mid,
        **hidden._asdict(),
        resid_post=mid + hidden.mlp_out,
    )


def readout(x: Tensor, ends: EndWeights, spec: ModelSpec) -> Tensor:
    """Logits [..., d_vocab] of the chosen positions' last residual stream, x [..., d_model].

    The weights may be of any dtype: they are taken in x's, never all at once.
    """
    return unembed(read_norm(x, map_tensors(ends.norm, lambda t: t.to(x.dtype)), spec), ends, spec)


def unembed(normed: Tensor, ends: EndWeights, spec: ModelSpec) -> Tensor:
    """Logits [..., d_vocab] of what the unembedding reads, [..., d_model]; see `readout`."""
    weight, bias = ends.unembedding
    logits = normed.new_empty(*normed.shape[:-1], len(weight))
    for a in range(0, len(weight), _TOKENS):
        some = slice(a, a + _TOKENS)
        part = None if bias is None else bias[some].to(normed.dtype)
        logits[..., some] = F.linear(normed, weight[some].to(normed.dtype), part)
    return softcap(logits, spec.logit_softcap)


def read_norm(x: Tensor, norm: Norm, spec: ModelSpec) -> Tensor:
    """What the unembedding reads, [..., d_model], the scale of the logits in it."""
    normed = normalise(x, norm, spec)
    return normed if spec.logit_scale == 1 else normed * spec.logit_scale
