"""Models of a chosen shape with random weights of a realistic scale, and prompt pairs for them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltapatch.errors import DeltapatchError
from deltapatch.models.model import Model

if TYPE_CHECKING:
    import torch

ARCHITECTURES = ("gpt_neox", "gptj", "llama")
_LOGIT_SCALE = 2.5  # standard deviation of the logits, about that of trained models
# Matrices that write to the residual stream.
_WRITES = ("dense_4h_to_h", "attention.dense", "out_proj", "o_proj", "fc_out", "down_proj")


@dataclass(frozen=True)
class Shape:
    """What a random model looks like.

    Attributes:
        kv_heads: of LLaMA's, key-value heads; 0 stands for as many as there are heads.
        tied: of LLaMA's, whether the embedding is the read-out too.
    """

    architecture: str = "gpt_neox"
    layers: int = 6
    d_model: int = 512
    d_mlp: int = 2048
    heads: int = 8
    vocab: int = 50304
    context: int = 2048
    kv_heads: int = 0
    tied: bool = False


# name -> a shape that comparisons are made on
SHAPES = {
    "gpt-neox-small": Shape(),  # Pythia-70M's
    "smollm2-135m": Shape(
        "llama", layers=30, d_model=576, d_mlp=1536, heads=9, vocab=49152, kv_heads=3, tied=True
    ),
}


def make_model(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """Write a random model in Hugging Face's format, float32.

    Raises:
        DeltapatchError: a shape that no model can have.
    """
    import torch
    from transformers.utils import logging

    if shape.architecture not in ARCHITECTURES:
        raise DeltapatchError(
            f"unknown architecture {shape.architecture!r}: choose from {', '.join(ARCHITECTURES)}"
        )
    if min(shape.layers, shape.d_model, shape.d_mlp, shape.heads, shape.vocab) < 1:
        raise DeltapatchError(f"a model of {shape} cannot be: every size must be at least 1")
    if shape.d_model % (2 * shape.heads):
        raise DeltapatchError(
            f"d_model {shape.d_model} does not divide into {shape.heads} heads of an even width"
        )
    if shape.architecture != "llama" and (shape.kv_heads or shape.tied):
        raise DeltapatchError(f"only llama has --kv-heads and --tied, and this is {shape.architecture}")
    if shape.kv_heads < 0 or (shape.kv_heads and shape.heads % shape.kv_heads):
        raise DeltapatchError(f"{shape.heads} heads cannot share {shape.kv_heads} key-value heads equally")
    model = _build(shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if shape.tied and "embed_tokens" in name:
                name = "lm_head.weight"  # the logits' scale decides: norms follow the embedding
            weight.copy_(draw_weight(name, tuple(weight.shape), shape.layers, generator))
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    make_tokenizer(shape.vocab).save_pretrained(folder)
    return folder


def make_tokenizer(vocab: int) -> Any:
    """A tokenizer whose tokens are numbers between spaces, for peers that insist on one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(i): i for i in range(vocab)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")


def _build(shape: Shape) -> Any:
    from transformers import (
        GPTJConfig,
        GPTJForCausalLM,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    no_tokens = {"bos_token_id": None, "eos_token_id": None}  # the defaults may be outside the vocabulary
    width = shape.d_model // shape.heads
    turning = max(2, width // 8 * 2)  # a quarter of each head, as in GPT-NeoX and GPT-J
    if shape.architecture == "gptj":
        return GPTJForCausalLM(
            GPTJConfig(
                vocab_size=shape.vocab,
                n_embd=shape.d_model,
                n_layer=shape.layers,
                n_head=shape.heads,
                rotary_dim=turning,
                n_inner=shape.d_mlp,
                n_positions=shape.context,
                **no_tokens,
            )
        )
    config, kind, rope, own = {
        "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {"partial_rotary_factor": turning / width}, {}),
        "llama": (
            LlamaConfig,
            LlamaForCausalLM,
            {},
            {"num_key_value_heads": shape.kv_heads or shape.heads, "tie_word_embeddings": shape.tied},
        ),
    }[shape.architecture]
    return kind(
        config(
            vocab_size=shape.vocab,
            hidden_size=shape.d_model,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.d_mlp,
            max_position_embeddings=shape.context,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, **rope},
            **own,
            **no_tokens,
        )
    )


def draw_weight(
    name: str,
    shape: tuple[int, ...],
    n_layers: int,
    generator: "torch.Generator",
    dtype: "torch.dtype | None" = None,
) -> "torch.Tensor":
    """Weights that keep activations of order one, of layers that add to the stream in equal parts.

    Args:
        name: what Hugging Face's model calls the tensor.
        shape: of it; matrices are [out, in].
        n_layers: of the model.
        generator: on the device where it is drawn.
        dtype: PyTorch's default unless given.
    """
    import torch

    noise = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
    if len(shape) == 1:
        noise *= 0.1
        return noise.add_(1) if name.endswith("weight") else noise  # a norm's scale; a bias
    if any(part in name for part in ("embed_in", "wte", "embed_tokens")):
        return noise
    scale = 1 / math.sqrt(shape[1])
    if any(part in name for part in ("embed_out", "lm_head")):
        scale *= _LOGIT_SCALE
    elif any(part in name for part in _WRITES):
        scale *= math.sqrt(2 / n_layers)
    return noise.mul_(scale)


def make_pairs(
    model: Model, n: int, length: int, seed: int = 0
) -> list[tuple[list[int], list[int], int, int]]:
    """Prompt pairs of random tokens that differ in every third, with the answers that the model gives.

    Raises:
        DeltapatchError: no pairs, or prompts too short to differ before their end.
    """
    if n < 1 or length < 2:
        raise DeltapatchError(f"{n} pairs of {length} tokens: give at least 1 pair and 2 tokens")
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n):
        clean = rng.integers(0, model.spec.d_vocab, length)
        corrupted = clean.copy()
        differs = np.arange(length) % 3 == 1
        corrupted[differs] = rng.integers(0, model.spec.d_vocab, int(differs.sum()))
        ids = clean.tolist(), corrupted.tolist()
        change = model.logits(ids[0])[-1] - model.logits(ids[1])[-1]
        pairs.append((*ids, int(change.argmax()), int(change.argmin())))
    return pairs
