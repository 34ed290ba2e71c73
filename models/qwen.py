"""Qwen 2 and 2.5: LLaMA with biases on queries, keys and values; Qwen 3: with norms of heads instead."""

from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config, windows_of
from deltapatch.models.llama import HEAD_NORMS, NAMES, attention_bias, read_llama
from deltapatch.models.spec import ModelSpec


def _windows(config: Config) -> tuple[int | None, ...]:
    """From a layer on, where the config asks for them."""
    n_layers = config.integer("num_hidden_layers")
    asked = config.flag("use_sliding_window", default=False)
    given = config.window(default=4096)  # published configs have one, and do not ask for it
    window = given if asked else None
    first = config.integer("max_window_layers", default=28, zero=True)
    kinds = ["sliding_attention" if window and l >= first else "full_attention" for l in range(n_layers)]
    return windows_of(config.layer_types(n_layers, kinds), window)


def read_qwen2(config: Config) -> ModelSpec:
    """The spec of a config.json with model_type "qwen2".

    Raises:
        DeltapatchError: a field is missing, broken, or asks for what is not supported.
    """
    return read_llama(config, "qwen2", context=32768, qkv_bias=True, windows=_windows(config))


def read_qwen3(config: Config) -> ModelSpec:
    """The same with model_type "qwen3"."""
    return read_llama(
        config,
        "qwen3",
        head_dim=128,
        context=32768,
        qk_norm="head",
        windows=_windows(config),
        **attention_bias(config),
    )


QWEN2 = Architecture(name="qwen2", read_spec=read_qwen2, prefix="model.", names=NAMES)
QWEN3 = Architecture(name="qwen3", read_spec=read_qwen3, prefix="model.", names=NAMES | HEAD_NORMS)
