"""LLaMA: RMSNorm, gated MLP, grouped-query heads, sequential blocks, scaled rotary.

Most later families are LLaMA with a few changes: they share its fields (`read_llama`) and its tensors' names.
"""

from typing import Any

from deltapatch.errors import DeltapatchError
from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config, Setting
from deltapatch.models.spec import ModelSpec, RopeSpec


def read_llama(
    config: Config,
    architecture: str,
    *,
    head_dim: int | None = None,
    context: int = 2048,
    theta: float = 10_000.0,
    rope: RopeSpec | None = None,
    **changes: Any,
) -> ModelSpec:
    """The fields that LLaMA's relatives have in common.

    Args:
        config: of the checkpoint.
        architecture: the relative's name.
        head_dim: where the config says none; None: the hidden size over the heads.
        context, theta: where the config says none.
        rope: read by the relative itself.
        changes: fields of the spec that are otherwise than LLaMA's.

    Raises:
        DeltapatchError: a field is missing, broken, or asks for what is not supported.
    """
    d_model, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    n_kv_heads = config.integer("num_key_value_heads", default=n_heads, null=True)
    if n_heads % n_kv_heads:
        raise DeltapatchError(f"{config.where}: {n_heads} heads cannot share {n_kv_heads} key-value heads")
    d_head = config.optional_integer("head_dim") or head_dim or config.heads(n_heads, d_model)
    context = config.integer("max_position_embeddings", default=context)
    if rope is None:
        rope = config.rope(
            d_head,
            context,
            theta=Setting("rope_theta", theta),
            partial=Setting("partial_rotary_factor", 1.0, null=True),
        )
    fields: dict[str, Any] = {
        "norm": "rms",
        "parallel": False,
        "gated": True,
        "tied_embeddings": config.flag("tie_word_embeddings", default=False),
    } | changes
    if "norm_eps" not in fields:
        fields["norm_eps"] = config.number("rms_norm_eps", default=1e-6)
    if "activation" not in fields:
        fields["activation"] = config.activation("hidden_act", default="silu")
    return ModelSpec(
        architecture=architecture,
        n_layers=config.integer("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_mlp=config.integer("intermediate_size"),
        d_vocab=config.integer("vocab_size"),
        context=context,
        rope=rope,
        **fields,
    )


def attention_bias(config: Config) -> dict[str, Any]:
    """The biases of a config that has one flag for all four projections."""
    bias = config.flag("attention_bias", default=False)
    return {"qkv_bias": bias, "out_bias": bias}


def read_spec(config: Config) -> ModelSpec:
    """The spec of a config.json with model_type "llama".

    Raises:
        DeltapatchError: a field is missing, broken, or asks for what is not supported.
    """
    mlp_bias = config.flag("mlp_bias", default=False)
    spec = read_llama(config, "llama", mlp_bias=mlp_bias, **attention_bias(config))
    if spec.rope.dim != spec.d_head:
        raise DeltapatchError(
            f"{config.where}: a 'partial_rotary_factor' other than 1 is not supported in a llama model"
        )
    return spec


NAMES: dict[str, str | tuple[str, ...] | None] = {
    "embed_tokens.weight": "embedding.weight",
    "layers.{l}.input_layernorm.weight": "norm1.weight",
    "layers.{l}.post_attention_layernorm.weight": "norm2.weight",
    "layers.{l}.self_attn.q_proj.weight": "qkv.0.weight",
    "layers.{l}.self_attn.q_proj.bias": "qkv.0.bias",
    "layers.{l}.self_attn.k_proj.weight": "qkv.1.weight",
    "layers.{l}.self_attn.k_proj.bias": "qkv.1.bias",
    "layers.{l}.self_attn.v_proj.weight": "qkv.2.weight",
    "layers.{l}.self_attn.v_proj.bias": "qkv.2.bias",
    "layers.{l}.self_attn.o_proj.weight": "out.weight",
    "layers.{l}.self_attn.o_proj.bias": "out.bias",
    "layers.{l}.mlp.gate_proj.weight": "gate.weight",
    "layers.{l}.mlp.gate_proj.bias": "gate.bias",
    "layers.{l}.mlp.up_proj.weight": "up.weight",
    "layers.{l}.mlp.up_proj.bias": "up.bias",
    "layers.{l}.mlp.down_proj.weight": "down.weight",
    "layers.{l}.mlp.down_proj.bias": "down.bias",
    "norm.weight": "norm.weight",
    "lm_head.weight": "unembedding.weight",
    # The rotary frequencies: buffers of older versions.
    "layers.{l}.self_attn.rotary_emb.inv_freq": None,
    "rotary_emb.inv_freq": None,
}
# Norms of heads, and norms behind attention and MLP, where a family has them.
HEAD_NORMS: dict[str, str | tuple[str, ...] | None] = {
    "layers.{l}.self_attn.q_norm.weight": "q_norm.weight",
    "layers.{l}.self_attn.k_norm.weight": "k_norm.weight",
}

ARCHITECTURE = Architecture(
    name="llama",
    read_spec=read_spec,
    prefix="model.",
    names=NAMES,
    ignored=frozenset({"rope_interleaved", "rotary_emb_base", "layer_norm_eps", "n_embd"}),
)
