"""Three-operand arithmetic: pairs of one expression shape with other operands, or of two shapes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import PromptPair
from deltapatch.tasks.answers import check_answers
from deltapatch.tasks.draws import DIFFER, check_differ
from deltapatch.tasks.expressions import SHAPES, Shape
from deltapatch.tasks.numbers import NumberRange, check_writing, number_range
from deltapatch.tasks.pairing import SAME_QUESTION, SAME_RESULT, Dropped, Pairing, Question, collect, fill

WORDINGS = ("Q: What is {}? A:", "{} =")  # in words, in symbols
OUT_OF_RANGE = "the expression has no whole result in range for the numbers drawn"

Asked = tuple[Shape, tuple[int, int, int], int]  # the operands, and the result


def three_operand_pairs(
    tokenizer: Any,
    *,
    per_template: int = 15,
    shots: int = 2,
    seed: int = 0,
    max_number: int = 300,
    templates: Sequence[int] = (0,),
    shapes: Sequence[str] | None = None,
    differ: str = "operands",
    numbers: str = "numerals",
    answers: str = "one",
) -> tuple[list[PromptPair], Dropped]:
    """Pairs of the 29 expressions of three operands over + - * / (see `expressions.SHAPES`).

    Operands and results go from 1 to `max_number`, as far as the tokenizer allows (see `arithmetic_pairs`);
    what is worked out on the way is a whole number of at least 1 too. No operand beside * or / is 1.

    Args:
        per_template: how many pairs of each shape and wording.
        templates: 0 for the wording in words, 1 for symbols.
        shapes: their names, for example "(x + y) * z"; all by default.
        differ: "operands", "same_result", or "operator" (the same operands in a shape that has the same
            brackets and one other operator).
        numbers, answers: as of `arithmetic_pairs`.

    Returns:
        the pairs, with labels op1, op2, op3 and last, in symbols also operator1 and operator2; and what was
        dropped.

    Raises:
        DeltapatchError: an option out of range; no usable numbers or pairs.
    """
    check_differ(differ)
    check_writing(numbers)
    check_answers(answers)
    chosen = _shapes(shapes)
    if per_template < 1 or shots < 0:
        raise DeltapatchError("Ask for at least one pair of each shape and for no fewer than 0 exemplars.")
    if not templates or any(t not in (0, 1) for t in templates):
        raise DeltapatchError(f"Templates are 0 (words) and 1 (symbols), not {list(templates)}.")
    if numbers == "words" and 1 in templates:
        raise DeltapatchError("Template 1 is in symbols and takes no number words; choose template 0.")
    known = number_range(tokenizer, max_number, numbers, answers)
    dropped = Dropped(notes=known.notes(max_number))
    pairing = Pairing(tokenizer, known.ending, answers)
    pairs = []
    for shape in chosen:
        for template in templates:
            kind = "" if differ == DIFFER[0] else f" {differ}"
            rng = random.Random(f"{seed} {shape.name} {template}{kind}")
            draw = _Drawing(
                rng=rng,
                shape=shape,
                template=template,
                shots=shots,
                differ=differ,
                known=known,
                pairing=pairing,
                numbers=numbers,
            )
            found = collect(per_template, draw.attempt, dropped)
            if len(found) < per_template:
                dropped.notes.append(
                    f"Only {len(found)} of {per_template} pairs were found for {shape.name}, template "
                    f"{template}, with results up to {known.write(known.results)}."
                )
            pairs += found
    if not pairs:
        raise DeltapatchError(
            f"No three-operand pairs are possible with operands up to {known.operands} and results up to "
            f"{known.results}; raise the largest number or choose other shapes."
        )
    return pairs, dropped


def ask(asked: Asked, template: int, known: NumberRange) -> Question:
    """An expression as a question."""
    shape, operands, result = asked
    pieces = {f"op{i}": known.write(n) for i, n in enumerate(operands, start=1)}
    pieces |= {"operator1": shape.first, "operator2": shape.second}
    text, spans = fill(WORDINGS[template].format(shape.symbols if template else shape.phrase), pieces)
    # As they stand in the text, so that the order says nothing of the shape.
    return Question(text, known.write(result), dict(sorted(spans.items(), key=lambda item: item[1])))


def expressions(rng: random.Random, shape: Shape, known: NumberRange, most: int = 500) -> list[Asked]:
    """Different expressions of a shape with usable results; fewer than `most` where they are hard to find."""
    found: dict[tuple[int, int, int], Asked] = {}
    for _ in range(10 * most):
        # Small numbers are drawn more often, because products of large ones are out of range.
        x, y, z = (rng.randint(1, max(1, round(known.operands ** rng.uniform(0.1, 1.0)))) for _ in range(3))
        value = usable(shape, (x, y, z), known)
        if value is not None:
            found[x, y, z] = shape, (x, y, z), value
            if len(found) == most:
                break
    return list(found.values())


def usable(shape: Shape, operands: tuple[int, int, int], known: NumberRange) -> int | None:
    """The result, where it can be an answer and no operand is one that changes nothing."""
    x, y, z = operands
    inner, outer = ((y, z), x) if shape.right else ((x, y), z)
    outer_symbol = shape.first if shape.right else shape.second
    beside = (inner if shape.inner in "*/" else ()) + ((outer,) if outer_symbol in "*/" else ())
    value = shape.value(x, y, z)
    if value is None or 1 in beside or not known.allows(value):
        return None
    return value


@dataclass(kw_only=True, eq=False)
class _Drawing:
    """The draws of one shape and template."""

    rng: random.Random
    shape: Shape
    template: int
    shots: int
    differ: str
    known: NumberRange
    pairing: Pairing
    numbers: str

    def __post_init__(self) -> None:
        self.table = expressions(self.rng, self.shape, self.known)
        self.by_result: dict[int, list[Asked]] = {}
        for asked in self.table:
            self.by_result.setdefault(asked[2], []).append(asked)
        alike = [s for s in SHAPES if s.right == self.shape.right and s != self.shape]
        self.near = [s for s in alike if s.first == self.shape.first or s.second == self.shape.second]

    def attempt(self) -> PromptPair | str:
        """One pair, or why not."""
        drawn = self._drawn() if len(self.table) > self.shots + 1 else OUT_OF_RANGE
        if isinstance(drawn, str):
            return drawn
        clean, corrupted = drawn
        shown = self._exemplars(drawn)
        if shown is None:
            return OUT_OF_RANGE
        meta = {
            "task": "three-operands",
            "differ": self.differ,
            "numbers": self.numbers,
            "operator": clean[0].name,
            "template": self.template,
            "shots": self.shots,
            "clean_fact": [*clean[1], clean[2]],
            "corrupted_fact": [*corrupted[1], corrupted[2]],
        }
        if self.differ == "operator":
            meta["corrupted_operator"] = corrupted[0].name
        questions = [ask(asked, self.template, self.known) for asked in drawn]
        return self.pairing.pair(questions[0], questions[1], meta, shown)

    def _drawn(self) -> tuple[Asked, Asked] | str:
        clean = self.rng.choice(self.table)
        if self.differ == "operator":
            other = self.rng.choice(self.near)
            value = usable(other, clean[1], self.known)
            if value is None:
                return OUT_OF_RANGE
            return SAME_RESULT if value == clean[2] else (clean, (other, clean[1], value))
        same = self.differ == "same_result"
        corrupted = self.rng.choice(self.by_result[clean[2]] if same else self.table)
        if corrupted == clean:
            return SAME_QUESTION
        if not same and corrupted[2] == clean[2]:
            return SAME_RESULT
        return clean, corrupted

    def _exemplars(self, drawn: tuple[Asked, Asked]) -> tuple[str, str] | None:
        """Solved expressions of each prompt's shape, on the same operands; None where none are found."""
        shown, other = ["", ""], drawn[1][0]
        seen = {asked[1] for asked in drawn}
        wanted = len(seen) + self.shots
        for first in self.rng.sample(self.table, min(len(self.table), 50 + self.shots)):
            if len(seen) == wanted:
                break
            value = usable(other, first[1], self.known)
            if first[1] not in seen and value is not None:
                seen.add(first[1])
                for i, asked in enumerate((first, (other, first[1], value))):
                    shown[i] += ask(asked, self.template, self.known).solved
        return (shown[0], shown[1]) if len(seen) == wanted else None


def _shapes(names: Sequence[str] | None) -> list[Shape]:
    if names is None:
        return list(SHAPES)
    by_name = {shape.name: shape for shape in SHAPES}
    unknown = [name for name in names if name not in by_name]
    if unknown or not names:
        raise DeltapatchError(f"There is no shape {unknown or names!r}; there are {', '.join(by_name)}.")
    return [by_name[name] for name in names]
