"""Exact ACDC: edges are removed one by one, as long as a removal costs less than a threshold.

The sequential algorithm (Conmy et al. 2023) with exact effects: edges in a fixed order, from the logits
back to the input; an edge stays removed where the loss, averaged over pairs, grows by less than the
threshold against the circuit so far. Many candidates go in one pass: it is guessed which will be removed,
the circuits that follow from the guesses are run together, and from the first wrong guess on they are run
anew. The result is that of one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltapatch.analysis.circuit import Circuit
from deltapatch.analysis.circuit_runs import wired
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.nodes import Nodes
from deltapatch.interventions.pairs_file import Pairs
from deltapatch.interventions.wirings import existing, keeping
from deltapatch.models.model import Model
from deltapatch.results.metrics import check_metric

_AT_ONCE = 64  # candidates in a pass
_RECENT = 32  # decisions that a guess goes by
_SAMPLE = 16  # circuits that are run in float64 too


@dataclass(frozen=True)
class Acdc:
    """What ACDC found.

    Attributes:
        circuit: what is left, pruned; its scores are the increments of the loss.
        kept: [sender, receiver] bool, before pruning.
        increments: [sender, receiver], how much the loss grew by an edge's removal; NaN where none is.
        threshold: below which an edge was removed.
        noise: how far losses are from float64, at most, in a sample of the circuits that were met.
        close: edges whose decision lies within twice the noise of the threshold, (sender, receiver).
        runs: circuits that were run, and of them `wasted` after a wrong guess.
        wasted: see there.
    """

    circuit: Circuit
    kept: np.ndarray
    increments: np.ndarray
    threshold: float
    noise: float
    close: list[tuple[str, str]]
    runs: int
    wasted: int


def order(nodes: Nodes) -> list[tuple[int, int]]:
    """All edges in the order in which ACDC meets them: receivers from the logits back, senders likewise."""
    there = existing(nodes)
    return [(int(s), int(r)) for r, s in np.argwhere(there.T)[::-1]]


def acdc(
    model: Model,
    pairs: Pairs,
    threshold: float,
    *,
    metric: str = "kl",
    source: str = "counterpart",
    at_once: int = _AT_ONCE,
    **options: Any,
) -> Acdc:
    """Remove edges one by one, as long as the loss grows by less than a threshold.

    Args:
        model, pairs: as of `sweep`.
        threshold: of the metric, averaged over pairs.
        metric: the loss: one that grows as the run moves away from the clean one ("kl"), or falls
            ("logit_diff"), which is then taken with the opposite sign.
        source: what removed edges carry.
        at_once: candidates in a pass; the result does not depend on it.
        options: other options of `run`, but for direction and those of a run folder.

    Raises:
        DeltapatchError: bad input.
    """
    if "direction" in options:
        raise DeltapatchError("circuits have the clean run as their base: leave out direction")
    if not threshold > 0:
        raise DeltapatchError(f"threshold must be more than 0, not {threshold:g}")
    sign = check_metric(metric).sign("noise")
    nodes, every = Nodes.of(model.spec), existing(Nodes.of(model.spec))
    options |= {"direction": "noise", "source": source, "metrics": metric, "noise_sample": 0}

    def losses(circuits: Sequence[np.ndarray], **other: Any) -> np.ndarray:
        """Of circuits: mean over pairs."""
        found, _ = wired(model, pairs, [keeping(nodes, kept) for kept in circuits], metric, **options | other)
        return sign * found.mean(1)

    left = order(nodes)
    kept, increments = every.copy(), np.full(every.shape, np.nan)
    now, runs, wasted = 0.0, 0, 0  # the whole model loses nothing
    met: list[np.ndarray] = []
    went = [True] * _RECENT  # whether each of the last edges was removed
    while left:
        # Guess that the next ones all go the way of most: each candidate without those before it. As many as
        # may pass before a guess is wrong.
        share = sum(went) / _RECENT
        expect = share >= 0.5
        some = left[: max(4, min(at_once, round(2 / (min(share, 1 - share) + 1 / _RECENT))))]
        tried, state = [], kept
        for edge in some:
            without = state.copy()
            without[edge] = False
            tried.append(without)
            state = without if expect else state
        found = losses(tried)
        runs += len(tried)
        done = 0
        for edge, without, loss in zip(some, tried, found.tolist(), strict=True):
            increments[edge] = loss - now
            removed = loss - now < threshold
            went = [*went[1:], removed]
            done += 1
            if removed:
                kept, now = without, loss
            if removed != expect:
                break
        met = [*met, tried[0]][-_SAMPLE:]
        wasted += len(tried) - done
        left = left[done:]
    noise = 0.0
    if options.get("precision") != "fp64":
        sample = [*met[: _SAMPLE - 1], kept]
        noise = float(np.abs(losses(sample) - losses(sample, precision="fp64")).max())
        runs += 2 * len(sample)
    close = np.abs(increments - threshold) <= 2 * noise
    receivers = list(nodes.receivers)
    names = [(nodes.senders[s], receivers[r]) for s, r in np.argwhere(close)] if noise else []
    whole = Circuit(nodes, kept, np.nan_to_num(increments), model.spec.d_model)
    return Acdc(whole.pruned(), kept, increments, threshold, noise, names, runs, wasted)
