"""A sweep of many small passes in a process of its own, to be killed: survivor.py RUN [SECONDS A PASS]."""

import sys
import time
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import deltapatch
from deltapatch.engine import products
from deltapatch.engine.memory import Costs
from deltapatch.engine.shards import Shards
from deltapatch.kernels.product import PRECISIONS

OPTIONS = {"sites": "mlp_out,z", "positions": [1, -1], "noise_sample": 4, "precision": "bf16"}


def make_model() -> deltapatch.Model:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = GPTNeoXConfig(vocab_size=61, max_position_embeddings=32, initializer_range=0.5, **sizes)
    return deltapatch.from_transformers(GPTNeoXForCausalLM(config).eval())


def make_pairs(n: int = 6) -> list[deltapatch.PromptPair]:
    """Of two lengths."""
    return [
        deltapatch.PromptPair([1, 2, 3, 4, 5 + i][i % 2 :], [1, 2, 6, 4, 5 + i][i % 2 :], 7, 8)
        for i in range(n)
    ]


def budget(model: deltapatch.Model) -> int:
    """So little memory that a pass holds one pair."""
    from deltapatch.kernels.backend import choose_backend

    block = choose_backend("auto", model.device).block_tokens
    return Costs.of(model, PRECISIONS["bf16"], block, 1, 5, 1).total(1, 5, 40, 10)


def sweep(run: Path | str | None, **options: object) -> deltapatch.Effects:
    model = make_model()
    given = OPTIONS | {"memory_budget": budget(model), "out": run, "progress": False} | options
    few, products.FEW = products.FEW, 0  # bfloat16 for few tokens too
    try:
        return deltapatch.sweep(model, given.pop("pairs", make_pairs()), **given)  # type: ignore[arg-type]
    finally:
        products.FEW = few


if __name__ == "__main__":
    keep, pause = Shards.write, float(sys.argv[2]) if len(sys.argv) > 2 else 0

    def slowly(*args: object) -> None:
        keep(*args)  # type: ignore[arg-type]
        print("kept", flush=True)
        time.sleep(pause)

    Shards.write = slowly  # type: ignore[method-assign,assignment]
    print("ready", flush=True)
    sweep(sys.argv[1], resume=True)
