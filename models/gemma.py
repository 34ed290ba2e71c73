"""Gemma, 1 to 3: norms multiply by 1 + their weight, embeddings by the root of their width.

Gemma 2 has norms behind attention and MLP as well, soft caps, and a window in every other layer; Gemma 3
norms of heads, a window in five layers of six, and a rotary base of its own in those that have none.
"""

from dataclasses import replace
from typing import Any

from deltapatch.errors import DeltapatchError
from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config, Setting, windows_of
from deltapatch.models.llama import HEAD_NORMS, NAMES, attention_bias, read_llama
from deltapatch.models.spec import ModelSpec

_KINDS = ("sliding_attention", "full_attention")


def _common(config: Config) -> dict[str, Any]:
    """What all three are otherwise than LLaMA."""
    if config.find("use_bidirectional_attention", null=True):
        raise DeltapatchError(
            f"{config.where}: 'use_bidirectional_attention' is not supported: queries see what is before them"
        )
    return {
        "unit_offset": True,
        "embedding_scale": config.integer("hidden_size") ** 0.5,
        "round_embedding_scale": True,
        "tied_embeddings": config.flag("tie_word_embeddings", default=True),
        **attention_bias(config),
    }


def read_gemma(config: Config) -> ModelSpec:
    """The spec of a config.json with model_type "gemma".

    Raises:
        DeltapatchError: a field is missing, broken, or asks for what is not supported.
    """
    # Early configs say "gelu" and mean its tanh form; transformers reads them so.
    found = config.activation("hidden_act", default="gelu_pytorch_tanh")
    config.find("hidden_activation", null=True)
    activation = "gelu_tanh" if found == "gelu" else found
    return read_llama(config, "gemma", head_dim=256, context=8192, activation=activation, **_common(config))


def read_gemma2(config: Config) -> ModelSpec:
    """The same with model_type "gemma2"."""
    n_layers = config.integer("num_hidden_layers")
    config.find("hidden_act", null=True)  # of early configs, beside the one that is read
    kinds = config.layer_types(n_layers, [_KINDS[l % 2] for l in range(n_layers)])
    window = config.window(default=4096)
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    attention_cap, logit_cap = (
        config.optional_number(name) if name in config.fields else cap for name, cap in caps.items()
    )
    return read_llama(
        config,
        "gemma2",
        head_dim=256,
        context=8192,
        activation=config.activation("hidden_activation", default="gelu_pytorch_tanh"),
        post_norm=True,
        attention_scale=config.number("query_pre_attn_scalar", default=256) ** -0.5,
        attention_softcap=attention_cap,
        logit_softcap=logit_cap,
        windows=windows_of(kinds, window),
        **_common(config),
    )


def read_gemma3(config: Config) -> ModelSpec:
    """The same with model_type "gemma3_text"."""
    n_layers = config.integer("num_hidden_layers")
    config.find("attn_logit_softcapping", null=True)  # transformers reads it, and its attention does not
    every = config.integer("sliding_window_pattern", "_sliding_window_pattern", default=6)
    kinds = config.layer_types(n_layers, [_KINDS[(l + 1) % every == 0] for l in range(n_layers)])
    window = config.window(default=4096)
    context = config.integer("max_position_embeddings", default=131_072)
    theta = {
        "full_attention": Setting("rope_theta", 1_000_000.0),
        "sliding_attention": Setting("rope_local_base_freq", 10_000.0),
    }
    d_head = config.optional_integer("head_dim") or 256
    ropes = config.ropes(d_head, context, theta, Setting("partial_rotary_factor", 1.0, null=True))
    return read_llama(
        config,
        "gemma3_text",
        head_dim=d_head,
        context=context,
        rope=ropes[kinds[0]],
        ropes=tuple(ropes[kind] for kind in kinds),
        activation=config.activation("hidden_activation", default="gelu_pytorch_tanh"),
        post_norm=True,
        qk_norm="head",
        attention_scale=config.number("query_pre_attn_scalar", default=256) ** -0.5,
        logit_softcap=config.optional_number("final_logit_softcapping"),
        windows=windows_of(kinds, window),
        **_common(config),
    )


def read_gemma3_of_two(config: Config) -> ModelSpec:
    """The text part of a config.json with model_type "gemma3", which has one for images as well."""
    given = config.find("text_config")
    if not isinstance(given, dict):
        raise DeltapatchError(f"{config.where}: 'text_config' must be an object")
    # What transformers takes where older configs say nothing.
    sizes = {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    tied = {name: config.fields[name] for name in ("tie_word_embeddings",) if name in config.fields}
    text = Config(sizes | given | tied, f"{config.where}, text_config")
    text.refuse_unsupported()
    spec = replace(read_gemma3(text), architecture="gemma3")
    text.refuse_unread("gemma3_text", ())
    return spec


_BEHIND = NAMES | {
    "layers.{l}.post_attention_layernorm.weight": "post1.weight",
    "layers.{l}.pre_feedforward_layernorm.weight": "norm2.weight",
    "layers.{l}.post_feedforward_layernorm.weight": "post2.weight",
}

GEMMA3_OF_TWO = Architecture(
    name="gemma3",
    read_spec=read_gemma3_of_two,
    prefix="language_model.model.",
    names=_BEHIND | HEAD_NORMS | {"language_model.lm_head.weight": "unembedding.weight"},
    older=("model.language_model.",),
    others=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    ignored=frozenset(
        {
            "vision_config",
            "tie_word_embeddings",
            "boi_token_index",
            "eoi_token_index",
            "image_token_index",
            "mm_tokens_per_image",
        }
    ),
)
GEMMA = Architecture(name="gemma", read_spec=read_gemma, prefix="model.", names=NAMES)
GEMMA2 = Architecture(name="gemma2", read_spec=read_gemma2, prefix="model.", names=_BEHIND)
GEMMA3 = Architecture(name="gemma3_text", read_spec=read_gemma3, prefix="model.", names=_BEHIND | HEAD_NORMS)
