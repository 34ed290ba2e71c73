"""Run by test_memory.py in a process of its own: sweeps under a budget, each in a fresh fork, measured.

Its argument is "first" or "later": sweeps of the first family, or of those that came later. Prints one JSON
object a sweep: the budget, how far resident memory rose, the size of the results, the passes.
"""

import ctypes
import gc
import json
import os
import sys
import threading
import time
from typing import NamedTuple

import torch
import transformers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import deltapatch
from deltapatch.arguments import n_bytes

MEGABYTE = 1 << 20
NEURONS = {"sites": "mlp_post", "positions": "last"}
EVERYWHERE = {"sites": "mlp_out,attn_out", "positions": "all"}
SOME = {"sites": "mlp_out,z", "positions": [0, -1]}
UNLIKELY = NEURONS | {"metrics": "dlogp_clean"}  # enough rows, and no metric that needs every token
EDGES = {"receivers": "a,m", "positions": "together", "effect": "both"}
ZERO = {"sites": "mlp_out,q", "positions": [0, -1], "source": "zero"}


class Case(NamedTuple):
    """A sweep and how it is measured."""

    precision: str
    sweep: dict
    spare: int  # megabytes beyond the least budget
    threads: int = 1
    prompts: str = "short"
    vocab: int = 500
    answers: int = 1  # tokens of an answer
    family: str = "gpt_neox"


LENGTHS = {
    "short": [24] * 16,
    "few": [24] * 4,
    "long": [1000] * 2,
    "mixed": [8] * 40 + [24] * 20 + [100] * 10 + [300] * 3,
    "many": [12] * 400,
}
HEADS = {"sites": "q,z", "positions": [0, -1]}
CAPPED = {"metrics": "all", "layers": [1]}  # every logit of a row goes through the cap
FAMILIES = {
    "gemma2": transformers.Gemma2Config,  # soft caps, norms behind, windows
    "gemma3": transformers.Gemma3TextConfig,  # norms of heads and behind, windows
    "olmo2": transformers.Olmo2Config,  # norms of whole projections, and behind alone
    "phi3": transformers.Phi3Config,
    "qwen3": transformers.Qwen3Config,  # norms of heads
}
CASES = [
    Case("fp32", NEURONS, 16),
    Case("fp32", NEURONS, 64),
    Case("bf16", NEURONS, 16),
    Case("fp64", NEURONS, 16),
    Case("fp32", NEURONS, 16, threads=2),
    Case("fp32", EVERYWHERE, 16),
    Case("fp32", EVERYWHERE, 64),
    Case("bf16", EVERYWHERE, 16),
    Case("fp64", EVERYWHERE, 16),
    Case("fp32", SOME, 8, prompts="long"),
    Case("fp32", SOME, 8, threads=2, prompts="long"),
    Case("fp32", SOME, 16, prompts="mixed"),
    Case("fp32", ZERO, 16, prompts="mixed"),
    Case("fp32", SOME, 4, prompts="many"),
    Case("fp32", SOME, 16, threads=2, vocab=40_000),
    Case("bf16", UNLIKELY, 16, vocab=40_000),
    Case("fp32", EDGES, 48),
    Case("bf16", EDGES, 64),
    Case("fp32", NEURONS, 16, answers=3),
    Case("fp32", EVERYWHERE, 16, answers=3),
    *(Case("fp32", NEURONS, 16, family=family) for family in FAMILIES),
    *(Case("bf16", EVERYWHERE, 16, family=family) for family in FAMILIES),
    *(Case("fp32", HEADS, 8, prompts="long", family=family) for family in ("gemma2", "olmo2", "qwen3")),
    Case("fp32", SOME, 16, threads=2, vocab=40_000, family="gemma2"),
    Case("fp32", NEURONS | CAPPED, 4, prompts="few", vocab=40_000, family="gemma2"),
    Case("fp32", EDGES, 48, family="qwen3"),
]


def resident():
    """Memory of the process itself; pages of files, as of libraries that a fork meets anew, do not count."""
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith(("RssAnon", "RssShmem")))


def peak_of(work):
    """The highest resident memory while `work()` ran, and what it returned."""
    peak, done = [resident()], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    result = work()
    done.set()
    watcher.join()
    return max(peak[0], resident()), result


def least_budget(sweep):
    """What the error of a budget that is too small asks for, in bytes."""
    try:
        sweep(memory_budget=1)
    except deltapatch.DeltapatchError as error:
        least = n_bytes(str(error).split("at least ")[1].split(";")[0], "the least budget")
        assert least is not None
        return least
    raise AssertionError("a byte was enough")


def measure(model, prompts, case):
    torch.set_num_threads(case.threads)
    pairs = [deltapatch.PromptPair(*both, [5] * case.answers, [6] * case.answers) for both in prompts]

    def sweep(memory_budget):
        way = deltapatch.sweep if "sites" in case.sweep else deltapatch.sweep_edges
        return way(
            model,
            pairs,
            precision=case.precision,
            progress=False,
            memory_budget=memory_budget,
            noise_sample=0,
            **case.sweep,
        )

    budget = least_budget(sweep) + case.spare * MEGABYTE
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free already would be taken again without being seen
    before = resident()
    peak, effects = peak_of(lambda: sweep(budget))
    of_edges = "sites" not in case.sweep
    parts = [effects] if of_edges else effects.sites.values()
    results = sum(a.nbytes for part in parts for a in part.measured.values())
    return {
        **case._asdict(),
        "sweep": "edges" if of_edges else case.sweep["sites"],
        "budget": budget,
        "growth": peak - before,
        "results": results,
        "passes": effects.meta["passes"],
        "seconds": effects.meta["seconds"],
    }


def random_model(family, vocab):
    sizes = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}
    sizes |= {"vocab_size": vocab, "max_position_embeddings": 1024}
    if family == "gpt_neox":
        return deltapatch.from_transformers(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)))
    sizes |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")) | {"num_key_value_heads": 2}
    if family in ("gemma2", "gemma3"):
        sizes |= {"sliding_window": 16, "head_dim": 64}
    config = FAMILIES[family](**sizes)
    return deltapatch.from_transformers(transformers.AutoModelForCausalLM.from_config(config))


def main(which):
    cases = [case for case in CASES if (case.family == "gpt_neox") == (which == "first")]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {kind: random_model(*kind) for kind in {(case.family, case.vocab) for case in cases}}
    draw = torch.Generator().manual_seed(0)
    prompts = {
        name: [torch.randint(500, (2, n), generator=draw).tolist() for n in lengths]
        for name, lengths in LENGTHS.items()
    }
    for model in models.values():
        model.logits(prompts["short"][0][0])
        # One small sweep loads what python and torch load late
        options = {"positions": [-1], "layers": [1], "progress": False, "noise_sample": 0}
        pair = deltapatch.PromptPair(*prompts["short"][0], 5, 6)
        deltapatch.sweep(model, [pair], sites="attn_out", **options)
    for case in cases:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            print(
                json.dumps(measure(models[case.family, case.vocab], prompts[case.prompts], case)), flush=True
            )
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"the sweep of {case} failed")


if __name__ == "__main__":
    main(sys.argv[1])
