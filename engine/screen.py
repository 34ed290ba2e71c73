"""A screened sweep: all effects are estimated, and which are then computed exactly.

Exact are those of the largest estimates, and of a random sample of all others that can have an effect.
"""

import math
from dataclasses import replace

import numpy as np
import torch

from deltapatch.engine.estimates import Estimates, Method, reaching
from deltapatch.engine.options import SweepOptions
from deltapatch.engine.progress import progress_bar
from deltapatch.engine.question import ask
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.given import Listed
from deltapatch.interventions.grid import Grid
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.pairs_file import Pairs
from deltapatch.interventions.table import COLUMNS, PatchTable, take
from deltapatch.models.model import Model
from deltapatch.models.spec import ModelSpec
from deltapatch.results.outcome import Outcome
from deltapatch.results.screened import NOTHING, TOP, Screened
from deltapatch.results.strata import cut, draw

_TOP, _SAMPLE, _STEPS = 1000, 1000, 5


class Screen:
    """Estimates, and the choice of what is computed exactly.

    Args:
        model, pairs: as of `sweep`.
        options: with a screen.

    Attributes:
        options: of the exact effects. In precision "auto" they are float32, or float64 as the model is.

    Raises:
        DeltapatchError: bad input, or a screen that does not go together with it.
    """

    def __init__(self, model: Model, pairs: Pairs, options: SweepOptions) -> None:
        self.by = options.screen_by or "logit_diff"
        question = ask(model, pairs, options)
        assert isinstance(question.interventions, Grid)
        assert options.screen is not None
        if self.by not in question.measured:
            raise DeltapatchError(f"a sweep that is screened by {self.by} needs it: name it among metrics")
        exact = "fp64" if model.dtype == torch.float64 else "fp32"
        self.options = replace(options, precision=exact) if options.precision == "auto" else options
        self.grid = question.interventions
        estimates = Estimates(question, Method(options.screen, self.by, options.screen_steps or _STEPS))
        with progress_bar("estimating", estimates.n_steps, options.progress) as tick:
            self.estimates = estimates.run(tick)
        self._choose(reaching(question))

    def _choose(self, reaching: np.ndarray) -> None:
        """The top, and a sample by strata of what is below it. reaching: [effect].

        The largest of each pair is at the top too, so that every pair is run.
        """
        top, sample = (
            default if given is None else given
            for given, default in ((self.options.top, _TOP), (self.options.screen_sample, _SAMPLE))
        )
        self.stratum = np.full(len(reaching), NOTHING)
        can = np.flatnonzero(reaching)
        size = np.abs(self.estimates[can])
        site, pair = np.zeros((2, len(can)), dtype=np.int64)
        for number, g in enumerate(self.grid.sites):
            mine = can >= g.offset
            site[mine], pair[mine] = number, (can[mine] - g.offset) // math.prod(g.shape(1))
        order = np.argsort(-size, kind="stable")
        is_top = np.zeros(len(can), dtype=bool)
        is_top[order[:top]] = is_top[order[np.unique(pair[order], return_index=True)[1]]] = True
        best, rest, site = can[is_top], can[~is_top], site[~is_top]
        self.stratum[best] = TOP
        self.stratum[rest] = stratum = cut(np.abs(self.estimates[rest]), site)
        self.strata, drawn = draw(stratum, sample, self.options.seed)
        self.chosen = np.sort(np.concatenate([best, rest[drawn]]))
        if not len(self.chosen):
            raise DeltapatchError(
                "no effect can be anything but zero: patch where the prompts differ, before the read-out"
            )

    def listed(self, spec: ModelSpec, pairs: list[EncodedPair]) -> Listed:
        """What is computed exactly, each labelled with its number among all effects."""
        parts: list[PatchTable] = []
        effects = []
        for number, pair in enumerate(pairs):
            table, out = self.grid.table(number, pair)
            rows = np.flatnonzero(np.isin(out, self.chosen))
            parts.append(take(table, rows))
            effects.append(out[rows])
        first = np.cumsum([0, *(part.n_rows for part in parts)])
        whole = PatchTable(
            int(first[-1]),
            np.repeat(np.arange(len(pairs)), np.diff(first)),
            np.concatenate([part.row + a for part, a in zip(parts, first[:-1], strict=True)]),
            *(np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS),
        )
        return Listed(whole, labels={"effect": np.concatenate(effects)})

    def result(self, verified: Outcome) -> Screened:
        """What is known, now that these are."""
        return Screened(verified, self.grid, self.estimates, self.stratum, self.strata, self.by)
