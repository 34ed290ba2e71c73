"""First-order estimates of every effect of a sweep: what a patch changes, times the gradient in the base run.

Attribution patching (Nanda 2023), and that of edges (Syed et al. 2023), for all of them at once. The
unpatched runs go through the layers once, and only what enters each layer is kept; gradients then go back
layer by layer.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.question import Question
from deltapatch.engine.screening.added import Added
from deltapatch.engine.screening.gradients import Backward
from deltapatch.engine.screening.hearing import Hearing
from deltapatch.engine.screening.lines import Lines
from deltapatch.engine.screening.sent import Sent
from deltapatch.engine.screening.swapped import Swapped
from deltapatch.engine.wavefront.layers import Layers
from deltapatch.engine.wavefront.pool import Pool, workers
from deltapatch.engine.wavefront.prompts import EMBEDDING, Prompts, prompts_of
from deltapatch.engine.wavefront.reads import Reads
from deltapatch.engine.wavefront.rows import make_rows
from deltapatch.engine.wavefront.setup import Setup
from deltapatch.engine.wavefront.unpatched import Unpatched
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.edges import EdgeGrid
from deltapatch.interventions.given import Listed
from deltapatch.interventions.grid import Grid, SiteGrid
from deltapatch.interventions.nodes import LOGITS, Receiver, V
from deltapatch.interventions.sources import DIFFERING
from deltapatch.interventions.table import first_positions, place_of
from deltapatch.kernels.device import upload
from deltapatch.kernels.product import PRECISIONS
from deltapatch.models import forward
from deltapatch.models.surroundings import undisturbed
from deltapatch.models.weights import Converter, constant

# What gradients may be of: log P(clean answer) and log P(corrupted answer), times these.
GOES_BY = {"logit_diff": (1.0, -1.0), "dlogp_clean": (1.0, 0.0), "dlogp_corrupted": (0.0, 1.0)}

_HELD = 3  # of a layer's activations, for all pairs of a chunk: the base run's, the changes, the gradients


@dataclass(frozen=True)
class Method:
    """How the gradients of an estimate are taken.

    Attributes:
        name: as the user gives it.
        by: of `GOES_BY`, what the gradient is of.
        steps: runs that gradients are averaged over.
    """

    name: str
    by: str
    steps: int


class Estimates:
    """Estimates the effects of a grid of swaps or edges, or of a list of vectors that are added.

    Args:
        question: of a sweep, of edges too, or of features.
        method: how.

    Raises:
        DeltapatchError: the method does not go together with a site, a source or an answer.
    """

    def __init__(self, question: Question, method: Method) -> None:
        assert isinstance(question.interventions, Grid | EdgeGrid | Listed)
        self.question, self.method, self.asked = question, method, question.interventions
        self.model, self.spec = question.model, question.model.spec
        wide = "fp64" in (question.options.precision, {torch.float64: "fp64"}.get(self.model.dtype))
        self.setup = Setup(self.model, PRECISIONS["fp64" if wide else "fp32"], question.backend, Pool())
        self.dtype = self.setup.precision.base
        self.found = np.full(self.asked.n_effects, np.nan, np.float64 if wide else np.float32)
        self._check()

    def _check(self) -> None:
        name, source = self.method.name, self.question.options.source
        if name == "ig-activations" and not isinstance(self.asked, Grid):
            what = "edges" if isinstance(self.asked, EdgeGrid) else "features"
            raise DeltapatchError(
                f"screen 'ig-activations' has no lines for {what}: use attribution, relp or ig-inputs"
            )
        for number, pair in enumerate(self.question.pairs):
            # Added vectors and gradients of the base run need no source run.
            added = isinstance(self.asked, Listed)
            if not (added and name != "ig-inputs") and not self.question.roles.in_step(pair):
                raise DeltapatchError(
                    "a screen needs prompts that line up position by position, and those of pair "
                    f"{number} (of {len(pair.clean)} and {len(pair.corrupted)} tokens) do not: leave it out"
                )
        if name == "ig-inputs" and source in ("zero", "mean"):
            raise DeltapatchError(
                f"screen 'ig-inputs' goes from one prompt's embeddings to another's, and the source {source} "
                "is no prompt: use attribution, or another source"
            )
        places = self.asked.places
        if name == "relp" and (no := sorted(places & {"q", "k", "pattern"})):
            raise DeltapatchError(
                f"screen 'relp' holds attention probabilities constant, so it says nothing of {no[0]}: "
                "leave that site out, or use attribution"
            )
        if name == "relp" and isinstance(self.asked, EdgeGrid) and (self.asked.reads < V).any():
            raise DeltapatchError(
                "screen 'relp' holds attention probabilities constant, so it says nothing of edges into <q> "
                "and <k>: leave these receivers out (receivers a<v>,m,logits), or use attribution"
            )
        if name != "ig-activations":
            return
        if "pattern" in places:
            raise DeltapatchError("screen 'ig-activations' has no line for pattern: use attribution there")
        if source == "noise" or any(pair.answer_tokens > 1 for pair in self.question.pairs):
            raise DeltapatchError(
                "screen 'ig-activations' takes answers of one token, and no source noise: use attribution"
            )

    @undisturbed()
    @torch.no_grad()
    def run(self, tick: Callable[[int], None] = lambda n: None) -> np.ndarray:
        """The estimates, [effect], as the grid counts them; NaN where a pair has no such position.

        Args:
            tick: told of every layer that is done, forward and back.

        Raises:
            DeltapatchError: they are not finite.
        """
        with workers(self.model.device) as pool:
            setup = replace(self.setup, pool=pool)
            for numbers in self.chunks():
                _Chunk(self, setup, numbers).run(tick)
        if not np.isfinite(self.found[reaching(self.question)]).all():
            raise DeltapatchError(
                "the gradients of this model are not finite in float32: load it with dtype='float64'"
            )
        return self.found

    @property
    def sites(self) -> list[SiteGrid]:
        """Those that are swapped."""
        return self.asked.sites if isinstance(self.asked, Grid) else []

    @property
    def n_steps(self) -> int:
        """How often `run` ticks."""
        return 2 * self.spec.n_layers * sum(1 for _ in self.chunks())

    @property
    def n_back(self) -> int:
        """The layers that gradients go back through: those down to the lowest that is patched."""
        if isinstance(self.asked, Listed):
            lowest = int(self.asked.table_of_all.layer.min())
        elif isinstance(self.asked, EdgeGrid):
            lowest = min(self.hearing, default=self.spec.n_layers)
        else:
            lowest = min(l for g in self.sites for l in _layers_of(g))
        return self.spec.n_layers - max(0, lowest)

    @cached_property
    def receivers(self) -> list[Receiver]:
        """Those of edges; none where there are none."""
        if not isinstance(self.asked, EdgeGrid):
            return []
        return [self.asked.nodes.receivers[name] for name in self.asked.receivers]

    @property
    def hearing(self) -> set[int]:
        """The layers that have receivers."""
        return {receiver.layer for receiver in self.receivers if receiver.reads != LOGITS}

    @property
    def token_layers(self) -> int:
        """How many tokens go through a layer, forward or back, in all."""
        steps, question, n_layers = self.method.steps, self.question, self.spec.n_layers
        total, runs = 0, steps if self.method.name == "ig-inputs" else 1
        for number in question.order:
            passed = (1 + question.n_sources) * n_layers
            # A gradient takes the forward of a layer again, and the way back, which takes as long.
            if self.method.name == "ig-activations":
                # A line for each vector, in runs of its own, and back through the layers behind it.
                each = ((g, len(g.spots(question.pairs[number]))) for g in self.sites)
                passed += steps * sum(n * (2 * n_layers - 1 - l) for g, n in each for l in _layers_of(g))
            elif self.method.name == "ig-inputs":
                passed += steps * (n_layers + 2 * self.n_back)
            else:
                passed += 2 * self.n_back
            if isinstance(self.asked, EdgeGrid):  # attention and MLP again, for each effect
                passed += 2 * runs * len(self.hearing) * len(self.asked.effects)
            total += question.runs[number].length * passed
        return total

    def chunks(self) -> Iterator[list[int]]:
        """The pairs that go together, as many as the memory budget has room for.

        A mean is over all pairs of one length, which are never parted.
        """
        question, spec = self.question, self.spec
        widths = forward.widths(spec, max(run.length for run in question.runs))
        held = sum(
            math.prod(w) for name, w in widths.items() if name != "pattern" or name in self.asked.places
        )
        runs = self.method.steps if self.method.name == "ig-inputs" else 1
        token = _HELD * held + (spec.n_layers + 1) * spec.d_model * runs  # numbers that one takes
        if isinstance(self.asked, EdgeGrid):
            # What senders say, and the gradients of a layer's receivers.
            most = max(np.bincount([receiver.layer for receiver in self.receivers]))
            receivers = int(most) * len(self.asked.effects) * _HELD
            token += (len(self.asked.senders) + receivers) * spec.d_model
        chunk: list[int] = []
        size = 0
        for number in question.order:
            run = question.runs[number]
            joined = question.shares_means and chunk and question.runs[chunk[-1]].prompt == run.prompt
            own = token * run.length + sum(
                len(g.layers) * math.prod(widths[g.site.place]) * sum(len(at) for _, at in g.spots(pair))
                for g in self.sites
                for pair in [question.pairs[number]]
            )
            if chunk and (size + own) * self.dtype.itemsize > question.memory_budget and not joined:
                yield chunk
                chunk, size = [], 0
            chunk.append(number)
            size += own
        yield chunk


class _Chunk:
    """The estimates of some pairs.

    Args:
        whole: the estimates of all.
        setup: what they are made with.
        numbers: of the pairs.
    """

    def __init__(self, whole: Estimates, setup: Setup, numbers: list[int]) -> None:
        self.whole, self.model, self.spec, self.dtype = whole, whole.model, whole.spec, whole.dtype
        self.setup, self.numbers, self.method = setup, numbers, whole.method
        self.prompts: Prompts = prompts_of(whole.question, numbers)
        self.shapes = self.prompts.shapes
        self.convert = Converter(self.model.device, self.dtype)
        self.layers = Layers(setup, self.prompts, Unpatched(setup, self.prompts))
        self.backward = Backward(setup, self.shapes, relp=self.method.name == "relp")
        question, found = whole.question, whole.found
        self.part: Swapped | Added | Sent
        self.hearing: Hearing | None = None
        self.ends: list[Tensor] = []  # of each run, the gradient in what the last layer leaves
        if isinstance(question.interventions, EdgeGrid):
            self.part = Sent(question, found, numbers, self.prompts, setup)
            relp = self.method.name == "relp"
            self.hearing = Hearing(setup, self.shapes, question.interventions, relp=relp)
        elif isinstance(question.interventions, Grid):
            lines = self._lines if self.method.name == "ig-activations" else None
            self.part = Swapped(question, found, numbers, self.prompts, lines)
        else:
            self.part = Added(question, found, numbers, self.prompts)

    def run(self, tick: Callable[[int], None]) -> None:
        """Forward, back, and the products."""
        n_layers = self.spec.n_layers
        runs, slopes = self._forward(tick)
        self.ends = list(slopes)
        places = {l: self.part.places(l) for l in range(-1, n_layers + 1)}
        lowest = min((l for l, here in places.items() if here), default=n_layers)
        for l in range(n_layers, lowest - 1, -1):
            if l in (-1, n_layers):  # between layers
                if places[l]:
                    self.part.put(l, {"resid_post": torch.stack(slopes).mean(0)} if slopes else {})
                continue
            self.part.put(l, self._back(l, runs, slopes, places[l]) if runs else {})
            tick(1)

    def _lines(self, pair: int) -> Lines:
        return Lines(self.setup, self.prompts, pair, GOES_BY[self.method.by], self.method.steps)

    def _back(
        self, l: int, runs: list[list[Tensor]], slopes: list[Tensor], places: list[str]
    ) -> dict[str, Tensor]:
        """Take the gradient of each run back through a layer: the means of those inside it, by place.

        Of edges those in what is read there, by effect.
        """
        exact = constant(self.convert(self.model.layer(l, None)))
        means: dict[str, Tensor] = {}
        for number, before in enumerate(runs):
            at = l, self.layers.rotaries[self.spec.rope_of(l)]
            slopes[number], found = self.backward.through(before[l], slopes[number], exact, at, places)
            if self.hearing is not None and places:
                found = self.hearing.of_effects(before[l], exact, at, found, self.ends[number])
            for place, value in found.items():
                share = value / len(runs)
                means[place] = share if place not in means else means[place] + share
        return means

    def _forward(self, tick: Callable[[int], None]) -> tuple[list[list[Tensor]], list[Tensor]]:
        """The unpatched runs; what patches change is kept in `changes`.

        Returns:
            Of the runs that gradients are of, [run][layer] what is before each, and the gradient in what the
            last layer leaves. None of them of lines, each of which has runs of its own.
        """
        # [base token, d_model], [source token, d_model]
        x = self.prompts.embed(self._embed, with_positions=self.spec.learned_positions)
        dx = self.prompts.embed_source_difference(self._embed)
        way = dx[upload(self.prompts.n_sources * np.arange(len(x)) + self.prompts.n_sources - 1, dx.device)]
        steps = self.method.steps
        shares = [k / steps for k in range(1, steps + 1)] if self.method.name == "ig-inputs" else []
        # Runs whose embeddings lie between those of both prompts, or the base run itself.
        others = [x + share * way for share in shares]
        before: list[list[Tensor]] = [[] for _ in others or [x]]
        self.part.keep(-1, {"resid_post": self.prompts.delta(x, dx, EMBEDDING)}, None)
        with self.model.reading() as read:
            for l in range(self.spec.n_layers):
                exact = self.convert(read.layer(l))
                rotary = self.layers.rotaries[self.spec.rope_of(l)]
                for run, now in zip(before, others or [x], strict=True):
                    run.append(now)
                others = [self.layers.unpatched.base(now, exact, l, rotary, ()).resid_post for now in others]
                ready = self.layers.at(l, exact, x, dx, self.part.sources(l))
                self.part.keep(l, ready.deltas, ready.here)
                x, dx = ready.x, ready.dx
                tick(1)
            ends = read.ends()
        if self.method.name == "ig-activations":
            return [], []
        reads, by = Reads(self.shapes, self.prompts.targets), GOES_BY[self.method.by]
        return before, [self.backward.of_logits(end, ends, reads, by) for end in others or [x]]

    def _embed(self, ids: Tensor, *, positions: Tensor | None = None) -> Tensor:
        return self.model.embed(ids, self.dtype, positions=positions)


def _layers_of(g: SiteGrid) -> list[int]:
    """The layers of a site's places."""
    found: list[int] = np.asarray(place_of(g.site.name, g.layers)[1]).tolist()
    return found


def reaching(question: Question) -> np.ndarray:
    """[effect], whether a patch can do anything: it exists, is read behind, and brings something.

    What is behind the read-out has no effect, and neither has what brings what is there already: of sources
    that are one of a pair's two prompts, all before the first position at which these differ.
    """
    if isinstance(question.interventions, Listed):  # which adds something, each
        table = question.interventions.table_of_all
        return first_positions(table) < np.array([run.prompt for run in question.runs])[table.pair]
    if isinstance(question.interventions, EdgeGrid):
        return _reaching_edges(question, question.interventions)
    assert isinstance(question.interventions, Grid)
    out = np.zeros(question.interventions.n_effects, dtype=bool)
    for g in question.interventions.sites:
        shape = g.shape(len(question.pairs))
        own = out[g.offset : g.offset + int(np.prod(shape))].reshape(shape)
        for number, pair in enumerate(question.pairs):
            first = pair.first_difference if question.options.source in DIFFERING else 0
            last = question.runs[number].prompt
            for column, joined in g.spots(pair):
                own[number, :, column] = joined[-1] >= first and joined[0] < last
    return out


def _reaching_edges(question: Question, grid: EdgeGrid) -> np.ndarray:
    """The same of edges, without those whose receiver says nothing any more where it is read."""
    out = np.zeros(grid.n_effects, dtype=bool)
    for number, pair in enumerate(question.pairs):
        first = pair.first_difference if question.options.source in DIFFERING else 0
        table, to = grid.table(number, pair)
        rows = make_rows(table, np.array([question.runs[number].prompt]), question.model.spec)
        out[to] = (rows.id_of >= 0) & (table.position >= first)
    return out
