"""The process of a peer of the edges' comparison: it does its job, and prints JSON lines.

    python -m deltapatch.bench.edge_peers.work PEER JOB EFFECTS

The lines are objects: the versions; each batch size that is tried and its seconds; the best one; the seconds
of each repeat; or an error, in words. Seconds are the processor's, on one thread. The effects, [pair, edge],
go into a file. What libraries print goes to stderr.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from deltapatch.bench.edge_peers.base import EdgePeer, Job, Names
from deltapatch.bench.memory import peak_bytes

_ENOUGH = 20.0  # seconds: who took as many does not repeat
# name -> where its class is; the order is that of tables
PEERS = {
    "deltapatch-fp32": "ours.Ours",
    "tlens": "tlens.TLens",
    "auto-circuit": "autocircuit.AutoCircuit",
    "eap-ig": "eap_ig.EapIg",
    "eap-ig-bf16": "eap_ig.EapIgBf16",
}


def make_peer(name: str) -> EdgePeer:
    """The peer of that name, which is one of PEERS."""
    module, kind = PEERS[name].split(".")
    peer: EdgePeer = getattr(import_module(f"deltapatch.bench.edge_peers.{module}"), kind)()
    return peer


def work(peer: EdgePeer, job: Job, effects: Path, tell: Callable[[dict[str, Any]], None]) -> None:
    """Find the best batch size on some edges, then time all edges at it."""
    import torch

    torch.set_num_threads(1)  # seconds are those of the processor, which others may be using too
    tell({"versions": {name: version(name) for name in peer.packages}})
    peer.prepare(job)
    edges = job.edges[peer.keys]
    best, least = None, float("inf")
    for batch in peer.batches:
        seconds = _trial(peer, edges, batch, job.trial)
        tell({"batch": batch, "trial_seconds": seconds})
        if seconds < least:
            best, least = batch, seconds
    tell({"best": best})
    if best is None:
        peer.effects(edges, None)  # once, so that it is warm as the others are
    spent: list[float] = []
    while len(spent) < job.repeats and sum(spent) < _ENOUGH:
        began = time.process_time()
        found = peer.effects(edges, best)
        spent.append(time.process_time() - began)
        tell({"seconds": spent[-1]})
    np.save(effects, found)
    tell({"peak_bytes": peak_bytes()})


def _trial(peer: EdgePeer, edges: list[Names], batch: int, n: int) -> float:
    """Seconds of some edges, evenly apart, once it is warm."""
    some = edges[:: max(1, len(edges) // n)]
    peer.effects(some[:4], batch)
    times = []
    for _ in range(2):
        began = time.process_time()
        peer.effects(some, batch)
        times.append(time.process_time() - began)
    return min(times)


def main() -> None:
    """Do the job of the command line."""
    name, job, effects = sys.argv[1:]
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=lines, flush=True)

    try:
        work(make_peer(name), Job.load(Path(job)), Path(effects), tell)
    except Exception as error:
        traceback.print_exc()
        tell({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]})
        sys.exit(1)


if __name__ == "__main__":
    main()
