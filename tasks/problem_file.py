"""A user's file of word problems: each line is a pair, a template with a formula, or a problem."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltapatch.arguments import WORDS
from deltapatch.errors import DeltapatchError
from deltapatch.tasks.facts import read_rows
from deltapatch.tasks.formula import Formula, read_formula
from deltapatch.tasks.pairing import holes

_NUMBER = re.compile(r"(?<![\w.,])\d+(?![\w]|[.,]\d)")


@dataclass(frozen=True)
class GivenPair:
    """Two prompts that the user has paired."""

    where: str
    prompts: tuple[str, str]
    answers: tuple[str, str]


@dataclass(frozen=True)
class Template:
    """A problem with holes for numbers, the formula of its answer, and the range of each number."""

    where: str
    text: str
    formula: Formula
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A problem as it is; it finds its counterpart among the others, of its group where that is named."""

    where: str
    text: str
    answer: str
    group: str = ""


Entry = GivenPair | Template | Problem


def read_problems(path: Path) -> tuple[list[Entry], list[tuple[str, str]]]:
    """The entries of a file, and the lines that make none: (where, why).

    A line has the fields of one of these:

    - ``clean``, ``corrupted``, ``clean_answer``, ``corrupted_answer``: a pair;
    - ``template``, with holes such as {a}, and ``answer``, a formula of them; ``numbers`` may say in which
      range each is, for example {"a": [2, 20]};
    - ``question`` and ``answer``, and if there is one ``equation``, such as "8 - 3": its numbers are then
      found in the question, which becomes a template; ``group`` keeps problems apart.

    Raises:
        DeltapatchError: the file cannot be read, or a line is none of these.
    """
    entries: list[Entry] = []
    left_out: list[tuple[str, str]] = []
    for where, row in read_rows(path):
        if "template" in row:
            entries.append(_template(row, where))
        elif "clean" in row:
            keys = ("clean", "corrupted", "clean_answer", "corrupted_answer")
            clean, corrupted, *answers = (_text(row, key, where) for key in keys)
            entries.append(GivenPair(where, (clean, corrupted), (answers[0], answers[1])))
        elif "question" in row:
            question, answer = _text(row, "question", where), _text(row, "answer", where)
            if not row.get("equation"):
                entries.append(Problem(where, question, answer, str(row.get("group", ""))))
                continue
            made = _from_equation(question, answer, _text(row, "equation", where), where)
            if isinstance(made, str):
                left_out.append((where, made))
            else:
                entries.append(made)
        else:
            raise DeltapatchError(
                f"{where}: a line has the field 'template', 'clean' or 'question', and this one has none."
            )
    if not entries and not left_out:
        raise DeltapatchError(f"{path} is empty; it needs one JSON object a line.")
    return entries, left_out


def _template(row: dict[str, Any], where: str) -> Template:
    text, formula = _text(row, "template", where), read_formula(_text(row, "answer", where), where)
    names = holes(text)
    strange = sorted(formula.names - set(names))
    if strange or not names:
        what = f"no hole {{{strange[0]}}}, which its answer needs" if strange else "no holes such as {a}"
        raise DeltapatchError(f"{where}: the template has {what}.")
    for name in names:
        if name in WORDS or (name.endswith("_first") and name.removesuffix("_first") in names):
            what = "a word of the tool" if name in WORDS else "what the first token of another hole is called"
            raise DeltapatchError(
                f"{where}: the hole {{{name}}} would be a label, and {name} is {what}: give it another name."
            )
    ranges = row.get("numbers", {})
    sound = isinstance(ranges, dict) and all(
        name in names
        and isinstance(r, list)
        and len(r) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) for n in r)
        and 0 <= r[0] <= r[1]
        for name, r in ranges.items()
    )
    if not sound:
        raise DeltapatchError(
            f"{where}: 'numbers' gives holes of the template a range each, for example {{\"a\": [2, 20]}}."
        )
    return Template(where, text, formula, {name: (r[0], r[1]) for name, r in ranges.items()})


def _from_equation(question: str, answer: str, equation: str, where: str) -> Template | str:
    """A problem as a template, or why it cannot be one."""
    formula = read_formula(equation.rpartition("=")[2] if equation.strip().startswith("x") else
                           equation.partition("=")[0], where)  # fmt: skip
    if formula.names:
        return f"its equation {equation!r} has names in it"
    value = formula.value({})
    if value is None:
        return f"not all parts of its equation {equation!r} are whole and positive"
    if str(value) != answer.removesuffix(".0"):
        return f"its equation gives {value} and its answer is {answer}"
    found = [(m.start(), m.end(), int(m[0])) for m in _NUMBER.finditer(question)]
    shown = [n for _, _, n in found]
    used = [n for n in dict.fromkeys(shown) if n in formula.numbers]
    if not used:
        return "none of the numbers of its equation stands in the question"
    twice = [n for n in used if shown.count(n) > 1 or formula.numbers.count(n) > 1]
    if twice:
        return f"{twice[0]} stands twice, so that it cannot be told which is which"
    names = {n: f"number{i}" for i, n in enumerate(used, start=1)}
    text = question
    for start, end, n in reversed(found):
        if n in names:
            text = text[:start] + "{" + names[n] + "}" + text[end:]
    # Other numbers of the same size, so that the story stays plausible.
    ranges = {names[n]: (max(1, 10 ** (len(str(n)) - 1)), 10 ** len(str(n)) - 1) for n in used}
    return Template(where, text, formula.named(names), ranges)


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise DeltapatchError(f"{where}: the field {key!r} is missing or no text or number.")
    return str(int(value)) if isinstance(value, float) and value % 1 == 0 else str(value)
