"""Work: what a job carries out, and who keeps what it finds."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from deltapatch.interventions.grid import Grid
from deltapatch.interventions.table import PatchTable
from deltapatch.results.measured import Gathered, PassEffects
from deltapatch.results.truth import Truth

if TYPE_CHECKING:
    from deltapatch.engine.job import Job

Tables = Iterable[tuple[int, PatchTable, np.ndarray]]


@dataclass(frozen=True)
class Work:
    """What a job carries out.

    Attributes:
        order: pairs, by the shape of their runs.
        table_of: the interventions of a pair, and where their effects go.
        n_effects: of all pairs.
        n_reads: positions that they are read at, one each where answers are single tokens.
        row_layers: row tokens times the layers that they pass.
        places: where patches go.
        describe: an effect in words.
    """

    order: list[int]
    table_of: Callable[[int], tuple[PatchTable, np.ndarray]]
    n_effects: int
    n_reads: int
    row_layers: int
    places: frozenset[str]
    describe: Callable[[int], str]

    @classmethod
    def of_sweep(cls, grid: Grid, job: "Job") -> "Work":
        """Every patch of a grid, each alone."""
        return cls(
            job.ordered(range(len(job.pairs))),
            lambda pair: grid.table(pair, job.pairs[pair]),
            grid.n_effects,
            grid.n_effects // len(job.pairs) * sum(run.reads for run in job.runs),
            int(sum(grid.in_flight(p, n, job.model.spec.n_layers).sum() for p, n in job.shapes())),
            frozenset(g.site.place for g in grid.sites),
            lambda i: grid.describe(i, len(job.pairs)),
        )

    def tables(self) -> Tables:
        """Of every pair: its number, interventions, and where their effects go."""
        return ((pair, *self.table_of(pair)) for pair in self.order)


class Keeper(Protocol):
    """Keeps what passes find where it survives the process."""

    seconds_kept: float  # that the passes took which were already there

    @property
    def whole(self) -> bool:
        """Whether this process does all passes, not a part of them."""

    @property
    def truth(self) -> Truth | None:
        """Of the sample."""

    def wants(self, number: int) -> bool:
        """Whether this process does that pass."""

    def kept(self, number: int, out: np.ndarray, pairs: list[int], gathered: Gathered) -> PassEffects | None:
        """What the pass found earlier; None where it is to be done."""

    def keep(self, number: int, found: PassEffects) -> None:
        """Keep what the pass found."""
