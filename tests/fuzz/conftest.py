"""Whole files to break, and a process to read them."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import deltapatch
from deltapatch.models.builtin_models import builtin_model_path

# --import-mode=importlib puts no test folder on sys.path
_spec = importlib.util.spec_from_file_location("fuzz_hunter", Path(__file__).with_name("hunter.py"))
assert _spec is not None
assert _spec.loader is not None
hunter_module = importlib.util.module_from_spec(_spec)
sys.modules["fuzz_hunter"] = hunter_module
_spec.loader.exec_module(hunter_module)

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}
MODELS = {
    "gpt_neox": lambda n: GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=n, max_position_embeddings=32, **SIZES)
    ),
    "gptj": lambda n: GPTJForCausalLM(
        GPTJConfig(vocab_size=n, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=32)
    ),
    "llama": lambda n: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=n,
            max_position_embeddings=32,
            num_key_value_heads=1,
            rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
            **SIZES,
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def hunter(tmp_path_factory) -> Iterator[object]:
    found = hunter_module.Hunter(tmp_path_factory.mktemp("fuzz") / "hunter")
    found.folder.mkdir()
    yield found
    found.close()


@pytest.fixture(scope="session")
def seeds(tmp_path_factory) -> Callable[[str], Path]:
    """Makes folders of whole files, each once, by name."""
    root = tmp_path_factory.mktemp("seeds")

    def seed(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            MAKERS[name](folder, seed)
        return folder

    return seed


def _model(kind: str, **options: object) -> Callable[[Path, Callable[[str], Path]], None]:
    def make(folder: Path, seed: Callable[[str], Path]) -> None:
        torch.manual_seed(0)
        MODELS[kind](61).save_pretrained(folder, **options)

    return make


def _with_tokenizer(folder: Path, seed: Callable[[str], Path]) -> None:
    torch.manual_seed(0)
    MODELS["gpt_neox"](
        json.loads((builtin_model_path() / "config.json").read_text())["vocab_size"]
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(builtin_model_path() / name, folder)


def _adapter(folder: Path, seed: Callable[[str], Path]) -> None:
    shutil.copytree(seed("gpt_neox"), folder / "model")
    (folder / "adapter").mkdir()
    module = "base_model.model.gpt_neox.layers.1.mlp.dense_h_to_4h"
    save_file(
        {f"{module}.lora_A.weight": torch.ones(2, 16), f"{module}.lora_B.weight": torch.ones(24, 2)},
        folder / "adapter" / "adapter_model.safetensors",
    )
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["dense_h_to_4h"],
               "bias": "none", "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {"dense_h_to_4h": 3},
               "init_lora_weights": True, "fan_in_fan_out": False, "use_dora": False}  # fmt: skip
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(options))


def _pairs(folder: Path, seed: Callable[[str], Path]) -> None:
    shutil.copytree(seed("with_tokenizer"), folder / "model")
    pairs = [
        {"clean": "3 + 4 =", "corrupted": "5 + 4 =", "clean_answer": " 7", "corrupted_answer": " 9",
         "labels": {"op1": 0, "last": -1}, "meta": {"template": 1, "note": "é"}},
        {"clean": [1, 2, 3], "corrupted": [1, 4, 3], "clean_answer": 5, "corrupted_answer": {"any": [6, 7]}},
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))


def _sweep(folder: Path, seed: Callable[[str], Path], **options: object) -> None:
    model = deltapatch.load_model(seed("gpt_neox"), device="cpu")
    pairs = [deltapatch.PromptPair([1, 2, 3, 4 + i], [1, 5, 3, 4 + i], 7, 8, {"here": 1}) for i in range(3)]
    deltapatch.sweep(model, pairs, sites="mlp_out,z", positions=[1, "here"], out=folder, progress=False,
                     precision="fp32", **options)  # type: ignore[arg-type]  # fmt: skip


def _outcome(folder: Path, seed: Callable[[str], Path]) -> None:
    model = deltapatch.load_model(seed("gpt_neox"), device="cpu")
    pairs = [deltapatch.PromptPair([1, 2, 3], [1, 5, 3 + i], 7, 8) for i in range(2)]
    patches = [deltapatch.Intervention(i, [deltapatch.Patch("mlp_out", 0, 1)]) for i in (0, 1, 1)]
    steer = [0.1] * model.spec.d_model
    patches.append(deltapatch.Intervention(0, [deltapatch.Patch("attn_out", 0, 2, add=steer)]))
    deltapatch.run(model, pairs, patches, progress=False, precision="fp32", out=folder)


def _listed(folder: Path, seed: Callable[[str], Path]) -> None:
    model = deltapatch.load_model(seed("gpt_neox"), device="cpu")
    pair = deltapatch.PromptPair([1, 2, 3], [1, 5, 3], 7, deltapatch.AnyOf([8, 9]))
    directions = {"z": [[0.5] * model.spec.d_head, [1.0, -1.0] * (model.spec.d_head // 2)]}
    options = {"positions": [1], "layers": [1], "out": folder, "progress": False, "precision": "fp32"}
    deltapatch.sweep_directions(model, pair, directions, strengths=[1, -2], **options)


def _autoencoder(folder: Path, seed: Callable[[str], Path]) -> None:
    folder.mkdir()
    config = {
        "architecture": "topk",
        "k": 3,
        "normalize_activations": "layer_norm",
        "apply_b_dec_to_input": True,
        "metadata": {"hook_name": "blocks.1.hook_resid_post"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (4, 8), "W_dec": (8, 4), "b_enc": (8,), "b_dec": (4,)}
    save_file(
        {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()},
        folder / "sae_weights.safetensors",
    )


def _gemma(folder: Path, seed: Callable[[str], Path]) -> None:
    folder.mkdir()
    shapes = {"W_enc": (4, 8), "W_dec": (8, 4), "b_enc": (8,), "b_dec": (4,), "threshold": (8,)}
    np.savez(folder / "params.npz", **{n: np.ones(shape, np.float32) for n, shape in shapes.items()})


def _edges(folder: Path, seed: Callable[[str], Path]) -> None:
    model = deltapatch.load_model(seed("gpt_neox"), device="cpu")
    pairs = [deltapatch.PromptPair([1, 2, 3], [1, 5, 3 + i], 7, 8) for i in range(2)]
    options = {"positions": [1, -1], "effect": "both", "precision": "fp32", "progress": False}
    deltapatch.sweep_edges(model, pairs, senders="input,m0", out=folder, **options)  # type: ignore[arg-type]


def _begun(folder: Path, seed: Callable[[str], Path]) -> None:
    for i in (1, 2):
        _sweep(folder, seed, shard=(i, 2))


def _bin(folder: Path, seed: Callable[[str], Path]) -> None:
    shutil.copytree(seed("gpt_neox"), folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    torch.save(MODELS["gpt_neox"](61).state_dict(), folder / "pytorch_model.bin")


def _tasks(folder: Path, seed: Callable[[str], Path]) -> None:
    folder.mkdir()
    facts = [
        {"subject": "Paris", "relation": "capital of", "object": "France", "template": "[X] is capital of"}
    ]
    problems = [
        {"template": "Ann has {a} and {b} apples.", "answer": "a + b * 2", "numbers": {"a": [2, 20]}},
        {"question": "Tom had 8 nuts and ate 3.", "answer": "5", "equation": "x = 8 - 3", "group": "g"},
        {"clean": "a", "corrupted": "b", "clean_answer": 1, "corrupted_answer": "2"},
    ]
    for name, rows in (("facts", facts), ("problems", problems)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


MAKERS: dict[str, Callable[[Path, Callable[[str], Path]], None]] = {
    **{kind: _model(kind) for kind in MODELS},
    "sharded": _model("llama", max_shard_size="5KB"),
    "with_tokenizer": _with_tokenizer,
    "adapter": _adapter,
    "pairs": _pairs,
    "run": _sweep,
    "outcome": _outcome,
    "listed": _listed,
    "autoencoder": _autoencoder,
    "gemma": _gemma,
    "edges": _edges,
    "begun": _begun,
    "bin": _bin,
    "tasks": _tasks,
}
