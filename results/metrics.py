"""Metrics: what is said of one intervention's read-out distribution. Adding one is one entry of METRICS.

The engine measures a few numbers for each intervention (MEASURED), changes of probabilities as differences
from the base run and so without cancellation; every metric follows from them and from the two unpatched runs
of the pair.

Probabilities are of whole answers: log P(answer) adds up over its tokens, each after the ones before it.
`kl`, `entropy` and `flip` are of the distribution at the end of the prompt.
"""

import hashlib
import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeGuard

import numpy as np

from deltapatch.arguments import choice, several
from deltapatch.errors import DeltapatchError, shown
from deltapatch.results.probe import Probe, load_probes

Direction = Literal["denoise", "noise"]
Formula = Callable[[Mapping[str, np.ndarray], "Reference", Direction], np.ndarray]

_EXAMPLE = "'all' or names such as ['ie', 'recovered']"

# What the engine writes down of each intervention; each is itself a metric.
MEASURED = (
    "logit_diff",
    "dlogp_clean",
    "dlogp_corrupted",
    "kl",
    "entropy",
    "flip",
    "says_clean",
    "says_corrupted",
)


@dataclass(frozen=True)
class Reference:
    """The two unpatched runs of each pair. Run and answer are (clean, corrupted), unless told otherwise.

    Attributes:
        logit: [pair, run, answer], float64: the logit of the answer's token at the position where the two
            answers part, plus the log-probabilities of its tokens after that. Their difference is that of
            log P(answer). Of answers of one token it is the logit, of any of several log Σ exp(logit).
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

    def accuracy(self) -> float:
        """Half clean runs right and half corrupted runs right: what the run says is the answer.

        Of an answer of several tokens each must be the likeliest after those before it.
        """
        return float(self.says[:, [0, 1], [0, 1]].mean())

    def caveat(self) -> str | None:
        """What a reader has to know beside effects: that the model answers nothing right; None otherwise."""
        if self.says[:, [0, 1], [0, 1]].any():
            return None
        return (
            f"the model answers none of these {2 * len(self.says)} prompts right: effects say how its wrong "
            "predictions move, not how it finds answers"
        )

    def runs(self, order: Sequence[int]) -> "Reference":
        """The same with the runs in another order."""
        return Reference(*(array[:, list(order)] for array in self.arrays().values()))


@dataclass(frozen=True)
class Metric:
    """A metric: the measured numbers it needs, how it follows from them, and what is said of it everywhere.

    `formula(measured, reference, direction)` gets arrays [pair, ...] and returns one of the same shape.
    `reference` is already broadcast: attributes are [pair, run, answer, 1, ...].

    Attributes:
        title: what it is called in a sentence.
        equation: the formula as people read it, in the words of NOTATION.
        bounds: the values it can have.
        denoise, noise: its sign, or value, where a patch takes the base run towards the source run; "either".
        undefined: when it is NaN.
        hint: how a figure tells its sign.
        over: what each pair's number is divided by, [pair]; a mean over pairs is then the ratio of both
            means. None where it is no such ratio.
        skewed: a few pairs can make most of its mean, so tables show its median too.
        yes_or_no: it is 1 or 0.
        judges: its error has a say when a precision is chosen.
        additive: it is how far one quantity moves, so that effects which do not interact add up.
    """

    needs: tuple[str, ...]
    formula: Formula
    title: str
    equation: str
    bounds: str
    denoise: str
    noise: str
    undefined: str = "never"
    hint: str = ""
    over: Callable[[Reference, Direction], np.ndarray] | None = None
    skewed: bool = False
    yes_or_no: bool = False
    judges: bool = True
    additive: bool = True

    @property
    def label(self) -> str:
        """What a figure's axis says."""
        return f"{self.title} ({self.hint})" if self.hint else self.title

    def sign(self, direction: Direction) -> int:
        """-1 where a patch that takes the base run towards the source run lowers it, else 1."""
        towards = self.denoise if direction == "denoise" else self.noise
        return -1 if towards in ("-", "0") else 1

    @property
    def never_negative(self) -> bool:
        """Whether it begins at 0."""
        return self.bounds.startswith("0")


def _ie(m: Mapping[str, np.ndarray], ref: Reference, direction: Direction) -> np.ndarray:
    src, base = ("clean", "corrupted") if direction == "denoise" else ("corrupted", "clean")
    return 0.5 * (np.expm1(m[f"dlogp_{src}"]) + np.expm1(-m[f"dlogp_{base}"]))


def _to_the_source(ref: Reference, direction: Direction) -> np.ndarray:
    """[pair], how far the logit difference of the pair's other run is from that of the base run."""
    clean, corrupted = (ref.logit[:, run, 0] - ref.logit[:, run, 1] for run in (0, 1))
    return clean - corrupted if direction == "denoise" else corrupted - clean


def _probability_change(answer: int) -> Formula:
    name = ("clean", "corrupted")[answer]

    def formula(m: Mapping[str, np.ndarray], ref: Reference, direction: Direction) -> np.ndarray:
        base_run = 1 if direction == "denoise" else 0
        return np.exp(ref.logp[:, base_run, answer]) * np.expm1(m[f"dlogp_{name}"])

    return formula


def _as_measured(name: str) -> tuple[tuple[str, ...], Formula]:
    return (name,), lambda m, ref, direction: m[name]


# What equations are written in.
NOTATION = (
    "P are probabilities of whole answers. D is logit(clean answer) - logit(corrupted answer), of answers "
    "of several tokens, or any of several, log P(clean answer) - log P(corrupted answer). Those with * "
    "are of the patched run, P and D_base of the base run, which is the same prompt unpatched, and "
    "D_source of the pair's other run. The answers s and b are those of the source and the base prompt. "
    "The columns denoise and noise tell the sign, or value, of a patch that takes the base run towards "
    "the source run."
)
NOTHING = 1e-4  # below it, a difference between two runs' logit differences is mostly rounding
_ANSWER = "the end of the prompt"
METRICS: dict[str, Metric] = {
    "ie": Metric(
        ("dlogp_clean", "dlogp_corrupted"),
        _ie,
        "indirect effect",
        "1/2 [(P*(s) - P(s)) / P(s) + (P(b) - P*(b)) / P*(b)], of Stolfo et al. 2023",
        "above -1",
        "+",
        "+",
        hint="+ towards the source's answer",
        skewed=True,
        additive=False,
    ),
    "logit_diff": Metric(
        *_as_measured("logit_diff"),
        "change of logit difference",
        "D* - D_base",
        "any",
        "+",
        "-",
        hint="+ towards the clean answer",
    ),
    "recovered": Metric(
        *_as_measured("logit_diff"),
        "logit difference recovered",
        "(D* - D_base) / (D_source - D_base), whatever patches bring; over pairs, the ratio of means",
        "any; 0 nothing, 1 all",
        "+",
        "+",
        f"where the two runs' D differ by less than {NOTHING:g}",
        hint="0: base, 1: source",
        over=_to_the_source,
    ),
    "dlogp_clean": Metric(
        *_as_measured("dlogp_clean"),
        "change of log P(clean answer), nats",
        "log P*(clean answer) - log P(clean answer)",
        "any",
        "+",
        "-",
    ),
    "dlogp_corrupted": Metric(
        *_as_measured("dlogp_corrupted"),
        "change of log P(corrupted answer), nats",
        "log P*(corrupted answer) - log P(corrupted answer)",
        "any",
        "-",
        "+",
    ),
    "dp_clean": Metric(
        ("dlogp_clean",),
        _probability_change(0),
        "change of P(clean answer)",
        "P*(clean answer) - P(clean answer)",
        "-1 to 1",
        "+",
        "-",
    ),
    "dp_corrupted": Metric(
        ("dlogp_corrupted",),
        _probability_change(1),
        "change of P(corrupted answer)",
        "P*(corrupted answer) - P(corrupted answer)",
        "-1 to 1",
        "-",
        "+",
    ),
    "prob_diff": Metric(
        ("dlogp_clean", "dlogp_corrupted"),
        lambda m, ref, direction: (
            _probability_change(0)(m, ref, direction) - _probability_change(1)(m, ref, direction)
        ),
        "change of probability difference",
        "(P*(clean answer) - P*(corrupted answer)) - (P(clean answer) - P(corrupted answer))",
        "-2 to 2",
        "+",
        "-",
        hint="+ towards the clean answer",
    ),
    "kl": Metric(
        *_as_measured("kl"),
        "KL(base || patched), nats",
        f"KL(base || patched) at {_ANSWER}, nats",
        "0 and more",
        "+",
        "+",
        additive=False,
    ),
    "entropy": Metric(
        *_as_measured("entropy"),
        "change of entropy, nats",
        f"H(patched) - H(base) of the next token at {_ANSWER}, nats",
        "any",
        "either",
        "either",
        hint="+ less sure",
        judges=False,  # where one certain answer gives way to another it is next to nothing beside what moved
    ),
    "flip": Metric(
        *_as_measured("flip"),
        "share of predictions changed",
        f"whether the likeliest token at {_ANSWER} changed",
        "0 or 1",
        "1",
        "1",
        yes_or_no=True,
        additive=False,
    ),
    "says_clean": Metric(
        *_as_measured("says_clean"),
        "share of predictions that are the clean answer",
        "whether the patched run says the clean answer, each token the likeliest",
        "0 or 1",
        "1",
        "0",
        yes_or_no=True,
        additive=False,
    ),
    "says_corrupted": Metric(
        *_as_measured("says_corrupted"),
        "share of predictions that are the corrupted answer",
        "whether the patched run says the corrupted answer",
        "0 or 1",
        "0",
        "1",
        yes_or_no=True,
        additive=False,
    ),
}
DEFAULT = "recovered"
WEIGHTED = "weighted_logits"
# Metrics that users bring, in Python or as the weights of their pairs: name -> what is said of it. A run
# keeps their values. "all" has none of them.
OWN: dict[str, Metric] = {
    WEIGHTED: Metric(
        *_as_measured(WEIGHTED),
        "change of weighted logits",
        f"Σ w (logit* - logit_base) at {_ANSWER}, over the tokens of the pair's `weights`",
        "any",
        "either",
        "either",
    )
}
Function = Callable[..., Any]  # (logits [row, d_vocab], base logits [d_vocab], pair) -> [row]
Own = Function | Probe


def is_own(metric: object) -> TypeGuard[Own]:
    """Whether a metric is a user's: a function or a probe."""
    return callable(metric) or isinstance(metric, Probe)


def name_of(metric: str | Own) -> str:
    """The name of a metric that is given by name, as a function, or as a probe.

    Raises:
        DeltapatchError: a function or probe whose name cannot stand for it.
    """
    if isinstance(metric, Probe):
        if _is_taken(metric.name):
            raise DeltapatchError(f"a probe is called {metric.name!r}, which is taken: rename it")
        return metric.name
    if not callable(metric):
        return metric
    name = getattr(metric, "__name__", "")
    if not name.isidentifier() or _is_taken(name):
        raise DeltapatchError(
            f"a metric that is a function goes by its name, and {shown(name or metric)} "
            f"{'is taken' if _is_taken(name) else 'is none'}: define it with `def` under another"
        )
    return name


def _is_taken(name: str) -> bool:
    """Whether a metric of a user's cannot be called so."""
    return name in METRICS or name in ("all", WEIGHTED)


def know(name: str) -> str:
    """Let a name stand for a metric of a user's. ValueError where it cannot."""
    if not name.isidentifier() or _is_taken(name):
        raise ValueError(f"metric {name}")
    if name not in OWN:
        needs, formula = _as_measured(name)
        OWN[name] = Metric(needs, formula, name, name, "any", "either", "either", judges=False)
    return name


def know_all(functions: object) -> None:
    """Let the names of a run's record stand for metrics. ValueError where it is something else."""
    if functions is None:
        return
    if not isinstance(functions, dict) or not all(isinstance(v, str) for v in functions.values()):
        raise ValueError("functions")
    for name in functions:
        know(name)


def check_metric(name: str | Own) -> Metric:
    """The metric of that name, or a sentence that lists the names."""
    if is_own(name):
        name = name_of(name)
    return {**METRICS, **OWN}[choice(name, [*METRICS, *OWN], "metric")]


def metric_names(metrics: str | Own | Sequence[str | Own]) -> tuple[str | Own, ...]:
    """Metrics, given as one, as several, by names with commas between, or as "all".

    Functions and probes stay what they are, and their names are known from then on. A name that ends in
    .safetensors is a file of probes.

    Raises:
        DeltapatchError: there are none, or one is unknown.
    """
    if is_own(metrics):
        metrics = [metrics]
    given = metrics.split(",") if isinstance(metrics, str) else list(several(metrics, "metrics", _EXAMPLE))
    names = [name.strip() if isinstance(name, str) else name for name in given]
    names = [name for name in names if name != ""]
    files = [load_probes(n) if isinstance(n, str) and n.endswith(".safetensors") else [n] for n in names]
    names = [name for some in files for name in some]
    if not names:
        raise DeltapatchError(f"no metrics were given: metrics must be {_EXAMPLE}")
    out: list[str | Own] = []
    for name in names:
        if name == "all" and (len(names) == 1 or any(is_own(n) or n == WEIGHTED for n in names)):
            out += METRICS
        elif is_own(name):
            know(name_of(name))
            if name_of(name) in [name_of(other) for other in out]:
                raise DeltapatchError(f"two metrics are called {name_of(name)!r}: rename one")
            out.append(name)
        else:
            check_metric(name)  # type: ignore[arg-type]  # which says so
            out.append(name)  # type: ignore[arg-type]  # just checked
    return tuple(out)


def functions_of(metrics: Sequence[str | Own]) -> dict[str, Function]:
    """Those of some metrics that are functions, by name."""
    return {name_of(metric): metric for metric in metrics if callable(metric)}


def probes_of(metrics: Sequence[str | Own]) -> dict[str, Probe]:
    """Those of some metrics that are probes, by name."""
    return {name_of(metric): metric for metric in metrics if isinstance(metric, Probe)}


def source_of(function: Own) -> str:
    """A hash of a function's source, or, where Python does not know it, of what it was compiled to."""
    if isinstance(function, Probe):
        return function.digest()
    try:
        text = inspect.getsource(function).encode()
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        text = repr(function).encode() if code is None else code.co_code + repr(code.co_consts).encode()
    return hashlib.sha256(text).hexdigest()


def metrics_of(measured: Collection[str]) -> list[str]:
    """The metrics that follow from some measured numbers."""
    return [name for name, m in {**METRICS, **OWN}.items() if set(m.needs) <= set(measured)]


def is_measured(names: Collection[str]) -> bool:
    """Whether all of some names are of measured numbers."""
    return set(names) <= {*MEASURED, *OWN}


def measured_for(metrics: Sequence[str | Own]) -> tuple[str, ...]:
    """What the engine has to write down so that these metrics can be asked for."""
    needed = {n: None for metric in metrics for n in check_metric(metric).needs}
    return (*(n for n in MEASURED if n in needed), *(n for n in needed if n not in MEASURED))


def default_metric(known: Sequence[str]) -> str:
    """What is shown of a run unless it is told: `recovered`, or the first that the run can answer."""
    return DEFAULT if DEFAULT in known or not known else known[0]


def asked_of(known: Sequence[str], metrics: str | Own | Sequence[str | Own] | None) -> list[str]:
    """The metrics to show: as asked, one or several, or the default of what is known.

    Raises:
        DeltapatchError: they are something else than names.
    """
    if metrics is None:
        return [default_metric(known)]
    given = [metrics] if is_own(metrics) else metrics
    found = several(given, "metrics", "names such as ['ie', 'recovered']")
    return [name_of(metric) for metric in found]  # type: ignore[arg-type]  # what is none is told of later


def compute(
    name: str | Own, measured: Mapping[str, np.ndarray], reference: Reference, direction: Direction
) -> np.ndarray:
    """One metric as a float64 array of the shape of the measured ones, [pair, ...].

    NaN, with a warning, where it is undefined.

    Raises:
        DeltapatchError: an unknown metric, or one that the run did not measure.
    """
    return quotient(name_of(name), *terms(name, measured, reference, direction))


def terms(
    name: str | Own, measured: Mapping[str, np.ndarray], reference: Reference, direction: Direction
) -> tuple[np.ndarray, np.ndarray | None]:
    """One metric as it is averaged: its mean over pairs is the mean of the first over that of the second.

    Returns:
        float64 [pair, ...], and [pair] where the metric is a ratio (see `Metric.over`), else None.

    Raises:
        DeltapatchError: an unknown metric, or one that the run did not measure.
    """
    metric = check_metric(name)
    for need in metric.needs:
        if need not in measured:
            again = f"[{name_of(name)}]" if need in OWN else repr("all")
            raise DeltapatchError(
                f"this run did not measure what metric {name_of(name)!r} needs: sweep again with "
                f"metrics={repr(WEIGHTED) if need == WEIGHTED else again}"
            )
    arrays = {need: np.asarray(measured[need], dtype=np.float64) for need in metric.needs}
    trailing = (1,) * (next(iter(arrays.values())).ndim - 1)
    wide = Reference(*(a.reshape(*a.shape, *trailing) for a in reference.arrays().values()))
    over = None if metric.over is None else metric.over(reference, direction)
    return metric.formula(arrays, wide, direction), over


def quotient(name: str, values: np.ndarray, over: np.ndarray | None) -> np.ndarray:
    """What `terms` gave, pair by pair: [pair, ...]."""
    if over is None:
        return values
    return values / something(name, over, "pair(s)").reshape(-1, *(1,) * (values.ndim - 1))


def something(name: str, over: np.ndarray, of: str, same: str = "logit difference") -> np.ndarray:
    """What a ratio is divided by, NaN where that is nothing, with a warning.

    Args:
        name: of the metric.
        of: what the numbers are of, for the warning.
        same: what is the same in both runs then.
    """
    nothing = np.abs(over) < NOTHING
    if nothing.any():
        warnings.warn(
            f"{name} is undefined (NaN) for {int(nothing.sum())} {of}: "
            f"clean and corrupted runs have the same {same}",
            stacklevel=5,
        )
    return np.where(nothing, np.nan, over)


def definitions() -> list[tuple[str, ...]]:
    """The table of all metrics as people read it: a row each, the first row its header."""
    header = ("metric", "what it is", "values", "denoise", "noise", "undefined")
    rows = ((n, m.equation, m.bounds, m.denoise, m.noise, m.undefined) for n, m in METRICS.items())
    return [header, *rows]
