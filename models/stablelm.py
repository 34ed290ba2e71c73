"""StableLM: LLaMA with LayerNorms, partial rotary, and biases on queries, keys and values where asked for."""

from deltapatch.errors import DeltapatchError
from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config, Setting
from deltapatch.models.llama import NAMES, read_llama
from deltapatch.models.spec import ModelSpec


def read_spec(config: Config) -> ModelSpec:
    """The spec of a config.json with model_type "stablelm".

    Raises:
        DeltapatchError: a field is missing, broken, or asks for what is not supported.
    """
    if config.flag("qk_layernorm", default=False):
        raise DeltapatchError(
            f"{config.where}: 'qk_layernorm', LayerNorms of heads, is not supported in a stablelm model"
        )
    parallel = config.flag("use_parallel_residual", default=False)
    context = config.integer("max_position_embeddings", default=4096)
    d_head = config.heads(config.integer("num_attention_heads"), config.integer("hidden_size"))
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
    )


ARCHITECTURE = Architecture(
    name="stablelm",
    read_spec=read_spec,
    prefix="model.",
    names=NAMES
    | {
        "layers.{l}.input_layernorm.bias": "norm1.bias",
        "layers.{l}.post_attention_layernorm.bias": "norm2.bias",
        "norm.bias": "norm.bias",
    },
)
