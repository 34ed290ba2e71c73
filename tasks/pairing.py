"""From two questions to a prompt pair: equal numbers of tokens, labelled pieces, answers that can be read."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deltapatch.interventions.pairs import PromptPair
from deltapatch.tasks.answers import ANSWERS, answer_writer
from deltapatch.tasks.numbers import token_spans

SAME_QUESTION = "both prompts would ask the same question"
SAME_RESULT = "both prompts have the same result"
TWICE = "the same two questions were drawn before"
UNEVEN = "the operands of the two prompts have different numbers of tokens"


@dataclass(frozen=True)
class Dropped:
    """Draws that became no pair, and what else the user should know of how the pairs were made.

    Attributes:
        reasons: why -> how many draws.
        notes: sentences, for example on the range of numbers that the tokenizer leaves.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many draws were dropped."""
        return sum(self.reasons.values())

    def lines(self) -> list[str]:
        """What to tell the user, one sentence a line."""
        dropped = [
            f"{n} draw{' was' if n == 1 else 's were'} dropped because {why}."
            for why, n in sorted(self.reasons.items())
        ]
        return [*self.notes, *dropped]


Span = tuple[int, int]  # [start, end) in characters

_HOLE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        text: without the answer and without a space at its end.
        answer: without a space at its beginning.
        spans: label -> where that piece stands in the text.
    """

    text: str
    answer: str
    spans: dict[str, Span]

    @property
    def solved(self) -> str:
        """The question with its answer on a line of its own, as an exemplar shows it."""
        return f"{self.text} {self.answer}\n"


def fill(template: str, pieces: Mapping[str, str]) -> tuple[str, dict[str, Span]]:
    """Put the pieces where the template names them, as in ``{op1} plus {op2}``, and say where they stand.

    A piece that is named twice is marked where it stands last. Other braces stay as they are.
    """
    text, spans, end = "", {}, 0
    for hole in _HOLE.finditer(template):
        name = hole[1]
        if name not in pieces:
            continue
        text += template[end : hole.start()]
        spans[name] = (len(text), len(text) + len(pieces[name]))
        text += pieces[name]
        end = hole.end()
    return text + template[end:], spans


def holes(template: str) -> list[str]:
    """The names in a template, each once, in the order in which they stand."""
    return list(dict.fromkeys(_HOLE.findall(template)))


_DRY = 1000  # that many draws in a row without a new pair, and there are no more


@dataclass(frozen=True)
class Pairing:
    """How pairs of a task are put together.

    Attributes:
        tokenizer: a fast one.
        ending: what prompts end in, nothing or a space.
        answers: one of `answers.ANSWERS`.
        uneven: why two questions with different numbers of tokens are dropped.
    """

    tokenizer: Any
    ending: str = ""
    answers: str = "one"
    uneven: str = UNEVEN

    def pair(
        self,
        clean: Question,
        corrupted: Question,
        meta: dict[str, Any],
        shown: tuple[str, str] = ("", ""),
    ) -> PromptPair | str:
        """The pair of two questions with the same labels, or why they make none.

        A piece of several tokens is labelled twice: its name is its last token, name_first its first.

        Args:
            shown: the exemplars before each of them.
        """
        prompts, places = [], []
        for question, before in zip((clean, corrupted), shown, strict=True):
            spans = [(len(before) + a, len(before) + b) for a, b in question.spans.values()]
            prompts.append(before + question.text + self.ending)
            ids, found = token_spans(self.tokenizer, prompts[-1], spans)
            places.append((len(ids), dict(zip(question.spans, found, strict=True))))
        # The same pieces at the same places, so that a label means the same in both prompts.
        if places[0] != places[1] or any(len(tokens) == 0 for tokens in places[0][1].values()):
            return self.uneven
        length, found_at = places[0]
        labels = {}
        for name, tokens in found_at.items():
            if len(tokens) > 1:
                labels[f"{name}_first"] = tokens[0]
            labels[name] = tokens[-1]
        space = "" if self.ending else " "
        write = answer_writer(self.tokenizer, self.answers)
        answers = [write(p, space + q.answer) for p, q in zip(prompts, (clean, corrupted), strict=True)]
        if None in answers:
            return ANSWERS[self.answers]
        labels["last"] = length - 1
        return PromptPair(prompts[0], prompts[1], answers[0], answers[1], labels, meta)


def collect(wanted: int, attempt: Callable[[], PromptPair | str], dropped: Dropped) -> list[PromptPair]:
    """Up to `wanted` different pairs; fewer where the attempts run dry. Reasons are counted in `dropped`."""
    found: list[PromptPair] = []
    taken: set[tuple[Any, Any]] = set()
    misses = 0
    while len(found) < wanted and misses < _DRY:
        made = attempt()
        if isinstance(made, PromptPair) and (made.clean, made.corrupted) in taken:
            made = TWICE
        if isinstance(made, str):
            dropped.reasons[made] += 1
            misses += 1
            continue
        taken.add((made.clean, made.corrupted))
        found.append(made)
        misses = 0
    return found
