"""A job: checked options and encoded pairs, carried out pass by pass."""

import copy
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from deltapatch.engine.audit import Audit
from deltapatch.engine.layout import PairShapes
from deltapatch.engine.limit import Limit
from deltapatch.engine.memory import Costs, default_budget
from deltapatch.engine.planner import Pass, cut
from deltapatch.engine.pool import Map, workers
from deltapatch.engine.products import has_float8
from deltapatch.engine.progress import progress_bar
from deltapatch.engine.prompts import Prompts
from deltapatch.engine.wavefront import PassResult, Wavefront
from deltapatch.engine.work import Keeper, Tables, Work
from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.pairs import EncodedPair, encode_pairs, read_at
from deltapatch.interventions.pairs_file import Pairs, as_pairs
from deltapatch.interventions.runs import Continuation, RunShape, check_rotary, continuation
from deltapatch.interventions.sources import Source, check_source, partners
from deltapatch.interventions.table import row_layers
from deltapatch.kernels.backend import Backend, choose_backend
from deltapatch.kernels.product import PRECISIONS, Precision
from deltapatch.models.model import Model
from deltapatch.models.surroundings import undisturbed
from deltapatch.results.folder import environment
from deltapatch.results.measured import Gathered, PassEffects
from deltapatch.results.metrics import Direction, Reference, measured_for
from deltapatch.results.truth import Truth

_TOKENS = 4096  # whose embeddings are looked at together


@dataclass
class Job:
    """Checked options of a sweep or run."""

    model: Model
    pairs: list[EncodedPair]
    length: np.ndarray  # [pair], tokens up to the read-out position
    continued: list[Continuation]  # [pair], what the answers add
    direction: Direction
    source: Source
    precision: Precision | None  # None: to be chosen when the work is known
    backend: Backend
    budget: int
    measured: tuple[str, ...]
    readout: int | str
    seed: int
    noise_scale: float
    noise_sample: int | None
    partner: np.ndarray | None  # [pair], whose source run "resample" takes
    stream: bool  # whether passes are cut as for a streamed model
    fingerprint: str | None = None  # of the model, once it is asked for
    noise_floor: dict[str, Any] | None = None
    noise_floor_left_out: str | None = None  # why there is none
    passes: int = 0
    rows: int = 0
    seconds: float = 0.0

    @classmethod
    def of(
        cls,
        model: Model,
        pairs: Pairs,
        direction: Direction,
        source: str,
        precision: str,
        backend: str,
        memory_budget: int | None,
        metrics: Sequence[str],
        readout: int | str,
        seed: int,
        noise_scale: float,
        noise_sample: int | None,
    ) -> "Job":
        """Check the options of a sweep or run, as `prepare.Options` has them, and encode its pairs.

        Raises:
            DeltapatchError: an option or a pair is wrong.
        """
        if not isinstance(model, Model):
            raise DeltapatchError(
                f"model must be what load_model or from_transformers returns, not {shown(model)}"
            )
        if direction not in ("denoise", "noise"):
            raise DeltapatchError(f"unknown direction {direction!r}: choose denoise or noise")
        if precision != "auto" and precision not in PRECISIONS:
            raise DeltapatchError(
                f"unknown precision {precision!r}: choose from auto, {', '.join(PRECISIONS)}"
            )
        if precision == "fp8" and not has_float8(model.device):
            raise DeltapatchError(f"precision fp8 needs a newer GPU than {model.device}: use fp16 or bf16")
        kind = check_source(source)
        measured = measured_for(tuple(metrics))
        given, names = as_pairs(pairs)
        encoded = encode_pairs(given, model.tokenizer, model.spec.d_vocab, names)
        length = np.array([read_at(readout, i, p) + 1 for i, p in enumerate(encoded)])
        continued = [continuation(pair.clean_answer, pair.corrupted_answer) for pair in encoded]
        for number, pair in enumerate(encoded):
            check_rotary(pair, number, model.spec.rope)
        return cls(
            model,
            encoded,
            length,
            continued,
            direction,
            kind,
            PRECISIONS.get(precision),
            choose_backend(backend, model.device),
            memory_budget or default_budget(model.device, model.stream),
            measured,
            readout,
            seed,
            noise_scale,
            noise_sample,
            partners(length, seed) if kind == "resample" else None,
            model.stream,
        )

    def identify(self) -> str:
        """The model's fingerprint, taken once: where something is kept, not else, since it reads all weights.

        Raises:
            DeltapatchError: its file has changed since it was loaded.
        """
        if self.fingerprint is None:
            self.fingerprint = self.model.fingerprint()
        return self.fingerprint

    @property
    def n_sources(self) -> int:
        """How many runs of each pair are carried beside the base run."""
        return 1 if self.partner is None else 2

    @cached_property
    def runs(self) -> list[RunShape]:
        """[pair], the shapes of their runs."""
        return [c.shape(n) for c, n in zip(self.continued, self.length.tolist(), strict=True)]

    def shapes(self) -> Iterator[tuple[EncodedPair, RunShape]]:
        """Every pair, and the shape of its run."""
        return zip(self.pairs, self.runs, strict=True)

    def ordered(self, pairs: Iterable[int]) -> list[int]:
        """Pairs in the order in which passes take them."""
        return sorted(pairs, key=lambda pair: self.runs[pair].order)

    def carry_out(
        self, work: Work, progress: bool, keeper: Keeper | None = None
    ) -> tuple[dict[str, np.ndarray], Reference]:
        """Run all passes: the measured numbers, [effect], NaN where there is none, and the unpatched runs.

        Args:
            work: what to do.
            progress: show a bar.
            keeper: keeps what each pass finds, and already has what others found.
        """
        began = time.perf_counter()
        bar = progress_bar("patching", work.row_layers, progress)
        with bar as tick, self.at_work() as each:
            audit = Audit(self, work, each)
            if self.precision is None:
                self.precision = audit.cheapest()
            dtype = np.float64 if self.precision.name == "fp64" else np.float32
            gathered = Gathered(self.measured, dtype, work.n_effects, len(self.pairs))
            for number, part in enumerate(self.parts(work, each)):
                if keeper is not None and not keeper.wants(number):
                    continue
                found = None if keeper is None else keeper.kept(number, part.out, part.pairs, gathered)
                if found is None:
                    found = self.found(part, each, tick, work.describe)
                    if keeper is not None:
                        keeper.keep(number, found)
                else:
                    tick(self.row_layers(part))
                gathered.add(found)
            if keeper is None:
                truth = audit.truth_for(self.precision)
            else:
                truth = keeper.truth if keeper.whole else None
            if truth is not None:
                self.noise_floor = truth.noise_floor(self.precision.name, gathered.measured, self.direction)
            self.noise_floor_left_out = audit.left_out(self.precision) if truth is None else None
        self.passes, self.rows = gathered.passes, gathered.rows
        # What is kept took its time in another process.
        self.seconds += time.perf_counter() - began + (0.0 if keeper is None else keeper.seconds_kept)
        return gathered.measured, gathered.reference

    @contextmanager
    def at_work(self) -> Iterator[Map]:
        """PyTorch as it is with nothing switched on, and threads; all that computes does so within."""
        with undisturbed(self.model.device), workers(self.model.device) as each:
            yield each

    def parts(self, work: Work, each: Map) -> Iterator[Pass]:
        """The passes of some work, once the precision is chosen."""
        assert self.precision is not None
        return self._parts(work.tables(), work.places, self.precision, each)

    def adopt(self, settings: Mapping[str, Any]) -> None:
        """Take what a run decided when it began."""
        self.precision, self.budget = PRECISIONS[settings["precision"]], settings["memory_budget"]
        self.stream = settings["stream"]

    def settle(self, work: Work) -> tuple[Truth | None, int]:
        """Choose the precision; the truth of a sample, for the noise floor, and the number of passes.

        Raises:
            DeltapatchError: the memory budget has no room for one intervention.
        """
        began = time.perf_counter()
        with self.at_work() as each:
            audit = Audit(self, work, each)
            self.precision = self.precision or audit.cheapest()
            n_passes = sum(1 for _ in self.parts(work, each))
            truth = audit.truth_for(self.precision)
            self.noise_floor_left_out = audit.left_out(self.precision) if truth is None else None
        self.seconds = time.perf_counter() - began
        return truth, n_passes

    def passes_of(
        self, tables: Tables, places: Collection[str], precision: Precision, each: Map
    ) -> Iterator[tuple[Pass, PassResult]]:
        """Carry interventions, in the order of the pairs' shapes, out in some precision, pass by pass."""
        for part in self._parts(tables, places, precision, each):
            yield part, self._carry(part, precision, each)

    def _parts(
        self, tables: Tables, places: Collection[str], precision: Precision, each: Map
    ) -> Iterator[Pass]:
        """The passes that interventions are cut into."""
        costs = self.costs(places, precision, each.count)
        limit, share = self.limit(each.count), self.source == "mean"
        return cut(tables, self.runs, costs, self.budget, share, limit, self.stream)

    def limit(self, threads: int) -> Limit:
        """How much work a pass may be."""
        return Limit.of(self.model, threads, 1 + self.n_sources)

    def costs(self, places: Collection[str], precision: Precision, threads: int) -> Costs:
        """What things cost in memory, with patches at these places and so many blocks at once."""
        longest, block = max(run.length for run in self.runs), self.backend.block_tokens
        against_base = self.source in ("zero", "mean")
        model = self.model
        if model.stream != self.stream:
            # Passes are those of the plan, whichever way this process keeps its weights.
            model = copy.copy(model)
            model.stream = self.stream
        return Costs.of(model, precision, block, self.n_sources, longest, threads, places, against_base)

    def _carry(
        self, part: Pass, precision: Precision, each: Map, tick: Callable[[int], None] = lambda n: None
    ) -> PassResult:
        prompts = self.prompts(part.pairs)
        return Wavefront(
            self.model, prompts, part.table, self.measured, precision, self.backend, each, tick
        ).run()

    def found(
        self, part: Pass, each: Map, tick: Callable[[int], None], describe: Callable[[int], str]
    ) -> PassEffects:
        """What a pass finds.

        Raises:
            DeltapatchError: it is not finite.
        """
        assert self.precision is not None
        began = time.perf_counter()
        result = self._carry(part, self.precision, each, tick)
        self._check_finite(part, result, describe)
        reference = result.reference(self.direction)
        seconds = round(time.perf_counter() - began, 3)
        return PassEffects(part.out, np.array(part.pairs), result.measured, reference, seconds)

    def row_layers(self, part: Pass) -> int:
        """What a pass adds to the progress bar."""
        return row_layers(part.table, [self.runs[pair] for pair in part.pairs], self.model.spec.n_layers)

    def prompts(self, numbers: list[int]) -> Prompts:
        """The prompts of some pairs, cut at the read-out position, and what their answers add."""
        parts: list[list[list[int]]] = [[], [], []]  # base, counterpart, another pair's source
        for i in numbers:
            n, after = self.length[i], self.continued[i].tokens
            base, other = self._base_and_source(i)
            parts[0].append([*base[:n], *after])
            parts[1].append([*other[:n], *after])
            if self.partner is not None:
                parts[2].append([*self._base_and_source(int(self.partner[i]))[1][:n], *after])
        flat = [np.concatenate(p) for p in parts if p]
        noise = self._noise(numbers) if self.source == "noise" else None
        in_base = self.direction == "denoise"
        return Prompts(
            tokens=flat[0],
            sources=np.stack(flat[1:]),
            noise=noise if in_base else None,
            source_noise=None if in_base else noise,
            shapes=PairShapes([self.runs[i] for i in numbers]),
            targets=np.concatenate([self.continued[i].targets for i in numbers]),
            kind=self.source,
        )

    def _base_and_source(self, number: int) -> tuple[list[int], list[int]]:
        pair = self.pairs[number]
        corrupted = pair.clean if self.source == "noise" else pair.corrupted
        return (corrupted, pair.clean) if self.direction == "denoise" else (pair.clean, corrupted)

    @cached_property
    def _embedding_std(self) -> float:
        n, total, squares = 0, 0.0, 0.0
        for ids in torch.arange(self.model.spec.d_vocab).split(_TOKENS):  # never a wide copy of the whole
            some = self.model.embed(ids, torch.float64)
            n, total, squares = n + some.numel(), total + float(some.sum()), squares + float((some**2).sum())
        return ((squares - total**2 / n) / (n - 1)) ** 0.5

    def _noise(self, numbers: list[int]) -> torch.Tensor:
        """[base token, d_model]; each pair has a seed of its own, so passes may be cut anywhere."""
        scale = self.noise_scale * self._embedding_std
        parts = []
        for i in numbers:
            n, pair, width = self.length[i], self.pairs[i], self.model.spec.d_model
            drawn = np.random.default_rng((self.seed, i)).standard_normal((n, width)) * scale
            differs = np.array(pair.clean[:n]) != np.array(pair.corrupted[:n])
            parts += [drawn * differs[:, None], np.zeros((len(self.continued[i].tokens), width))]
        return torch.from_numpy(np.concatenate(parts))

    def _check_finite(self, part: Pass, result: PassResult, describe: Callable[[int], str]) -> None:
        bad_pairs = ~np.isfinite(result.unpatched.logp).all(axis=(1, 2))
        if bad_pairs.any():
            raise DeltapatchError(
                f"the model's own logits are not finite for pair {part.pairs[int(np.argmax(bad_pairs))]}: "
                "its weights overflow in float32; load it with dtype='float64' or check the checkpoint"
            )
        for name, values in result.measured.items():
            bad = ~np.isfinite(values)
            if bad.any():
                raise DeltapatchError(
                    f"{name} is not finite for {int(bad.sum())} intervention(s), the first: "
                    f"{describe(int(part.out[np.argmax(bad)]))}; try precision={self._wider()!r}"
                )

    def _wider(self) -> str:
        """What to try where numbers overflow."""
        assert self.precision is not None
        return "fp64" if self.precision.name == "fp32" else "fp32"

    def meta(self) -> dict[str, Any]:
        """What was run, for the record."""
        return {
            "model": self.model.name,
            "revision": self.model.revision,
            "commit": self.model.commit,
            "fingerprint": self.fingerprint,
            "architecture": self.model.spec.architecture,
            "source": self.source,
            "direction": self.direction,
            "readout": self.readout,
            "answer_tokens": max(pair.answer_tokens for pair in self.pairs),
            "precision": None if self.precision is None else self.precision.name,
            "noise_floor": self.noise_floor,
            "noise_floor_left_out": self.noise_floor_left_out,
            "backend": self.backend.name,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "stream": self.model.stream,
            "seed": self.seed,
            "noise_scale": self.noise_scale if self.source == "noise" else None,
            "memory_budget": self.budget,
            "passes": self.passes,
            "rows": self.rows,
            "seconds": round(self.seconds, 3),
            **environment(),
        }
