"""Wirings: what every edge of the model carries in a run, so that each receiver reads a stream of its own.

An edge carries what its sender says in this run (own), what it says in the source run (source), or what it
says in the unpatched base run. A circuit is a wiring whose removed edges carry the source; a path one whose
other edges carry the base; a patch that only some receivers see one whose other edges all carry their own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.given import Intervention, Listed, Patch
from deltapatch.interventions.nodes import READS, Nodes
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.runs import RunShape
from deltapatch.interventions.sites import find_site
from deltapatch.interventions.sources import DIFFERING
from deltapatch.interventions.table import EDIT, PLACE, PatchTable, row_tokens
from deltapatch.models.spec import ModelSpec


class At(NamedTuple):
    """One edge that carries the source at one position alone."""

    position: int
    sender: int
    receiver: int


@dataclass(frozen=True)
class Wiring:
    """What the edges carry; senders and receivers are all of the model, in the order of `Nodes`.

    Attributes:
        own: [sender, receiver] bool, edges that carry what the sender says in this run.
        source: [sender, receiver] bool, those that carry the source at every position of the prompt; no edge
            is in both. All others carry what the base run says.
        at: edges that carry the source at single positions, whatever they carry elsewhere.
    """

    own: np.ndarray
    source: np.ndarray
    at: tuple[At, ...] = ()

    def weights(self, receivers: slice, senders: int, positions: Sequence[int], prompt: int) -> np.ndarray:
        """[2, position, receiver, sender]: which edges carry their own, and which the source.

        Args:
            receivers: some of them.
            senders: the first so many.
            positions: of the run.
            prompt: after so many tokens nothing carries the source: what would, carries its own.
        """
        own, source = (kind[:senders, receivers].T for kind in (self.own, self.source))
        shape = (len(positions), *own.shape)
        out = np.stack([np.broadcast_to(own, shape), np.broadcast_to(source, shape)])
        after = np.asarray(positions) >= prompt
        out[0, after] |= out[1, after]
        out[1, after] = False
        for at in self.at:
            receiver, place = at.receiver - receivers.start, at.position - positions[0]
            if 0 <= receiver < shape[1] and at.sender < senders and 0 <= place < len(positions):
                out[0, place, receiver, at.sender] = False
                out[1, place, receiver, at.sender] = True
        return out


@dataclass(frozen=True)
class Wirings:
    """Wired runs of pairs: their effects are [run].

    Attributes:
        nodes: of the model.
        wirings: what there is to choose from.
        pair, wiring: [run], the pair and the number of its wiring.
        differs: whether the source says nothing new where both prompts are the same up to a position.
    """

    nodes: Nodes
    wirings: Sequence[Wiring]
    pair: np.ndarray
    wiring: np.ndarray
    differs: bool

    @property
    def n_effects(self) -> int:
        """One a run."""
        return len(self.pair)

    @property
    def places(self) -> frozenset[str]:
        """What of the source runs is looked at."""
        return frozenset(("z", "mlp_out"))

    @cached_property
    def acted(self) -> list[int]:
        """The pairs that are run, ascending."""
        return np.unique(self.pair).tolist()

    def table(self, number: int, pair: EncodedPair) -> tuple[PatchTable, np.ndarray]:
        """One pair's runs, a row of one entry each, and where their effects go: [row]."""
        out = np.flatnonzero(self.pair == number)
        n, start = len(out), pair.first_difference if self.differs else 0
        zero = np.zeros(n, np.int64)
        place, edit = PLACE[READS[-1]], EDIT["total together"]
        columns = (zero, zero + place, zero + start, zero + edit, self.wiring[out])
        return PatchTable(n, zero, np.arange(n), *columns), out

    def n_rows(self, number: int, pair: EncodedPair) -> int:
        """How many runs of a pair there are."""
        return int((self.pair == number).sum())

    def row_sizes(self, number: int, pair: EncodedPair, run: RunShape) -> tuple[np.ndarray, np.ndarray]:
        """[row] twice, the tokens and the first layer of each run of a pair."""
        table, _ = self.table(number, pair)
        return row_tokens(table, run), table.layer

    def describe(self, effect: int) -> str:
        """A run in words."""
        return f"pair {self.pair[effect]}, wiring {self.wiring[effect]}"

    def settings(self) -> dict[str, Any]:
        """What tells them from others."""
        digest = hashlib.sha256(repr((self.nodes, [w.at for w in self.wirings])).encode())
        for array in (self.pair, self.wiring, *(a for w in self.wirings for a in (w.own, w.source))):
            digest.update(np.ascontiguousarray(array))
        return {"wirings": {"number": self.n_effects, "sha256": digest.hexdigest()}}


def all_own(nodes: Nodes) -> Wiring:
    """The wiring of the model as it is: every edge carries what its sender says."""
    own = existing(nodes)
    return Wiring(own, np.zeros_like(own))


def keeping(nodes: Nodes, kept: np.ndarray) -> Wiring:
    """The wiring of a circuit: edges that are kept, [sender, receiver], carry their own, others source."""
    return Wiring(kept, existing(nodes) & ~kept)


def existing(nodes: Nodes) -> np.ndarray:
    """[sender, receiver] bool, whether there is an edge."""
    before = np.array([nodes.before(receiver) for receiver in nodes.receivers.values()])
    found: np.ndarray = np.arange(nodes.n_senders)[:, None] < before
    return found


@dataclass(frozen=True)
class WiredList(Wirings):
    """Given interventions some of whose patches only some receivers see.

    Attributes:
        listed: what was given, which is what results and run folders hold.
    """

    listed: Listed

    def describe(self, effect: int) -> str:
        """An intervention in words."""
        return self.listed.describe(effect)

    def settings(self) -> dict[str, Any]:
        """What tells them from others."""
        return self.listed.settings()


def wired_interventions(
    interventions: Sequence[Intervention],
    listed: Listed,
    pairs: Sequence[EncodedPair],
    spec: ModelSpec,
    source: str,
) -> WiredList:
    """Given interventions some of whose patches only some receivers see.

    Args:
        interventions: as `checked` gives them.
        listed: the same, from `listed_interventions`.
        source: where patches come from.

    Raises:
        DeltapatchError: a patch is not at what a node says, or comes after all that should see it.
    """
    nodes, whole = Nodes.of(spec), all_own(Nodes.of(spec))
    order = {name: i for i, name in enumerate(nodes.receivers)}
    wirings = []
    for number, intervention in enumerate(interventions):
        at: list[At] = []
        for patch in intervention.patches:
            senders = _senders(nodes, patch, f"intervention {number}")
            chosen = list(order) if patch.into is None else nodes.choose_receivers(patch.into)
            position = pairs[intervention.pair].resolve(patch.position)
            assert position is not None
            found = [At(position, s, order[r]) for s in senders for r in chosen if whole.own[s, order[r]]]
            if not found:
                raise DeltapatchError(
                    f"intervention {number}: {patch.site} of layer {patch.layer} does not come before "
                    f"{shown(patch.into)}"
                )
            at += found
        wirings.append(replace(whole, at=tuple(at)))
    pair = listed.table_of_all.pair
    return WiredList(nodes, wirings, pair, np.arange(len(wirings)), source in DIFFERING, listed)


def _senders(nodes: Nodes, patch: Patch, where: str) -> list[int]:
    """The nodes whose saying a patch replaces. DeltapatchError where it is at something else."""
    site, first = find_site(patch.site)[0].name, nodes.attention(patch.layer)
    if patch.along is not None or patch.add is not None:
        raise DeltapatchError(
            f"{where}: where patches have `into`, all swap a whole node: leave out along and add"
        )
    if site == "z" and patch.index is not None:
        return [first + patch.index]
    if site == "attn_out":
        return list(range(first, first + nodes.n_heads))
    if site == "mlp_out":
        return [nodes.mlp(patch.layer)]
    if site == "resid_pre" and patch.layer == 0:
        return [0]
    raise DeltapatchError(
        f"{where}: where patches have `into`, all are at what nodes say (z, attn_out, mlp_out, or resid_pre "
        f"of layer 0), not {site} of layer {patch.layer}"
    )
