"""Circuits: sets of edges that are kept, chosen by their effects, in the graph JSON of EAP-IG and MIB."""

import heapq
import json
import math
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deltapatch.arguments import choice, whole
from deltapatch.errors import DeltapatchError, path_of
from deltapatch.interventions.nodes import Nodes
from deltapatch.interventions.wirings import Wiring, existing, keeping
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.effects import looking
from deltapatch.results.folder import plain_errors
from deltapatch.results.metrics import check_metric
from deltapatch.results.wholefile import write_new

By = Literal["magnitude", "sign"]


@dataclass(frozen=True, eq=False)
class Circuit:
    """Edges that are kept; all others carry what their sender says in the source run.

    Attributes:
        nodes: of the model; keys and values are read by query head.
        kept: [sender, receiver] bool, over all of the model.
        scores: [sender, receiver], what the edges were chosen by; 0 where there is no edge.
        d_model: of the model, which the file format tells; 0 where it is not known.
    """

    nodes: Nodes
    kept: np.ndarray
    scores: np.ndarray
    d_model: int = 0

    # Choosing ---------------------------------------------------------------------------------------------

    @classmethod
    def top(
        cls,
        edges: EdgeEffects,
        n: int,
        metric: str = "logit_diff",
        *,
        by: By = "magnitude",
        greedy: bool = False,
        prune: bool = True,
    ) -> "Circuit":
        """The n edges with the largest mean effects.

        Args:
            edges: a sweep of all edges, all positions together.
            n: how many, before those that reach nothing are left out.
            metric: its name.
            by: "magnitude", or "sign": how far the edge speaks for the clean answer, whichever the direction.
            greedy: from the logits back, always the best edge into what is kept already, as EAP-IG does.
            prune: leave out edges whose sender nothing reaches, or whose receiver reaches nothing.

        Raises:
            DeltapatchError: the sweep is not of all edges with keys by query head, or n is out of range.
        """
        return cls.of_scores(*cls._scored(edges, metric), n, by=by, greedy=greedy, prune=prune)

    @classmethod
    def above(
        cls,
        edges: EdgeEffects,
        threshold: float,
        metric: str = "logit_diff",
        *,
        by: By = "magnitude",
        prune: bool = True,
    ) -> "Circuit":
        """The edges whose mean effect is at least a threshold; else as `top`."""
        nodes, scores, d_model = cls._scored(edges, metric)
        found = cls(nodes, existing(nodes) & (_judged(scores, by) >= threshold), scores, d_model)
        return found.pruned() if prune else found

    @classmethod
    def _scored(cls, edges: EdgeEffects, metric: str) -> tuple[Nodes, np.ndarray, int]:
        """Nodes, scores of all edges, and d_model; they are importance for the clean answer."""
        if not isinstance(edges, EdgeEffects):
            raise DeltapatchError(
                "a circuit is chosen from the effects of all edges, and of a screened sweep few are known: "
                "leave out screen"
            )
        nodes = edges.grid.nodes
        if not edges.grid.together or nodes.keys != "query" or len(edges.edges) < nodes.n_edges:
            raise DeltapatchError(
                "a circuit is chosen from a sweep of all edges, positions together, keys='query': this "
                f"one has {len(edges.edges):,} of {nodes.n_edges:,} edges"
            )
        found = edges.by_node(edges.mean(metric))
        # In denoise the clean run is patched in, and what speaks for its answer raises the metric; in noise
        # it is taken away, and the metric falls.
        scores = np.nan_to_num(found) * check_metric(metric).sign(edges.direction)
        return nodes, scores, int(edges.meta.get("d_model") or 0)

    @classmethod
    def of_scores(
        cls,
        nodes: Nodes,
        scores: np.ndarray,
        d_model: int,
        n: int,
        *,
        by: By = "magnitude",
        greedy: bool = False,
        prune: bool = True,
    ) -> "Circuit":
        """The n best edges by any scores, [sender, receiver]; see `top`."""
        there = existing(nodes)
        n = whole(n, "a circuit's number of edges must be a whole number")
        if not 0 <= n <= there.sum():
            raise DeltapatchError(f"a circuit of {n:,} edges cannot be had: the model has {there.sum():,}")
        judged = np.where(there, _judged(scores, by), -np.inf)
        if greedy:
            kept = _greedy(nodes, judged, n)
        else:
            kept = np.zeros_like(there)
            kept.ravel()[np.argsort(-judged, axis=None, kind="stable")[:n]] = True
        found = cls(nodes, kept, scores, d_model)
        return found.pruned() if prune else found

    def pruned(self) -> "Circuit":
        """Without edges whose sender nothing reaches, or whose receiver does not reach the logits."""
        kept = self.kept.copy()
        owner = _owners(self.nodes)  # [receiver], the sender that it is a part of; the logits' is none
        while True:
            alive = np.zeros(len(kept), dtype=bool)  # [sender], whether it is reached
            alive[owner[:-1][np.any(kept[:, :-1], axis=0)]] = True
            alive[0] = True
            alive &= np.any(kept, axis=1)
            left = kept & alive[:, None] & np.append(alive[owner[:-1]], True)
            if (left == kept).all():
                return replace(self, kept=left)
            kept = left

    # What it holds ----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(np.count_nonzero(self.kept))

    @cached_property
    def edges(self) -> list[tuple[str, str]]:
        """The names of sender and receiver of every edge that is kept."""
        receivers = list(self.nodes.receivers)
        return [(self.nodes.senders[s], receivers[r]) for r, s in np.argwhere(self.kept.T)]

    @property
    def parts(self) -> list[str]:
        """The senders that it keeps an edge from."""
        return [self.nodes.senders[i] for i in np.flatnonzero(self.kept.any(1))]

    def complement(self) -> "Circuit":
        """All other edges."""
        return replace(self, kept=existing(self.nodes) & ~self.kept)

    def wiring(self) -> Wiring:
        """As runs take it."""
        return keeping(self.nodes, self.kept)

    def plot(self, title: str = "") -> Any:
        """A matplotlib Figure: the circuit from the input at the bottom to the logits at the top.

        DeltapatchError where it is empty.
        """
        return looking().plot_circuit(self, title)

    def __repr__(self) -> str:
        return f"Circuit of {len(self):,} of {self.nodes.n_edges:,} edges between {len(self.parts)} senders"

    # Files ------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write EAP-IG's graph JSON. DeltapatchError where the path is taken or cannot be written."""
        nodes = self.nodes
        shape = {"n_layers": nodes.n_layers, "n_heads": nodes.n_heads, "parallel_attn_mlp": nodes.parallel,
                 "d_model": self.d_model, "n_kv_heads": nodes.n_kv_heads}  # fmt: skip
        alive: np.ndarray = np.any(self.kept, axis=1)
        names, receivers = nodes.senders, list(nodes.receivers)
        about = {
            "cfg": shape,
            "nodes": {name: {"in_graph": bool(alive[i])} for i, name in enumerate(names)}
            | {"logits": {"in_graph": True}},
            "edges": {
                f"{names[s]}->{receivers[r]}": {
                    "score": float(self.scores[s, r]),
                    "in_graph": bool(self.kept[s, r]),
                }
                for r, s in np.argwhere(existing(nodes).T)
            },
        }
        file, text = path_of(path, "a circuit"), json.dumps(about)
        with plain_errors(file):
            if not write_new(file, lambda draft: draft.write_text(text, encoding="utf-8")):
                raise DeltapatchError(f"output path {file} is taken: choose another or remove it")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Circuit":
        """Read EAP-IG's graph JSON. DeltapatchError where it cannot be read or is something else."""
        file = path_of(path, "a circuit")
        try:
            about = json.loads(Path(file).read_text(encoding="utf-8"))
            return cls._of_json(about)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
            why = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise DeltapatchError(
                f"{file} cannot be read as a circuit, EAP-IG's graph JSON ({why})"
            ) from error

    @classmethod
    def _of_json(cls, about: dict[str, Any]) -> "Circuit":
        cfg = about["cfg"]
        sizes = [cfg["n_layers"], cfg["n_heads"], cfg.get("n_kv_heads", cfg["n_heads"])]
        if any(type(n) is not int or not 0 < n < 1 << 10 for n in sizes) or sizes[1] % sizes[2]:
            raise ValueError("cfg")
        nodes = Nodes(sizes[0], sizes[1], sizes[2], bool(cfg["parallel_attn_mlp"]))
        row = {name: i for i, name in enumerate(nodes.senders)}
        column = {name: i for i, name in enumerate(nodes.receivers)}
        kept, scores = np.zeros((len(row), len(column)), dtype=bool), np.zeros((len(row), len(column)))
        there = existing(nodes)
        for name, told in about["edges"].items():
            sender, receiver = name.split("->")
            at = row[sender], column[receiver]
            if not there[at] or not math.isfinite(told["score"]):
                raise ValueError(f"edge {name}")
            kept[at], scores[at] = bool(told["in_graph"]), told["score"]
        return cls(nodes, kept, scores, int(cfg.get("d_model", 0)))


def _judged(scores: np.ndarray, by: By) -> np.ndarray:
    """What edges are ranked by. DeltapatchError where that is unknown."""
    return np.abs(scores) if choice(by, ("magnitude", "sign"), "way of choosing") == "magnitude" else scores


def _owners(nodes: Nodes) -> np.ndarray:
    """[receiver], the sender that each receiver is a part of; -1 for the logits."""
    number = {name: i for i, name in enumerate(nodes.senders)}
    return np.array([number.get(name.split("<")[0], -1) for name in nodes.receivers])


def _greedy(nodes: Nodes, judged: np.ndarray, n: int) -> np.ndarray:
    """From the logits back: always the best edge into a node that is kept already."""
    owner = _owners(nodes)
    kept = np.zeros(judged.shape, dtype=bool)
    reached: set[int] = set()
    heap: list[tuple[float, int, int]] = []

    def reach(node: int) -> None:
        if node in reached:
            return
        reached.add(node)
        for receiver in np.flatnonzero(owner == node).tolist():
            for sender in np.flatnonzero(np.isfinite(judged[:, receiver])).tolist():
                heapq.heappush(heap, (-judged[sender, receiver], receiver, sender))

    reach(-1)
    for _ in range(n):
        if not heap:
            break
        _, receiver, sender = heapq.heappop(heap)
        kept[sender, receiver] = True
        reach(sender)
    return kept
