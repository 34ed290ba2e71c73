"""SmolLM 3: LLaMA in which one layer of four has no rotary embedding."""

from dataclasses import replace

from deltapatch.errors import DeltapatchError, shown
from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config, windows_of
from deltapatch.models.llama import NAMES, attention_bias, read_llama
from deltapatch.models.spec import ModelSpec, RopeSpec

_NONE = RopeSpec(dim=0)


def read_spec(config: Config) -> ModelSpec:
    """The spec of a config.json with model_type "smollm3".

    Raises:
        DeltapatchError: a field is missing, broken, or asks for what is not supported.
    """
    n_layers = config.integer("num_hidden_layers")
    every = config.integer("no_rope_layer_interval", default=4)
    given = config.find("no_rope_layers", null=True)
    turns = [(l + 1) % every != 0 for l in range(n_layers)] if given is None else given
    if not isinstance(turns, list) or len(turns) < n_layers or any(t not in (0, 1) for t in turns):
        raise DeltapatchError(
            f"{config.where}: 'no_rope_layers' must say 1 or 0 for each of the {n_layers} layers, "
            f"not {shown(given)}"
        )
    window = config.window()
    window = window if config.flag("use_sliding_window", default=False) else None
    kinds = ["full_attention" if turn or window is None else "sliding_attention" for turn in turns[:n_layers]]
    spec = read_llama(
        config,
        "smollm3",
        context=32768,
        theta=2_000_000.0,
        tied_embeddings=config.flag("tie_word_embeddings", default=True),
        mlp_bias=config.flag("mlp_bias", default=False),
        windows=windows_of(config.layer_types(n_layers, kinds), window),
        **attention_bias(config),
    )
    ropes = tuple(spec.rope if turn else _NONE for turn in turns[:n_layers])
    return replace(spec, rope=ropes[0], ropes=ropes)


ARCHITECTURE = Architecture(name="smollm3", read_spec=read_spec, prefix="model.", names=NAMES)
