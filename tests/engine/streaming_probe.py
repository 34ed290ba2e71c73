"""Run by test_streaming.py in a process of its own: streamed sweeps, each in a fresh fork, measured.

Arguments: folders of checkpoints. Prints one JSON object for each: how far the process's own memory rose, and
what it had mapped of files, libraries included.
"""

import gc
import json
import os
import sys
import threading
import time

import numpy as np
import torch

import deltapatch

OPTIONS = {
    "sites": ["mlp_out", "attn_out"],
    "positions": "last",
    "precision": "fp32",
    "memory_budget": 1 << 28,
}


def resident():
    """Bytes of the process's own memory, and of mapped files."""
    with open("/proc/self/status") as file:
        fields = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file if line.startswith("Rss")}
    return np.array([fields["RssAnon"] + fields["RssShmem"], fields["RssFile"]])


def sweep(folder):
    model = deltapatch.load_model(folder, device="cpu", stream=True)
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.spec.d_vocab, (3, 2, 12), generator=draw).tolist()
    pairs = [deltapatch.PromptPair(clean, corrupted, 5, 6) for clean, corrupted in prompts]
    return deltapatch.sweep(model, pairs, progress=False, **OPTIONS)


def measure(folder):
    gc.collect()
    before = resident()
    peak, done = [before], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = np.maximum(peak[0], resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    sweep(folder)
    done.set()
    watcher.join()
    own, mapped = (peak[0] - before).tolist()
    return {"own": own, "mapped": mapped}


def main():
    torch.set_num_threads(1)
    for folder in sys.argv[1:]:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            print(json.dumps(measure(folder)), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"the sweep of {folder} failed")


if __name__ == "__main__":
    main()
