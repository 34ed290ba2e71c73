"""The pairs of an experiment: made for a tokenizer, asked of the model, kept with what was dropped."""

import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.pairs import PromptPair
from deltapatch.interventions.pairs_file import read_pairs, write_pairs
from deltapatch.models.model import Model
from deltapatch.results.wholefile import write_whole
from deltapatch.study.presets import Experiment
from deltapatch.study.settings import Settings
from deltapatch.tasks.answered import WRONG, answered
from deltapatch.tasks.numbers import number_range
from deltapatch.tasks.pairing import Dropped
from deltapatch.tasks.registry import TASKS, make_pairs

PAIRS, MADE = "pairs.jsonl", "pairs.json"
AMONG = "answers"  # the paper looks for the most likely of the number tokens


@dataclass(frozen=True)
class Made:
    """The pairs of an experiment, and how they came about.

    Attributes:
        pairs: those that are kept.
        dropped: draws that became no pair, and notes.
        answers: "one" or "text", as of `make_pairs`.
        asked: [made], the operator (or shape, relation) of every pair, kept or not.
        right: [made, (clean, corrupted)], whether the model answers it right.
    """

    pairs: list[PromptPair]
    dropped: Dropped
    answers: str
    asked: list[str]
    right: np.ndarray


def make(experiment: Experiment, settings: Settings, model: Model, ask: bool = True) -> Made:
    """Make an experiment's pairs.

    Args:
        ask: ask the model for its answers; else nothing is known of them (but where only right ones count).

    Raises:
        DeltapatchError: this model cannot do the experiment; the message says why.
    """
    pairs, dropped, answers = _alignable(experiment, settings, model)
    if not ask and not settings.correct_only:
        return Made(pairs, dropped, answers, [], np.empty((0, 2), dtype=bool))
    right = answered(model, pairs, AMONG)
    asked = [str(pair.meta.get("operator", experiment.name)) for pair in pairs]
    if settings.correct_only:
        kept = np.asarray(right.all(axis=1))
        if not kept.any():
            raise DeltapatchError(
                f"the model answers both prompts of none of {len(pairs)} pairs right, and only such pairs "
                "were asked for"
            )
        pairs = [pair for pair, right_both in zip(pairs, kept.tolist(), strict=True) if right_both]
        if not kept.all():
            dropped.reasons[WRONG] += int((~kept).sum())
    return Made(pairs, dropped, answers, asked, right)


def write(folder: Path, made: Made) -> None:
    """Write the pairs, and beside them how they came about. DeltapatchError where that cannot be."""
    about = {
        "answers": made.answers,
        "dropped": dict(sorted(made.dropped.reasons.items())),
        "notes": made.dropped.notes,
        "asked": made.asked,
        "right": made.right.astype(int).tolist(),
    }
    write_pairs(folder / PAIRS, made.pairs)
    about["sha256"] = _hash(folder)  # what is said of each pair is said of these
    text = json.dumps(about, ensure_ascii=False) + "\n"
    write_whole(folder / MADE, lambda draft: draft.write_text(text, encoding="utf-8"))


def read(folder: Path) -> Made | None:
    """What was written; None where it is not all there."""
    if not (folder / MADE).is_file() or not (folder / PAIRS).is_file():
        return None
    try:
        about = json.loads((folder / MADE).read_text(encoding="utf-8"))
        if about["sha256"] != _hash(folder):
            raise ValueError
        dropped = Dropped(notes=about["notes"])
        dropped.reasons.update(about["dropped"])
        right = np.array(about["right"], dtype=bool).reshape(-1, 2)
        return Made(read_pairs(folder / PAIRS), dropped, about["answers"], about["asked"], right)
    except (ValueError, KeyError, TypeError) as error:
        raise DeltapatchError(
            f"{folder / MADE} is not of the pairs beside it, or damaged: remove {folder} and resume"
        ) from error


def _hash(folder: Path) -> str:
    return hashlib.sha256((folder / PAIRS).read_bytes()).hexdigest()


def command(
    experiment: Experiment, settings: Settings, model: Model, adapter: str | None, answers: str, out: str
) -> str:
    """The `deltapatch pairs` that makes the same file."""
    options = task_options(experiment, settings) | {"answers": answers}
    words = ["deltapatch", "pairs", "--task", experiment.task, "--model", model.name]
    words += ["--revision", model.revision] if model.revision else []
    words += ["--per-template", str(settings.pairs_of(experiment))]
    words += ["--shots", str(settings.shots_of(experiment)), "--seed", str(settings.seed)]
    for name, value in options.items():
        text = str(value) if isinstance(value, str | int) else ",".join(value)
        if TASKS[experiment.task].default(name) != value:
            words += [f"--{name.replace('_', '-')}", text]
    if settings.correct_only:
        words += ["--only-correct", "--among", AMONG, *(["--adapter", adapter] if adapter else [])]
    return shlex.join([*words, "--out", out])


def task_options(experiment: Experiment, settings: Settings) -> dict[str, Any]:
    """The options that only the experiment's task has."""
    options = dict(experiment.options)
    if settings.max_number is not None and "max_number" in TASKS[experiment.task].options:
        options["max_number"] = settings.max_number
    data = {"factual": settings.facts, "word-problems": settings.problems}.get(experiment.task)
    return options | ({"data": data} if data else {})


def _alignable(
    experiment: Experiment, settings: Settings, model: Model
) -> tuple[list[PromptPair], Dropped, str]:
    """The pairs, with answers of one token where these do; and which they have."""
    kinds = [settings.answers] if settings.answers != "auto" else _kinds(experiment, settings, model)
    failure: DeltapatchError | None = None
    for answers in kinds:
        try:
            pairs, dropped = make_pairs(
                experiment.task,
                model.tokenizer,
                settings.pairs_of(experiment),
                settings.shots_of(experiment),
                settings.seed,
                answers=answers,
                **task_options(experiment, settings),
            )
            encoded = encode_pairs(pairs, model.tokenizer, model.spec.d_vocab)
        except DeltapatchError as error:
            failure = failure or error
            continue
        longest = max(len(pair.clean) for pair in encoded)
        if longest > model.spec.context:
            raise DeltapatchError(
                f"its prompts have up to {longest} tokens, more than the {model.spec.context} that the model "
                "was made for; fewer exemplars (--shots) make them shorter"
            )
        return pairs, dropped, answers
    assert failure is not None
    raise failure


def _kinds(experiment: Experiment, settings: Settings, model: Model) -> list[str]:
    """Which kinds of answers to try: one token where that leaves the numbers whole, else any length first."""
    if "numbers" not in TASKS[experiment.task].options:
        return ["one", "text"]
    numbers = str(experiment.options.get("numbers", TASKS[experiment.task].default("numbers")))
    most = settings.max_number or int(TASKS[experiment.task].default("max_number"))
    try:
        known = number_range(model.tokenizer, most, numbers)
    except DeltapatchError:
        return ["text", "one"]
    return ["text", "one"] if known.split or known.possible is not None else ["one", "text"]
