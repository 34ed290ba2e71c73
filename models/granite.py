"""Granite: LLaMA with multipliers of embeddings, scores, what blocks add, and logits."""

from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config
from deltapatch.models.llama import NAMES, attention_bias, read_llama
from deltapatch.models.spec import ModelSpec


def read_spec(config: Config) -> ModelSpec:
    """The spec of a config.json with model_type "granite".

    Raises:
        DeltapatchError: a field is missing, broken, or asks for what is not supported.
    """
    return read_llama(
        config,
        "granite",
        mlp_bias=config.flag("mlp_bias", default=False),
        embedding_scale=config.number("embedding_multiplier", default=1.0),
        residual_scale=config.number("residual_multiplier", default=1.0),
        attention_scale=config.number("attention_multiplier", default=1.0),
        logit_scale=1 / config.number("logits_scaling", default=1.0),
        **attention_bias(config),
    )


ARCHITECTURE = Architecture(name="granite", read_spec=read_spec, prefix="model.", names=NAMES)
