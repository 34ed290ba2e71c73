"""What passes found, put together: the measured numbers of every effect, and the unpatched runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from deltapatch.interventions.edges import EdgeGrid
from deltapatch.interventions.given import Listed
from deltapatch.interventions.grid import Grid
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.effects import Effects, SiteEffects
from deltapatch.results.metrics import Direction, Reference
from deltapatch.results.outcome import Outcome

Found: TypeAlias = Effects | EdgeEffects | Outcome


@dataclass(frozen=True)
class PassEffects:
    """What one pass found.

    Attributes:
        out: [row], where its effects go among all.
        pairs: [pair], the numbers of its pairs.
        measured: name -> [row].
        reference: of its pairs.
        seconds: that it took.
    """

    out: np.ndarray
    pairs: np.ndarray
    measured: dict[str, np.ndarray]
    reference: Reference
    seconds: float = 0.0


class Gathered:
    """All effects, filled pass by pass, in order: pairs that are in several passes keep the last one's runs.

    Args:
        names: of the measured numbers.
        dtype: of them.
        n_effects, n_pairs: how many there are.
    """

    def __init__(self, names: Sequence[str], dtype: type[np.floating], n_effects: int, n_pairs: int) -> None:
        self.measured = {name: np.full(n_effects, np.nan, dtype=dtype) for name in names}
        self.reference = Reference.empty(n_pairs)
        self.passes = self.rows = 0
        self.seconds = 0.0

    def add(self, found: PassEffects) -> None:
        """Put what a pass found in its place."""
        for name, values in found.measured.items():
            self.measured[name][found.out] = values
        self.reference.put(found.pairs, found.reference)
        self.passes += 1
        self.rows += len(found.out)
        self.seconds += found.seconds


def with_axes(
    interventions: Grid | EdgeGrid | Listed,
    gathered: Gathered,
    pairs: list[EncodedPair],
    direction: Direction,
    meta: dict[str, Any],
) -> Found:
    """What the passes found, as users take it: effects of a grid by site or by edge, or those of a list."""
    if isinstance(interventions, Listed):
        return Outcome(gathered.measured, interventions, pairs, gathered.reference, direction, meta)
    if isinstance(interventions, EdgeGrid):
        arrays = {name: values.reshape(interventions.shape) for name, values in gathered.measured.items()}
        return EdgeEffects(interventions, arrays, pairs, gathered.reference, direction, meta)
    sites = {}
    for g in interventions.sites:
        shape = g.shape(len(pairs))
        own = slice(g.offset, g.offset + math.prod(shape))
        arrays = {name: values[own].reshape(shape) for name, values in gathered.measured.items()}
        sites[g.site.name] = SiteEffects(g.site.name, g.layers, g.positions, arrays)
    return Effects(sites, pairs, gathered.reference, direction, meta)
