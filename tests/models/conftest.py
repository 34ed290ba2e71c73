"""Tiny random transformers models: weights, norms and biases all random, so that no mix-up goes unseen."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

_NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None}
_BASE: dict[str, dict[str, Any]] = {
    "gpt_neox": {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 72,
        "max_position_embeddings": 48,
    },
    "gptj": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 48},
    "llama": {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 72,
        "max_position_embeddings": 48,
    },
}
_CONFIGS = {
    "gpt_neox": transformers.GPTNeoXConfig,
    "gptj": transformers.GPTJConfig,
    "llama": transformers.LlamaConfig,
    "gpt2": transformers.GPT2Config,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "olmo2": transformers.Olmo2Config,
    "olmo3": transformers.Olmo3Config,
    "phi3": transformers.Phi3Config,
    "granite": transformers.GraniteConfig,
    "smollm3": transformers.SmolLM3Config,
    "stablelm": transformers.StableLmConfig,
}
_BASE["gpt2"] = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
for _kind in _CONFIGS:
    if _kind not in _BASE:  # their modules and fields are named as LLaMA's
        _BASE[_kind] = _BASE["llama"] | {"pad_token_id": None}


def _build(kind: str, scale: float = 0.2, seed: int = 0, **options: Any) -> Any:
    config = _CONFIGS[kind](**{**_BASE[kind], **_NO_SPECIAL, **options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale
        # Gemma's norms multiply by 1 + their weight.
        is_norm = parameter.ndim == 1 and name.endswith("weight") and not kind.startswith("gemma")
        parameter.data.copy_(noise + 1 if is_norm else noise)
    return model.eval()


@contextmanager
def _true_float64() -> Iterator[None]:
    """Inside, transformers' casts to float32 (norms, rotary tables, scores) are casts to float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(torch, "float", torch.float64),
            mock.patch.object(torch, "float32", torch.float64),
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """build(kind, scale=0.2, seed=0, **config options) -> transformers model."""
    return _build


@pytest.fixture(scope="session")
def true_float64() -> Callable[[], AbstractContextManager[None]]:
    """A context in which a transformers model that is built and run is float64 throughout."""
    return _true_float64


@pytest.fixture(scope="session")
def reference() -> Callable[..., torch.Tensor]:
    """reference(model, ids) -> transformers' logits [T, vocab] in the model's own dtypes."""

    def run(model: Any, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0]

    return run


@pytest.fixture(scope="session")
def exact() -> Callable[..., torch.Tensor]:
    """exact(model, ids) -> logits of the same weights in float64 with no cast to float32 inside."""

    def run(model: Any, ids: list[int]) -> torch.Tensor:
        with _true_float64():
            twin = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float64).eval()
            twin.load_state_dict(model.state_dict())
            with torch.no_grad():
                return twin(torch.tensor([ids])).logits[0]

    return run


@pytest.fixture(scope="session")
def relative() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """relative(x, truth) -> norm of the difference over the norm of the truth."""

    def error(x: torch.Tensor, truth: torch.Tensor) -> float:
        assert x.shape == truth.shape
        return float((x.double() - truth.double()).norm() / truth.double().norm())

    return error


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """saved(model, **save_pretrained options) -> its folder."""

    def save(model: Any, **options: Any) -> Path:
        folder = tmp_path / "model"
        model.save_pretrained(folder, **options)
        return folder

    return save


@pytest.fixture(scope="session")
def ids() -> list[int]:
    return torch.randint(0, 61, (21,), generator=torch.Generator().manual_seed(5)).tolist()
