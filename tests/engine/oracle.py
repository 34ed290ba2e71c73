"""The oracle: a plain forward of all architectures, patches put in by hand, metrics by definition.

It shares no code with deltapatch. Everything is numpy in float64, or in `np.longdouble` where an effect is so
small that subtracting two float64 runs would lose it. Transformers itself cannot be the oracle: it casts to
float32 in RMSNorm, in the rotary tables and in GPT-J's attention scores.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

WHOLE = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
DIMS = ("mlp_out.dim", "attn_out.dim", "resid_pre.dim", "resid_post.dim")
SITES = (*WHOLE, "q", "k", "v", "pattern", "z", "mlp_post", *DIMS)
METRICS = (
    "ie",
    "logit_diff",
    "recovered",
    "dlogp_clean",
    "dlogp_corrupted",
    "dp_clean",
    "dp_corrupted",
    "prob_diff",
    "kl",
    "entropy",
    "flip",
    "says_clean",
    "says_corrupted",
)
FLAGS = ("flip", "says_clean", "says_corrupted")  # 1 or 0


class Patch(NamedTuple):
    """One activation to replace: the whole vector, or one head, neuron or coordinate of it."""

    site: str
    layer: int
    position: int
    index: int | None = None


class Pair(NamedTuple):
    """Two prompts of token ids, of one length unless they are lined up, and answers, as a PromptPair."""

    clean: list[int]
    corrupted: list[int]
    clean_answer: int | list[int] | tuple[int, ...]
    corrupted_answer: int | list[int] | tuple[int, ...]
    labels: dict[str, int] = {}  # noqa: RUF012  (never written to)
    meta: dict[str, Any] = {}  # noqa: RUF012
    align: Any = None


# ---------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Affine:
    """A matrix [out, in] and a bias; or the scale and shift of a norm, [d_model]."""

    weight: np.ndarray
    bias: np.ndarray | float = 0.0


@dataclass(frozen=True)
class Block:
    norm1: Affine | None  # None: no norm there
    norm2: Affine | None  # None: the MLP reads what the attention reads, or no norm there
    q: Affine
    k: Affine
    v: Affine
    out: Affine
    gate: Affine | None
    up: Affine
    down: Affine
    post1: Affine | None = None
    post2: Affine | None = None
    q_norm: Affine | None = None
    k_norm: Affine | None = None


@dataclass(frozen=True)
class Rope:
    dim: int
    base: float = 10_000.0
    interleaved: bool = False
    scaling: dict[str, Any] | None = None  # the config's rope_parameters
    context: int = 0


@dataclass(frozen=True)
class Shape:
    n_heads: int
    n_kv_heads: int
    d_head: int
    parallel: bool
    rms: bool
    eps: float
    activation: str
    ropes: tuple[Rope | None, ...]  # of each layer
    windows: tuple[int | None, ...]
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    by_depth: bool = False  # scores of a layer are divided by its number, counted from 1, as well
    logit_scale: float = 1.0
    attention_cap: float | None = None
    logit_cap: float | None = None


class _Reader:
    """A state dict, as arrays of one dtype."""

    def __init__(self, state: dict[str, torch.Tensor], dtype: type) -> None:
        self.state, self.dtype = state, dtype

    def array(self, name: str) -> np.ndarray:
        return self.state[name].detach().double().numpy().astype(self.dtype)

    def affine(self, name: str) -> Affine:
        bias = self.array(f"{name}.bias") if f"{name}.bias" in self.state else 0.0
        return Affine(self.array(f"{name}.weight"), bias)


def _neox_blocks(read: _Reader, cfg: Any) -> Iterable[Block]:
    d_head = cfg.hidden_size // cfg.num_attention_heads

    def part(fused: Affine, i: int) -> Affine:
        # the rows of the fused product are ordered [head, (q, k, v), d_head]
        rows = fused.weight.reshape(-1, 3, d_head, cfg.hidden_size)[:, i]
        bias = (
            fused.bias if isinstance(fused.bias, float) else fused.bias.reshape(-1, 3, d_head)[:, i].ravel()
        )
        return Affine(rows.reshape(-1, cfg.hidden_size), bias)

    for l in range(cfg.num_hidden_layers):
        at = f"gpt_neox.layers.{l}"
        fused = read.affine(f"{at}.attention.query_key_value")
        yield Block(
            norm1=read.affine(f"{at}.input_layernorm"),
            norm2=read.affine(f"{at}.post_attention_layernorm"),
            q=part(fused, 0),
            k=part(fused, 1),
            v=part(fused, 2),
            out=read.affine(f"{at}.attention.dense"),
            gate=None,
            up=read.affine(f"{at}.mlp.dense_h_to_4h"),
            down=read.affine(f"{at}.mlp.dense_4h_to_h"),
        )


def _gptj_blocks(read: _Reader, cfg: Any) -> Iterable[Block]:
    for l in range(cfg.n_layer):
        at = f"transformer.h.{l}"
        yield Block(
            norm1=read.affine(f"{at}.ln_1"),
            norm2=None,
            q=read.affine(f"{at}.attn.q_proj"),
            k=read.affine(f"{at}.attn.k_proj"),
            v=read.affine(f"{at}.attn.v_proj"),
            out=read.affine(f"{at}.attn.out_proj"),
            gate=None,
            up=read.affine(f"{at}.mlp.fc_in"),
            down=read.affine(f"{at}.mlp.fc_out"),
        )


def _llama_blocks(read: _Reader, cfg: Any) -> Iterable[Block]:
    for l in range(cfg.num_hidden_layers):
        at = f"model.layers.{l}"
        yield Block(
            norm1=read.affine(f"{at}.input_layernorm"),
            norm2=read.affine(f"{at}.post_attention_layernorm"),
            q=read.affine(f"{at}.self_attn.q_proj"),
            k=read.affine(f"{at}.self_attn.k_proj"),
            v=read.affine(f"{at}.self_attn.v_proj"),
            out=read.affine(f"{at}.self_attn.o_proj"),
            gate=read.affine(f"{at}.mlp.gate_proj"),
            up=read.affine(f"{at}.mlp.up_proj"),
            down=read.affine(f"{at}.mlp.down_proj"),
        )


def _gpt2_blocks(read: _Reader, cfg: Any) -> Iterable[Block]:
    def turned(name: str, i: int = 0, of: int = 1) -> Affine:
        whole = read.affine(name)  # [in, out]
        return Affine(np.split(whole.weight.T, of)[i], np.split(whole.bias, of)[i])

    for l in range(cfg.n_layer):
        at = f"transformer.h.{l}"
        q, k, v = (turned(f"{at}.attn.c_attn", i, 3) for i in range(3))
        yield Block(
            norm1=read.affine(f"{at}.ln_1"),
            norm2=read.affine(f"{at}.ln_2"),
            q=q,
            k=k,
            v=v,
            out=turned(f"{at}.attn.c_proj"),
            gate=None,
            up=turned(f"{at}.mlp.c_fc"),
            down=turned(f"{at}.mlp.c_proj"),
        )


def _modern_blocks(read: _Reader, cfg: Any) -> Iterable[Block]:
    """The later families, whose modules are named as LLaMA's are."""
    kind, heads = cfg.model_type, cfg.num_attention_heads
    d_head = getattr(cfg, "head_dim", None) or cfg.hidden_size // heads
    d_kv = cfg.num_key_value_heads * d_head
    plus_one = kind.startswith("gemma")

    def norm(name: str) -> Affine | None:
        if f"{name}.weight" not in read.state:
            return None
        found = read.affine(name)
        return Affine(found.weight + 1, found.bias) if plus_one else found

    def each(name: str, count: int) -> Affine | None:
        """A norm for each head, [head, d_head]."""
        if f"{name}.norms.0.weight" not in read.state:
            return None
        return Affine(np.stack([read.array(f"{name}.norms.{h}.weight") for h in range(count)]))

    def rows(whole: Affine, sizes: Sequence[int]) -> list[Affine]:
        return [Affine(part) for part in np.split(whole.weight, np.cumsum(sizes)[:-1])]

    for l in range(cfg.num_hidden_layers):
        at = f"model.layers.{l}"
        if kind == "phi3":
            q, k, v = rows(read.affine(f"{at}.self_attn.qkv_proj"), (heads * d_head, d_kv, d_kv))
            gate, up = rows(read.affine(f"{at}.mlp.gate_up_proj"), (cfg.intermediate_size,) * 2)
        else:
            q, k, v = (read.affine(f"{at}.self_attn.{name}_proj") for name in "qkv")
            gate, up = (read.affine(f"{at}.mlp.{name}_proj") for name in ("gate", "up"))
        behind = kind in ("gemma2", "gemma3_text", "olmo2", "olmo3")
        before_mlp = "pre_feedforward_layernorm" if behind else "post_attention_layernorm"
        yield Block(
            norm1=norm(f"{at}.input_layernorm"),
            norm2=norm(f"{at}.{before_mlp}"),
            q=q,
            k=k,
            v=v,
            out=read.affine(f"{at}.self_attn.o_proj"),
            gate=gate,
            up=up,
            down=read.affine(f"{at}.mlp.down_proj"),
            post1=norm(f"{at}.post_attention_layernorm") if behind else None,
            post2=norm(f"{at}.post_feedforward_layernorm") if behind else None,
            q_norm=norm(f"{at}.self_attn.q_norm") or each(f"{at}.self_attn.q_layernorm", heads),
            k_norm=norm(f"{at}.self_attn.k_norm")
            or each(f"{at}.self_attn.k_layernorm", cfg.num_key_value_heads),
        )


def _modern_shape(cfg: Any) -> Shape:
    kind, n_layers, heads = cfg.model_type, cfg.num_hidden_layers, cfg.num_attention_heads
    d_head = getattr(cfg, "head_dim", None) or cfg.hidden_size // heads
    types = getattr(cfg, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if getattr(cfg, "sliding_window", None) else "full_attention"] * n_layers

    def rope(layer: int) -> Rope | None:
        if not getattr(cfg, "no_rope_layers", [1] * n_layers)[layer]:
            return None
        said = cfg.rope_parameters
        said = said[types[layer]] if "rope_type" not in said else said
        dim = int(d_head * said.get("partial_rotary_factor", 1.0))
        return Rope(dim, said["rope_theta"], scaling=said, context=cfg.max_position_embeddings)

    stable = kind == "stablelm"
    query_scalar = getattr(cfg, "query_pre_attn_scalar", None)
    return Shape(
        heads,
        cfg.num_key_value_heads,
        d_head,
        parallel=stable and cfg.use_parallel_residual,
        rms=not stable,
        eps=cfg.layer_norm_eps if stable else cfg.rms_norm_eps,
        activation=cfg.hidden_activation if kind in ("gemma2", "gemma3_text") else cfg.hidden_act,
        ropes=tuple(rope(l) for l in range(n_layers)),
        windows=tuple(cfg.sliding_window if t == "sliding_attention" else None for t in types),
        embedding_scale=(
            float(torch.tensor(cfg.hidden_size**0.5, dtype=torch.float32))
            if kind.startswith("gemma")
            else getattr(cfg, "embedding_multiplier", 1.0)
        ),
        residual_scale=getattr(cfg, "residual_multiplier", 1.0),
        attention_scale=(
            query_scalar**-0.5 if query_scalar is not None else getattr(cfg, "attention_multiplier", None)
        ),
        logit_scale=1 / getattr(cfg, "logits_scaling", 1.0),
        attention_cap=getattr(cfg, "attn_logit_softcapping", None),
        logit_cap=getattr(cfg, "final_logit_softcapping", None),
    )


def _shape(cfg: Any) -> Shape:
    every: dict[str, Any] = {"windows": (None,) * cfg.num_hidden_layers}
    if cfg.model_type in ("gptj", "gpt2"):
        d_head = cfg.n_embd // cfg.n_head
        rope = Rope(cfg.rotary_dim, interleaved=True) if cfg.model_type == "gptj" else None
        return Shape(
            cfg.n_head,
            cfg.n_head,
            d_head,
            parallel=cfg.model_type == "gptj",
            rms=False,
            eps=cfg.layer_norm_epsilon,
            activation=cfg.activation_function,
            ropes=(rope,) * cfg.n_layer,
            by_depth=getattr(cfg, "scale_attn_by_inverse_layer_idx", False),
            **every,
        )
    if cfg.model_type not in ("gpt_neox", "llama"):
        return _modern_shape(cfg)
    heads, rope_config = cfg.num_attention_heads, cfg.rope_parameters
    if cfg.model_type == "gpt_neox":
        d_head = cfg.hidden_size // heads
        rope = Rope(int(d_head * rope_config["partial_rotary_factor"]), rope_config["rope_theta"])
        parallel = cfg.use_parallel_residual
        ropes = (rope,) * cfg.num_hidden_layers
        eps, act = cfg.layer_norm_eps, cfg.hidden_act
        return Shape(heads, heads, d_head, parallel, False, eps, act, ropes, **every)
    rope = Rope(
        cfg.head_dim, rope_config["rope_theta"], scaling=rope_config, context=cfg.max_position_embeddings
    )
    kv_heads = cfg.num_key_value_heads
    ropes = (rope,) * cfg.num_hidden_layers
    eps, act = cfg.rms_norm_eps, cfg.hidden_act
    return Shape(heads, kv_heads, cfg.head_dim, False, True, eps, act, ropes, **every)


# ---------------------------------------------------------------------------------------------- forward


def _linear(x: np.ndarray, w: Affine) -> np.ndarray:
    return x @ w.weight.T + w.bias


def _erf(x: np.ndarray) -> np.ndarray:
    if x.dtype == np.float64:
        return torch.erf(torch.from_numpy(x)).numpy()
    # erf(x) = 2/√π e^(-x²) Σ 2ⁿ x^(2n+1) / (2n+1)!!: terms of one sign, so nothing cancels
    x = np.clip(x, -7, 7)  # beyond, erf is ±1 to 1e-22
    term = x.copy()
    total = x.copy()
    for n in range(1, 400):
        term *= 2 * x * x / (2 * n + 1)
        total += term
        if (np.abs(term) <= np.finfo(x.dtype).eps * np.abs(total) / 8).all():
            break
    return 2 / np.sqrt(np.arccos(x.dtype.type(-1))) * np.exp(-x * x) * total


def _activation(name: str, x: np.ndarray) -> np.ndarray:
    if name == "gelu":
        return x * (1 + _erf(x / np.sqrt(x.dtype.type(2)))) / 2
    if name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        pi = np.arccos(x.dtype.type(-1))
        return x * (1 + np.tanh(np.sqrt(2 / pi) * (x + x.dtype.type(44715) / 1_000_000 * x * x * x))) / 2
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "relu":
        return np.maximum(x, 0)
    raise ValueError(f"the oracle has no activation {name!r}")


def _frequencies(rope: Rope, length: int, dtype: type) -> np.ndarray:
    """Radians a position, [rope.dim / 2]."""
    scaling = rope.scaling or {}
    kind = scaling.get("rope_type", "default")
    base = dtype(rope.base)
    if kind == "dynamic" and length > rope.context:
        factor = dtype(scaling["factor"])
        base *= (factor * length / rope.context - (factor - 1)) ** (dtype(rope.dim) / (rope.dim - 2))
    freq = 1 / base ** (np.arange(0, rope.dim, 2).astype(dtype) / rope.dim)
    if kind == "linear":
        return freq / scaling["factor"]
    if kind == "llama3":
        turns = scaling["original_max_position_embeddings"] * freq / (2 * np.arccos(dtype(-1)))
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return kept * freq + (1 - kept) * freq / scaling["factor"]
    if kind == "longrope":
        which = "long" if length > scaling["original_max_position_embeddings"] else "short"
        return freq / np.array(scaling[f"{which}_factor"]).astype(dtype)
    if kind == "yarn":
        context, theta = scaling["original_max_position_embeddings"], scaling["rope_theta"]
        ends = [
            rope.dim * np.log(context / (turns * 2 * np.pi)) / (2 * np.log(theta))
            for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
        ]
        if scaling.get("truncate", True):
            ends = [np.floor(ends[0]), np.ceil(ends[1])]
        low, high = max(ends[0], 0), min(ends[1], rope.dim - 1)
        ramp = np.clip((np.arange(rope.dim // 2) - low) / max(high - low, 0.001), 0, 1).astype(dtype)
        return freq * (1 - ramp) + freq / scaling["factor"] * ramp
    return freq


def _attention_factor(rope: Rope) -> float:
    """What longrope and yarn multiply queries and keys by."""
    said = rope.scaling or {}
    if said.get("rope_type") not in ("yarn", "longrope"):
        return 1.0
    if said.get("attention_factor") is not None:
        return said["attention_factor"]
    context = said["original_max_position_embeddings"]
    factor = said.get("factor") or rope.context / context
    if factor <= 1:
        return 1.0
    return (
        0.1 * np.log(factor) + 1
        if said["rope_type"] == "yarn"
        else np.sqrt(1 + np.log(factor) / np.log(context))
    )


def _rotate(x: np.ndarray, rope: Rope | None) -> np.ndarray:
    """Turn the coordinate pairs of [row, T, head, d_head] by position x frequency."""
    if rope is None:
        return x
    length = x.shape[1]
    angle = np.arange(length).astype(x.dtype)[:, None] * _frequencies(
        rope, length, x.dtype.type
    )  # [T, dim/2]
    factor = x.dtype.type(_attention_factor(rope))
    cos, sin = factor * np.cos(angle)[:, None], factor * np.sin(angle)[:, None]  # [T, 1, dim/2]
    half = rope.dim // 2
    if rope.interleaved:
        first, second = slice(0, rope.dim, 2), slice(1, rope.dim, 2)
    else:
        first, second = slice(half), slice(half, rope.dim)
    turned = x.copy()
    turned[..., first] = x[..., first] * cos - x[..., second] * sin
    turned[..., second] = x[..., second] * cos + x[..., first] * sin
    return turned


def _scores(
    q: np.ndarray,
    k: np.ndarray,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> np.ndarray:
    """Causal scores over [row, T, head, d_head], query by query: [row, T, head, T]; masked -inf."""
    found = np.full((*q.shape[:3], q.shape[1]), -np.inf, q.dtype)
    for t in range(q.shape[1]):
        scores = np.einsum("rhd,rihd->rhi", q[:, t], k[:, : t + 1])
        scores = scores / np.sqrt(q.dtype.type(q.shape[-1])) if scale is None else scores * scale
        if cap is not None:
            scores = cap * np.tanh(scores / cap)
        if window is not None:
            scores[:, :, : max(0, t + 1 - window)] = -np.inf
        found[:, t, :, : t + 1] = scores
    return found


def _softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _attend(q: np.ndarray, k: np.ndarray, *how: Any) -> np.ndarray:
    """Probabilities of causal attention, [row, T, head, T]; `how` as of `_scores`."""
    return _softmax(_scores(q, k, *how))


# called with (site, layer, value [row, T, ...]) at every site; what it returns flows on
Visit = Callable[[str, int, np.ndarray], np.ndarray]
Activations = dict[tuple[str, int], np.ndarray]  # (site, layer) -> [T, ...]
Rows = Sequence[Sequence[Patch]]  # interventions: a set of patches each


class TrueModel:
    """A decoder-only model in one dtype throughout."""

    def __init__(self, hf_model: Any, dtype: type = np.float64) -> None:
        cfg = hf_model.config
        read = _Reader(hf_model.state_dict(), dtype)
        blocks, embedding, norm, head = {
            "gpt_neox": (_neox_blocks, "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
            "gptj": (_gptj_blocks, "transformer.wte", "transformer.ln_f", "lm_head"),
            "llama": (_llama_blocks, "model.embed_tokens", "model.norm", "lm_head"),
            "gpt2": (_gpt2_blocks, "transformer.wte", "transformer.ln_f", "lm_head"),
        }.get(cfg.model_type, (_modern_blocks, "model.embed_tokens", "model.norm", "lm_head"))
        if f"{head}.weight" not in read.state and "lm_head.weight" in read.state:
            head = "lm_head"  # the same matrix under its newer name
        self.shape = _shape(cfg)
        self.blocks = list(blocks(read, cfg))
        self.embedding = read.array(f"{embedding}.weight")  # [vocab, d_model]
        self.norm = read.affine(norm)
        if cfg.model_type.startswith("gemma"):
            self.norm = Affine(self.norm.weight + 1)
        self.positions = read.array("transformer.wpe.weight") if cfg.model_type == "gpt2" else None
        self.unembedding = read.affine(head)
        self._unpatched: dict[tuple[int, ...], tuple[np.ndarray, Activations]] = {}

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    def n_indices(self, site: str) -> int | None:
        """How many indices a site has; None where a patch takes the whole vector."""
        kind = "dim" if site.endswith(".dim") else site
        return {
            "dim": self.embedding.shape[1],
            "q": self.shape.n_heads,
            "k": self.shape.n_kv_heads,
            "v": self.shape.n_kv_heads,
            "pattern": self.shape.n_heads,
            "z": self.shape.n_heads,
            "mlp_post": self.blocks[0].up.weight.shape[0],
        }.get(kind)

    def sites(self) -> list[str]:
        """The sites this model has."""
        return [s for s in SITES if not (s == "resid_mid" and self.shape.parallel)]

    def _normed(self, x: np.ndarray, w: Affine | None) -> np.ndarray:
        if w is None:
            return x
        if not self.shape.rms:
            x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(self.shape.eps)) * w.weight + w.bias

    def attention(self, layer: int) -> tuple[int | None, Any, float | None]:
        """What `_attend` takes beside queries and keys."""
        shape, scale = self.shape, self.shape.attention_scale
        if shape.by_depth:
            scale = 1 / (np.sqrt(self.embedding.dtype.type(shape.d_head)) * (layer + 1))
        return shape.windows[layer], scale, shape.attention_cap

    def _normed_heads(self, x: np.ndarray, w: Affine | None) -> np.ndarray:
        """Queries or keys [row, T, head, d_head], each normed by itself, or all together."""
        if w is None or w.weight.shape[-1] == x.shape[-1]:
            return self._normed(x, w)
        return self._normed(x.reshape(*x.shape[:2], -1), w).reshape(x.shape)

    def _heads(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], -1, self.shape.d_head)

    def forward(self, tokens: Sequence[int], n_rows: int, visit: Visit) -> np.ndarray:
        """Logits [row, T, vocab] of n_rows copies of one prompt, which `visit` may make different."""
        group = self.shape.n_heads // self.shape.n_kv_heads
        x = self.embedding[list(tokens)] * self.embedding.dtype.type(self.shape.embedding_scale)
        if self.positions is not None:
            x = x + self.positions[: len(tokens)]
        x = np.repeat(x[None], n_rows, axis=0)  # [row, T, d_model]
        said = x.dtype.type(self.shape.residual_scale)
        for l, w in enumerate(self.blocks):
            x = visit("resid_pre", l, x)
            normed = self._normed(x, w.norm1)
            q = visit("q", l, self._heads(_linear(normed, w.q)))  # [row, T, head, d_head]
            k = visit("k", l, self._heads(_linear(normed, w.k)))  # [row, T, kv_head, d_head]
            v = visit("v", l, self._heads(_linear(normed, w.v)))
            q, k = self._normed_heads(q, w.q_norm), self._normed_heads(k, w.k_norm)
            q, k = _rotate(q, self.shape.ropes[l]), _rotate(k, self.shape.ropes[l])
            how = self.attention(l)
            scores = visit("scores", l, _scores(q, np.repeat(k, group, axis=2), *how))  # [row, T, head, T]
            pattern = visit("pattern", l, _softmax(scores))
            z = visit("z", l, np.einsum("rthi,rihd->rthd", pattern, np.repeat(v, group, axis=2)))
            attn_out = self._normed(_linear(z.reshape(*z.shape[:2], -1), w.out), w.post1)
            attn_out = visit("attn_out", l, said * attn_out)  # [row, T, d_model]
            mid = x + attn_out
            if not self.shape.parallel:
                mid = visit("resid_mid", l, mid)
            if w.norm2 is not None or not self.shape.parallel:
                normed = self._normed(x if self.shape.parallel else mid, w.norm2)
            hidden = _linear(normed, w.up)  # [row, T, d_mlp]
            if w.gate is None:
                post = _activation(self.shape.activation, hidden)
            else:
                post = _activation(self.shape.activation, _linear(normed, w.gate)) * hidden
            post = visit("mlp_post", l, post)
            mlp_out = visit("mlp_out", l, said * self._normed(_linear(post, w.down), w.post2))
            x = visit("resid_post", l, mid + mlp_out)
        logits = _linear(self._normed(x, self.norm), self.unembedding) * x.dtype.type(self.shape.logit_scale)
        cap = self.shape.logit_cap
        return logits if cap is None else cap * np.tanh(logits / cap)

    def unpatched(self, tokens: Sequence[int]) -> tuple[np.ndarray, Activations]:
        """Logits [T, vocab] and every site's value in an unpatched run, which is kept."""
        prompt = tuple(tokens)
        if prompt not in self._unpatched:
            seen: Activations = {}

            def keep(site: str, layer: int, value: np.ndarray) -> np.ndarray:
                seen[site, layer] = value[0]
                return value

            logits = self.forward(prompt, 1, keep)[0]
            for kept in (logits, *seen.values()):
                kept.flags.writeable = False
            self._unpatched[prompt] = logits, seen
        return self._unpatched[prompt]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """[T, vocab]."""
        return self.unpatched(tokens)[0]

    def activations(self, tokens: Sequence[int]) -> Activations:
        """Every site's value in an unpatched run."""
        return dict(self.unpatched(tokens)[1])

    def patched(
        self,
        base: Sequence[int],
        source: Activations,
        rows: Sequence[Sequence[Patch]],
        after: Sequence[int] = (),
        places: Callable[[int], tuple[int, int]] = lambda position: (position, position),
    ) -> np.ndarray:
        """Read-out logits [row, vocab] of one base prompt, each row with its own set of patches.

        All patches of a row act in one forward. A patched value is the source's, whatever arrived there. With
        tokens after the prompt, [row, 1 + n, vocab]: at its end and at each of them. `places` says where a
        patch's position is in the base and in the source prompt.
        """
        todo = defaultdict(list)  # (site, layer) -> [(row, patch)]
        for r, patches in enumerate(rows):
            for patch in patches:
                todo[patch.site.removesuffix(".dim"), patch.layer].append((r, patch))

        def swap(site: str, layer: int, value: np.ndarray) -> np.ndarray:
            if (site, layer) not in todo:
                return value
            value = value.copy()
            for r, patch in todo[site, layer]:
                at, of = places(patch.position)
                at, index = at % len(base), () if patch.index is None else (patch.index,)  # of the prompt,
                where = (at, *index)  # whatever comes after it
                new = source[site, layer][(of, *index)]
                if site == "pattern":  # the source run may have fewer tokens: none of the others is seen
                    value[r][where] = 0
                    value[r][where][: len(new)] = new
                else:
                    value[r][where] = new
            return value

        read = self.forward([*base, *after], len(rows), swap)[:, len(base) - 1 :]
        return read if len(after) else read[:, 0]

    def effects(
        self,
        pair: Pair,
        rows: Sequence[Sequence[Patch]],
        direction: str = "denoise",
        source: str = "counterpart",
    ) -> dict[str, np.ndarray]:
        """Every metric of a list of interventions on one pair: name -> [row]."""
        base, other = (pair.corrupted, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupted)
        values = self.activations(base if source == "zero" else other)
        if source == "zero":
            values = {site: np.zeros_like(v) for site, v in values.items()}

        def places(position: int) -> tuple[int, int]:
            found = places_of(pair, position % len(pair.clean), direction, source)
            assert found is not None
            return found

        def patched(after: Sequence[int]) -> np.ndarray:
            parts = [rows[i : i + 512] for i in range(0, len(rows), 512)]
            read = np.concatenate([self.patched(base, values, some, after, places) for some in parts])
            return read.reshape(len(rows), 1 + len(after), -1)

        clean, corrupted = (
            both(continuations(pair), lambda after, p=prompt: self.logits([*p, *after])[len(p) - 1 :])
            for prompt in (pair.clean, pair.corrupted)
        )
        return metrics_of_answers(
            corrupted if direction == "denoise" else clean,
            both(continuations(pair), patched),
            clean,
            corrupted,
            pair,
            direction,
        )

    def sweep(
        self,
        pairs: Sequence[Pair],
        site: str,
        positions: Sequence[int | str] | None = None,
        layers: Sequence[int] | None = None,
        direction: str = "denoise",
        source: str = "counterpart",
    ) -> dict[str, np.ndarray]:
        """Every metric of one site: name -> [pair, layer, position(, index)].

        NaN where a pair has no such position, or none to take from. `positions` are ints, negative from the
        end, or labels; None is every position of the longest prompt.
        """
        positions = range(max(len(p.clean) for p in pairs)) if positions is None else positions
        layers = range(self.n_layers) if layers is None else layers
        indices = range(self.n_indices(site)) if self.n_indices(site) else [None]
        shape = (len(pairs), len(layers), len(positions), len(indices))
        found = {name: np.full(shape, np.nan) for name in METRICS}
        for i, pair in enumerate(pairs):
            there = [(j, t) for j, p in enumerate(positions) if (t := resolve(pair, p)) is not None]
            there = [(j, t) for j, t in there if places_of(pair, t, direction, source) is not None]
            cells = [
                (a, j, b, Patch(site, l, t, n))
                for a, l in enumerate(layers)
                for j, t in there
                for b, n in enumerate(indices)
            ]
            if not cells:
                continue
            values = self.effects(pair, [[patch] for *_, patch in cells], direction, source)
            a, j, b = (list(axis) for axis in list(zip(*cells, strict=True))[:3])
            for name in METRICS:
                found[name][i, a, j, b] = values[name]
        return found if self.n_indices(site) else {name: v[..., 0] for name, v in found.items()}


def counterparts(pair: Pair) -> dict[int, int]:
    """Clean position -> the position of the corrupted prompt that it lines up with."""
    clean, corrupted = pair.clean, pair.corrupted
    n, m = len(clean), len(corrupted)
    if pair.align is None or (pair.align == "prefix+suffix" and n == m):
        return {t: t for t in range(n)}
    if pair.align != "prefix+suffix":
        return {a % n: b % m for a, b in pair.align}
    found = {t: t for t in range(min(n, m)) if clean[: t + 1] == corrupted[: t + 1]}
    begin = len(found)
    for back in range(1, min(n, m) - begin + 1):
        if clean[-back:] == corrupted[-back:]:
            found[n - back] = m - back
    return found


def places_of(pair: Pair, position: int, direction: str, source: str) -> tuple[int, int] | None:
    """Where a position of the clean prompt is in the base and in the source prompt; None where in neither.

    Zero is taken from no prompt: its place is that in the base.
    """
    there = counterparts(pair).get(position)
    base, other = (there, position) if direction == "denoise" else (position, there)
    if base is None or (other is None and source != "zero"):
        return None
    return base, base if source == "zero" else other


def resolve(pair: Pair, position: int | str) -> int | None:
    """A position of a pair from the start, None where it has no such position."""
    length = len(pair.clean)
    if isinstance(position, str):
        if position not in pair.labels:
            return None
        position = pair.labels[position]
    return position % length if -length <= position < length else None


# ---------------------------------------------------------------------------------------------- metrics


def _expm1_minus_x(x: np.ndarray) -> np.ndarray:
    """e^x - 1 - x, by its series where the subtraction would cancel."""
    out, small = np.expm1(x) - x, np.abs(x) < 1
    x = x[small]
    series = np.ones_like(x)  # e^x - 1 - x = x² / 2 (1 + x / 3 (1 + x / 4 (1 + ...)))
    for n in range(25, 2, -1):  # 1 / 26! is beyond 80 bits
        series *= x
        series /= n
        series += 1
    out[small] = series * x * x / 2
    return out


def answers_of(pair: Pair) -> list[list[int]]:
    """Clean and corrupted answer, as lists of tokens; a tuple is a token of which several count."""
    return [
        [a] if isinstance(a, int | tuple) else list(a) for a in (pair.clean_answer, pair.corrupted_answer)
    ]


def continuations(pair: Pair) -> list[list[int]]:
    """What the model reads after the prompt to give each token of an answer: all tokens but the last.

    One list twice where it is the same for both answers, so that it is run once.
    """
    clean, corrupted = (answer[:-1] for answer in answers_of(pair))
    return [clean, clean if clean == corrupted else corrupted]


def both(two: Sequence[Any], work: Callable[[Any], np.ndarray]) -> list[np.ndarray]:
    """What `work` makes of each of two things, once where they are one and the same."""
    first, second = two
    done = work(first)
    return [done, done if second is first else work(second)]


def oracle_metrics(
    logits_base: np.ndarray,
    logits_patched: np.ndarray,
    logits_clean_run: np.ndarray,
    logits_corrupted_run: np.ndarray,
    clean_answer: int,
    corrupted_answer: int,
    direction: str,
) -> dict[str, np.ndarray]:
    """All metrics, float64 [row], of answers of one token, from logits [row, vocab] or [vocab]."""
    runs = (logits_base, logits_patched, logits_clean_run, logits_corrupted_run)
    pair = Pair([], [], clean_answer, corrupted_answer)
    return metrics_of_answers(*([x[..., None, :]] * 2 for x in runs), pair, direction)


def metrics_of_answers(
    base: Sequence[np.ndarray],
    patched: Sequence[np.ndarray],
    clean_run: Sequence[np.ndarray],
    corrupted_run: Sequence[np.ndarray],
    pair: Pair,
    direction: str,
) -> dict[str, np.ndarray]:
    """All metrics, float64 [row], from logits read at each token of both answers, each answer by itself.

    By definition, in 80-bit arithmetic so that the subtractions lose nothing of an effect of 1e-6. Only KL
    needs a form of its own: it is the square of a small effect.

    Args:
        base, clean_run, corrupted_run: for the clean and the corrupted answer [token, vocab].
        patched: likewise [row, token, vocab].
        pair: its answers.
    """
    runs = (both(run, lambda x: x.astype(np.longdouble)) for run in (base, patched, clean_run, corrupted_run))
    base, patched, clean_run, corrupted_run = runs
    answers = answers_of(pair)

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    def entropy(x: np.ndarray) -> np.ndarray:
        logp = log_softmax(x)
        return -(np.exp(logp) * logp).sum(-1)

    def logp_of(run: Sequence[np.ndarray]) -> list[np.ndarray]:
        """log P of the clean and of the corrupted answer, by the chain rule."""
        return [
            sum(of_token(x[..., i, :], token) for i, token in enumerate(answer))
            for x, answer in zip(both(run, log_softmax), answers, strict=True)
        ]

    def of_token(logp: np.ndarray, token: int | tuple[int, ...]) -> np.ndarray:
        return (
            np.log(np.exp(logp[..., list(token)]).sum(-1)) if isinstance(token, tuple) else logp[..., token]
        )

    def says(run: Sequence[np.ndarray], which: int) -> np.ndarray:
        if isinstance(answers[which][0], tuple):
            return np.isin(run[which].argmax(-1), answers[which][0]).all(-1)
        return (run[which].argmax(-1) == np.array(answers[which])).all(-1)

    def apart(logp: Sequence[np.ndarray]) -> np.ndarray:
        return logp[0] - logp[1]

    logp, logp_star = logp_of(base), logp_of(patched)
    p, p_star = [np.exp(x) for x in logp], [np.exp(x) for x in logp_star]
    src, own = (0, 1) if direction == "denoise" else (1, 0)
    towards_source = (p_star[src] - p[src]) / p[src]
    away_from_base = (p[own] - p_star[own]) / p_star[own]
    logit_diff = apart(logp_star) - apart(logp)
    gap = apart(logp_of(clean_run)) - apart(logp_of(corrupted_run))
    gap = gap if direction == "denoise" else -gap  # from the base run to the source run

    # KL = Σ p (log p - log p*) = log Σ p e^c with c the logit change centred under p; as Σ p c = 0, the sum
    # is 1 + Σ p (e^c - 1 - c), whose terms are all positive
    before, after = base[0][0], patched[0][:, 0]
    p_end = np.exp(log_softmax(before))
    change = after - before
    centred = change - (p_end * change).sum(-1, keepdims=True)
    kl = np.log1p((p_end * _expm1_minus_x(centred)).sum(-1))

    found = {
        "ie": (towards_source + away_from_base) / 2,
        "logit_diff": logit_diff,
        "recovered": logit_diff / (gap if gap else np.nan),
        "dlogp_clean": logp_star[0] - logp[0],
        "dlogp_corrupted": logp_star[1] - logp[1],
        "dp_clean": p_star[0] - p[0],
        "dp_corrupted": p_star[1] - p[1],
        "prob_diff": (p_star[0] - p[0]) - (p_star[1] - p[1]),
        "kl": kl,
        "entropy": entropy(after) - entropy(before),
        "flip": after.argmax(-1) != before.argmax(-1),
        "says_clean": says(patched, 0),
        "says_corrupted": says(patched, 1),
    }
    return {name: value.astype(np.float64) for name, value in found.items()}


# ------------------------------------------------------------------------- transformers' model with hooks


def hf_hooks_logits(
    hf_model: Any, base: Sequence[int], source: Sequence[int], patches: Sequence[Patch], zero: bool = False
) -> np.ndarray:
    """Read-out logits [vocab] of transformers' own model, patched by forward hooks on its public modules.

    All sites but resid_mid, which no module puts out.
    """
    values: dict[tuple[str, int], torch.Tensor] = {}

    def keep(site: str, layer: int, value: torch.Tensor) -> None:
        values[site, layer] = torch.zeros_like(value) if zero else value.clone()

    def swap(site: str, layer: int, value: torch.Tensor) -> None:
        for patch in patches:
            if (patch.site.removesuffix(".dim"), patch.layer) == (site, layer):
                where = patch.position if patch.index is None else (patch.position, patch.index)
                value[where] = values[site, layer][where]

    with torch.no_grad():
        for tokens, act in ((source, keep), (base, swap)):
            handles = _hook_all(hf_model, act)
            out = hf_model(torch.tensor([list(tokens)]), use_cache=False).logits[0, -1]
            for handle in handles:
                handle.remove()
    return out.numpy()


class _Undo(NamedTuple):
    """What a hook is: something to remove."""

    remove: Callable[[], None]


def _hook_all(hf_model: Any, act: Callable[[str, int, torch.Tensor], None]) -> list[Any]:
    """Hook every site of every layer; `act` may write into the [T, ...] view of the value that it gets."""
    cfg = hf_model.config
    d_head = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
    layers, attn, out, down = {
        "gpt_neox": ("gpt_neox.layers", "attention", "dense", "mlp.dense_4h_to_h"),
        "gptj": ("transformer.h", "attn", "out_proj", "mlp.fc_out"),
        "gpt2": ("transformer.h", "attn", "c_proj", "mlp.c_proj"),
    }.get(cfg.model_type, ("model.layers", "self_attn", "o_proj", "mlp.down_proj"))
    n_heads, n_kv = cfg.num_attention_heads, getattr(cfg, "num_key_value_heads", cfg.num_attention_heads)
    ends = np.cumsum([n_heads, n_kv, n_kv])  # of q, k and v in one product of heads side by side
    handles = []

    def whole(x: torch.Tensor) -> torch.Tensor:
        return x[0]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x[0].unflatten(-1, (-1, d_head))

    def fused(part: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: x[0].unflatten(-1, (-1, 3, d_head))[:, :, part]

    def beside(part: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: heads(x)[:, ends[part - 1] if part else 0 : ends[part]]

    def before(module: Any, site: str, layer: int, view: Callable) -> None:
        def hook(module: Any, args: tuple) -> tuple:
            x = args[0].clone()
            act(site, layer, view(x))
            return (x, *args[1:])

        handles.append(module.register_forward_pre_hook(hook))

    def after(module: Any, site: str, layer: int, view: Callable) -> None:
        def hook(module: Any, args: tuple, result: Any) -> Any:
            x = (result[0] if isinstance(result, tuple) else result).clone()
            act(site, layer, view(x))
            return (x, *result[1:]) if isinstance(result, tuple) else x

        handles.append(module.register_forward_hook(hook))

    # No module puts out the probabilities: while an attention runs, what takes a softmax is its.
    real, running = torch.nn.functional.softmax, []

    def softmax(*args: Any, **named: Any) -> torch.Tensor:
        out = real(*args, **named)
        if running:
            out = out.clone()
            act("pattern", running[-1], out[0].transpose(0, 1))
        return out

    torch.nn.functional.softmax = softmax
    how = cfg._attn_implementation
    cfg._attn_implementation = "eager"  # in Python, with a softmax of its own
    handles.append(_Undo(lambda: setattr(torch.nn.functional, "softmax", real)))
    handles.append(_Undo(lambda: setattr(cfg, "_attn_implementation", how)))

    for l, block in enumerate(hf_model.get_submodule(layers)):
        attention = block.get_submodule(attn)
        attention.reorder_and_upcast_attn = False  # GPT-2's, in float32 whatever its model is in
        handles.append(attention.register_forward_pre_hook(lambda *_, l=l: running.append(l)))
        handles.append(attention.register_forward_hook(lambda *_: running.clear()))
        before(block, "resid_pre", l, whole)
        if cfg.model_type == "gpt_neox":
            for i, site in enumerate("qkv"):
                after(attention.query_key_value, site, l, fused(i))
        elif cfg.model_type in ("gpt2", "phi3"):
            product = attention.get_submodule("c_attn" if cfg.model_type == "gpt2" else "qkv_proj")
            for i, site in enumerate("qkv"):
                after(product, site, l, beside(i))
        else:
            for site in "qkv":
                after(attention.get_submodule(f"{site}_proj"), site, l, heads)
        before(attention.get_submodule(out), "z", l, heads)
        before(block.get_submodule(down), "mlp_post", l, whole)
        # Where there is a norm behind them, what is added to the stream is what that puts out.
        behind = hasattr(block, "post_feedforward_layernorm")
        said = (
            ("post_attention_layernorm", "post_feedforward_layernorm") if behind else (f"{attn}.{out}", down)
        )
        for site, name in zip(("attn_out", "mlp_out"), said, strict=True):
            after(block.get_submodule(name), site, l, whole)
        after(block, "resid_post", l, whole)
    return handles
