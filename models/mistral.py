"""Mistral: LLaMA in which every query sees a window of positions, where the config says one."""

from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config
from deltapatch.models.llama import NAMES, read_llama
from deltapatch.models.spec import ModelSpec


def read_spec(config: Config) -> ModelSpec:
    """The spec of a config.json with model_type "mistral".

    Raises:
        DeltapatchError: a field is missing, broken, or asks for what is not supported.
    """
    n_layers = config.integer("num_hidden_layers")
    window = config.window(default=4096)
    windows = () if window is None else (window,) * n_layers
    return read_llama(config, "mistral", context=4096 * 32, windows=windows)


ARCHITECTURE = Architecture(name="mistral", read_spec=read_spec, prefix="model.", names=NAMES)
