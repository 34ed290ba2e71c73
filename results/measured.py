"""What passes found, put together: the measured numbers of every effect, and the unpatched runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deltapatch.interventions.grid import Grid
from deltapatch.results.effects import SiteEffects
from deltapatch.results.metrics import Reference


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


def split(grid: Grid, measured: Mapping[str, np.ndarray], n_pairs: int) -> dict[str, SiteEffects]:
    """The measured numbers of a sweep, [effect], by site."""
    out = {}
    for g in grid.sites:
        shape = g.shape(n_pairs)
        own = slice(g.offset, g.offset + int(np.prod(shape)))
        arrays = {name: values[own].reshape(shape) for name, values in measured.items()}
        out[g.site.name] = SiteEffects(g.site.name, g.layers, g.positions, arrays)
    return out
