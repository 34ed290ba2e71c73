"""What the comparison of edges asks of a peer, and the job that it gives to all."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deltapatch.interventions.nodes import READS, Keys, Nodes, Receiver
from deltapatch.interventions.pairs import PromptPair

Names = tuple[str, str]  # an edge's sender and receiver


@dataclass(frozen=True)
class Job:
    """One model, its pairs, and which edges are asked for.

    The clean run is the base: an edge carries what its sender says in the corrupted run. The effect is how
    the logit difference of both answers changes at the last position.
    """

    folder: str  # a model folder that transformers reads
    clean: list[list[int]]  # [pair][T]
    corrupted: list[list[int]]  # [pair][T]
    answers: list[list[int]]  # [pair][2]: clean, corrupted
    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool
    edges: dict[Keys, list[Names]] = field(default_factory=dict)  # by how keys and values are counted
    trial: int = 48  # edges that a batch size is tried on
    repeats: int = 3

    @property
    def first_difference(self) -> int:
        """Where the first pair begins to differ, and none differs earlier."""
        apart = np.array(self.clean) != np.array(self.corrupted)
        return int(apart.any(0).argmax())

    @property
    def pairs(self) -> list[PromptPair]:
        """The pairs as `sweep_edges` takes them."""
        each = zip(self.clean, self.corrupted, self.answers, strict=True)
        return [PromptPair(clean, corrupted, a, b) for clean, corrupted, (a, b) in each]

    def nodes(self, keys: Keys) -> Nodes:
        """The names of what sends and receives."""
        return Nodes(self.n_layers, self.n_heads, self.n_kv_heads, self.parallel, keys)

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "Job":
        """Read what `save` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        found["edges"] = {keys: [(s, r) for s, r in some] for keys, some in found["edges"].items()}
        return Job(**found)


class EdgePeer:
    """One tool. It is made without importing what it runs on.

    Attributes:
        name: what users call it.
        what: one line about it.
        packages: whose versions are told.
        keys: how it counts keys and values under grouped queries.
        batches: rows of a forward that are tried, ascending; none where it has no such choice.
    """

    name: str
    what: str
    packages: tuple[str, ...] = ("torch", "transformers")
    keys: Keys = "query"
    batches: tuple[int, ...] = ()

    job: Job
    nodes: Nodes

    def prepare(self, job: Job) -> None:
        """Load the model."""
        raise NotImplementedError

    def effects(self, edges: Sequence[Names], batch: int | None) -> np.ndarray:
        """[pair, edge], the plain runs that it needs among it."""
        raise NotImplementedError


def place(sender: str) -> tuple[int, int | None]:
    """The layer of a sender and its head; None where it is an MLP, layer -1 where it is the embedding."""
    if sender == "input":
        return -1, None
    layer, _, head = sender[1:].partition(".h")
    return int(layer), int(head) if head else None


def grouped(edges: Sequence[Names], nodes: Nodes, size: int) -> Iterator[list[tuple[int, int, Receiver]]]:
    """(number among the edges, sender, receiver) of a few at a time, those of one layer together."""
    number = {name: i for i, name in enumerate(nodes.senders)}
    found = [(i, number[s], nodes.receivers[r]) for i, (s, r) in enumerate(edges)]
    found.sort(key=lambda e: (e[2].layer, e[2].reads))
    for start in range(0, len(found), size):
        yield found[start : start + size]


def letter(receiver: Receiver) -> str:
    """What a receiver reads, in a word: q, k, v, mlp or logits."""
    return READS[receiver.reads][1:-1]


def apart(logits: Tensor, answers: Tensor) -> Tensor:
    """[row], the difference of both answers' logits: of [row, vocabulary] and [row, 2]."""
    found = logits.gather(1, answers).double()
    return found[:, 0] - found[:, 1]


def tokens(job: Job) -> list[Tensor]:
    """[pair, T] twice and [pair, 2]: clean and corrupted prompts, answers."""
    return [torch.tensor(ids) for ids in (job.clean, job.corrupted, job.answers)]
