"""The audit: a sample of the run's effects in float64, for the noise floor and the choice of precision."""

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch

from deltapatch.engine.passes import carry, passes
from deltapatch.engine.planning.costs import flops, parameters
from deltapatch.engine.question import Question
from deltapatch.engine.wavefront.pool import Pool
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.table import PatchTable, take
from deltapatch.kernels.device import fast_bfloat16
from deltapatch.kernels.product import PRECISIONS, Precision
from deltapatch.kernels.readout_tail import worth_a_tail
from deltapatch.results.metrics import Reference, check_metric
from deltapatch.results.truth import Sampled, Truth, relative_errors

TOLERANCE = 1e-2  # what "auto" allows, relative to the norm of the effects
SAMPLE, _FEW = 32, 4  # effects, at most and at least, where the user does not say
_ONE_IN = 16  # of a small run's effects
_PAIRS = 4  # that the sample is drawn from, where that is little: each costs its unpatched runs in float64
# What the sample may take: this share of the run, or so many FLOPs (half a second) where that is more.
_SHARE, _SMALL = 1 / 8, {"cpu": 2e10, "cuda": 1e12}
_DOUBLE = 2  # times as long as in float32 a product takes in float64
_CONVERTING = 64  # FLOPs that could be done while one weight is converted
# Below so many necessary FLOPs, choosing would take longer than it saves.
_WORTH_CHOOSING = {"cpu": 2e12, "cuda": 2e13}
# Reading a streamed model takes about as long as taking so many tokens through all layers. Each precision in
# which a sample is computed reads all of it: a run beside which that is little needs so many times more.
_READING = {"cpu": 1 << 10, "cuda": 1 << 15}
_READINGS = 16


class Audit:
    """Recomputes a sample of a question's effects.

    Args:
        question: what the sample is drawn from.
        pool: does blocks.
    """

    def __init__(self, question: Question, pool: Pool) -> None:
        self.question, self.pool = question, pool
        self._found: dict[str, Truth | None] = {}

    def cheapest(self) -> Precision:
        """The cheapest precision whose effects are within TOLERANCE of the truth, in every metric."""
        *candidates, safe = self._candidates()
        for name in candidates:
            precision = PRECISIONS[name]
            try:
                got = self._recompute(precision)
            except DeltapatchError:  # a weight that this precision cannot hold, or too little memory
                continue
            truth = self.truth_for(precision)
            if truth is not None and not self._worst(got.measured, truth.sampled) > TOLERANCE:
                return precision
        return PRECISIONS[safe]

    def expected(self) -> Precision:
        """What `cheapest` will choose if the first candidate is good enough."""
        return PRECISIONS[self._candidates()[0]]

    def expects(self) -> list[str]:
        """The precisions in which the sample will then be computed."""
        precision = self.question.precision or self.expected()
        tried = [] if self.question.precision or len(self._candidates()) == 1 else [precision.name]
        return tried + self.recomputed(precision)[:1]

    def truth_for(self, precision: Precision) -> Truth | None:
        """The truth that a run in that precision is held to.

        It is in float64, or in float32 where that would take long beside the run or has no room in memory.
        None where the run is itself as precise, and else for the reason that `left_out` says.
        """
        found = (self._truth(name) for name in self.recomputed(precision))
        return next((truth for truth in found if truth is not None), None)

    def recomputed(self, precision: Precision) -> list[str]:
        """What the truth for a run in that precision is computed in: the first that memory has room for."""
        if not self._size or precision.name == "fp64":
            return []
        exact = ["fp64"] if self.question.options.noise_sample is not None or self._is_little else []
        return exact if precision.name == "fp32" else [*exact, "fp32"]

    def left_out(self, precision: Precision) -> str | None:
        """Why a run in that precision has no noise floor, if it turns out to have none. None for float64."""
        if precision.name == "fp64":
            return None
        if not self._size:
            return "no sample was asked for"
        if self.recomputed(precision):
            return "the memory budget has no room for it"
        if self.question.flops < self._reading:
            return "the model would be read from its file once more"
        return "that would take long beside so short a run"

    def _of_runs(self, pairs: Sequence[int]) -> int:
        """FLOPs of the unpatched runs of some pairs, and of those that they share a mean with."""
        runs, spec = [self.question.runs[pair] for pair in pairs], self.question.model.spec
        if self.question.shares_means:
            prompts = {run.prompt for run in runs}
            runs = [
                self.question.runs[pair]
                for pair in self.question.order
                if self.question.runs[pair].prompt in prompts
            ]
        tokens, reads = (sum(getattr(run, name) for run in runs) for name in ("tokens", "reads"))
        return (1 + self.question.n_sources) * flops(spec, tokens * spec.n_layers, reads)

    def _takes(self, pairs: Sequence[int]) -> float:
        """FLOPs that could be done while the sample is computed in float64, drawn from some pairs."""
        rows = self.question.flops * self._size / max(1, self.question.interventions.n_effects)
        return _DOUBLE * (self._of_runs(pairs) + rows) + _CONVERTING * parameters(self.question.model.spec)

    def takes(self) -> float:
        """FLOPs that could be done while the sample is computed in float64."""
        return self._takes(self._pairs)

    @cached_property
    def _pairs(self) -> list[int]:
        """Pairs that lie evenly among all, as many as the sample may be drawn from."""
        order = self.question.order
        for n in range(min(_PAIRS, len(order)), 0, -1):
            pairs = [order[i] for i in np.linspace(0, len(order) - 1, n).round().astype(int)]
            if self.question.options.noise_sample is not None or self._takes(pairs) <= self._allowed:
                break
        return pairs

    @cached_property
    def _allowed(self) -> float:
        """FLOPs that the sample may take the time of."""
        small = _SMALL.get(self.question.model.device.type, 0)
        return max(small, _SHARE * (self.question.flops + self._of_runs(self.question.order)))

    @property
    def _is_little(self) -> bool:
        """Whether the sample in float64 is little beside the run."""
        return self.question.flops >= self._reading and self._takes(self._pairs) <= self._allowed

    @property
    def _reading(self) -> float:
        """FLOPs of a run beside which reading a streamed model once or twice more is little; 0 in memory."""
        model = self.question.model
        tokens = _READING.get(model.device.type, 0) if model.stream else 0
        return 2.0 * tokens * _READINGS * parameters(model.spec)

    @property
    def _size(self) -> int:
        """How many effects to compute again: as asked, or so few that the run hardly takes longer."""
        if self.question.options.noise_sample is not None:
            return self.question.options.noise_sample
        return min(SAMPLE, max(_FEW, -(-self.question.interventions.n_effects // _ONE_IN)))

    @cached_property
    def sample(self) -> list[tuple[int, PatchTable, np.ndarray]]:
        """Interventions drawn at random from a few pairs."""
        chosen, size = self._pairs, self._size
        out: list[tuple[int, PatchTable, np.ndarray]] = []
        for pair in chosen if size else []:
            table, effects = self.question.interventions.table(pair, self.question.pairs[pair])
            n = min(-(-size // len(chosen)), table.n_rows)
            rows = np.random.default_rng((self.question.options.seed, pair)).choice(
                table.n_rows, n, replace=False
            )
            rows.sort()
            out.append((pair, take(table, rows), effects[rows]))
        return [part for part in out if part[1].n_rows]

    def _truth(self, name: str) -> Truth | None:
        """The sample in that precision; None where there is no sample, or the memory budget has no room."""
        if name not in self._found:
            self._found[name] = None
            if self.sample:
                with contextlib.suppress(DeltapatchError):
                    sampled = self._recompute(PRECISIONS[name])
                    at = np.concatenate([out for _, _, out in self.sample])
                    self._found[name] = Truth(name, at, sampled)
        return self._found[name]

    def _candidates(self) -> Sequence[str]:
        """Precisions from the cheapest on; the last one is taken without a test."""
        model = self.question.model
        if model.dtype == torch.float64:
            return ["fp64"]
        on = model.device.type
        if not self._size or self.question.flops < max(_WORTH_CHOOSING.get(on, 0), self._reading):
            return ["fp32"]
        if on == "cuda":
            return ["fp16", "bf16", "tf32", "fp32"]
        return ["bf16", "fp32"] if fast_bfloat16() or self._expands else ["fp32"]

    @property
    def _expands(self) -> bool:
        """Whether a run in bfloat16 does not multiply most rows with the whole vocabulary."""
        question, spec = self.question, self.question.model.spec
        rows = self.question.n_reads // max(1, len(self.question.order))
        return question.backend.expands and worth_a_tail(
            rows, spec.d_vocab, spec.d_model, PRECISIONS["bf16"], question.measured
        )

    def _recompute(self, precision: Precision) -> Sampled:
        """The sample in another precision."""
        question = self.question
        place = {int(effect): i for i, effect in enumerate(np.concatenate([o for _, _, o in self.sample]))}
        n = len(place)
        measured = {name: np.full(n, np.nan) for name in question.measured}
        reference = Reference.empty(n)
        for part in passes(question, question.decided(precision), self.pool, self.sample):
            result = carry(question, part, precision, self.pool, narrow_few=True)
            at = np.array([place[int(effect)] for effect in part.out])
            for name, values in result.measured.items():
                measured[name][at] = values
            reference.put(at, result.reference(question.options.direction).of(part.table.pair))
        return Sampled(measured, reference)

    def _worst(self, got: Mapping[str, np.ndarray], truth: Sampled) -> float:
        """The largest error of all metrics that judge."""
        errors = relative_errors(got, truth.measured, truth.reference, self.question.options.direction)
        known = {name: check_metric(name) for name in errors}
        judged = (e for name, e in errors.items() if known[name].judges and not known[name].yes_or_no)
        return max(judged, default=0.0)
