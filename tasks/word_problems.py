"""Word problems from the user's file: pairs of equal token length are taken, found or made."""

import random
from collections import defaultdict
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import PromptPair
from deltapatch.interventions.tokens import tokenise
from deltapatch.tasks.alignment import differing_labels, nearest
from deltapatch.tasks.answers import ANSWERS, answer_writer, check_answers, need_fast_tokenizer
from deltapatch.tasks.numbers import number_range
from deltapatch.tasks.pairing import (
    SAME_QUESTION,
    SAME_RESULT,
    Dropped,
    Pairing,
    Question,
    collect,
    fill,
    holes,
)
from deltapatch.tasks.problem_file import GivenPair, Problem, Template, read_problems

UNEVEN = "the numbers of the two problems have different numbers of tokens"
NO_RESULT = "the numbers drawn give no whole and positive result"
_MOST_NAMED = 50  # lines of the file that are named in the notes; the rest are only counted


def word_problem_pairs(
    tokenizer: Any,
    *,
    per_template: int = 50,
    shots: int = 0,
    seed: int = 0,
    data: str | PathLike[str] | None = None,
    wording: str = "Q: {question} A:",
    max_number: int = 300,
    answers: str = "one",
) -> tuple[list[PromptPair], Dropped]:
    """Pairs from a file of word problems; `problem_file.read_problems` says what its lines may be.

    Given pairs are taken if they have equally many tokens. Templates, and questions with an equation, get
    numbers drawn anew for both prompts until these have equally many tokens and other results. Questions
    without an equation find among the others the one of equal length that differs in the fewest tokens and
    has another answer.

    Args:
        per_template: how many pairs of each template or equation.
        data: the file.
        wording: what a question is put in; given pairs stay as they are.
        max_number: the largest number that is drawn where a template gives no range.
        answers: as of `arithmetic_pairs`.

    Returns:
        the pairs, with the holes of a template as labels (number1, number2, ... of an equation), else diff1,
        diff2, ... on the spans that differ, and last; and what was dropped, with the file's lines.

    Raises:
        DeltapatchError: an option or line that cannot be used; no file; no pairs.
    """
    check_answers(answers)
    need_fast_tokenizer(tokenizer, "Word problems")
    if data is None:
        raise DeltapatchError("Word problems come from a file of yours: give its path with --data.")
    if shots:
        raise DeltapatchError("Word problems take no exemplars (shots); write them into the file's text.")
    if per_template < 1 or max_number < 1:
        raise DeltapatchError("Ask for at least one pair of each template, and numbers up to at least 1.")
    if wording.count("{question}") != 1:
        raise DeltapatchError(f"The wording {wording!r} must have {{question}} in it, once.")
    entries, left_out = read_problems(Path(data))
    dropped = Dropped()
    builder = _Builder(tokenizer, answers, wording, max_number, dropped, left_out)
    pairs = []
    for entry in entries:
        if isinstance(entry, GivenPair):
            pairs += builder.given(entry)
        elif isinstance(entry, Template):
            pairs += builder.made(entry, per_template, random.Random(f"{seed} {entry.text}"))
    pairs += builder.found([entry for entry in entries if isinstance(entry, Problem)])
    named = [f"{where} is dropped: {why}." for where, why in left_out]
    if len(named) > _MOST_NAMED:
        named[_MOST_NAMED:] = [f"{len(named) - _MOST_NAMED} more lines are dropped for such reasons."]
    dropped.notes.extend(named)
    if not pairs:
        why = f"; {named[0]}" if named else "."
        raise DeltapatchError(f"No pairs can be made of {data}{why}")
    return pairs, dropped


class _Builder:
    """Makes pairs of entries; notes which lines make none in `left_out`."""

    def __init__(
        self,
        tokenizer: Any,
        answers: str,
        wording: str,
        max_number: int,
        dropped: Dropped,
        left_out: list[tuple[str, str]],
    ) -> None:
        self.tokenizer, self.wording, self.max_number = tokenizer, wording, max_number
        self.dropped, self.left_out = dropped, left_out
        self.write = answer_writer(tokenizer, answers)
        self.pairing = Pairing(tokenizer, _ending(tokenizer, answers), answers, UNEVEN)

    def given(self, entry: GivenPair) -> list[PromptPair]:
        """A pair of the file, with the spans that differ as labels."""
        made = self._aligned(entry.prompts, entry.answers, {"line": _line(entry.where)})
        if isinstance(made, str):
            self.left_out.append((entry.where, made))
            return []
        return [made]

    def made(self, entry: Template, wanted: int, rng: random.Random) -> list[PromptPair]:
        """Pairs of a template, with numbers drawn for both prompts."""
        names = holes(entry.text)
        template = self.wording.replace("{question}", entry.text)
        ranges = {name: entry.ranges.get(name, (1, self.max_number)) for name in names}

        def draw() -> tuple[list[int], Question] | None:
            values = {name: rng.randint(*ranges[name]) for name in names}
            result = entry.formula.value(values)
            if result is None or result < 1:
                return None
            text, spans = fill(template, {name: str(n) for name, n in values.items()})
            return [*values.values(), result], Question(text, str(result), spans)

        def attempt() -> PromptPair | str:
            clean, corrupted = draw(), draw()
            if clean is None or corrupted is None:
                return NO_RESULT
            if clean[1].text == corrupted[1].text:
                return SAME_QUESTION
            if clean[1].answer == corrupted[1].answer:
                return SAME_RESULT
            meta = {
                "task": "word-problems",
                "operator": entry.formula.text,
                "template": entry.text,
                "line": _line(entry.where),
                "clean_fact": clean[0],
                "corrupted_fact": corrupted[0],
            }
            return self.pairing.pair(clean[1], corrupted[1], meta)

        found = collect(wanted, attempt, self.dropped)
        if not found:
            self.left_out.append((entry.where, "no two draws of its numbers make a pair"))
        elif len(found) < wanted:
            self.dropped.notes.append(f"Only {len(found)} of {wanted} pairs exist for {entry.where}.")
        return found

    def found(self, problems: Sequence[Problem]) -> list[PromptPair]:
        """Pairs among problems of one group and one number of tokens."""
        buckets: dict[tuple[str, int], list[int]] = defaultdict(list)
        texts = [self.wording.replace("{question}", p.text) + self.pairing.ending for p in problems]
        ids = [tokenise(self.tokenizer, text).ids for text in texts]
        for i, problem in enumerate(problems):
            if self._answer(texts[i], problem.answer) is None:
                self.left_out.append((problem.where, ANSWERS[self.pairing.answers]))
            else:
                buckets[problem.group, len(ids[i])].append(i)
        pairs = []
        for (group, length), members in buckets.items():
            joined = nearest(
                np.array([ids[i] for i in members]), np.array([problems[i].answer for i in members])
            )
            for a, b in ((members[a], members[b]) for a, b in joined):
                answers = problems[a].answer, problems[b].answer
                lines = {"line": _line(problems[a].where), "with": _line(problems[b].where)}
                made = self._aligned((texts[a], texts[b]), answers, lines)
                assert isinstance(made, PromptPair)
                pairs.append(made)
            alone = set(range(len(members))) - {i for pair in joined for i in pair}
            where = f" of its group {group!r}" if group else ""
            why = f"no other problem{where} with {length} tokens and another answer is left"
            self.left_out.extend((problems[members[i]].where, why) for i in sorted(alone))
        return pairs

    def _aligned(
        self, prompts: tuple[str, str], answers: tuple[str, str], meta: dict[str, Any]
    ) -> PromptPair | str:
        """Two prompts as they are, with the spans that differ as labels; or why they make no pair."""
        ids = [tokenise(self.tokenizer, text).ids for text in prompts]
        if len(ids[0]) != len(ids[1]):
            return f"its prompts have {len(ids[0])} and {len(ids[1])} tokens"
        labels = differing_labels(ids[0], ids[1])
        if not labels:
            return "its prompts are the same"
        given = [self._answer(text, answer) for text, answer in zip(prompts, answers, strict=True)]
        if None in given:
            return ANSWERS[self.pairing.answers]
        meta = {"task": "word-problems", "operator": "word-problems"} | meta
        labels["last"] = len(ids[0]) - 1
        return PromptPair(prompts[0], prompts[1], given[0], given[1], labels, meta)

    def _answer(self, prompt: str, answer: str) -> Any:
        """The answer as the pair holds it, with a space before it where the prompt leaves one to it."""
        spaced = answer if prompt.endswith((" ", "\n")) or answer.startswith(" ") else f" {answer}"
        return self.write(prompt, spaced)


def _line(where: str) -> int:
    """The number in "problems.jsonl, line 7"; pairs do not depend on where the file lies."""
    return int(where.rpartition(" ")[2])


def _ending(tokenizer: Any, answers: str) -> str:
    """What prompts end in so that a number is one more token; nothing where numbers are several anyway."""
    try:
        return number_range(tokenizer, 9, answers=answers).ending
    except DeltapatchError:
        return ""
