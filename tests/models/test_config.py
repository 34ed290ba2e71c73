"""Every field that is read of a config.json means what it means to transformers, or is refused."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from deltapatch import DeltapatchError, load_model

BASE = {
    "gpt_neox": {
        "vocab_size": 31,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 8,
    },
    "gptj": {
        "vocab_size": 31,
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 2,
        "rotary_dim": 4,
        "n_positions": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "llama": {
        "vocab_size": 31,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 8,
    },
}
PLAIN = {"rope_type": "default"}
LINEAR, DYNAMIC = {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4,
}
TOKENS = torch.randint(0, 31, (12,), generator=torch.Generator().manual_seed(1)).tolist()
pytestmark = pytest.mark.filterwarnings("ignore:a prompt of 12 tokens exceeds the 8:UserWarning")


def rope(**fields):
    return {"rope_parameters": PLAIN | fields}


# What is changed; None in place of a field that is left out.
LEFT_OUT = object()
AGREE = {
    "gpt_neox": [
        {},
        {"rotary_emb_base": 50.0},
        {"rotary_pct": 0.5},
        {"rope_theta": None},  # nobody reads it
        {"partial_rotary_factor": None},
        {"rope_theta": 10_000, "rotary_pct": 0.5, "partial_rotary_factor": 0.5},  # as 4.45 writes them
        {"rope_theta": 50.0, "rotary_emb_base": 50.0},
        rope(rope_theta=50.0),
        rope(partial_rotary_factor=0.5),
        rope(rope_theta=50.0) | {"rope_theta": 50.0, "rotary_emb_base": 50.0},
        rope(rope_theta=50.0) | {"rotary_emb_base": None},
        {"rope_scaling": LINEAR, "rotary_emb_base": 50.0},
        {"rope_scaling": DYNAMIC},
        {"rope_scaling": LINEAR | {"rope_type": "dynamic"}},
        {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 10_000.0}},
        {"rope_scaling": None, "rope_parameters": None},
        {"rope_scaling": {}},
        {"head_dim": 16},
        {"head_dim": None},
        {"max_position_embeddings": LEFT_OUT},
        {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
        {"hidden_act": "gelu_new", "layer_norm_eps": 0.1},
        {"num_key_value_heads": 1, "n_positions": 4, "rms_norm_eps": 3.0},  # others' fields
    ],
    "gptj": [
        {},
        {"n_inner": None},
        {"n_inner": 20, "activation_function": "relu", "layer_norm_epsilon": 0.1},
        {"tie_word_embeddings": True},
        {
            "n_embd": LEFT_OUT,
            "n_head": LEFT_OUT,
            "n_layer": LEFT_OUT,
            "n_positions": LEFT_OUT,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "max_position_embeddings": 64,
        },
        {"hidden_size": 32, "num_attention_heads": 2},
        {"rope_theta": 50.0, "rotary_pct": 0.5, "rope_scaling": LINEAR, "rotary": False},  # others' fields
        {"intermediate_size": 20, "hidden_act": "relu", "layer_norm_eps": 0.1, "head_dim": 8},
    ],
    "llama": [
        {},
        {"num_key_value_heads": None, "head_dim": None, "partial_rotary_factor": None},
        {"num_key_value_heads": 1, "head_dim": 8, "attention_bias": True, "mlp_bias": True},
        {"rope_theta": 50.0},
        rope() | {"rope_theta": 50.0},
        rope(rope_theta=50.0) | {"rope_theta": None},
        {"rope_scaling": LINEAR, "rope_theta": 50},
        {"rope_scaling": DYNAMIC},
        {"rope_scaling": DYNAMIC | {"original_max_position_embeddings": 4, "alpha": 3.0}},
        {"rope_scaling": LLAMA3, "rope_theta": 50.0},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": LEFT_OUT}},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 6},
        {"rope_scaling": LLAMA3 | {"type": "linear"}},
        {"rope_scaling": {"factor": 2.0}},
        {"rope_scaling": False},
        {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 50.0}, "rope_theta": 50.0},
        {"rotary_emb_base": 50.0, "layer_norm_eps": 0.1, "n_embd": 16},  # others' fields
        {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 0.1, "tie_word_embeddings": True},
        {"quantization_config": None, "sliding_window": None, "pretraining_tp": None},
    ],
}
# What is changed, what the sentence says, and whether transformers refuses it as well.
TWO = "says two things: "
REFUSED = {
    "gpt_neox": [
        (
            {"rope_theta": 50.0},
            TWO + r"'rotary_emb_base' \(by default\) is 10000.0, and 'rope_theta' is 50.0",
            False,
        ),
        ({"partial_rotary_factor": 0.5}, TWO + r"'rotary_pct' \(by default\) is 0.25, and 'partial_", False),
        ({"rope_theta": 50.0, "rotary_emb_base": 90.0}, TWO + "'rotary_emb_base' is 90.0, and 'rope_", False),
        (
            rope(rope_theta=50.0) | {"rotary_emb_base": 90.0},
            TWO + "'rope_theta' in the rotary settings",
            False,
        ),
        (rope(rope_theta=50.0) | {"rope_theta": 90.0}, "'rope_theta' in the rotary settings is 50", False),
        (
            rope(partial_rotary_factor=0.5) | {"rotary_pct": 1.0},
            TWO + "'partial_rotary_factor' in the",
            False,
        ),
        (rope(rope_theta=50.0) | {"rope_scaling": LINEAR}, TWO + "'rope_scaling' is .*'linear'", False),
        ({"head_dim": 8}, TWO + "hidden_size / num_attention_heads is 16, and 'head_dim' is 8", False),
        (rope(partial_rotary_factor=None), "rotary settings: 'partial_rotary_factor' is null", True),
        (rope(rope_theta=None), "rotary settings: 'rope_theta' is null", True),
        *(
            ({name: None}, f"{name!r} is null", True)
            for name in (
                "rotary_emb_base",
                "rotary_pct",
                "hidden_act",
                "layer_norm_eps",
                "use_parallel_residual",
                "attention_bias",
                "tie_word_embeddings",
                "max_position_embeddings",
                "vocab_size",
            )
        ),
    ],
    "gptj": [
        ({"num_attention_heads": 4}, TWO + "'n_head' is 2, and 'num_attention_heads' is 4", False),
        ({"hidden_size": 16}, TWO + "'n_embd' is 32, and 'hidden_size' is 16", False),
        ({"num_hidden_layers": 2}, TWO + "'n_layer' is 1, and 'num_hidden_layers' is 2", False),
        ({"max_position_embeddings": 9}, TWO + "'n_positions' is 64, and 'max_position_embed", True),
        ({"num_attention_heads": None}, "'num_attention_heads' is null", True),
        *(
            ({name: None}, f"{name!r} is null", True)
            for name in (
                "rotary_dim",
                "activation_function",
                "layer_norm_epsilon",
                "tie_word_embeddings",
                "n_positions",
            )
        ),
    ],
    "llama": [
        (rope(rope_theta=90.0) | {"rope_theta": 50.0}, "'rope_theta' in the rotary settings is 90.0", False),
        (rope(rope_theta=90.0) | {"rope_scaling": LINEAR}, TWO + "'rope_scaling' is", False),
        ({"partial_rotary_factor": 0.5}, "other than 1 is not supported in a llama model", False),
        ({"rope_scaling": DYNAMIC, "rope_theta": None}, "'rope_theta' is null", True),
        ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "'rope_type' is null", True),
        *(
            ({"rope_scaling": LLAMA3 | {name: None}}, f"{name!r} is null", True)
            for name in LLAMA3
            if name != "rope_type"
        ),
        *(
            ({"rope_scaling": LLAMA3 | {name: LEFT_OUT}}, f"(no|a) '{name}'", True)
            for name in ("factor", "low_freq_factor", "high_freq_factor")
        ),
        *(
            ({name: None}, f"{name!r} is null", True)
            for name in (
                "rope_theta",
                "hidden_act",
                "rms_norm_eps",
                "tie_word_embeddings",
                "attention_bias",
                "mlp_bias",
                "max_position_embeddings",
                "intermediate_size",
            )
        ),
    ],
}


def write(folder, kind, changes):
    fields = {"model_type": kind} | BASE[kind] | changes
    fields = {
        name: {k: v for k, v in value.items() if v is not LEFT_OUT} if isinstance(value, dict) else value
        for name, value in fields.items()
        if value is not LEFT_OUT
    }
    (folder / "config.json").write_text(json.dumps(fields))


def theirs(folder):
    """The logits of transformers' model of a config.json, whose weights go beside it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0]


@pytest.mark.parametrize(("kind", "changes"), [(kind, c) for kind in AGREE for c in AGREE[kind]])
def test_a_field_means_what_it_means_to_transformers(kind, changes, tmp_path, relative):
    write(tmp_path, kind, changes)
    want = theirs(tmp_path)
    assert relative(load_model(tmp_path, device="cpu").logits(TOKENS), want) < 1e-5


@pytest.mark.parametrize(
    ("kind", "changes", "said", "by_both"), [(kind, *case) for kind in REFUSED for case in REFUSED[kind]]
)
def test_what_means_nothing_or_two_things_is_refused(kind, changes, said, by_both, tmp_path):
    write(tmp_path, kind, {})
    theirs(tmp_path)
    load_model(tmp_path, device="cpu")
    write(tmp_path, kind, changes)
    with pytest.raises(DeltapatchError, match=said):
        load_model(tmp_path, device="cpu")
    if by_both:
        with pytest.raises(Exception):  # noqa: B017, PT011  # of whatever kind it has
            theirs(tmp_path)
