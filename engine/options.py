"""Options: what a sweep and a run may be asked for, each written down once.

An option is one field here: its name, default and check, what its documentation says, and how the shell takes
it. The signatures of `sweep` and `run`, the command line, a run's record, and what a run that is resumed or
shared is held to are made from these fields; tests go over them. Torch and numpy are not needed to read them.
"""

import functools
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from deltapatch import arguments
from deltapatch.errors import DeltapatchError, path_of, shown
from deltapatch.interventions.alignment import ENDS

if TYPE_CHECKING:
    from deltapatch.interventions.roles import Roles
    from deltapatch.results.recall import Recall

P = ParamSpec("P")
Result = TypeVar("Result")

Positions = str | int | Sequence[int | str]
Layers = str | int | Sequence[int]

SCREENS = ("attribution", "relp", "ig-inputs", "ig-activations")
SCREENED_BY = ("logit_diff", "dlogp_clean", "dlogp_corrupted")
OF_SCREENS = ("top", "screen_sample", "screen_by", "screen_steps", "threshold", "until", "screen_limit")


def option(
    default: Any,
    help: str,
    *,
    check: Callable[[Any], Any] = lambda value: value,
    word: str = "",
    other: Any = None,
    typed: dict[str, Any] | None = None,
    kept: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """A field of `Options`.

    Args:
        default: its default.
        help: what the documentation of `sweep` says of it.
        check: gives the value that is plainly meant; DeltapatchError where none is.
        word: what a sentence calls it where a run has another; none for what decides nothing of a result.
        other: another value than the default, and one that makes another run.
        typed: how the shell takes it: its own `help`, other arguments of `click.option`, a `choice` or the
            whole numbers from `at_least` on; `read` makes the value of its text.
        kept: what a record has of the value.
    """
    about = {"help": help, "check": check, "word": word, "other": other, "typed": typed or {}, "kept": kept}
    return field(default=default, metadata=about)


def _name(what: str) -> Callable[[Any], Any]:
    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise DeltapatchError(f"{what} must be a name, not {shown(value)}")
        return value

    return check


def _direction(value: Any) -> str:
    if _name("direction")(value) not in ("denoise", "noise"):
        raise DeltapatchError(f"unknown direction {value!r}: choose denoise or noise")
    return str(value)


def _metrics(value: Any) -> tuple[Any, ...]:
    from deltapatch.results.metrics import metric_names

    return metric_names(value)


def _source(value: Any) -> str:
    from deltapatch.interventions.sources import check_source

    return check_source(_name("source")(value))


def _until(value: Any) -> str | None:
    """As text, which a record can keep."""
    from deltapatch.results.recall import Recall

    return value if value is None else str(Recall.of(value))


def _prompts_file(path: str) -> Any:
    from deltapatch.interventions.prompts_file import load_prompts

    return load_prompts(path)


def _digest(value: Any) -> dict[str, Any] | None:
    """Of a list that may be long: how many, and what tells it from others."""
    if value is None:
        return None
    text = json.dumps([one if isinstance(one, str | Mapping) else list(one) for one in value], sort_keys=True)
    return {"prompts": len(value), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _directions(value: Any) -> Any:
    from deltapatch.interventions.directions import by_site

    return value if value is None else by_site(value)


def _directions_file(path: str) -> Any:
    from deltapatch.interventions.directions import load_directions

    return load_directions(path)


def _digest_of_directions(value: Any) -> str | None:
    from deltapatch.interventions.directions import digest

    return digest(value)


def _out(value: Any) -> Any:
    return value if value is None else path_of(value, "out")


def _shard(value: Any) -> tuple[int, int] | None:
    """(i, n) of a part, from 1."""
    if value is None:
        return None
    must = "shard must be two whole numbers such as (2, 8), the part and how many there are"
    given = list(arguments.several(value, "shard", "a part such as (2, 8)"))
    if len(given) != 2:
        raise DeltapatchError(f"{must}, not {shown(value)}")
    i, n = (arguments.whole(number, must) for number in given)
    if not 1 <= i <= n:
        raise DeltapatchError(f"shard {i}/{n} does not exist: the first of {n} is 1/{n}, the last {n}/{n}")
    return i, n


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every run is asked for. What is given another way is made the same.

    Raises:
        DeltapatchError: an option is of another type, or out of range.
    """

    direction: Literal["denoise", "noise"] = option(
        "denoise",
        '"denoise" patches clean activations into the corrupted run, "noise" the other way round.',
        check=_direction,
        word="direction",
        other="noise",
        typed={
            "choice": ("denoise", "noise"),
            "help": "denoise patches clean activations into the corrupted run; noise the other way round.",
        },
    )
    source: str = option(
        "counterpart",
        '"counterpart" (the pair\'s other prompt), "zero", "mean" (over both prompts of all pairs of the '
        'same length), "resample" (another pair\'s source run) or "noise" (the corrupted run is the clean '
        "prompt with Gaussian noise on the embeddings where the prompts differ, as in ROME).",
        check=_source,
        word="source",
        other="zero",
        typed={"help": "Where activations come from: counterpart, zero, mean, resample or noise."},
    )
    align: str | None = option(
        None,
        'how pairs line up that do not say so themselves: "prefix+suffix", by the tokens that both prompts '
        "begin and end with. It changes nothing for prompts of equal length.",
        check=lambda value: value if value is None else arguments.choice(value, (ENDS,), "align"),
        word="alignment",
        other=ENDS,
        typed={
            "choice": (ENDS,),
            "help": "How pairs line up that do not say so themselves: by the tokens that both prompts begin "
            "and end with.",
        },
    )
    mean_over: Sequence[Any] | None = option(
        None,
        'of source "mean", prompts (texts, or lists of token ids) whose runs the mean is over, position by '
        "position, in place of those of the pairs: at each over the prompts that have it. One needs as many "
        "tokens as the longest prompt that is patched, up to where effects are read; more are left out. "
        'Where prompts have labels, {"prompt": ..., "labels": {...}}, a position for which a pair has such a '
        "label takes the mean over where they have it.",
        check=lambda value: arguments.prompts(value, "mean_over"),
        word="list of prompts that the mean is over",
        other=[[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]],
        kept=_digest,
        typed={
            "help": "Of the source mean: a file of prompts whose runs the mean is over, one a line, or JSON "
            'strings, lists of token ids and {"prompt": ..., "labels": {...}} (.jsonl).',
            "read": _prompts_file,
        },
    )
    precision: str = option(
        "auto",
        'of the products of differences: "fp64", "fp32", "tf32", "bf16", "fp16" (each row scaled by a power '
        'of two), "fp8" (for screening: effects are approximate), or "auto": the cheapest whose effects, in '
        "a sample of this run, are within 1e-2 of float64 (fp64 for a model loaded in float64). Unpatched "
        "runs are float32 in all of them, or float64.",
        check=_name("precision"),
        word="precision",
        other="bf16",
        typed={
            "help": "Of the products of differences: fp64, fp32, tf32, bf16, fp16, fp8 (approximate, for "
            "screening), or auto: the cheapest that keeps a sample of the effects within 1e-2 of float64."
        },
    )
    backend: str = option(
        "auto",
        '"triton" (on a CUDA device), "reference", or "auto": the best one for the model\'s device.',
        check=_name("backend"),
        word="backend",
        other="reference",
        typed={"help": "auto, triton or reference."},
    )
    memory_budget: int | str | None = option(
        None,
        'bytes, or text such as "2GB", that the run may use beside the model and its results; a quarter of '
        "what is free, at most 4 GiB, by default; on a GPU half of what is free there.",
        check=lambda value: arguments.n_bytes(value, "the memory budget"),
        word="memory budget",
        other="256MiB",
        typed={
            "help": "Memory that the sweep may use beside the model: 2GB, 512MiB.",
            "read": lambda text: arguments.n_bytes(text, "--memory-budget"),
        },
    )
    metrics: str | Callable[..., Any] | Sequence[str | Callable[..., Any]] = option(
        "all",
        'which metrics will be asked for, or "all"; leaving out kl, entropy, flip and says_* is faster. A '
        "function (logits [row, d_vocab], base_logits [d_vocab], pair) -> [row] is one too, named after "
        "itself: it is given the patched logits at the end of the prompt, some rows at a time. So is a "
        "`Probe`, or a file of them, which reads the residual stream. `weighted_logits`, of pairs that "
        "have `weights`, is not among all.",
        check=_metrics,
        word="metrics",
        other="kl",
        typed={
            "help": "Metrics to be asked for later, with commas; `deltapatch effects --help` says what each "
            "is. A file of probes (probes.safetensors) may be among them."
        },
    )
    readout: int | str = option(
        "last",
        "where the effect is read, a position or label; patches after it have no effect. Answers of several "
        "tokens are read from the end of the prompt on.",
        check=lambda value: arguments.position(value, "readout must be a whole number or a label"),
        word="readout",
        other=-2,
        typed={
            "help": "Where the effect is read: last, a number or a label.",
            "read": arguments.number_or_label,
        },
    )
    seed: int = option(
        0,
        'of "resample" and "noise", and of the sample that is computed again.',
        check=arguments.seed,
        word="seed",
        other=5,
        typed={"at_least": 0, "help": "Of the sources resample and noise."},
    )
    noise_scale: float = option(
        3.0,
        'of source "noise", in standard deviations of the embeddings.',
        check=lambda value: arguments.scale(value, "noise_scale"),
        word="noise scale",
        other=1.5,
        typed={"type": float, "help": "Of the source noise, in standard deviations of the embeddings."},
    )
    noise_sample: int | None = option(
        None,
        "how many of the effects are computed again in float64, drawn by `seed`; their relative errors are "
        '`meta["noise_floor"]`. 0 for none. By default 4 to 32, so few that they take an eighth of the '
        "run's time or half a second. Where even that is not enough, they are computed in float32 (of a run "
        'that is itself less precise) or not at all, as `meta["noise_floor_left_out"]` says.',
        check=lambda value: arguments.count(value, "the noise sample"),
        word="noise sample",
        other=3,
        typed={
            "at_least": 0,
            "help": "How many effects are computed again in float64, for the noise floor; 0 for none. By "
            "default as many as cost little.",
        },
    )
    progress: bool = option(True, "show a bar on stderr where that is a terminal.")
    out: str | PathLike[str] | None = option(
        None,
        "write a run folder there, which must not exist yet. What each pass finds is kept there at once.",
        check=_out,
    )
    resume: bool = option(
        False,
        "`out` may hold the same run, cut off: only what is missing is computed, and the result has the same "
        "bytes as if nothing had happened. A finished one is read.",
    )
    shard: tuple[int, int] | None = option(
        None,
        "(i, n), i from 1: do only this part of the passes, and leave `out` unfinished until all n parts are "
        "done, by processes that share `out`, and `results.merge.merge` joins them. What the others found is "
        "NaN here. Implies `resume`.",
        check=_shard,
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, each.metadata["check"](getattr(self, each.name)))
        if self.shard is not None and self.out is None:
            raise DeltapatchError("a shard needs an output folder, which all shards share")
        if self.mean_over is not None and self.source != "mean":
            raise DeltapatchError(
                f"mean_over is of source 'mean', not of {self.source!r}: choose that source, or leave it out"
            )

    @property
    def roles(self) -> "Roles":
        """Which prompt of a pair is the base, and which the source."""
        from deltapatch.interventions.roles import Roles

        return Roles(self.direction, self.source)  # type: ignore[arg-type]  # which its check made a Source

    def decisive(self) -> Iterator[tuple[Field[Any], Any]]:
        """The options that decide something of a result, and what a record has of their values."""
        return (
            (each, each.metadata["kept"](getattr(self, each.name)))
            for each in fields(self)
            if each.metadata["word"]
        )

    @property
    def part(self) -> tuple[int, int] | None:
        """Of the shard, counted from 0."""
        return None if self.shard is None else (self.shard[0] - 1, self.shard[1])


@dataclass(frozen=True, kw_only=True)
class GridOptions(Options):
    """The grid that a sweep patches."""

    sites: str | Sequence[str] = option(
        ("mlp_out", "attn_out"),
        'names of sites, for example ["mlp_out", "z", "mlp_post"].',
        word="sites or layers",
        other="z",
        typed={
            "default": "mlp_out,attn_out",
            "help": "Sites, with commas between.",
            "read": arguments.names,
        },
    )
    positions: Positions = option(
        "all",
        '"all", "last", or ints (negative from the end) and label names, one or several; or "together", all '
        "positions of the prompt at once.",
        word="positions",
        other="last",
        typed={
            "help": "all, last, numbers (negative from the end) and labels: 3,-1,op1; or together (at once).",
            "read": arguments.positions,
        },
    )
    layers: Layers = option(
        "all",
        '"all", or ints and ranges, one or several.',
        word="sites or layers",
        other=0,
        typed={"help": "all, or numbers and ranges: 0-5,9.", "read": arguments.layers},
    )
    directions: Mapping[str, Any] | None = option(
        None,
        'of sites such as "resid_post.along", what is swapped, as in {"resid_post": probes}: site -> '
        "[direction, d_model], at all layers, or {layer: [direction, d_model]}. Each is an index of its own: "
        "the part of the difference between source and base run along it is swapped, and nothing else.",
        check=_directions,
        word="directions",
        other={"resid_post": [[1.0]]},
        kept=_digest_of_directions,
        typed={
            "help": "Of sites such as resid_post.along: a safetensors file whose tensors are named after "
            "sites, resid_post, or a site and a layer, resid_post.3, each [direction, d_model].",
            "read": _directions_file,
        },
    )


@dataclass(frozen=True, kw_only=True)
class EdgeGridOptions(Options):
    """The edges that a sweep patches."""

    senders: str | Sequence[str] = option(
        "all",
        'whose change is sent: "all", names ("input", "a3.h5", "m3"), layers ("a3", "m3", "a0-5") or kinds '
        '("a", "m"), one or several.',
        word="senders",
        other="input",
        typed={
            "help": "Senders, with commas between: all, input, a3.h5, m3, a0-5, m.",
            "read": arguments.names,
        },
    )
    receivers: str | Sequence[str] = option(
        "all",
        'what alone reads it: "all", names ("a5.h2<q>", "m7", "logits"), layers ("a5", "a5<k>", "m0-5") or '
        'kinds ("a<v>", "m"), one or several.',
        word="receivers",
        other="logits",
        typed={
            "help": "Receivers, with commas between: all, a5.h2<q>, a5<k>, m7, m0-5, logits.",
            "read": arguments.names,
        },
    )
    positions: Positions = option(
        "together",
        '"together", all positions of the prompt at once; "all", each by itself; or "last", ints (negative '
        "from the end) and label names, one or several, each by itself.",
        word="positions",
        other="last",
        typed={
            "help": "together (the whole prompt at once), all (each by itself), last, or numbers and labels.",
            "read": arguments.positions,
        },
    )
    effect: Literal["total", "direct", "both"] = option(
        "total",
        '"total": everything behind the receiver reacts; "direct": what the receiver says goes to the logits '
        'alone; or "both".',
        check=lambda value: arguments.choice(value, ("total", "direct", "both"), "effect"),
        word="effect",
        other="direct",
        typed={
            "choice": ("total", "direct", "both"),
            "help": "Whether all behind the receiver reacts, or the logits alone.",
        },
    )
    keys: Literal["query", "kv"] = option(
        "query",
        'of models with grouped queries: whether each "query" head reads keys and values of its own, as MIB '
        'counts, or each key-value head ("kv") reads for all of its group.',
        check=lambda value: arguments.choice(value, ("query", "kv"), "keys"),
        word="way of reading keys and values",
        other="kv",
        typed={
            "choice": ("query", "kv"),
            "help": "Whether keys and values are read by query head or key-value head.",
        },
    )


@dataclass(frozen=True, kw_only=True)
class ScreenOptions(Options):
    """What is estimated, and what of that is computed exactly."""

    screen: Literal["attribution", "relp", "ig-inputs", "ig-activations"] | None = option(
        None,
        "estimate all effects by gradients, and compute those of the `top` and of a random sample exactly; a "
        '`Screened` is returned, of edges `ScreenedEdges`. "attribution" takes the gradient of the base run; '
        '"relp" coefficients of relevance propagation in its place; "ig-inputs" the mean gradient of runs '
        'with embeddings between those of both prompts; "ig-activations" the mean along the line of each '
        "vector that is patched, which takes longer than exact effects.",
        check=lambda value: value if value is None else arguments.choice(value, SCREENS, "screen"),
        word="screen",
        other="attribution",
        typed={
            "choice": SCREENS,
            "help": "Estimate all effects by gradients; only the top and a random sample are computed "
            "exactly.",
        },
    )
    top: int | None = option(
        None,
        "of a screened sweep, how many are computed exactly because their estimates are largest, beside the "
        "largest of each pair; 1000 unless given.",
        check=lambda value: arguments.count(value, "top"),
        word="top",
        other=3,
        typed={"at_least": 0, "help": "With --screen: how many of the largest are exact; 1000 unless given."},
    )
    screen_sample: int | None = option(
        None,
        "of a screened sweep, how many of the others are drawn by `seed` and computed exactly, which says "
        "how many large effects may have been missed; 1000 unless given.",
        check=lambda value: arguments.count(value, "screen_sample"),
        word="screen sample",
        other=4,
        typed={
            "at_least": 0,
            "help": "With --screen: how many of the others are drawn and exact; 1000 unless given.",
        },
    )
    screen_by: Literal["logit_diff", "dlogp_clean", "dlogp_corrupted"] | None = option(
        None,
        "of a screened sweep, what is estimated, and ranked by; logit_diff unless given.",
        check=lambda value: value if value is None else arguments.choice(value, SCREENED_BY, "screen_by"),
        word="number that is screened by",
        other="dlogp_clean",
        typed={"choice": SCREENED_BY, "help": "With --screen: what is estimated; logit_diff unless given."},
    )
    screen_steps: int | None = option(
        None,
        "of the screens ig-inputs and ig-activations, how many gradients are averaged; 5 unless given.",
        check=lambda value: arguments.count(value, "screen_steps"),
        word="number of steps",
        other=2,
        typed={"at_least": 1, "help": "With --screen ig-...: gradients that are averaged; 5 unless given."},
    )
    threshold: float | None = option(
        None,
        "of a screened sweep, the magnitude of `screen_by` above which effects are large, fixed beforehand: "
        "`Screened.missed` says how many may have been missed.",
        check=lambda value: value if value is None else arguments.scale(value, "threshold"),
        word="threshold",
        other=0.25,
        typed={"type": float, "help": "With --screen: effects above it in magnitude are large."},
    )
    until: "str | Recall | None" = option(
        None,
        'of a screened sweep, `Recall(0.9)`, or as text "recall:0.9": the top and the sample grow round by '
        "round, until with 95% confidence at least that share of all effects above `threshold` was found, "
        "which holds although it was looked at after every round. `top` and `screen_sample` are where they "
        "begin; unless given the sample is as large as it has to be if none of it is large.",
        check=_until,
        word="recall that is gone on until",
        other="recall:0.7",
        typed={
            "help": "With --screen and --threshold: go on until so much of what is above the threshold was "
            "found, recall:0.9, with 95% confidence or another, recall:0.9:0.99."
        },
    )
    screen_limit: int | None = option(
        None,
        "of a screened sweep with `until`, how many are computed exactly at most, beside the largest of each "
        "pair; all, if need be, unless given. Where it ends first, the result says so.",
        check=lambda value: arguments.count(value, "screen_limit"),
        word="limit of a screen",
        other=30,
        typed={"at_least": 1, "help": "With --until: how many are exact at most; all unless given."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.screen is None:
            for name in OF_SCREENS:
                if getattr(self, name) is not None:
                    raise DeltapatchError(
                        f"{name} is of screened sweeps: give screen as well, or leave it out"
                    )
        elif self.screen_steps is not None and (self.screen_steps < 1 or not self.screen.startswith("ig-")):
            raise DeltapatchError("screen_steps must be 1 or more, and are of ig-inputs and ig-activations")
        if self.until is None:
            if self.screen_limit is not None:
                raise DeltapatchError(
                    "screen_limit is of sweeps with until: give until as well, or leave it out"
                )
        elif self.threshold is None:
            raise DeltapatchError(
                "until needs threshold, the magnitude above which effects are large: give it"
            )
        elif self.shard is not None:
            raise DeltapatchError("until goes on from what was found, so it has no parts: leave out shard")
        elif self.screen_limit == 0:
            raise DeltapatchError("screen_limit must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class SweepOptions(ScreenOptions, GridOptions):
    """What a sweep is asked for: beside the options of every run, the grid that it patches, and screens."""


@dataclass(frozen=True, kw_only=True)
class EdgeOptions(ScreenOptions, EdgeGridOptions):
    """The same of a sweep of edges."""


def takes(kind: type[Options]) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Give a function that passes its keywords on to options the signature and documentation of these."""

    def documented(function: Callable[P, Result]) -> Callable[P, Result]:
        own = inspect.signature(function)
        first = [p for p in own.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        named = inspect.signature(kind).parameters.values()
        signature = own.replace(parameters=[*first, *named])

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> Result:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}(): {error}") from None
            return function(*args, **kwargs)

        called.__signature__ = signature  # type: ignore[attr-defined]
        text = inspect.getdoc(function) or ""
        said = (f"{each.name}: {each.metadata['help']}" for each in fields(kind))
        lines = "\n".join(
            textwrap.fill(s, 102, initial_indent=" " * 4, subsequent_indent=" " * 8) for s in said
        )
        called.__doc__ = text.replace("{options}", lines.strip())
        return called

    return documented
