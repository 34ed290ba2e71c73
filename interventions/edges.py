"""Edges: what a sweep of edges patches, as axes, and the edges of one pair as arrays, never as objects.

An edge sends one sender's change (source - base) into what one receiver reads, and into nothing else. Its
total effect is what follows when everything behind the receiver reacts; its direct effect what follows when
what the receiver then says goes to the logits alone.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.grid import Grid
from deltapatch.interventions.nodes import LOGITS, MLP, OF_SENDERS, READS, Nodes, Q
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.roles import Roles
from deltapatch.interventions.runs import RunShape
from deltapatch.interventions.table import (
    EDGE_EDITS,
    EDIT,
    PLACE,
    TOGETHER,
    PatchTable,
    is_direct,
    is_together,
    row_tokens,
)
from deltapatch.models.spec import ModelSpec

Effect = Literal["total", "direct"]
EFFECTS: dict[str, tuple[Effect, ...]] = {
    "total": ("total",),
    "direct": ("direct",),
    "both": ("total", "direct"),
}
SETTINGS = ("nodes", "senders", "receivers", "positions", "effect", "keys")


@dataclass(frozen=True)
class EdgeGrid:
    """What a sweep of edges patches. Effects are an array [pair, effect, position, edge], counted flat.

    DeltapatchError where there is no edge at all.

    Attributes:
        nodes: of the model.
        senders: their numbers.
        receivers: their names.
        positions: as given; just TOGETHER for all of a prompt at once.
        effects: which are measured.
        roles: of the pairs' prompts.
        n_pairs: of prompts.
    """

    nodes: Nodes
    senders: list[int]
    receivers: list[str]
    positions: list[int | str]
    effects: tuple[Effect, ...]
    roles: Roles
    n_pairs: int

    def __post_init__(self) -> None:
        if not len(self.edges):
            raise DeltapatchError(
                "there is no edge between these senders and receivers: a sender comes before what it sends to"
            )

    @cached_property
    def edges(self) -> np.ndarray:
        """[edge, (sender, receiver)], as `Nodes.edges` gives them."""
        return self.nodes.edges(self.senders, self.receivers)

    @property
    def sender_names(self) -> list[str]:
        """Of the senders, in order."""
        return [self.nodes.senders[i] for i in self.senders]

    @property
    def together(self) -> bool:
        """Whether edges are patched at all positions of a prompt at once."""
        return self.positions == [TOGETHER]

    def number_of(self, effect: str | None) -> int:
        """Which of `effects` a name means, the first where there is none.

        Raises:
            DeltapatchError: it is not among them.
        """
        name = effect or self.effects[0]
        if name not in self.effects:
            raise DeltapatchError(
                f"effect {name!r} was not measured: this run has {' and '.join(self.effects)}"
            )
        return [*self.effects].index(name)

    @cached_property
    def reads(self) -> np.ndarray:
        """[edge], what the receiver of each reads, as a number of `nodes.READS`."""
        of_receiver = np.array([self.nodes.receivers[name].reads for name in self.receivers])
        found: np.ndarray = of_receiver[self.edges[:, 1]]
        return found

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[pair, effect, position, edge]."""
        return self.n_pairs, len(self.effects), len(self.positions), len(self.edges)

    @property
    def n_effects(self) -> int:
        """How many numbers there are, those that a pair does not have with them."""
        return int(np.prod(self.shape))

    @property
    def places(self) -> frozenset[str]:
        """What of the source runs is looked at."""
        return OF_SENDERS

    @property
    def acted(self) -> list[int]:
        """The pairs that are patched: all of them."""
        return list(range(self.n_pairs))

    def settings(self) -> dict[str, Any]:
        """What tells it from others, by the names of SETTINGS."""
        effect = "both" if len(self.effects) > 1 else self.effects[0]
        shape = asdict(self.nodes)
        keys = shape.pop("keys")
        found = (shape, self.sender_names, self.receivers, self.positions, effect, keys)
        return dict(zip(SETTINGS, found, strict=True))

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any], n_pairs: int) -> "EdgeGrid":
        """What `settings` told. ValueError, KeyError or TypeError where it makes no sense."""
        shape, senders, receivers, positions, effect, keys = (settings[name] for name in SETTINGS)
        nodes = Nodes(**shape, keys=keys)
        nodes.check()
        order = {name: i for i, name in enumerate(nodes.receivers)}
        number = {name: i for i, name in enumerate(nodes.senders)}
        sends, reads = [number[name] for name in senders], [order[name] for name in receivers]
        if not sends or not reads or sends != sorted(set(sends)) or reads != sorted(set(reads)):
            raise ValueError("senders or receivers")
        if not isinstance(positions, list) or not positions or {type(p) for p in positions} - {int, str}:
            raise ValueError("positions")
        roles = Roles(settings["direction"], settings["source"])
        return cls(nodes, sends, list(receivers), positions, EFFECTS[effect], roles, n_pairs)

    def starts(self, pair: EncodedPair) -> tuple[np.ndarray, np.ndarray]:
        """The positions that a pair has: which they are among `positions`, and where in its base run."""
        if self.together:
            return np.zeros(1, np.int64), np.array([self.roles.first(pair)])
        places = ((i, self.roles.place(pair, at)) for i, at in enumerate(self.positions))
        spots = [(i, place) for i, place in places if place is not None]
        return np.array([i for i, _ in spots], np.int64), np.array([p for _, p in spots], np.int64)

    def table(self, number: int, pair: EncodedPair) -> tuple[PatchTable, np.ndarray]:
        """One pair's edges, each a row of one patch, and where their effects go: [row]."""
        which, start = self.starts(pair)
        sender, receiver = self.edges.T
        found = [self.nodes.receivers[name] for name in self.receivers]
        layer, reads, head = np.array(found, dtype=np.int64).T[:, receiver]
        index = code(self.nodes, sender, layer, head)
        place = PLACE[READS[0]] + reads
        shape = (len(self.effects), len(start), len(sender))
        last = self.nodes.n_layers - 1
        layers = np.stack(
            [layer if effect == "total" else np.full_like(layer, last) for effect in self.effects]
        )
        kind = "together" if self.together else "one"
        edit = np.array([EDIT[f"{effect} {kind}"] for effect in self.effects])
        out = number * np.prod(self.shape[1:]) + (
            np.arange(shape[0])[:, None, None] * self.shape[2] + which[:, None]
        ) * self.shape[3] + np.arange(shape[2])  # fmt: skip
        columns = (layers[:, None], place, start[:, None], edit[:, None, None], index)
        flat = [np.broadcast_to(column, shape).ravel() for column in columns]
        n = len(flat[0])
        return PatchTable(n, np.zeros(n, np.int64), np.arange(n), *flat), out.ravel().astype(np.int64)

    def n_rows(self, number: int, pair: EncodedPair) -> int:
        """How many interventions of a pair there are."""
        return len(self.effects) * len(self.starts(pair)[0]) * len(self.edges)

    def row_sizes(self, number: int, pair: EncodedPair, run: RunShape) -> tuple[np.ndarray, np.ndarray]:
        """[row] twice, the tokens and the layer of each intervention of a pair, in the order of `table`."""
        table, _ = self.table(number, pair)
        return row_tokens(table, run), table.layer

    def entering(self, number: int, pair: EncodedPair, run: RunShape, n_layers: int) -> np.ndarray:
        """[1 + layer], the row tokens of a pair that enter at the embedding and in each layer."""
        tokens, layers = self.row_sizes(number, pair, run)
        return np.bincount(1 + layers, tokens, 1 + n_layers).astype(np.int64)

    def describe(self, effect: int) -> str:
        """Which edge an effect belongs to, in words."""
        pair, kind, position, edge = np.unravel_index(effect, self.shape)
        sender, receiver = self.edges[edge]
        where = f"position {self.positions[position]}" if not self.together else "all positions"
        name = f"{self.nodes.senders[sender]} -> {self.receivers[receiver]}"
        return f"pair {pair}, {self.effects[kind]} effect of {name}, {where}"


def grid_of(settings: Mapping[str, Any], n_pairs: int) -> Grid | EdgeGrid:
    """The grid that the settings of a run tell, of sites or of edges."""
    return (EdgeGrid if "senders" in settings else Grid).of_settings(settings, n_pairs)


def own_flops(table: PatchTable, nodes: Nodes, spec: ModelSpec, run: RunShape) -> int:
    """FLOPs that some edges of a pair need in the layers of their receivers, messages included."""
    sender, layer, _ = decode(nodes, table.index)
    reads, tokens = table.place - PLACE[READS[0]], row_tokens(table, run)
    direct = is_direct(table.edit)
    patched = np.where(is_together(table.edit), tokens, tokens > 0)  # tokens at which the sender speaks
    at_end, ends = (tokens > 0) * run.reads, direct | (layer == nodes.n_layers - 1)
    mlp = 2 * (3 if spec.gated else 2) * spec.d_model * spec.d_mlp
    qkv = 2 * spec.d_model * spec.d_head * (spec.n_heads + 2 * spec.n_kv_heads)
    heads = np.where(nodes.heads_of(reads) == nodes.n_heads, 1, nodes.n_heads // nodes.n_kv_heads)
    behind = np.where(spec.parallel | direct, 0, mlp)
    of_heads = np.where(ends, at_end, np.where(reads == Q, patched, tokens))
    of_heads = of_heads * (2 * spec.d_model * spec.d_head * heads + behind)
    of_mlp = np.where(ends, at_end, patched) * mlp
    own = np.select([reads == LOGITS, reads == MLP], [0 * of_mlp, of_mlp], of_heads)
    heard = reads < MLP  # each message goes through the weights of a layer once, for all heads there
    said, first = np.unique(np.stack([sender, layer, table.position])[:, heard], axis=1, return_index=True)
    return int(own.sum() + patched[heard][first].sum() * qkv) if said.size else int(own.sum())


def code(nodes: Nodes, sender: np.ndarray, layer: np.ndarray, head: np.ndarray) -> np.ndarray:
    """What a patch table has as the `index` of an edge: its sender, its receiver's layer and head."""
    return (sender * nodes.n_layers + layer) * nodes.n_heads + head


def decode(nodes: Nodes, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sender, layer and head of `code`."""
    rest, head = np.divmod(index, nodes.n_heads)
    sender, layer = np.divmod(rest, nodes.n_layers)
    return sender, layer, head


def is_edge(columns: Mapping[str, np.ndarray], nodes: Nodes) -> np.ndarray:
    """[patch], whether the columns of a table, whatever a file says, are those of an edge."""
    edit, index = columns["edit"], columns["index"]
    reads = columns["place"] - PLACE[READS[0]]
    right = (reads >= 0) & (reads < len(READS)) & np.isin(edit, [EDIT[name] for name in EDGE_EDITS])
    reads = np.where(right, reads, LOGITS)
    sender, layer, head = decode(nodes, index)
    heads, mlp = reads < MLP, 0 if nodes.parallel else nodes.n_heads
    first = 1 + layer * (nodes.n_heads + 1)  # of a layer, as `Nodes.attention` has it
    speaks = np.where(reads == LOGITS, nodes.n_senders, first + np.where(heads, 0, mlp))
    found: np.ndarray = right & (sender < speaks) & (head < nodes.heads_of(reads))
    return found
