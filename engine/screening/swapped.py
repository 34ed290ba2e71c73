"""Swaps of a grid: what they change where they go, which gradients are multiplied with."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.question import Question
from deltapatch.engine.screening.lines import Lines
from deltapatch.engine.wavefront.block import Layer
from deltapatch.engine.wavefront.prompts import Prompts
from deltapatch.interventions.grid import Grid, SiteGrid
from deltapatch.interventions.table import TOGETHER, place_of
from deltapatch.kernels.device import upload


class Swapped:
    """The swaps of some pairs.

    Args:
        question: of a sweep.
        found: [effect], where estimates go.
        numbers: of the pairs.
        prompts: of these.
        lines: makes the lines of a pair, by its place among these, where each vector has one; None where
            gradients are those of runs.
    """

    def __init__(
        self,
        question: Question,
        found: np.ndarray,
        numbers: Sequence[int],
        prompts: Prompts,
        lines: Callable[[int], Lines] | None,
    ) -> None:
        assert isinstance(question.interventions, Grid)
        self.grid, self.found, self.numbers, self.prompts = question.interventions, found, numbers, prompts
        self.lines, self.device = lines, question.model.device
        self.changes: dict[tuple[str, int], Tensor] = {}  # (site, row): [spot, ...], until they are used
        # Where the patches of a site are: which pair and column each is of, and its base token.
        self.spots = {
            g.site.name: np.array(
                [
                    (number, column, int(prompts.shapes.base[i]) + at)
                    for i, number in enumerate(numbers)
                    for column, joined in g.spots(question.pairs[number])
                    for at in joined
                ]
            ).reshape(-1, 3)
            for g in self.grid.sites
        }
        for g in self.grid.sites:
            pair, column, _ = self.spots[g.site.name].T
            self._of(g)[pair, :, column] = 0

    def places(self, l: int) -> list[str]:
        """Where a layer is patched; -1 is the embedding."""
        return sorted({g.site.place for g, at in self._sites() if l in at})

    def sources(self, l: int) -> list[str]:
        """What of a layer's source runs is looked at."""
        return self.places(l)

    def keep(self, l: int, deltas: dict[str, Tensor], layer: Layer | None) -> None:
        """Keep (source - base) of what is patched at a layer, where it is patched."""
        for g, row, spots in self._here(l):
            delta = deltas[g.site.place]
            token = upload(self.prompts.source_token(spots[:, 2]), self.device)
            self.changes[g.site.name, row] = delta[token]

    def put(self, l: int, slopes: dict[str, Tensor]) -> None:
        """What patches of a layer are estimated to do: gradients, by place, times what they change there."""
        for g, row, spots in self._here(l):
            change = self.changes.pop((g.site.name, row))
            if self.lines is not None:
                self._put_lines(self.lines, g, (row, l), spots, change)
                continue
            slope = slopes[g.site.place][upload(spots[:, 2], self.device)]
            self._add(g, row, spots, self._product(g, row, slope, change))

    def _sites(self) -> Iterator[tuple[SiteGrid, np.ndarray]]:
        """The sites, and the layers of their places."""
        return ((g, np.asarray(place_of(g.site.name, g.layers)[1])) for g in self.grid.sites)

    def _of(self, g: SiteGrid) -> np.ndarray:
        """The estimates of a site, [pair, layer, position, ...]."""
        shape = g.shape(self.grid.n_pairs)
        return self.found[g.offset : g.offset + int(np.prod(shape))].reshape(shape)

    def _here(self, l: int) -> Iterator[tuple[SiteGrid, int, np.ndarray]]:
        """The sites that have patches at a layer: which of their layers it is, and where they can matter."""
        prompt = np.zeros(self.grid.n_pairs, dtype=np.int64)
        prompt[list(self.numbers)] = self.prompts.shapes.base + self.prompts.shapes.prompt
        for g, at in self._sites():
            spots = self.spots[g.site.name]
            for row in np.flatnonzero(at == l).tolist():
                yield g, row, spots[spots[:, 2] < prompt[spots[:, 0]]]

    def _put_lines(
        self,
        lines: Callable[[int], Lines],
        g: SiteGrid,
        at: tuple[int, int],
        spots: np.ndarray,
        change: Tensor,
    ) -> None:
        """The same for a site, each gradient the mean along a line of the vector that is patched.

        Args:
            at: which of the site's layers, and the layer of its place.
        """
        row, l = at
        for i, number in enumerate(self.numbers):
            mine = np.flatnonzero(spots[:, 0] == number)
            if len(mine):
                own, together = change[upload(mine, self.device)], g.positions == [TOGETHER]
                slope = lines(i).slopes((g.site.place, l), spots[mine, 2], own, together=together)
                self._add(g, row, spots[mine], self._product(g, row, slope, own))

    def _product(self, g: SiteGrid, row: int, slope: Tensor, change: Tensor) -> Tensor:
        """Gradient times change, [spot, ...] both, of each entry, or of the parts along each direction."""
        if g.numbers is None:
            return slope * change
        rows = np.concatenate([self.grid.vectors.arrays[n] for n in g.numbers[row].tolist()])
        along = torch.from_numpy(rows.T).to(change)  # [d_model, direction], each of length one
        return (slope @ along) * (change @ along)

    def _add(self, g: SiteGrid, row: int, spots: np.ndarray, product: Tensor) -> None:
        """Add gradient times change, [spot, ...], to the estimates: of a vector, or a head's, all of it."""
        axes = {"": 1, "head": 2}.get(g.site.index.counts)
        change = product if axes is None else product.flatten(axes).sum(axes)
        np.add.at(self._of(g)[:, row], (spots[:, 0], spots[:, 1]), change.cpu().numpy())
