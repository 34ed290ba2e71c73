"""deltapatch's screen: estimates of all effects, alone and with the largest and a sample computed exactly."""

from typing import Any

import numpy as np

from deltapatch.bench.peers.attribution import of_answers
from deltapatch.bench.peers.base import SITES
from deltapatch.bench.peers.ours import PREFIX, Ours
from deltapatch.bench.sides.cells import Cells


class Screen(Ours):
    """The estimates of `sweep(screen="attribution")`, and nothing else of it."""

    exact = False
    joint = False
    sites = SITES

    def __init__(self) -> None:
        super().__init__("fp32")
        self.name = f"{PREFIX}screen"
        self.what = "deltapatch, estimates of screen='attribution'"

    def measure(self, cells: Cells) -> np.ndarray:
        """All layers and positions that any of these cells has, and of those the cells."""
        from deltapatch.engine.options import SweepOptions
        from deltapatch.engine.question import ask
        from deltapatch.engine.screening.estimates import Estimates, Method

        question = ask(self.model, self.work.pairs, SweepOptions(**self._asked(cells)))
        shape = question.interventions.sites[0].shape(len(self.work.pairs))  # type: ignore[union-attr]
        found = Estimates(question, Method("attribution", "logit_diff", 1)).run().reshape(shape)
        return of_answers(_picked(cells, found).astype(np.float64), self.work.metric)

    def _asked(self, cells: Cells) -> dict[str, Any]:
        return {
            "sites": cells.site,
            "layers": np.unique(cells.layer).tolist(),
            "positions": np.unique(cells.position).tolist(),
            "metrics": ["logit_diff", *self.work.columns],
            "progress": False,
        }


class Verified(Screen):
    """The whole of it, with as many computed exactly as it does unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.name = f"{PREFIX}verified"
        self.what = "deltapatch, screen='attribution': estimates, 1,000 of the top and 1,000 drawn exact"

    def measure(self, cells: Cells) -> np.ndarray:
        """One call of the public interface."""
        from deltapatch.engine.sweep import sweep

        asked = self._asked(cells) | {"noise_sample": 0}
        found = sweep(self.model, self.work.pairs, screen="attribution", **asked)
        estimates = of_answers(_picked(cells, found.estimate()), self.work.metric)
        exact = np.stack([_picked(cells, found.values(name)) for name in self.work.columns], axis=1)
        return np.where(np.isnan(exact), estimates, exact)


def _picked(cells: Cells, found: np.ndarray) -> np.ndarray:
    """[n], what the cells have of [pair, layer, position(, index)], over the layers and positions of any."""
    layer, position = (np.searchsorted(np.unique(axis), axis[:, 0]) for axis in (cells.layer, cells.position))
    at: tuple[np.ndarray, ...] = (cells.pair, layer, position)
    picked: np.ndarray = found[at] if found.ndim == 3 else found[(*at, cells.index[:, 0])]
    return picked
