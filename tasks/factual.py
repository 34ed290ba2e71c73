"""Factual knowledge: pairs of one relation and two subjects, with the object as the answer."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import PromptPair
from deltapatch.interventions.tokens import tokenise
from deltapatch.tasks.answers import check_answers, need_fast_tokenizer
from deltapatch.tasks.facts import CLOSED_FACTS, CLOSED_RELATIONS, Fact, read_facts
from deltapatch.tasks.pairing import SAME_RESULT, TWICE, Dropped, Pairing, Question, collect, fill

UNEVEN = "the two subjects have different numbers of tokens"


def factual_pairs(
    tokenizer: Any,
    *,
    per_template: int = 50,
    shots: int = 0,
    seed: int = 0,
    data: str | PathLike[str] | None = None,
    relations: Sequence[str] | None = None,
    answers: str = "one",
) -> tuple[list[PromptPair], Dropped]:
    """Pairs of prompts that ask for the object of one relation and of different subjects.

    The subjects of a pair have as many tokens as each other, and their objects differ. Subjects with several
    objects in the file have no one answer and are left out, as are objects of more than one token.

    Args:
        per_template: how many pairs of each relation.
        data: a LAMA folder, or a JSONL file with the fields subject, relation, object and, if you like,
            template, for example "The capital of [X] is"; a small set about countries by default.
        relations: which ones; of LAMA the paper's six by default, else all.
        answers: as of `arithmetic_pairs`.

    Returns:
        the pairs, with labels subject (its last token; subject_first is the first of several) and last, and
        meta operator, which is the relation; and what was dropped.

    Raises:
        DeltapatchError: an option out of range; a file that cannot be used; no pairs.
    """
    check_answers(answers)
    need_fast_tokenizer(tokenizer, "Factual pairs")
    if per_template < 1 or shots < 0:
        raise DeltapatchError("Ask for at least one pair of each relation and for no fewer than 0 exemplars.")
    facts, notes = _facts(data, relations)
    dropped = Dropped(notes=notes)
    pairing = Pairing(tokenizer, "", answers, UNEVEN)
    pairs = []
    for relation, table in _by_relation(facts, dropped).items():
        one = _one_token(pairing, table, dropped) if answers == "one" else table
        draw = _Drawing(random.Random(f"{seed} {relation}"), relation, one, shots, pairing)
        found = collect(per_template, draw.attempt, dropped) if draw.enough else []
        if len(found) < per_template:
            dropped.notes.append(f"Only {len(found)} of {per_template} pairs exist for {relation}.")
        pairs += found
    if not pairs:
        raise DeltapatchError(
            "No factual pairs are possible: no relation has two subjects with as many tokens as each other "
            "and different objects of one token."
        )
    return pairs, dropped


def ask(fact: Fact) -> Question:
    """A fact as a text that its object follows."""
    text, spans = fill(fact.template.replace("[X]", "{subject}"), {"subject": fact.subject})
    return Question(text, fact.answer, spans)


class _Drawing:
    """The draws of one relation."""

    def __init__(
        self, rng: random.Random, relation: str, table: list[Fact], shots: int, pairing: Pairing
    ) -> None:
        self.rng, self.relation, self.table, self.shots, self.pairing = rng, relation, table, shots, pairing
        # Subjects of equal length, so that few draws are in vain.
        sizes: dict[int, list[Fact]] = defaultdict(list)
        for fact in table:
            sizes[len(tokenise(pairing.tokenizer, ask(fact).text).ids)].append(fact)
        self.same_size = {n: found for n, found in sizes.items() if len({f.answer for f in found}) > 1}
        self.size = {fact: n for n, found in self.same_size.items() for fact in found}
        self.usable = [fact for fact in table if fact in self.size]
        self.taken: set[tuple[Fact, Fact]] = set()

    @property
    def enough(self) -> bool:
        """Whether there can be a pair and its exemplars."""
        return bool(self.usable) and len(self.table) >= self.shots + 2

    def attempt(self) -> PromptPair | str:
        """One pair, or why not."""
        clean = self.rng.choice(self.usable)
        corrupted = self.rng.choice(self.same_size[self.size[clean]])
        if clean.answer == corrupted.answer:
            return SAME_RESULT
        if (clean, corrupted) in self.taken:
            return TWICE
        rest = [f for f in self.table if f.subject not in (clean.subject, corrupted.subject)]
        shown = "".join(ask(fact).solved for fact in self.rng.sample(rest, self.shots))
        meta = {
            "task": "factual",
            "operator": self.relation,
            "template": clean.template,
            "shots": self.shots,
            "clean_fact": [clean.subject, self.relation, clean.answer],
            "corrupted_fact": [corrupted.subject, self.relation, corrupted.answer],
        }
        made = self.pairing.pair(ask(clean), ask(corrupted), meta, (shown, shown))
        if isinstance(made, PromptPair):
            self.taken.add((clean, corrupted))
        return made


def _facts(data: str | PathLike[str] | None, relations: Sequence[str] | None) -> tuple[list[Fact], list[str]]:
    if data is not None:
        return read_facts(Path(data), relations)
    unknown = [r for r in relations or () if r not in CLOSED_RELATIONS]
    if unknown:
        raise DeltapatchError(
            f"The facts that come with deltapatch have no relation {unknown[0]!r}; they have "
            f"{', '.join(CLOSED_RELATIONS)}. Give a file of your own for others."
        )
    chosen = list(relations or CLOSED_RELATIONS)
    return [Fact(s, r, o, CLOSED_RELATIONS[r]) for s, r, o in CLOSED_FACTS if r in chosen], []


def _by_relation(facts: Sequence[Fact], dropped: Dropped) -> dict[str, list[Fact]]:
    """Relation -> its facts, each subject once and with one object."""
    objects: dict[tuple[str, str], set[str]] = defaultdict(set)
    for fact in facts:
        objects[fact.relation, fact.subject].add(fact.answer)
    several = Counter(relation for (relation, _), found in objects.items() if len(found) > 1)
    for relation, n in several.items():
        dropped.notes.append(f"{n} subjects of {relation} are left out, because they have several objects.")
    tables: dict[str, dict[str, Fact]] = defaultdict(dict)
    for fact in facts:
        if len(objects[fact.relation, fact.subject]) == 1:
            tables[fact.relation].setdefault(fact.subject, fact)
    return {relation: list(table.values()) for relation, table in tables.items()}


def _one_token(pairing: Pairing, table: list[Fact], dropped: Dropped) -> list[Fact]:
    """The facts whose object is one token after its prompt."""
    kept = [fact for fact in table if not isinstance(pairing.pair(ask(fact), ask(fact), {}), str)]
    if len(kept) < len(table):
        dropped.notes.append(
            f"{len(table) - len(kept)} facts of {table[0].relation} are left out, because the object is not "
            "one token after its prompt."
        )
    return kept
