"""Tiny random models of every architecture variant, and prompt pairs for them."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import transformers
from engine_oracle import Pair, Patch, TrueModel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import deltapatch

VOCAB = 61


def _neox(**options: Any) -> GPTNeoXForCausalLM:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(**(sizes | options)))


def _gptj(**options: Any) -> GPTJForCausalLM:
    sizes = {
        "vocab_size": VOCAB,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "rotary_dim": 4,
        "n_inner": 24,
        "n_positions": 32,
        "bos_token_id": None,  # the defaults are outside this vocabulary
        "eos_token_id": None,
    }
    return GPTJForCausalLM(GPTJConfig(**(sizes | options)))


def _llama(**options: Any) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | options)))


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # so small that all three bands of frequencies occur
}
_BUILDERS = {
    "neox-parallel": lambda: _neox(num_hidden_layers=3),
    "neox-sequential": lambda: _neox(
        use_parallel_residual=False,
        attention_bias=False,
        hidden_act="gelu_new",
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    ),
    "gptj": lambda: _gptj(),
    "gptj-full-rotary": lambda: _gptj(rotary_dim=8, n_inner=None),
    "llama": lambda: _llama(),
    "llama-grouped": lambda: _llama(
        num_hidden_layers=3,
        num_key_value_heads=2,
        head_dim=6,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters=_LLAMA3,
    ),
    "llama-linear": lambda: _llama(
        num_key_value_heads=1,
        rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    ),
}
_SPECIAL = {
    "one-layer": lambda: _neox(num_hidden_layers=1),
    "llama-dynamic": lambda: _llama(
        max_position_embeddings=4,  # prompts are longer: the rotary table depends on the prompt's length
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    ),
}
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
_LONG = {  # prompts are on both sides of the original context
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.1],
    "long_factor": [2.5],
}


# Said twice: some versions of transformers have a default beside the rotary settings.
_HALF = {
    "partial_rotary_factor": 0.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}


def _modern(config: type, **options: Any) -> Any:
    return AutoModelForCausalLM.from_config(config(**(_SIZES | options)), attn_implementation="eager")


def _gpt2(**options: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id"))
    return GPT2LMHeadModel(GPT2Config(**(sizes | tokens | options)))


# Of the later families, with what each brings: windows are shorter than prompts.
_FAMILIES = {
    "gpt2": lambda: _gpt2(),
    # As of Stanford's GPT-2s: scores are divided by the layer's number too.
    "gpt2-by-depth": lambda: _gpt2(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "qwen2": lambda: _modern(
        transformers.Qwen2Config, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "qwen3": lambda: _modern(transformers.Qwen3Config, head_dim=6, rope_parameters=_YARN),
    "mistral": lambda: _modern(transformers.MistralConfig, head_dim=6, sliding_window=3),
    "gemma": lambda: _modern(transformers.GemmaConfig, head_dim=6),
    "gemma2": lambda: _modern(
        transformers.Gemma2Config,
        head_dim=6,
        sliding_window=3,
        query_pre_attn_scalar=9,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: _modern(
        transformers.Gemma3TextConfig,
        head_dim=6,
        sliding_window=3,
        sliding_window_pattern=2,
        query_pre_attn_scalar=9,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        },
    ),
    "olmo2": lambda: _modern(transformers.Olmo2Config),
    "olmo3": lambda: _modern(
        transformers.Olmo3Config,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": _YARN,
        },
    ),
    "phi3": lambda: _modern(
        transformers.Phi3Config, original_max_position_embeddings=4, rope_parameters=_LONG
    ),
    "granite": lambda: _modern(
        transformers.GraniteConfig,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=0.5,
        attention_bias=True,
    ),
    "smollm3": lambda: _modern(transformers.SmolLM3Config, no_rope_layers=[1, 0, 1]),
    "stablelm": lambda: _modern(transformers.StableLmConfig, use_qkv_bias=True, **_HALF),
    "stablelm-parallel": lambda: _modern(transformers.StableLmConfig, use_parallel_residual=True, **_HALF),
    # As of StableLM 2 12B.
    "stablelm-head-norms": lambda: _modern(
        transformers.StableLmConfig, use_parallel_residual=True, qk_layernorm=True, **_HALF
    ),
}
FAMILIES = tuple(_FAMILIES)
VARIANTS = tuple(_BUILDERS)
SEQUENTIAL = ("neox-sequential", "llama", "llama-grouped", "llama-linear")


def _randomise(model: Any, seed: int, strength: float) -> None:
    """Weights so large, norms and biases included, that leaving any of them out shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = "norm" in name or ".ln_" in name
            if is_norm and name.endswith("weight"):
                # Gemma's are counted from 1.
                weight.copy_(strength * noise + (not model.config.model_type.startswith("gemma")))
            elif any(part in name for part in ("embed_in", "wte", "embed_tokens")):
                weight.copy_((0.3 if model.config.tie_word_embeddings else 0.7) * noise)
            else:
                weight.copy_(strength * noise)


def build(variant: str, seed: int = 0, strength: float = 0.3) -> Any:
    """A fresh float32 model of transformers."""
    with torch.random.fork_rng():
        model = (_BUILDERS | _SPECIAL | _FAMILIES)[variant]()
    _randomise(model, seed, strength)
    return model.eval()


@cache
def hf_model(variant: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same float32 numbers in either dtype; shared between tests, which leave it as it is."""
    return build(variant).to(dtype)


@cache
def model_of(variant: str, precision: str = "fp32") -> deltapatch.Model:
    """The engine's, with weights in what a precision needs."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    return deltapatch.from_transformers(hf_model(variant, dtype))


@cache
def true_model(variant: str) -> TrueModel:
    return TrueModel(hf_model(variant))


def random_pair(length: int, seed: int, first: int = 1, vocab: int = VOCAB) -> Pair:
    """A pair whose prompts differ from position `first` on, but for one position in between."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randperm(vocab, generator=generator)[:length].tolist()
    corrupted = torch.randperm(vocab, generator=generator)[:length].tolist()
    corrupted[:first] = clean[:first]
    if length > first + 2:
        corrupted[first + 1] = clean[first + 1]
    answers = torch.randperm(vocab, generator=generator)[:2].tolist()
    labels = {"subject": first, "last": -1}
    return Pair(clean, corrupted, *answers, labels=labels)


def with_apt_answers(true: TrueModel, pair: Pair) -> Pair:
    """The same prompts, with the answers that they move apart most: no metric divides by nearly nothing."""
    change = true.logits(pair.clean)[-1] - true.logits(pair.corrupted)[-1]
    return pair._replace(clean_answer=int(change.argmax()), corrupted_answer=int(change.argmin()))


def with_long_answers(true: TrueModel, pair: Pair, sizes: tuple[int, int], shared: int, seed: int) -> Pair:
    """The same prompts with answers of so many tokens, which begin with the same ones and part at apt ones.

    What they are after that is drawn; of two answers that are the same all is.
    """
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted = (torch.randint(VOCAB, (4,), generator=generator).tolist()[:n] for n in sizes)
    begin = torch.randint(VOCAB, (shared,), generator=generator).tolist()
    clean[:shared], corrupted[:shared] = begin[: sizes[0]], begin[: sizes[1]]
    if shared < min(sizes):
        change = true.logits([*pair.clean, *begin])[-1] - true.logits([*pair.corrupted, *begin])[-1]
        clean[shared], corrupted[shared] = int(change.argmax()), int(change.argmin())
    return pair._replace(clean_answer=clean, corrupted_answer=corrupted)


def said(true: TrueModel, prompt: Sequence[int], n: int) -> list[int]:
    """What a model says after a prompt, token by token."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(true.logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def pairs(true: TrueModel, lengths: Sequence[int] = (5, 4), seed: int = 0) -> list[Pair]:
    """Pairs of different lengths; a prompt of one token differs in that one."""
    drawn = [random_pair(n, seed=10 * seed + i, first=min(1, n - 1)) for i, n in enumerate(lengths)]
    return [with_apt_answers(true, pair) for pair in drawn]


def prompt_pairs(drawn: Sequence[Pair]) -> list[deltapatch.PromptPair]:
    return [deltapatch.PromptPair(**pair._asdict()) for pair in drawn]


def without_overlaps(patches: Sequence[Patch]) -> list[Patch]:
    """Drop a patch that touches what an earlier one has already replaced."""
    kept: list[Patch] = []
    taken: list[Any] = []
    for patch in patches:
        site, layer = patch.site.removesuffix(".dim"), patch.layer
        if site == "resid_pre" and layer:
            site, layer = "resid_post", layer - 1
        place = site, layer, patch.position
        if not any(place == p and (None in (patch.index, i) or patch.index == i) for p, i in taken):
            kept.append(patch)
            taken.append((place, patch.index))
    return kept


def nearly_equal_tokens(variant: str, difference: float) -> tuple[Any, Pair]:
    """A model in which two embeddings differ by a relative `difference`, and a pair that differs in them."""
    model = build(variant, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        noise = torch.randn(embedding.shape[1], generator=generator)
        embedding[1] = embedding[0] * (1 + difference * noise)
    pair = Pair([7, 0, 9, 3], [7, 1, 9, 3], 20, 30, {"subject": 1})
    return model, with_apt_answers(TrueModel(model), pair)


def huge(variant: str) -> Any:
    """A model whose attention is all but one-hot and whose logits are in the hundreds."""
    model = build(variant, seed=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("query_key_value", "q_proj", "k_proj")):
                weight.mul_(8)
        model.get_output_embeddings().weight.mul_(8 if model.config.tie_word_embeddings else 60)
    return model


def nearly_the_same(variant):
    """A model with two tokens of embeddings that differ by a millionth, and pairs that differ in them."""
    model = build(variant, seed=1).double()
    noise = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[1] = embedding[0] * (1 + 1e-6 * noise)
    clean, corrupted = [7, 0, 9, 3, 5], [7, 1, 9, 3, 5]
    return deltapatch.from_transformers(model), [
        deltapatch.PromptPair(clean, corrupted, 20, 30),
        deltapatch.PromptPair(clean[1:], corrupted[1:], [21, 8], [21, 9, 4]),
        deltapatch.PromptPair(clean, corrupted, deltapatch.AnyOf([22, 23]), 33),
        deltapatch.PromptPair(clean[:3], corrupted[:3], [11, 12], 13),
    ]
