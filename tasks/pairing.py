"""From two questions to a prompt pair: equal numbers of tokens, labelled pieces, answers that can be read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deltapatch.interventions.pairs import PromptPair
from deltapatch.tasks.answers import ANSWERS, answer_writer
from deltapatch.tasks.dropped import TWICE, UNEVEN, Dropped
from deltapatch.tasks.numbers import token_spans
from deltapatch.tasks.questions import Question

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
