"""Metrics: what is said of one intervention's read-out distribution. Adding one is one entry of METRICS.

The engine measures a few numbers for each intervention (MEASURED), changes of probabilities as differences
from the base run and so without cancellation; every metric follows from them and from the two unpatched runs
of the pair.

Probabilities are of whole answers: log P(answer) adds up over its tokens, each after the ones before it. `kl`
and `flip` are of the distribution at the end of the prompt.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from deltapatch.engine.arguments import choice, several
from deltapatch.errors import DeltapatchError, shown

Direction = Literal["denoise", "noise"]
Formula = Callable[[Mapping[str, np.ndarray], "Reference", Direction], np.ndarray]

_EXAMPLE = "'all' or names such as ['ie', 'recovered']"

# What the engine writes down of each intervention; each is itself a metric.
MEASURED = ("logit_diff", "dlogp_clean", "dlogp_corrupted", "kl", "flip", "says_clean", "says_corrupted")


@dataclass(frozen=True)
class Reference:
    """The two unpatched runs of each pair. Run and answer are (clean, corrupted), unless told otherwise.

    Attributes:
        logit: [pair, run, answer], float64: the logit of the answer's token at the position where the two
            answers part, plus the log-probabilities of its tokens after that. Their difference is that of
            log P(answer). Of answers of one token it is the logit.
        logp: [pair, run, answer], float64, log P(answer).
        prediction: [pair, run], the likeliest token at the end of the prompt.
        says: [pair, run, answer], whether the answer is what the run says, token by token.
    """

    logit: np.ndarray
    logp: np.ndarray
    prediction: np.ndarray
    says: np.ndarray

    @classmethod
    def empty(cls, n_pairs: int, n_runs: int = 2) -> "Reference":
        """Of runs that are not known yet: NaN, and -1 for a token."""
        each = (n_pairs, n_runs, 2)
        return cls(
            np.full(each, np.nan), np.full(each, np.nan), np.full(each[:2], -1), np.zeros(each, dtype=bool)
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """By name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def of(self, pairs: np.ndarray | slice) -> "Reference":
        """That of some pairs, which may come several times."""
        return Reference(*(array[pairs] for array in self.arrays().values()))

    def put(self, pairs: np.ndarray, other: "Reference") -> None:
        """Write down that of some pairs."""
        for name, array in self.arrays().items():
            array[pairs] = getattr(other, name)

    def runs(self, order: Sequence[int]) -> "Reference":
        """The same with the runs in another order."""
        return Reference(*(array[:, list(order)] for array in self.arrays().values()))


@dataclass(frozen=True)
class Metric:
    """A metric: the measured numbers it needs, and how it follows from them.

    `formula(measured, reference, direction)` gets arrays [pair, ...] and returns one of the same shape.
    `reference` is already broadcast: attributes are [pair, run, answer, 1, ...].
    """

    needs: tuple[str, ...]
    formula: Formula
    meaning: str
    yes_or_no: bool = False  # 1 or 0


def _ie(m: Mapping[str, np.ndarray], ref: Reference, direction: Direction) -> np.ndarray:
    # ½[(P*(src) - P(src)) / P(src) + (P(base) - P*(base)) / P*(base)], Stolfo et al. 2023, equation 2.
    src, base = ("clean", "corrupted") if direction == "denoise" else ("corrupted", "clean")
    return 0.5 * (np.expm1(m[f"dlogp_{src}"]) + np.expm1(-m[f"dlogp_{base}"]))


def _recovered(m: Mapping[str, np.ndarray], ref: Reference, direction: Direction) -> np.ndarray:
    gap = (ref.logit[:, 0, 0] - ref.logit[:, 0, 1]) - (ref.logit[:, 1, 0] - ref.logit[:, 1, 1])
    tiny = np.abs(gap) < 1e-4
    if tiny.any():
        warnings.warn(
            f"recovered is undefined (NaN) for {int(tiny.sum())} pair(s): "
            "clean and corrupted runs have the same logit difference",
            stacklevel=4,
        )
    return m["logit_diff"] / np.where(tiny, np.nan, gap)


def _probability_change(
    answer: int,
) -> Callable[[Mapping[str, np.ndarray], Reference, Direction], np.ndarray]:
    name = ("clean", "corrupted")[answer]

    def formula(m: Mapping[str, np.ndarray], ref: Reference, direction: Direction) -> np.ndarray:
        base_run = 1 if direction == "denoise" else 0
        return np.exp(ref.logp[:, base_run, answer]) * np.expm1(m[f"dlogp_{name}"])

    return formula


def _as_measured(name: str, meaning: str, yes_or_no: bool = False) -> Metric:
    return Metric((name,), lambda m, ref, direction: m[name], meaning, yes_or_no)


METRICS: dict[str, Metric] = {
    "ie": Metric(("dlogp_clean", "dlogp_corrupted"), _ie, "indirect effect (Stolfo et al. 2023)"),
    # Of one token each, logits differ as log-probabilities do.
    "logit_diff": _as_measured("logit_diff", "change of log P(clean answer) - log P(corrupted answer)"),
    "recovered": Metric(("logit_diff",), _recovered, "logit_diff over clean's minus corrupted's"),
    "dlogp_clean": _as_measured("dlogp_clean", "change of log P(clean answer)"),
    "dlogp_corrupted": _as_measured("dlogp_corrupted", "change of log P(corrupted answer)"),
    "dp_clean": Metric(("dlogp_clean",), _probability_change(0), "change of P(clean answer)"),
    "dp_corrupted": Metric(("dlogp_corrupted",), _probability_change(1), "change of P(corrupted answer)"),
    "kl": _as_measured("kl", "KL(base || patched) at the end of the prompt, nats"),
    "flip": _as_measured("flip", "1 where the likeliest token at the end of the prompt changed", True),
    "says_clean": _as_measured("says_clean", "1 where the patched run says the clean answer", True),
    "says_corrupted": _as_measured("says_corrupted", "1 where it says the corrupted answer", True),
}


def check_metric(name: str) -> Metric:
    """The metric of that name, or a sentence that lists the names."""
    if callable(name):
        raise DeltapatchError(
            f"a metric must be a name, not a function ({shown(name)}): choose from {', '.join(METRICS)}"
        )
    return METRICS[choice(name, METRICS, "metric")]


def metric_names(metrics: str | Sequence[str]) -> tuple[str, ...]:
    """The names of metrics, given as one, as several, with commas between, or as "all".

    Raises:
        DeltapatchError: there are none, or one is unknown.
    """
    given = metrics.split(",") if isinstance(metrics, str) else list(several(metrics, "metrics", _EXAMPLE))
    names = [name.strip() if isinstance(name, str) else name for name in given]
    names = [name for name in names if name != ""]
    if not names:
        raise DeltapatchError(f"no metrics were given: metrics must be {_EXAMPLE}")
    if names == ["all"]:
        return tuple(METRICS)
    for name in names:
        check_metric(name)  # type: ignore[arg-type]  # which says so
    return tuple(names)  # type: ignore[arg-type]  # just checked


def measured_for(metrics: tuple[str, ...]) -> tuple[str, ...]:
    """Which of MEASURED the engine has to write down so that these metrics can be asked for."""
    needed = {n for name in metrics for n in check_metric(name).needs}
    return tuple(n for n in MEASURED if n in needed)


def compute(
    name: str, measured: Mapping[str, np.ndarray], reference: Reference, direction: Direction
) -> np.ndarray:
    """One metric as a float64 array of the shape of the measured ones, [pair, ...].

    Raises:
        DeltapatchError: an unknown metric, or one that the run did not measure.
    """
    metric = check_metric(name)
    for need in metric.needs:
        if need not in measured:
            raise DeltapatchError(
                f"this run did not measure what metric {name!r} needs: sweep again with metrics='all'"
            )
    arrays = {need: np.asarray(measured[need], dtype=np.float64) for need in metric.needs}
    trailing = (1,) * (next(iter(arrays.values())).ndim - 1)
    wide = Reference(*(a.reshape(*a.shape, *trailing) for a in reference.arrays().values()))
    return metric.formula(arrays, wide, direction)
