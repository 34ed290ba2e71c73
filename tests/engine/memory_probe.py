"""Run by test_memory.py in a process of its own: sweeps under a budget, each in a fresh fork, measured.

Prints one JSON object a sweep: the budget, how far resident memory rose, the size of the results, the passes.
"""

import gc
import json
import os
import sys
import threading
import time

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import deltapatch

NEURONS = {"sites": "mlp_post", "positions": "last"}
EVERYWHERE = {"sites": "mlp_out,attn_out", "positions": "all"}
MEGABYTE = 1 << 20
# (precision, sweep, megabytes beyond the least budget, threads, tokens of an answer)
CASES = [
    ("fp32", NEURONS, 16, 1),
    ("fp32", NEURONS, 64, 1),
    ("bf16", NEURONS, 16, 1),
    ("fp64", NEURONS, 16, 1),
    ("fp32", NEURONS, 16, 2),
    ("fp32", EVERYWHERE, 16, 1),
    ("fp32", EVERYWHERE, 64, 1),
    ("bf16", EVERYWHERE, 16, 1),
    ("fp64", EVERYWHERE, 16, 1),
    ("fp32", NEURONS, 16, 1, 3),
    ("fp32", EVERYWHERE, 16, 1, 3),
]


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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
        return (int(str(error).split("at least ")[1].split(" MB")[0].replace(",", "")) + 1) * 10**6
    raise AssertionError("a byte was enough")


def measure(model, prompts, precision, options, spare, threads, answers=1):
    torch.set_num_threads(threads)
    pairs = [deltapatch.PromptPair(*both, [5] * answers, [6] * answers) for both in prompts]

    def sweep(memory_budget):
        return deltapatch.sweep(
            model, pairs, precision=precision, progress=False, memory_budget=memory_budget, **options
        )

    budget = least_budget(sweep) + spare * MEGABYTE
    gc.collect()
    before = resident()
    peak, effects = peak_of(lambda: sweep(budget))
    results = sum(a.nbytes for s in effects.sites.values() for a in s.measured.values())
    return {
        "precision": precision,
        "sites": options["sites"],
        "spare": spare,
        "threads": threads,
        "answers": answers,
        "budget": budget,
        "growth": peak - before,
        "results": results,
        "passes": effects.meta["passes"],
        "seconds": effects.meta["seconds"],
    }


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}
    hf = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=500, max_position_embeddings=64, **sizes))
    model = deltapatch.from_transformers(hf)
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(500, (16, 2, 24), generator=draw).tolist()
    model.logits(prompts[0][0])
    # One small sweep loads what python and torch load late
    pair = deltapatch.PromptPair(*prompts[0], 5, 6)
    deltapatch.sweep(model, [pair], "attn_out", positions=[-1], layers=[1], progress=False)
    for case in CASES:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            print(json.dumps(measure(model, prompts, *case)), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"the sweep of {case} failed")


if __name__ == "__main__":
    main()
