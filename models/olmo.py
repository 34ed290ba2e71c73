"""OLMo 2 and 3: norms behind attention and MLP alone, and norms of all queries and of all keys together.

OLMo 3 has a window in three layers of four, and scales the rotary embedding of the fourth alone.
"""

from typing import Any

from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config, Setting, windows_of
from deltapatch.models.llama import HEAD_NORMS, NAMES, attention_bias, read_llama
from deltapatch.models.spec import ModelSpec


def _common(config: Config) -> dict[str, Any]:
    """What both are otherwise than LLaMA."""
    eps = config.number("rms_norm_eps", default=1e-5)
    return {
        "pre_norm": False,
        "post_norm": True,
        "qk_norm": "width",
        "norm_eps": eps,
        **attention_bias(config),
    }


def read_olmo2(config: Config) -> ModelSpec:
    """The spec of a config.json with model_type "olmo2".

    Raises:
        DeltapatchError: a field is missing, broken, or asks for what is not supported.
    """
    return read_llama(config, "olmo2", **_common(config))


def read_olmo3(config: Config) -> ModelSpec:
    """The same with model_type "olmo3"."""
    n_layers, n_heads = config.integer("num_hidden_layers"), config.integer("num_attention_heads")
    kinds = config.layer_types(
        n_layers, ["full_attention" if (l + 1) % 4 == 0 else "sliding_attention" for l in range(n_layers)]
    )
    window = config.window(default=4096)
    context = config.integer("max_position_embeddings", default=2048)
    d_head = config.optional_integer("head_dim") or config.heads(n_heads, config.integer("hidden_size"))
    theta = Setting("rope_theta", 500_000.0)
    ropes = config.ropes(
        d_head,
        context,
        {"full_attention": theta, "sliding_attention": theta},
        Setting("partial_rotary_factor", 1.0, null=True),
    )
    return read_llama(
        config,
        "olmo3",
        context=context,
        rope=ropes[kinds[0]],
        ropes=tuple(ropes[kind] for kind in kinds),
        windows=windows_of(kinds, window),
        **_common(config),
    )


_NAMES = {name: slot for name, slot in NAMES.items() if "layernorm" not in name} | HEAD_NORMS
_NAMES |= {
    "layers.{l}.post_attention_layernorm.weight": "post1.weight",
    "layers.{l}.post_feedforward_layernorm.weight": "post2.weight",
}

OLMO2 = Architecture(name="olmo2", read_spec=read_olmo2, prefix="model.", names=_NAMES)
OLMO3 = Architecture(name="olmo3", read_spec=read_olmo3, prefix="model.", names=_NAMES)
