"""GGUF files of every family that transformers reads: the folder against the model that they were made of."""

import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from deltapatch import DeltapatchError, load_model
from deltapatch.models.convert import convert

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
WIDE = {"head_dim": 16, "query_pre_attn_scalar": 16}
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# name -> config's class and options, and the architecture of the file.
CASES = {
    "llama": ("LlamaConfig", {}, "LLAMA"),
    "llama 3.2": ("LlamaConfig", {"rope_parameters": LLAMA3, "max_position_embeddings": 131072}, "LLAMA"),
    "mistral": ("MistralConfig", {"sliding_window": None}, "LLAMA"),
    "qwen2": ("Qwen2Config", {}, "QWEN2"),
    "qwen3": ("Qwen3Config", {"head_dim": 16}, "QWEN3"),
    "gemma2": ("Gemma2Config", WIDE, "GEMMA2"),
    "gemma3": ("Gemma3TextConfig", WIDE, "GEMMA3"),
    "gemma3, scaled": (
        "Gemma3TextConfig",
        {**WIDE, "num_hidden_layers": 6, "rope_parameters": LINEAR},
        "GEMMA3",
    ),
    "phi3": ("Phi3Config", {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 0}, "PHI3"),
    "stablelm": ("StableLmConfig", {}, "STABLELM"),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64},
        "GPT2",
    ),
}


@pytest.fixture(autouse=True)
def _name_maps_once(monkeypatch):
    """transformers asks for the same map of names for every module of a model: of 62 layers, for 45 s."""
    monkeypatch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))


def built(name):
    kind, options, _ = CASES[name]
    config = getattr(transformers, kind)(**(options if kind == "GPT2Config" else {**SHAPE, **options}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def interleaved(weight, heads):
    """Rows of queries and keys in the order in which files of LLaMA's kind have them."""
    return (
        weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def llama3_factors(config):
    rope, n = config.rope_parameters, config.head_dim // 2
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(n) / n)
    smooth = np.clip((rope["original_max_position_embeddings"] / wavelength - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def written(path, name, model, keys=(), tensors=()):
    """A file as llama.cpp's converter makes them, with more keys and tensors."""
    config, arch = model.config, getattr(gguf.MODEL_ARCH, CASES[name][2])
    own, n_layers = gguf.MODEL_ARCH_NAMES[arch], config.num_hidden_layers
    file = gguf.GGUFWriter(str(path), own)
    file.add_block_count(n_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(32)
    file.add_feed_forward_length(128 if own == "gpt2" else 64)
    file.add_head_count(4)
    file.add_layer_norm_eps(1e-5)
    if own != "gpt2":
        file.add_head_count_kv(2)
        file.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-6))
        rope = config.rope_parameters
        file.add_rope_freq_base(float(rope.get("full_attention", rope)["rope_theta"]))
    if "head_dim" in CASES[name][1]:
        file.add_key_length(config.head_dim)
        file.add_value_length(config.head_dim)
    if own == "gemma2":
        file.add_attn_logit_softcapping(50.0)
        file.add_final_logit_softcapping(30.0)
    if own in ("gemma2", "gemma3"):
        file.add_sliding_window(config.sliding_window)
    if name == "gemma3, scaled":
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        file.add_rope_scaling_factor(8.0)
    if name == "llama 3.2":
        file.add_tensor("rope_freqs.weight", llama3_factors(config))
    for key, value in keys:
        (file.add_float32 if isinstance(value, float) else file.add_string)(f"{own}.{key}", value)
    for key, value in tensors:
        file.add_tensor(key, value)
    file.add_tokenizer_model("gpt2")
    file.add_token_list(["<s>", "</s>", "a", "b", "ab", *(f"t{i}" for i in range(59))])
    file.add_token_types([1] * 64)
    file.add_token_merges(["a b"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(arch, n_layers)
    for key, tensor in model.state_dict().items():
        value = tensor.float().numpy()
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if own == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            value = interleaved(value, 4 if "q_proj" in key else 2)
        if own.startswith("gemma") and key.endswith("norm.weight"):
            value = value + 1
        if own == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            value = value.T
        told = names.get_name(key, try_suffixes=(".weight", ".bias"))
        file.add_tensor(told, np.ascontiguousarray(value, dtype=np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_folder_computes_what_the_model_does(tmp_path, name):
    """Nothing that transformers leaves out is lost: widths of heads, scales of scores, rotary scaling."""
    model = built(name)
    path = written(tmp_path / "model.gguf", name, model)
    folder = Path(convert(path, tmp_path / "out"))
    tokens = torch.randint(64, (20,), generator=torch.Generator().manual_seed(1))
    got = load_model(folder, device="cpu").logits(tokens)
    with torch.no_grad():
        want = model(tokens[None]).logits[0]
    assert float((got - want).norm() / want.norm()) < 2e-6


@pytest.mark.parametrize(
    ("name", "layers", "scale"),
    [("gemma2", 46, 8), ("gemma2", 42, 16), ("gemma3", 62, 8), ("gemma3", 34, 16)],
)
def test_the_largest_divide_scores_by_their_width(tmp_path, monkeypatch, name, layers, scale):
    """As llama.cpp does: the file itself does not say."""
    kind, options, arch = CASES[name]
    monkeypatch.setitem(CASES, name, (kind, {**options, "num_hidden_layers": layers}, arch))
    folder = Path(convert(written(tmp_path / "model.gguf", name, built(name)), tmp_path / "out"))
    assert transformers.AutoConfig.from_pretrained(folder).query_pre_attn_scalar == scale


@pytest.mark.parametrize(
    ("name", "keys", "tensors", "said"),
    [
        ("llama", [("logit_scale", 2.0)], [], "says llama.logit_scale (2.0), which may change"),
        ("qwen2", [("rope.scaling.type", "yarn")], [], "has yarn rotary scaling"),
        ("llama", [], [("rope_freqs.weight", np.ones(4, np.float32) * 2)], "not those of LLaMA 3"),
        (
            "phi3",
            [],
            [("rope_factors_long.weight", np.ones(4, np.float32))],
            "has the tensor rope_factors_long",
        ),
        (
            "llama",
            [("attention.key_length", 8.0), ("attention.value_length", 4.0)],
            [],
            "not as wide as their keys",
        ),
    ],
)
def test_what_is_not_told_in_full_is_refused(tmp_path, name, keys, tensors, said):
    path = written(tmp_path / "model.gguf", name, built(name), keys, tensors)
    with pytest.raises(DeltapatchError, match=re.escape(said)):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
