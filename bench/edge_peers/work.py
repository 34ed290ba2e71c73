"""What the process of a peer of the edges' comparison does, told line by line (see bench/sides/process.py).

It is given a peer, a job and a file for the effects, [pair, edge]. The lines are objects: the versions; each
batch size that is tried and its seconds; the best one; the seconds of each repeat; or an error, in words.
Seconds are the processor's, on one thread.
"""

import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np

from deltapatch.bench.edge_peers.base import EdgePeer, Job, Names
from deltapatch.bench.sides.memory import peak_bytes
from deltapatch.bench.sides.process import Lines

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


def lines(name: str, job: str, effects: str) -> Lines:
    """What the process of a peer prints."""
    yield from carry_out(make_peer(name), Job.load(Path(job)), Path(effects))


def carry_out(peer: EdgePeer, job: Job, effects: Path) -> Lines:
    """Find the best batch size on some edges, then time all edges at it."""
    import torch

    torch.set_num_threads(1)  # seconds are those of the processor, which others may be using too
    yield {"versions": {name: version(name) for name in peer.packages}}
    peer.prepare(job)
    edges = job.edges[peer.keys]
    best, least = None, float("inf")
    for batch in peer.batches:
        seconds = _trial(peer, edges, batch, job.trial)
        yield {"batch": batch, "trial_seconds": seconds}
        if seconds < least:
            best, least = batch, seconds
    yield {"best": best}
    if best is None:
        peer.effects(edges, None)  # once, so that it is warm as the others are
    spent: list[float] = []
    while len(spent) < job.repeats and sum(spent) < _ENOUGH:
        began = time.process_time()
        found = peer.effects(edges, best)
        spent.append(time.process_time() - began)
        yield {"seconds": spent[-1]}
    np.save(effects, found)
    yield {"peak_bytes": peak_bytes()}


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
