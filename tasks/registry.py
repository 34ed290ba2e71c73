"""The tasks by name: adding one is one function and one entry of TASKS."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deltapatch.arguments import count
from deltapatch.arguments import seed as check_seed
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import PromptPair
from deltapatch.tasks.arithmetic import arithmetic_pairs
from deltapatch.tasks.factual import factual_pairs
from deltapatch.tasks.pairing import Dropped
from deltapatch.tasks.retrieval import retrieval_pairs
from deltapatch.tasks.three_operands import three_operand_pairs
from deltapatch.tasks.word_problems import word_problem_pairs

_COMMON = ("tokenizer", "per_template", "shots", "seed")


@dataclass(frozen=True)
class Task:
    """A task: what it is, in a few words, and the function that makes its pairs.

    `make(tokenizer, per_template=..., shots=..., seed=..., **options)` returns pairs and what was dropped.
    """

    summary: str
    make: Callable[..., tuple[list[PromptPair], Dropped]]

    @property
    def options(self) -> list[str]:
        """The options that only some tasks have."""
        return [name for name in inspect.signature(self.make).parameters if name not in _COMMON]

    def default(self, option: str) -> Any:
        """What an option is unless it is given."""
        return inspect.signature(self.make).parameters[option].default


TASKS: dict[str, Task] = {
    "arithmetic": Task(
        "two operands: + - * / and % ^ max min > <, in numerals or words; pairs differ by the operands and "
        "the result, by the operands alone, or by the operator",
        arithmetic_pairs,
    ),
    "three-operands": Task(
        "the 29 expressions of three operands over + - * /, in words or symbols", three_operand_pairs
    ),
    "retrieval": Task("how many things of one kind, of two that the prompt tells", retrieval_pairs),
    "factual": Task(
        "a relation's object, from a LAMA folder, a JSONL of facts or a small set that comes along",
        factual_pairs,
    ),
    "word-problems": Task("word problems from your own file", word_problem_pairs),
}


def find_task(name: str) -> Callable[..., tuple[list[PromptPair], Dropped]]:
    """The function that makes a task's pairs: see `Task.make`.

    Raises:
        DeltapatchError: no task has this name.
    """
    if name not in TASKS:
        raise DeltapatchError(f"There is no task {name!r}; the tasks are {', '.join(TASKS)}.")
    return TASKS[name].make


def make_pairs(
    task: str,
    tokenizer: Any,
    per_template: int | None = None,
    shots: int | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[list[PromptPair], Dropped]:
    """The pairs of a task, and what was dropped on the way. `options` are those of the task's own function.

    `per_template` and `shots` are the task's own unless given, as in the paper: 50 pairs and 2 exemplars for
    two operands, for example, and no exemplars for facts.

    Raises:
        DeltapatchError: no task has this name or this option, or it cannot be made with these options.
    """
    make = find_task(task)
    strange = [name for name in options if name not in TASKS[task].options]
    if strange:
        raise DeltapatchError(
            f"The task {task} has no option {strange[0]!r}; it has {', '.join(TASKS[task].options)}."
        )
    common = {"per_template": per_template, "shots": shots}
    given = {name: count(value, name) for name, value in common.items() if value is not None}
    if options.get("max_number") is not None:
        options["max_number"] = count(options["max_number"], "max_number")
    return make(tokenizer, seed=check_seed(seed), **given, **options)
