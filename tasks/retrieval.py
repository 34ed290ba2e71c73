"""Number retrieval: two numbers of things in the prompt, and the question how many there are of one kind."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import PromptPair
from deltapatch.tasks.answers import check_answers
from deltapatch.tasks.numbers import NumberRange, check_writing, number_range
from deltapatch.tasks.pairing import Dropped, Pairing, Question, collect, fill

TEMPLATES = (
    "Q: I have {number1} {entity1} and {number2} {entity2}. How many {entity} do I have? A:",
    "Q: Anna has {number1} {entity1} and {number2} {entity2}. How many {entity} does Anna have? A:",
    "Q: There are {number1} {entity1} and {number2} {entity2}. How many {entity} are there? A:",
    "Q: Tom sold {number1} {entity1} and {number2} {entity2}. How many {entity} did Tom sell? A:",
    "Q: We found {number1} {entity1} and {number2} {entity2}. How many {entity} did we find? A:",
    "Q: In the box are {number1} {entity1} and {number2} {entity2}. How many {entity} are in the box? A:",
    "Q: Mary bought {number1} {entity1} and {number2} {entity2}. How many {entity} did Mary buy? A:",
    "I can see {number1} {entity1} and {number2} {entity2}. The number of {entity} is",
)
ENTITIES = (
    "apples",
    "pens",
    "books",
    "cats",
    "dogs",
    "cars",
    "birds",
    "balls",
    "cups",
    "hats",
    "keys",
    "coins",
    "shoes",
    "eggs",
    "trees",
    "stones",
    "chairs",
    "boxes",
    "flowers",
    "horses",
)
UNEVEN = "the entities that are asked about have different numbers of tokens"


class Told(NamedTuple):
    """Two numbers of two kinds of things."""

    numbers: tuple[int, int]
    things: tuple[str, str]


def retrieval_pairs(
    tokenizer: Any,
    *,
    per_template: int = 50,
    shots: int = 2,
    seed: int = 0,
    max_number: int = 300,
    templates: Sequence[int] | None = None,
    entities: Sequence[str] = ENTITIES,
    numbers: str = "numerals",
    answers: str = "one",
) -> tuple[list[PromptPair], Dropped]:
    """Pairs of prompts that tell the same two numbers of things and ask about one or the other kind.

    Numbers go from 2 to `max_number`, as far as they are possible answers (see `arithmetic_pairs`). Which of
    the two kinds the clean prompt asks about is drawn. Exemplars use the same template.

    Args:
        per_template: how many pairs of each of the eight templates.
        entities: the things, in the plural.
        numbers, answers: as of `arithmetic_pairs`.

    Returns:
        the pairs, with labels number1, entity1, number2, entity2, entity (the one asked about) and last, and
        meta operator "retrieval"; and what was dropped.

    Raises:
        DeltapatchError: an option out of range; no usable numbers or pairs.
    """
    check_writing(numbers)
    check_answers(answers)
    chosen = list(range(len(TEMPLATES))) if templates is None else list(templates)
    if not chosen or any(t not in range(len(TEMPLATES)) for t in chosen):
        raise DeltapatchError(f"Templates are numbered 0 to {len(TEMPLATES) - 1}, not {chosen}.")
    if per_template < 1 or shots < 0:
        raise DeltapatchError("Ask for at least one pair of each template and for no fewer than 0 exemplars.")
    if len(set(entities)) < 2:
        raise DeltapatchError("Number retrieval needs at least two different entities.")
    known = number_range(tokenizer, max_number, numbers, answers)
    dropped = Dropped(notes=_notes(known, max_number, numbers))
    pairing = Pairing(tokenizer, known.ending, answers, UNEVEN)
    usable = [n for n in range(2, known.results + 1) if known.allows(n)]
    if len(usable) < 2:
        raise DeltapatchError(
            "Number retrieval needs at least two numbers above 1; raise the largest number."
        )
    pairs = []
    for template in chosen:
        rng = random.Random(f"{seed} retrieval {template}")

        def attempt(template: int = template, rng: random.Random = rng) -> PromptPair | str:
            told = draw(rng, usable, entities)
            first = rng.randrange(2)
            shown = "".join(
                ask(draw(rng, usable, entities), rng.randrange(2), template, known).solved
                for _ in range(shots)
            )
            clean, corrupted = (ask(told, which, template, known) for which in (first, 1 - first))
            facts = [[*told.numbers, *told.things, told.numbers[which]] for which in (first, 1 - first)]
            meta = {
                "task": "retrieval",
                "numbers": numbers,
                "operator": "retrieval",
                "template": template,
                "shots": shots,
                "clean_fact": facts[0],
                "corrupted_fact": facts[1],
            }
            return pairing.pair(clean, corrupted, meta, (shown, shown))

        found = collect(per_template, attempt, dropped)
        if len(found) < per_template:
            dropped.notes.append(f"Only {len(found)} of {per_template} pairs exist for template {template}.")
        pairs += found
    if not pairs:
        raise DeltapatchError(
            "No retrieval pairs are possible: no two entities have as many tokens as each other."
        )
    return pairs, dropped


def draw(rng: random.Random, usable: Sequence[int], entities: Sequence[str]) -> Told:
    """Two different numbers of two different things."""
    (x, y), (first, second) = rng.sample(list(usable), 2), rng.sample(list(entities), 2)
    return Told((x, y), (first, second))


def ask(told: Told, which: int, template: int, known: NumberRange) -> Question:
    """What is told, and a question about the first (0) or second (1) kind of things."""
    pieces = {
        "number1": known.write(told.numbers[0]),
        "entity1": told.things[0],
        "number2": known.write(told.numbers[1]),
        "entity2": told.things[1],
        "entity": told.things[which],
    }
    text, spans = fill(TEMPLATES[template], pieces)
    return Question(text, known.write(told.numbers[which]), spans)


def _notes(known: NumberRange, max_number: int, numbers: str) -> list[str]:
    """The numbers are answers and operands alike, so their range is said once."""
    if known.possible is None and known.results == max_number:
        return [note for note in known.notes(max_number) if note.startswith("Prompts end")]
    what = f"the {len(known.possible)} words up to" if known.possible else "from 2 to"
    notes = [f"Numbers are {what} {known.write(known.results)}, those that are one token."]
    return notes + [note for note in known.notes(max_number) if note.startswith("Prompts end")]
