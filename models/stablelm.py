"""StableLM: LLaMA with LayerNorms, partial rotary, and biases on queries, keys and values where asked for.

The 12B has a LayerNorm of each head's queries and keys as well, each with weights of its own.
"""

from deltapatch.errors import DeltapatchError
from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config, Setting
from deltapatch.models.llama import NAMES, read_llama
from deltapatch.models.spec import ModelSpec

_MOST_HEADS = 1024  # whose norms have a tensor each: as many names are made before a file is looked into


def read_spec(config: Config) -> ModelSpec:
    """The spec of a config.json with model_type "stablelm".

    Raises:
        DeltapatchError: a field is missing, broken, or asks for what is not supported.
    """
    each = config.flag("qk_layernorm", default=False)
    n_heads = config.integer("num_attention_heads")
    if each and n_heads > _MOST_HEADS:
        raise DeltapatchError(
            f"{config.where}: {n_heads:,} heads with LayerNorms of their own are not supported: at most "
            f"{_MOST_HEADS:,} are"
        )
    parallel = config.flag("use_parallel_residual", default=False)
    context = config.integer("max_position_embeddings", default=4096)
    d_head = config.heads(n_heads, config.integer("hidden_size"))
    rope = config.rope(
        d_head,
        context,
        theta=Setting("rope_theta", 10_000.0),
        partial=Setting("partial_rotary_factor", 0.25, unread="rope_pct", null=True),
    )
    return read_llama(
        config,
        "stablelm",
        context=context,
        rope=rope,
        norm="layer",
        norm_eps=config.number("layer_norm_eps", default=1e-5),
        parallel=parallel,
        shared_norm=parallel,
        qkv_bias=config.flag("use_qkv_bias", default=False),
        qk_norm="each" if each else "none",
    )


ARCHITECTURE = Architecture(
    name="stablelm",
    read_spec=read_spec,
    prefix="model.",
    names=NAMES
    | {
        "layers.{l}.input_layernorm.bias": "norm1.bias",
        "layers.{l}.post_attention_layernorm.bias": "norm2.bias",
        "layers.{l}.self_attn.q_layernorm.norms.{h}.weight": "q_norm.{h}.weight",
        "layers.{l}.self_attn.k_layernorm.norms.{h}.weight": "k_norm.{h}.weight",
        "norm.bias": "norm.bias",
    },
)
