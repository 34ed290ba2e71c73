"""Counts what sweeps do, as JSON, in a process of its own: what ran before in one changes the counts."""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import deltapatch

VARIANT = "llama-grouped"
SWEEPS = (
    {"sites": ["mlp_out", "attn_out"]},
    {"sites": ["mlp_post"], "positions": "last"},
    {"sites": ["z", "k"], "source": "mean"},
)


def load(name, file):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def counted(model, prompts, swept):
    options = {"precision": "fp32", "progress": False, "noise_sample": 0, "memory_budget": 1 << 28}
    deltapatch.sweep(model, prompts, **options, **swept)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, profile_memory=True) as found:
        deltapatch.sweep(model, prompts, **options, **swept)
    each = [event for event in found.key_averages() if event.key.startswith("aten::")]
    sizes = (event.self_cpu_memory_usage for event in found.events())
    return {
        "flops": sum(event.flops for event in each),
        "calls": sum(event.count for event in each),
        "allocations": sum(e.count for e in each if e.key in ("aten::empty", "aten::empty_strided")),
        "bytes": sum(size for size in sizes if size > 0),
    }


if __name__ == "__main__":
    load("engine_oracle", "oracle.py")
    tiny = load("engine_tiny", "tiny.py")
    torch.set_num_threads(1)
    model = deltapatch.from_transformers(tiny.hf_model(VARIANT))
    prompts = [deltapatch.PromptPair(*pair) for pair in tiny.pairs(tiny.true_model(VARIANT), (6, 4, 6))]
    print("\n" + json.dumps([counted(model, prompts, swept) for swept in SWEEPS]))
