"""A job: checked options and encoded pairs, carried out pass by pass."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from deltapatch.engine.audit import Audit
from deltapatch.engine.metrics import MEASURED, Direction, Reference, measured_for
from deltapatch.engine.pairs import EncodedPair, PromptPair, encode_pairs
from deltapatch.engine.patches import PatchTable
from deltapatch.engine.planner import Costs, Pass, cut, default_budget
from deltapatch.engine.progress import progress_bar
from deltapatch.engine.runfolder import environment
from deltapatch.engine.sources import Prompts, Source, check_source
from deltapatch.engine.wavefront import PassResult, Wavefront
from deltapatch.engine.workers import Map, full_float32, workers
from deltapatch.errors import DeltapatchError
from deltapatch.kernels.backend import Backend, choose_backend
from deltapatch.kernels.product import PRECISIONS, Precision
from deltapatch.models.model import Model


@dataclass(frozen=True)
class Work:
    """What a job carries out.

    Attributes:
        order: pairs, by length.
        table_of: the interventions of a pair, and where their effects go.
        n_effects: of all pairs.
        row_layers: row tokens times the layers that they pass.
        describe: an effect in words.
    """

    order: list[int]
    table_of: Callable[[int], tuple[PatchTable, np.ndarray]]
    n_effects: int
    row_layers: int
    describe: Callable[[int], str]


@dataclass
class Job:
    """Checked options of a sweep or run."""

    model: Model
    pairs: list[EncodedPair]
    length: np.ndarray  # [pair], tokens up to the read-out position
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
    noise_floor: dict[str, Any] | None = None
    passes: int = 0
    rows: int = 0
    seconds: float = 0.0

    @classmethod
    def of(
        cls,
        model: Model,
        pairs: Sequence[PromptPair],
        direction: Direction,
        source: str,
        precision: str,
        backend: str,
        memory_budget: int | None,
        metrics: str | Sequence[str],
        readout: int | str,
        seed: int,
        noise_scale: float,
        noise_sample: int | None,
    ) -> "Job":
        """Check the options of a sweep or run, and encode its pairs.

        Raises:
            DeltapatchError: an option or a pair is wrong.
        """
        if direction not in ("denoise", "noise"):
            raise DeltapatchError(f"unknown direction {direction!r}: choose denoise or noise")
        if precision != "auto" and precision not in PRECISIONS:
            raise DeltapatchError(
                f"unknown precision {precision!r}: choose from auto, {', '.join(PRECISIONS)}"
            )
        if precision == "fp8" and not _has_float8(model.device):
            raise DeltapatchError(f"precision fp8 needs a newer GPU than {model.device}: use fp16 or bf16")
        if noise_sample is not None and noise_sample < 0:
            raise DeltapatchError(f"the noise sample must be 0 or more effects, not {noise_sample}")
        if memory_budget is not None and memory_budget <= 0:
            raise DeltapatchError(f"the memory budget must be positive, not {memory_budget}")
        kind = check_source(source)
        if isinstance(metrics, str) and metrics != "all":
            metrics = [m.strip() for m in metrics.split(",")]
        measured = MEASURED if metrics == "all" else measured_for(tuple(metrics))
        encoded = encode_pairs(pairs, model.tokenizer, model.spec.d_vocab)
        length = np.array([_read_at(readout, i, p) + 1 for i, p in enumerate(encoded)])
        return cls(
            model,
            encoded,
            length,
            direction,
            kind,
            PRECISIONS.get(precision),
            choose_backend(backend, model.device),
            memory_budget or default_budget(model.device),
            measured,
            readout,
            seed,
            noise_scale,
            noise_sample,
            _partners(length, seed) if kind == "resample" else None,
        )

    def carry_out(self, work: Work, progress: bool) -> tuple[dict[str, np.ndarray], Reference]:
        """Run all passes: the measured numbers, [effect], NaN where there is none, and the unpatched runs."""
        began = time.perf_counter()
        n = len(self.pairs)
        reference = Reference(np.full((n, 2, 2), np.nan), np.full((n, 2, 2), np.nan), np.full((n, 2), -1))
        bar = progress_bar("patching", work.row_layers, progress)
        with bar as tick, full_float32(), workers(self.model.device) as each:
            audit = Audit(self, work, each)
            if self.precision is None:
                self.precision = audit.cheapest()
            dtype = np.float64 if self.precision.name == "fp64" else np.float32
            measured = {name: np.full(work.n_effects, np.nan, dtype=dtype) for name in self.measured}
            tables = ((pair, *work.table_of(pair)) for pair in work.order)
            for part, result in self.passes_of(tables, self.precision, each, tick):
                self._check_finite(part, result, work.describe)
                for name, values in result.measured.items():
                    measured[name][part.out] = values
                # The wavefront knows base and source; a reader of the results knows clean and corrupted.
                runs = [1, 0] if self.direction == "denoise" else [0, 1]
                reference.logit[part.pairs] = result.logit[:, runs]
                reference.logp[part.pairs] = result.logp[:, runs]
                reference.prediction[part.pairs] = result.prediction[:, runs]
                self.passes += 1
                self.rows += len(part.out)
            self.noise_floor = audit.noise_floor(self.precision, measured)
        self.seconds = time.perf_counter() - began
        return measured, reference

    def passes_of(
        self,
        tables: Iterable[tuple[int, PatchTable, np.ndarray]],
        precision: Precision,
        each: Map,
        tick: Callable[[int], None] = lambda n: None,
    ) -> Iterator[tuple[Pass, PassResult]]:
        """Carry interventions out, pass by pass.

        Args:
            tables: (pair, its interventions, where their effects go), ordered by the pairs' lengths.
            precision: of the products.
            each: does blocks.
            tick: is told the row-layers done.
        """
        n_sources = 1 if self.partner is None else 2
        longest = int(self.length.max())
        costs = Costs.of(self.model, precision, self.backend.block_tokens, n_sources, longest)
        for part in cut(tables, self.length, costs, self.budget, self.source == "mean"):
            prompts = self._prompts(part.pairs)
            wavefront = Wavefront(
                self.model, prompts, part.table, self.measured, precision, self.backend, each, tick
            )
            yield part, wavefront.run()

    def _prompts(self, numbers: list[int]) -> Prompts:
        """The prompts of some pairs, cut at the read-out position."""
        length = self.length[numbers]
        parts: list[list[list[int]]] = [[], [], []]  # base, counterpart, another pair's source
        for i, n in zip(numbers, length, strict=True):
            base, other = self._base_and_source(i)
            parts[0].append(base[:n])
            parts[1].append(other[:n])
            if self.partner is not None:
                parts[2].append(self._base_and_source(int(self.partner[i]))[1][:n])
        flat = [np.concatenate(p) for p in parts if p]
        noise = self._noise(numbers, length) if self.source == "noise" else None
        in_base = self.direction == "denoise"
        return Prompts(
            tokens=flat[0],
            sources=np.stack(flat[1:]),
            noise=noise if in_base else None,
            source_noise=None if in_base else noise,
            length=length,
            base=np.concatenate([[0], np.cumsum(length)[:-1]]),
            answers=np.array([[self.pairs[i].clean_answer, self.pairs[i].corrupted_answer] for i in numbers]),
            kind=self.source,
        )

    def _base_and_source(self, number: int) -> tuple[list[int], list[int]]:
        pair = self.pairs[number]
        corrupted = pair.clean if self.source == "noise" else pair.corrupted
        return (corrupted, pair.clean) if self.direction == "denoise" else (pair.clean, corrupted)

    @cached_property
    def _embedding_std(self) -> float:
        return float(self.model.ends().embedding.std())

    def _noise(self, numbers: list[int], length: np.ndarray) -> torch.Tensor:
        """[base token, d_model]; each pair has a seed of its own, so passes may be cut anywhere."""
        scale = self.noise_scale * self._embedding_std
        parts = []
        for i, n in zip(numbers, length, strict=True):
            drawn = (
                np.random.default_rng((self.seed, i)).standard_normal((n, self.model.spec.d_model)) * scale
            )
            pair = self.pairs[i]
            differs = np.array(pair.clean[:n]) != np.array(pair.corrupted[:n])
            parts.append(drawn * differs[:, None])
        return torch.from_numpy(np.concatenate(parts))

    def _check_finite(self, part: Pass, result: PassResult, describe: Callable[[int], str]) -> None:
        bad_pairs = ~np.isfinite(result.logit).all(axis=(1, 2))
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
            "fingerprint": self.model.fingerprint(),
            "architecture": self.model.spec.architecture,
            "source": self.source,
            "direction": self.direction,
            "readout": self.readout,
            "precision": None if self.precision is None else self.precision.name,
            "noise_floor": self.noise_floor,
            "backend": self.backend.name,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "seed": self.seed,
            "noise_scale": self.noise_scale if self.source == "noise" else None,
            "memory_budget": self.budget,
            "passes": self.passes,
            "rows": self.rows,
            "seconds": round(self.seconds, 3),
            **environment(),
        }


def _has_float8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _read_at(readout: int | str, number: int, pair: EncodedPair) -> int:
    at = pair.resolve(readout)
    if at is None:
        raise DeltapatchError(f"pair {number} has no position {readout!r} to read the effect at")
    return at


def _partners(length: np.ndarray, seed: int) -> np.ndarray:
    """[pair], another pair of the same length for each, by a seeded cyclic shift of a shuffle."""
    out = np.arange(len(length))
    rng = np.random.default_rng(seed)
    for n in np.unique(length):
        same = rng.permutation(np.flatnonzero(length == n))
        if len(same) < 2:
            raise DeltapatchError(
                f"source 'resample' needs another pair of the same length, but pair {same[0]} is alone "
                f"with its {n} tokens"
            )
        out[same] = np.roll(same, 1)
    return out
