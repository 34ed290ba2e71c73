"""Models of true shapes with random weights, in memory or on disk: speed hardly depends on the values."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deltapatch.bench.random_models import draw_weight
from deltapatch.models.architecture import Architecture, expected_shapes, file_shapes
from deltapatch.models.checkpoint import Checkpoint
from deltapatch.models.config import Config
from deltapatch.models.model import Model, Origin
from deltapatch.models.model_weights import InMemory
from deltapatch.models.registry import read_config
from deltapatch.models.spec import ModelSpec
from deltapatch.models.tensors import MadeTensors

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

# Further shapes that kernels can be compiled for: heads have 64 to 256 coordinates.
_LATER = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 8192}
COMPILED: dict[str, dict[str, Any]] = CONFIGS | {
    "gpt2": {
        "model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257,
    },
    "gpt2-xl": {
        "model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25, "vocab_size": 50257,
    },
    "qwen2.5-0.5b": _LATER | {
        "model_type": "qwen2", "num_hidden_layers": 24, "hidden_size": 896, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
    },
    "qwen2.5-7b": _LATER | {
        "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    },
    "qwen3-8b": _LATER | {
        "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
    },
    "gemma-2-2b": {
        "model_type": "gemma2", "num_hidden_layers": 26, "hidden_size": 2304, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216, "vocab_size": 256000,
        "query_pre_attn_scalar": 256, "sliding_window": 4096,
    },
    "gemma-2-9b": {
        "model_type": "gemma2", "num_hidden_layers": 42, "hidden_size": 3584, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "intermediate_size": 14336, "vocab_size": 256000,
        "query_pre_attn_scalar": 256, "sliding_window": 4096,
    },
    "gemma-3-4b": {
        "model_type": "gemma3_text", "num_hidden_layers": 34, "hidden_size": 2560, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 10240, "vocab_size": 262208,
        "query_pre_attn_scalar": 256, "sliding_window": 1024,
    },
    "mistral-7b": _LATER | {
        "model_type": "mistral", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "sliding_window": 4096,
    },
    "olmo-2-7b": _LATER | {
        "model_type": "olmo2", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "intermediate_size": 11008, "vocab_size": 100352,
    },
    "phi-3-mini": _LATER | {
        "model_type": "phi3", "num_hidden_layers": 32, "hidden_size": 3072, "num_attention_heads": 32,
        "intermediate_size": 8192, "vocab_size": 32064, "sliding_window": 2047,
    },
}  # fmt: skip


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
    architecture, spec, tensors = _random_tensors(config, on, dtype)
    weights = InMemory(Checkpoint(architecture, spec, tensors, device=on))
    return Model(weights, Origin(f"random {config['model_type']}"))


def write_random_model(
    config: dict[str, Any], folder: Path, dtype: torch.dtype, shard_bytes: int = 1 << 30
) -> None:
    """Write a checkpoint of these shapes, in shards; no more than one of them is in memory.

    Args:
        config: the fields of a config.json, for example one of CONFIGS.
        folder: where it goes; made if it is not there.
        dtype: of the weights.
        shard_bytes: the most in a file, unless a tensor has more.

    Raises:
        DeltapatchError: the config is not one of a supported model.
    """
    _, _, tensors = _random_tensors(config, torch.device("cpu"), dtype)
    shards: list[list[str]] = [[]]
    size = 0
    for name in tensors.names():
        n_bytes = math.prod(tensors.shape(name)) * dtype.itemsize
        if shards[-1] and size + n_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n_bytes
    folder.mkdir(parents=True, exist_ok=True)
    home: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: tensors.read(n) for n in names}, folder / file, metadata={"format": "pt"})
        home |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))


def config_bytes(config: dict[str, Any], dtype: torch.dtype) -> int:
    """What a checkpoint of these shapes takes."""
    return dtype.itemsize * sum(math.prod(shape) for _, shape in expected_shapes(spec_of(config)))


def spec_of(config: dict[str, Any]) -> ModelSpec:
    """The shape that a config describes."""
    return read_config(Config(config, "the benchmark's config"))[1]


def _random_tensors(
    config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[Architecture, ModelSpec, MadeTensors]:
    """Tensors drawn when they are read, as `draw_weight` has it, each from a seed of its own name."""
    architecture, spec = read_config(Config(config, "the benchmark's config"))
    shapes = file_shapes(architecture, spec)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        return draw_weight(name, shape, spec.n_layers, generator, dtype)

    return architecture, spec, MadeTensors("random weights", shapes, dtype, draw)
