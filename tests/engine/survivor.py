"""A sweep of many small passes, to be cut off; in a process of its own: survivor.py RUN [SECONDS A PASS]."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import deltapatch
from deltapatch.engine.planning.memory import Costs
from deltapatch.engine.wavefront import products
from deltapatch.kernels.product import PRECISIONS
from deltapatch.results.kept import KeptPasses

OPTIONS = {"sites": "mlp_out,z", "positions": [1, -1], "noise_sample": 4, "precision": "bf16"}


def make_model() -> deltapatch.Model:
    torch.set_num_threads(1)
    return deltapatch.from_transformers(make_hf_model())


def make_hf_model() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = GPTNeoXConfig(vocab_size=61, max_position_embeddings=32, initializer_range=0.5, **sizes)
    return GPTNeoXForCausalLM(config).eval()


def make_pairs(n: int = 6) -> list[deltapatch.PromptPair]:
    """Of two lengths."""
    return [
        deltapatch.PromptPair([1, 2, 3, 4, 5 + i][i % 2 :], [1, 2, 6, 4, 5 + i][i % 2 :], 7, 8)
        for i in range(n)
    ]


def budget(model: deltapatch.Model, tokens: int = 40, rows: int = 10, precision: str = "bf16") -> int:
    """So little memory that a pass holds one pair, with so many rows of so many tokens together."""
    from deltapatch.kernels.backend import choose_backend

    block = choose_backend("auto", model.device).block_tokens
    places = set(str(OPTIONS["sites"]).split(","))
    shape = {"n_sources": 1, "length": 5, "threads": 1, "places": places}
    costs = Costs.of(model, PRECISIONS[precision], block, **shape, against_base=False, stream=model.stream)
    return costs.total(1, 5, tokens, rows)


def sweep(run: Path | str | None, **options: object) -> deltapatch.Effects:
    model = options.pop("model", None) or make_model()
    given = OPTIONS | {"memory_budget": budget(model), "out": run, "progress": False} | options
    few, products.FEW = products.FEW, 0  # bfloat16 for few tokens too
    try:
        return deltapatch.sweep(model, given.pop("pairs", make_pairs()), **given)  # type: ignore[arg-type]
    finally:
        products.FEW = few


class Stop(Exception):
    pass


def cut_off(run, passes, error=Stop, **options):
    """Sweep until so many passes are kept."""
    keep, done = KeptPasses.write, []

    def write(self, number, found):
        if len(done) == passes:
            raise error
        keep(self, number, found)
        done.append(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptPasses, "write", write)
        with pytest.raises(error) as stopped:
            sweep(run, **options)
    return str(stopped.value)


def same(run, whole):
    """A finished folder with the same effects and pairs, and nothing else."""
    assert sorted(os.listdir(run)) == ["effects.safetensors", "pairs.jsonl", "run.json"]
    for name in ("effects.safetensors", "pairs.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    ours, theirs = (json.loads((r / "run.json").read_text()) for r in (run, whole))
    assert list(ours) == list(theirs)
    for name in set(ours) - {"date", "seconds"}:
        assert ours[name] == theirs[name], name
    return True


def passes_of(monkeypatch):
    """A list of the passes that are computed from now on."""
    keep, done = KeptPasses.write, []

    def write(self, number, found):
        keep(self, number, found)
        done.append(number)

    monkeypatch.setattr(KeptPasses, "write", write)
    return done


def process(run, pause=0.0):
    """A sweep in a process of its own, which has begun."""
    made = subprocess.Popen(
        [sys.executable, __file__, run, str(pause)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert made.stdout.readline() == "ready\n"
    return made


if __name__ == "__main__":
    keep, pause = KeptPasses.write, float(sys.argv[2]) if len(sys.argv) > 2 else 0

    def slowly(*args: object) -> None:
        keep(*args)  # type: ignore[arg-type]
        print("kept", flush=True)
        time.sleep(pause)

    KeptPasses.write = slowly  # type: ignore[method-assign,assignment]
    print("ready", flush=True)
    sweep(sys.argv[1], resume=True)
