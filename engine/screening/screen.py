"""A screened sweep: all effects are estimated, and which are then computed exactly.

Exact are those of the largest estimates, and of a random sample of all others that can have an effect.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from deltapatch.engine.options import ScreenOptions
from deltapatch.engine.progress import progress_bar
from deltapatch.engine.question import Question, ask
from deltapatch.engine.screening.estimates import Estimates, Method, reaching
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.edges import EdgeGrid
from deltapatch.interventions.given import Listed
from deltapatch.interventions.grid import Grid
from deltapatch.interventions.nodes import READS
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.pairs_file import Pairs
from deltapatch.interventions.sites import PLACES, SITES
from deltapatch.interventions.table import COLUMNS, PatchTable, take
from deltapatch.interventions.vectors import Vectors
from deltapatch.models.model import Model
from deltapatch.models.spec import ModelSpec
from deltapatch.results.estimated import NOTHING, TOP, Choice, Estimated
from deltapatch.results.outcome import Outcome
from deltapatch.results.screened import Screened
from deltapatch.results.screened_edges import ScreenedEdges
from deltapatch.results.screened_outcome import ScreenedOutcome
from deltapatch.results.strata import Strata, cut, draw

SAMPLE_UNLESS_GIVEN = 1000
_TOP, _STEPS = 1000, 5


class Screen:
    """Estimates, and the choice of what is computed exactly.

    Args:
        model, pairs: as of `sweep`.
        options: with a screen; of a sweep's grid, where nothing else is given.
        make: makes interventions that add vectors, of the model's spec and the pairs.

    Attributes:
        options: of the exact effects. In precision "auto" they are float32, or float64 as the model is.
        can: ascending, the effects that can be anything but zero.
        spec, pairs: of the model, and encoded.

    Raises:
        DeltapatchError: bad input, or a screen that does not go together with it.
    """

    def __init__(
        self,
        model: Model,
        pairs: Pairs,
        options: ScreenOptions,
        make: Callable[[ModelSpec, list[EncodedPair]], Listed] | None = None,
    ) -> None:
        question = ask(model, pairs, options, make)
        assert isinstance(question.interventions, Grid | EdgeGrid | Listed)
        self.asked, self.spec, self.pairs = question.interventions, model.spec, question.pairs
        self.options = verified_with(model, options)
        estimates = estimates_of(question)
        self.by = estimates.method.by
        with progress_bar("estimating", estimates.n_steps, options.progress) as tick:
            self.estimates = estimates.run(tick)
        self.can = np.flatnonzero(reaching(question))
        if not len(self.can):
            raise DeltapatchError(
                "no effect can be anything but zero: patch where the prompts differ, before the read-out"
            )

    def choose(self) -> Choice:
        """The top, and a sample by strata of what is below it."""
        top, sample = first_sizes(self.options)
        rest, site = self._below(top)
        cut_up = cut(np.abs(self.estimates[rest]), site)
        strata, drawn = draw(cut_up, sample, self.options.seed)
        return self._choice(rest, cut_up, strata, rest[drawn])

    def choose_nested(self, top: int, sample: int) -> Choice:
        """The top, and a sample of what is below it: the beginning of one random order of that.

        So a larger sample has the smaller ones, but for what has come to the top.
        """
        rest, _ = self._below(top)
        turn = np.random.default_rng(self.options.seed).permutation(len(self.estimates))
        drawn = rest[np.argsort(turn[rest])[:sample]]
        strata = Strata(np.array([len(rest)]), np.array([len(drawn)]))
        return self._choice(rest, np.zeros(len(rest), np.int64), strata, drawn)

    def _below(self, top: int) -> tuple[np.ndarray, np.ndarray]:
        """What can have an effect and is not at the top, and its site.

        The largest of each pair is at the top too, so that every pair is run.
        """
        can, size = self.can, np.abs(self.estimates[self.can])
        site, pair = _where(self.asked, can)
        order = np.argsort(-size, kind="stable")
        is_top = np.zeros(len(can), dtype=bool)
        is_top[order[:top]] = is_top[order[np.unique(pair[order], return_index=True)[1]]] = True
        return can[~is_top], site[~is_top]

    def _choice(self, rest: np.ndarray, cut_up: np.ndarray, strata: Strata, drawn: np.ndarray) -> Choice:
        stratum = np.full(len(self.estimates), NOTHING)
        stratum[self.can] = TOP
        stratum[rest] = cut_up
        return Choice(stratum, strata, np.union1d(np.setdiff1d(self.can, rest), drawn))

    def listed(self, chosen: np.ndarray, spec: ModelSpec, pairs: list[EncodedPair]) -> Listed:
        """Some of what is screened as interventions, each labelled with its number, as `ask` takes it."""
        if isinstance(self.asked, Grid | EdgeGrid):
            return listed_effects(self.asked, chosen, pairs)
        return some_added(self.asked, chosen, spec)

    def result(self, verified: Outcome, choice: Choice) -> Estimated:
        """What is known, now that these are."""
        if isinstance(self.asked, EdgeGrid):
            return ScreenedEdges(verified, self.asked, self.estimates, choice, self.by)
        if isinstance(self.asked, Grid):
            return Screened(verified, self.asked, self.estimates, choice, self.by)
        labels = {"pair": self.asked.table_of_all.pair, **self.asked.labels}
        return ScreenedOutcome(verified, labels, self.estimates, choice, self.by)


def _where(asked: Grid | EdgeGrid | Listed, effects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[effect] twice, the site and the pair of some, as numbers.

    Of a list its place stands for the site; of edges what the receiver reads, total and direct effects apart.
    """
    if isinstance(asked, EdgeGrid):
        found, kind, _, edge = np.unravel_index(effects, asked.shape)
        return kind * len(READS) + asked.reads[edge], found
    if isinstance(asked, Listed):
        table = asked.table_of_all
        first = np.searchsorted(table.row, effects)  # each one's first patch
        return table.place[first], table.pair[effects]
    site, pair = np.zeros((2, len(effects)), dtype=np.int64)
    for number, g in enumerate(asked.sites):
        mine = effects >= g.offset
        site[mine], pair[mine] = number, (effects[mine] - g.offset) // math.prod(g.shape(1))
    return site, pair


def verified_with(model: Model, options: ScreenOptions) -> ScreenOptions:
    """The options of the exact effects: in precision "auto" float32, or float64 as the model is."""
    exact = "fp64" if model.dtype == torch.float64 else "fp32"
    return replace(options, precision=exact) if options.precision == "auto" else options


def first_sizes(options: ScreenOptions) -> tuple[int, int]:
    """How many are verified at the top, and how many are drawn, to begin with."""
    top, sample = options.top, options.screen_sample
    return _TOP if top is None else top, SAMPLE_UNLESS_GIVEN if sample is None else sample


def estimates_of(question: Question) -> Estimates:
    """The estimates that a sweep with a screen asks for."""
    options = question.options
    assert isinstance(options, ScreenOptions)
    assert options.screen is not None
    by = options.screen_by or "logit_diff"
    if by not in question.measured:
        raise DeltapatchError(f"a sweep that is screened by {by} needs it: name it among metrics")
    return Estimates(question, Method(options.screen, by, options.screen_steps or _STEPS))


def listed_effects(grid: Grid | EdgeGrid, chosen: np.ndarray, pairs: list[EncodedPair]) -> Listed:
    """Some effects of a grid as interventions, each labelled with its number among all."""
    parts: list[PatchTable] = []
    effects = []
    for number, pair in enumerate(pairs):
        table, out = grid.table(number, pair)
        rows = np.flatnonzero(np.isin(out, chosen))
        parts.append(take(table, rows))
        effects.append(out[rows])
    first = np.cumsum([0, *(part.n_rows for part in parts)])
    whole = PatchTable(
        int(first[-1]),
        np.repeat(np.arange(len(pairs)), np.diff(first)),
        np.concatenate([part.row + a for part, a in zip(parts, first[:-1], strict=True)]),
        *(np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS),
    )
    labels = {"effect": np.concatenate(effects)}
    if isinstance(grid, EdgeGrid):
        return Listed(whole, labels=labels, nodes=grid.nodes)
    return Listed(whole, grid.vectors, labels)


def some_added(listed: Listed, chosen: np.ndarray, spec: ModelSpec) -> Listed:
    """Some interventions of a list that adds vectors, each labelled with its number, and their vectors.

    Args:
        chosen: ascending.
    """
    table = take(listed.table_of_all, chosen)
    heads = np.array([max(1, SITES[place].n_indices(spec)) for place in PLACES])[table.place]
    number, head = np.divmod(table.index, heads)
    kept, new = np.unique(number, return_inverse=True)
    of, scale = listed.vectors.multiples(kept)
    used, line = np.unique(of, return_inverse=True)
    vectors = Vectors(tuple(listed.vectors.arrays[i] for i in used.tolist()), line, scale)
    labels = {name: array[chosen] for name, array in listed.labels.items()}
    return Listed(replace(table, index=new * heads + head), vectors, labels | {"effect": chosen})
