"""Circuits at work: how much of the model's behaviour they keep, MIB's curve, and paths through the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from deltapatch.analysis.circuit import Circuit
from deltapatch.arguments import several
from deltapatch.engine.sweep import run_wired
from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.nodes import Nodes
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.pairs_file import Pairs
from deltapatch.interventions.sources import DIFFERING
from deltapatch.interventions.wirings import Wiring, Wirings, all_own, keeping
from deltapatch.models.model import Model
from deltapatch.models.spec import ModelSpec

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the edges, in MIB's curve


@dataclass(frozen=True, repr=False)
class Faithfulness:
    """What circuits keep of the model's behaviour. The clean run is the base: direction noise.

    Attributes:
        raw: [circuit, pair], the metric of the run in which only the circuit's edges carry their own, against
            the clean run; 0 where nothing is lost.
        empty: [pair], the same with no edge kept.
        share: [circuit], 1 - mean raw / mean empty: 1 all of the model, 0 nothing; MIB's faithfulness, of
            means over pairs.
        metric, source: as asked.
        meta: what was run.
    """

    raw: np.ndarray
    empty: np.ndarray
    share: np.ndarray
    metric: str
    source: str
    meta: dict[str, Any]

    def __repr__(self) -> str:
        shares = ", ".join(f"{share:.3f}" for share in self.share)
        return f"Faithfulness by {self.metric}, {self.source}, {len(self.empty)} pair(s): {shares}"


@dataclass(frozen=True, repr=False)
class Curve:
    """Faithfulness over the share of edges that are kept.

    Attributes:
        shares: of the edges, as asked.
        circuits: at each.
        faithfulness: of these.
        cpr, cmd: MIB's areas between the first share and the last: under the curve, and between it and 1.
    """

    shares: tuple[float, ...]
    circuits: list[Circuit]
    faithfulness: Faithfulness
    cpr: float
    cmd: float

    def __repr__(self) -> str:
        f = self.faithfulness.share
        points = zip(self.shares, self.circuits, f, strict=True)
        lines = [f"{s:>8.1%} {len(c):>9,} edges {x:>8.3f}" for s, c, x in points]
        return "\n".join([*lines, f"CPR {self.cpr:.3f}, CMD {self.cmd:.3f}"])


def faithfulness(
    model: Model,
    pairs: Pairs,
    circuits: Circuit | Sequence[Circuit],
    *,
    metric: str = "logit_diff",
    source: str = "counterpart",
    removed: bool = False,
    **options: Any,
) -> Faithfulness:
    """How much of the model's behaviour circuits keep: all other edges carry what the source run says.

    Args:
        model, pairs: as of `sweep`.
        circuits: one or several.
        metric: its name.
        source: what edges that are removed carry: "counterpart", "zero" or "mean".
        removed: remove the circuits instead, and keep all else.
        options: other options of `run`, but for direction, and those of a run folder.

    Raises:
        DeltapatchError: a circuit is of another model; bad input.
    """
    given = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    if not given or not all(isinstance(circuit, Circuit) for circuit in given):
        raise DeltapatchError("circuits must be one or several Circuit: give at least one")
    if "direction" in options:
        raise DeltapatchError("circuits have the clean run as their base: leave out direction")
    chosen = [circuit.complement() if removed else circuit for circuit in given]
    for circuit in chosen:
        if circuit.nodes != Nodes.of(model.spec):
            raise DeltapatchError(f"{circuit!r} is of another model than {model!r}")
    nothing = keeping(chosen[0].nodes, np.zeros_like(chosen[0].kept))
    wirings = [nothing, *(circuit.wiring() for circuit in chosen)]
    options |= {"direction": "noise", "source": source, "metrics": metric}
    found, meta = wired(model, pairs, wirings, metric, **options)
    lost = found.mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = 1 - lost[1:] / lost[0]
    return Faithfulness(found[1:], found[0], share, metric, source, meta)


def circuit_curve(
    model: Model,
    pairs: Pairs,
    choose: Callable[[int], Circuit],
    *,
    shares: Sequence[float] = SHARES,
    **options: Any,
) -> Curve:
    """MIB's curve: faithfulness of the circuits that keep so many of all edges, and the areas CPR and CMD.

    Args:
        model, pairs: as of `sweep`.
        choose: makes the circuit of n edges, for example ``lambda n: Circuit.top(edges, n)``.
        shares: of all edges, ascending; numbers of edges are rounded down, as MIB does.
        options: of `faithfulness`.
    """
    n_edges = Nodes.of(model.spec).n_edges
    circuits = [choose(int(share * n_edges)) for share in shares]
    found = faithfulness(model, pairs, circuits, **options)
    width, f = np.diff(shares), found.share
    cpr = float((width * (f[1:] + f[:-1]) / 2).sum())
    off = np.abs(1 - f)
    cmd = float((width * (off[1:] + off[:-1]) / 2).sum())
    return Curve(tuple(shares), circuits, found, cpr, cmd)


def path_effects(
    model: Model,
    pairs: Pairs,
    paths: Sequence[Sequence[str]],
    *,
    metric: str = "logit_diff",
    freeze: bool = True,
    **options: Any,
) -> np.ndarray:
    """Effects of paths: a sender's change goes to one receiver, from there to the next, and so to the logits.

    This is path patching (Wang et al. 2023; Goldowsky-Dill et al. 2023): ``["a0.h1", "a1.h0<q>", "logits"]``.

    Args:
        model, pairs: as of `sweep`.
        paths: each a sender, receivers, and "logits" at its end.
        metric: its name.
        freeze: all other edges carry what the unpatched base run says. Else the step into the first receiver
            alone is patched, and all behind it reacts: the total effect of that edge.
        options: other options of `run`, but for those of a run folder.

    Returns:
        [pair, path] float64.

    Raises:
        DeltapatchError: there is no such path.
    """
    nodes = Nodes.of(model.spec)
    given = [list(several(path, "a path", "names of nodes")) for path in paths]
    wirings = [_path(nodes, path, freeze) for path in given]
    if not wirings:
        raise DeltapatchError("there are no paths: give at least one")
    found, _ = wired(model, pairs, wirings, metric, **options | {"metrics": metric})
    return found.T


def _path(nodes: Nodes, path: Sequence[object], freeze: bool) -> Wiring:
    """The wiring of a path."""
    senders, receivers = nodes.senders, list(nodes.receivers)
    whole = all_own(nodes)
    own = np.zeros_like(whole.own) if freeze else whole.own.copy()
    source = np.zeros_like(own)
    if len(path) < 2 or path[-1] != "logits":
        raise DeltapatchError(f"a path leads from a sender over receivers to logits, not {shown(path)}")
    for i, (sender, receiver) in enumerate(pairwise(path)):
        speaker = str(sender).split("<")[0]
        if speaker not in senders or receiver not in receivers:
            raise DeltapatchError(f"path {shown(path)}: there is no edge from {sender} to {receiver}")
        at = senders.index(speaker), receivers.index(str(receiver))
        if not whole.own[at]:
            raise DeltapatchError(f"path {shown(path)}: {sender} does not come before {receiver}")
        if i == 0:
            source[at], own[at] = True, False
        else:
            own[at] = True
    return Wiring(own, source)


def wired(
    model: Model, pairs: Pairs, wirings: Sequence[Wiring], metric: str, **options: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    """Run every wiring of every pair: a metric, [wiring, pair], and what was run."""
    n = len(wirings)

    def made(spec: ModelSpec, found: list[EncodedPair]) -> Wirings:
        each = np.repeat(np.arange(len(found)), n), np.tile(np.arange(n), len(found))
        return Wirings(
            Nodes.of(spec), wirings, *each, differs=options.get("source", "counterpart") in DIFFERING
        )

    found = run_wired(model, pairs, made, **options)
    return found.values(metric).reshape(-1, n).T, found.meta
