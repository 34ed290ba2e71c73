"""A question: a model, prompt pairs, interventions and options, all checked, and what follows from them.

Nothing changes it. What is left open (`precision="auto"`, no memory budget) is decided when work begins, and
is a record of its own: a run that is resumed takes the decisions of the run.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.options import EdgeOptions, Options, SweepOptions
from deltapatch.engine.planning.costs import flops
from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.dataset import Dataset
from deltapatch.interventions.directions import with_directions
from deltapatch.interventions.edges import EFFECTS, EdgeGrid, own_flops
from deltapatch.interventions.encode import encode_pairs, encode_prompts
from deltapatch.interventions.features import FeaturesAsked
from deltapatch.interventions.given import Intervention, Listed, listed_interventions
from deltapatch.interventions.grid import Grid, make_grid, positions_of
from deltapatch.interventions.nodes import Nodes
from deltapatch.interventions.pairs import EncodedPair, read_at
from deltapatch.interventions.pairs_file import Pairs, as_pairs
from deltapatch.interventions.roles import Roles, check_everywhere, check_source_fits
from deltapatch.interventions.runs import Continuation, RunShape, check_length, check_rotary, continuation_of
from deltapatch.interventions.sources import partners
from deltapatch.interventions.table import PatchTable
from deltapatch.interventions.wirings import WiredList, Wirings, wired_interventions
from deltapatch.kernels.backend import Backend, choose_backend
from deltapatch.kernels.product import PRECISIONS, Precision, has_float8
from deltapatch.models.activations import Place, mean_activations
from deltapatch.models.forward import widths
from deltapatch.models.memory import available
from deltapatch.models.model import Model
from deltapatch.models.spec import ModelSpec
from deltapatch.results.metrics import WEIGHTED, Function, functions_of, measured_for, probes_of
from deltapatch.results.probe import Probe, check_probes

Interventions: TypeAlias = Grid | EdgeGrid | Listed | Wirings
Tables: TypeAlias = Iterable[tuple[int, PatchTable, np.ndarray]]

_TOKENS = 4096  # whose embeddings are looked at together


@dataclass(frozen=True)
class Decided:
    """What a question leaves open, decided once, on the machine where a run begins.

    Attributes:
        precision: of the products of differences.
        memory_budget: bytes that a pass may take.
        threads: of torch; passes are cut for as many.
        stream: whether passes are cut as for a streamed model.
    """

    precision: Precision
    memory_budget: int
    threads: int
    stream: bool


@dataclass(frozen=True)
class Question:
    """What a sweep or run is to find out. `ask` makes it.

    Attributes:
        options: as they were given.
        pairs: encoded.
        interventions: a grid, or a list.
        roles: of the prompts of the pairs.
        continued: [pair], what the answers add to the prompt.
        lengths: [(base, source), pair], tokens of each prompt up to the position where effects are read.
        measured: the numbers that are written down of each intervention.
        threads: of torch when it was asked.
    """

    model: Model
    options: Options
    pairs: list[EncodedPair]
    interventions: Interventions
    backend: Backend
    roles: Roles
    continued: list[Continuation]
    lengths: np.ndarray
    measured: tuple[str, ...]
    threads: int

    @property
    def asked(self) -> Grid | EdgeGrid | Listed:
        """The interventions as results hold them."""
        found = self.interventions
        if isinstance(found, WiredList):
            return found.listed
        assert not isinstance(found, Wirings)  # circuits and paths, which no results of this kind hold
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Of the model, taken once: where something is kept, not else, since it reads all weights.

        Raises:
            DeltapatchError: its file has changed since it was loaded.
        """
        return self.model.fingerprint()

    @property
    def precision(self) -> Precision | None:
        """Of the products of differences; None where it is to be chosen."""
        return PRECISIONS.get(self.options.precision)

    @cached_property
    def memory_budget(self) -> int:
        """Bytes: as asked, or what this machine has when that is first asked."""
        asked = self.options.memory_budget
        assert not isinstance(asked, str)  # it became a number when the options were made
        return asked or default_budget(self.model.device, self.model.stream)

    def decided(self, precision: Precision) -> Decided:
        """What is decided here and now, with this precision."""
        return Decided(precision, self.memory_budget, self.threads, self.model.stream)

    @cached_property
    def functions(self) -> dict[str, Function]:
        """The metrics that are functions, by name."""
        return functions_of(self.options.metrics)  # type: ignore[arg-type]  # which its check made a tuple

    @cached_property
    def probes(self) -> dict[str, Probe]:
        """The metrics that are probes, by name."""
        return probes_of(self.options.metrics)  # type: ignore[arg-type]  # which its check made a tuple

    @cached_property
    def partner(self) -> np.ndarray | None:
        """[pair], whose source run "resample" takes."""
        return partners(self.lengths[0], self.options.seed) if self.options.source == "resample" else None

    @property
    def n_sources(self) -> int:
        """How many runs of each pair are carried beside the base run."""
        return 2 if self.options.source == "resample" else 1

    @property
    def shares_means(self) -> bool:
        """Whether the pairs of one length need each other's runs: a mean is over them."""
        return self.options.source == "mean" and self.options.mean_over is None

    @cached_property
    def dataset(self) -> Dataset | None:
        """The prompts that a mean is over, where they are not the pairs'.

        Raises:
            DeltapatchError: one is no prompt of this model, or there is no mean at a position.
        """
        given = self.options.mean_over
        if given is None:
            return None
        names = [f"prompt {i} of mean_over" for i in range(len(given))]
        encoded = encode_prompts(given, self.model.tokenizer, self.model.spec.d_vocab, names)
        return Dataset.of(encoded, self.pairs, self.lengths[0], self.interventions.places)

    @property
    def _mean_places(self) -> list[Place]:
        places = sorted({*self.interventions.places, "resid_post"})
        return [("resid_pre", 0), *((name, l) for l in range(self.model.spec.n_layers) for name in places)]

    @cached_property
    def means(self) -> dict[Place, Tensor] | None:
        """place -> [line of `Dataset.lines`, ...], the means over `dataset`; None where there is none."""
        if self.dataset is None:
            return None
        return mean_activations(self.model, self.dataset.prompts, self._mean_places, self.dataset.labelled)

    @property
    def means_bytes(self) -> int:
        """What `means` takes."""
        if self.dataset is None:
            return 0
        width = widths(self.model.spec, self.dataset.longest)
        lines = self.dataset.longest + len(self.dataset.labelled)
        return 8 * lines * sum(math.prod(width[name]) for name, _ in self._mean_places)

    @cached_property
    def runs(self) -> list[RunShape]:
        """[pair], the shapes of their base runs."""
        out = []
        for pair, after, n, m in zip(self.pairs, self.continued, *self.lengths.tolist(), strict=True):
            beside = 0 if self.roles.in_step(pair) else after.shape(m).length
            out.append(after.shape(n)._replace(beside=beside))
        return out

    @cached_property
    def order(self) -> list[int]:
        """The pairs that are patched, as passes take them."""
        return sorted(self.interventions.acted, key=lambda pair: self.runs[pair].order)

    def tables(self) -> Tables:
        """Of every pair that is patched: its number, interventions, and where their effects go."""
        return ((pair, *self.interventions.table(pair, self.pairs[pair])) for pair in self.order)

    @cached_property
    def _rows(self) -> np.ndarray:
        """[pair], how many interventions each has: those cells of a grid that it has, or what is listed."""
        return np.array([self.interventions.n_rows(i, pair) for i, pair in enumerate(self.pairs)])

    @property
    def n_rows(self) -> int:
        """How many interventions there are."""
        return int(self._rows.sum())

    @property
    def n_reads(self) -> int:
        """Positions at which the interventions are read, one each where answers are single tokens."""
        return int((self._rows * [run.reads for run in self.runs]).sum())

    @cached_property
    def entering(self) -> np.ndarray:
        """[1 + layer], the row tokens that enter at the embedding and in each layer."""
        n_layers, grid = self.model.spec.n_layers, self.interventions
        out = np.zeros(1 + n_layers, dtype=np.int64)
        for pair in self.order:
            if isinstance(grid, Grid):
                out += grid.entering(self.pairs[pair], self.runs[pair], n_layers)
            elif isinstance(grid, EdgeGrid):
                out += grid.entering(pair, self.pairs[pair], self.runs[pair], n_layers)
            else:
                tokens, layers = grid.row_sizes(pair, self.pairs[pair], self.runs[pair])
                np.add.at(out, 1 + layers, tokens)
        return out

    @cached_property
    def row_layers(self) -> int:
        """Row tokens times the layers that they pass, which the progress bar counts."""
        return int(np.cumsum(self.entering)[:-1].sum())

    @cached_property
    def flops(self) -> int:
        """The necessary FLOPs, without the unpatched runs."""
        grid, spec = self.interventions, self.model.spec
        own, nodes = 0, grid.nodes if isinstance(grid, EdgeGrid | Listed) else None
        if nodes is not None:
            own = sum(own_flops(table, nodes, spec, self.runs[i]) for i, table, _ in self.tables())
        return own + flops(spec, self.row_layers, self.n_reads)

    @cached_property
    def embedding_std(self) -> float:
        """Standard deviation of the embedding's entries, without a wide copy of the whole."""
        n, total, squares = 0, 0.0, 0.0
        for ids in torch.arange(self.model.spec.d_vocab).split(_TOKENS):
            some = self.model.embed(ids, torch.float64)
            n, total, squares = n + some.numel(), total + float(some.sum()), squares + float((some**2).sum())
        return ((squares - total**2 / n) / (n - 1)) ** 0.5


def ask(
    model: Model,
    pairs: Pairs,
    options: Options,
    interventions: Sequence[Intervention]
    | Callable[[ModelSpec, list[EncodedPair]], Wirings | Listed]
    | None = None,
) -> Question:
    """Check a question.

    Args:
        options: with the grid of a sweep, `SweepOptions`, where no interventions are given.
        interventions: as `checked` gives them; or what makes some of the model's spec and the pairs.

    Raises:
        DeltapatchError: an option, a pair or an intervention is wrong.
    """
    if not isinstance(model, Model):
        raise DeltapatchError(
            f"model must be what load_model or from_transformers returns, not {shown(model)}"
        )
    if options.precision != "auto" and options.precision not in PRECISIONS:
        raise DeltapatchError(
            f"unknown precision {options.precision!r}: choose from auto, {', '.join(PRECISIONS)}"
        )
    if options.precision == "fp8" and not has_float8(model.device):
        raise DeltapatchError(f"precision fp8 needs a newer GPU than {model.device}: use fp16 or bf16")
    spec, (found, names) = model.spec, as_pairs(pairs)
    encoded = encode_pairs(found, model.tokenizer, spec.d_vocab, names, options.align)
    roles = options.roles
    check_source_fits(encoded, roles)
    ends = [read_at(options.readout, i, pair) for i, pair in enumerate(encoded)]
    lengths = 1 + np.array([roles.of(*both) for both in ends]).T
    continued = [continuation_of(pair) for pair in encoded]
    for number, pair in enumerate(encoded):
        for rope in spec.all_ropes():
            check_rotary(pair, number, rope)
        check_length(pair, number, spec)
    if callable(interventions):
        patched: Interventions = interventions(spec, encoded)
    elif interventions is not None:
        features = FeaturesAsked(model, encoded, roles)
        patched = listed = listed_interventions(interventions, encoded, spec, roles, features)
        if len(listed.seen_by):
            check_everywhere(encoded, "patches that some receivers alone see")
            patched = wired_interventions(interventions, listed, encoded, spec, options.source)
    elif isinstance(options, EdgeOptions):
        nodes = Nodes.of(spec, options.keys)
        patched = EdgeGrid(
            nodes,
            nodes.choose_senders(options.senders),
            nodes.choose_receivers(options.receivers),
            positions_of(options.positions, encoded, roles),
            EFFECTS[options.effect],
            roles,
            n_pairs=len(encoded),
        )
    else:
        assert isinstance(options, SweepOptions)
        grid = make_grid(options.sites, options.positions, options.layers, encoded, spec, roles)
        patched = with_directions(grid, options.directions, spec)
    if isinstance(patched, Listed):
        patched = replace(patched, begins=[roles.brings_from(pair) for pair in encoded])
    _check_lined_up(patched, encoded, roles)
    backend = choose_backend(options.backend, model.device)
    measured = measured_for(options.metrics)  # type: ignore[arg-type]  # which its check made a tuple
    if WEIGHTED in measured:
        _check_weights(encoded, names)
    threads = torch.get_num_threads()
    question = Question(
        model, options, encoded, patched, backend, roles, continued, lengths, measured, threads
    )
    _ = question.dataset  # of which a prompt may be too short
    _ = question.partner  # a pair may be alone with its length
    if question.probes and isinstance(patched, EdgeGrid | Wirings):
        raise DeltapatchError("probes are of sweeps and runs that patch sites: edges and circuits have none")
    check_probes(question.probes, encoded, roles, lengths[0], spec)
    return question


def _check_lined_up(patched: Interventions, pairs: Sequence[EncodedPair], roles: Roles) -> None:
    """Raise DeltapatchError where what is patched needs prompts that line up entirely, and some do not."""
    if isinstance(patched, Wirings):
        check_everywhere(pairs, "circuits and paths")
    elif isinstance(patched, EdgeGrid) and patched.together:
        check_everywhere(pairs, "edges at all positions together")
    elif isinstance(patched, Grid) and patched.together:
        check_everywhere(pairs, "patches at all positions together", roles)
    elif isinstance(patched, Grid) and "pattern" in patched.places:
        check_everywhere(pairs, "attention patterns", roles)


def _check_weights(pairs: Sequence[EncodedPair], names: Sequence[str]) -> None:
    """Raise DeltapatchError where a pair has no weights of logits."""
    for pair, name in zip(pairs, names, strict=True):
        if pair.weights is None:
            raise DeltapatchError(
                f"{name} has no weights, which the metric {WEIGHTED} needs: give each pair some, such as "
                'weights {" yes": 1, " no": -1}, or leave the metric out'
            )


def default_budget(device: torch.device | None = None, stream: bool = False) -> int:
    """A quarter of the memory that can be had now, at most 4 GiB: more makes passes no faster.

    On a GPU it is half of what is free there: the more rows in a pass, the fuller its products. Of a streamed
    model every pass reads all weights: half of what can be had makes passes few.
    """
    free = available(device)
    if stream or (device is not None and device.type == "cuda"):
        return free // 2
    return min(free // 4, 4 << 30)
