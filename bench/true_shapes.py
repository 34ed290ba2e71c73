"""Models of true shapes with random weights, made where they are used: speed hardly depends on the values."""

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deltapatch.models.architecture import expected_shapes
from deltapatch.models.config import Config
from deltapatch.models.model import Model
from deltapatch.models.registry import read_config
from deltapatch.models.store import Store

# config.json of the models that the tables name, as their checkpoints have it
CONFIGS: dict[str, dict[str, Any]] = {
    "gptj-6b": {
        "model_type": "gptj", "n_layer": 28, "n_embd": 4096, "n_head": 16, "rotary_dim": 64, "n_inner": None,
        "vocab_size": 50400, "n_positions": 2048, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
    },
    "pythia-2.8b": {
        "model_type": "gpt_neox", "num_hidden_layers": 32, "hidden_size": 2560, "num_attention_heads": 32,
        "intermediate_size": 10240, "vocab_size": 50304, "max_position_embeddings": 2048,
        "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 10000,
        "use_parallel_residual": True, "tie_word_embeddings": False,
    },
    "llama-7b": {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000,
        "max_position_embeddings": 2048, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "llama-3-8b": {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 8192, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": False,
    },
}  # fmt: skip


class RandomTensors:
    """Tensors drawn when they are read, each from a seed of its own name.

    Args:
        shapes: name -> shape.
        device, dtype: where and as what they are drawn.
    """

    where = "random weights"

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> None:
        self._shapes, self._device, self._dtype = shapes, device, dtype

    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one."""
        return self._shapes[name]

    def place(self, name: str) -> str:
        """What a sentence calls the place that it is read from."""
        return self.where

    def read(self, name: str) -> Tensor:
        """Matrices that keep the size of what they multiply; scales around one; small shifts."""
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        shape = self._shapes[name]
        drawn = torch.randn(shape, generator=generator, device=self._device, dtype=self._dtype)
        if len(shape) == 2:
            return drawn.mul_(shape[1] ** -0.5)
        return drawn.mul_(0.02) if name.endswith("bias") else drawn.mul_(0.1).add_(1)


def random_model(config: dict[str, Any], device: str | torch.device, dtype: torch.dtype) -> Model:
    """A model of these shapes.

    Args:
        config: the fields of a config.json, for example one of CONFIGS.
        device: where the weights are drawn and the engine computes.
        dtype: of the weights.

    Raises:
        DeltapatchError: the config is not one of a supported model.
    """
    on = torch.device(device)
    architecture, spec = read_config(Config(config, "the benchmark's config"))
    shapes = {architecture.tensor_name(slot): shape for slot, shape in expected_shapes(spec)}
    store = Store(architecture, spec, RandomTensors(shapes, on, dtype))
    return Model(store, f"random {config['model_type']}", on)
