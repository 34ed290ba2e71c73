"""Two-operand arithmetic (Stolfo et al. 2023): pairs that differ in operands, result or operator."""

import random
from collections.abc import Sequence
from typing import Any

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import PromptPair
from deltapatch.tasks.answers import check_answers
from deltapatch.tasks.draws import Asked, Drawn, Draws, Fact, check_differ
from deltapatch.tasks.numbers import NumberRange, check_writing, number_range
from deltapatch.tasks.pairing import TWICE, Dropped, Pairing, Question, collect, fill
from deltapatch.tasks.templates import ALL_OPERATORS, facts

_SYMBOLIC = 5  # the template in symbols, which number words do not have


def arithmetic_pairs(
    tokenizer: Any,
    *,
    per_template: int = 50,
    shots: int = 2,
    operators: str | Sequence[str] = "+-*/",
    max_number: int = 300,
    seed: int = 0,
    templates: Sequence[int] | None = None,
    differ: str = "operands",
    numbers: str = "numerals",
    answers: str = "one",
) -> tuple[list[PromptPair], Dropped]:
    """Pairs of two-operand questions, of one template and with exemplars of the same operation.

    Operands and results go from 1 to the largest number up to `max_number` that is one token; divisions
    leave no remainder. Exemplars are questions of the same operator and template, the same in both prompts,
    each other than the questions asked and on a line of its own. Questions that need no arithmetic (x * 1,
    x / 1, x / x) are left out. Draws in which the two prompts ask the same or have the same result, and
    repeated draws, are dropped and counted.

    Where a tokenizer splits numbers (LLaMA: one token a digit), operands may be several tokens, as many in
    both prompts, and results are the numbers that remain one token (1 to 9), unless answers may be of any
    length. Where a number after a space is
    a space and a number, the prompts end in a space, as in the paper. `Dropped.notes` says so.

    Each operator and template has its own `random.Random` (Python's own, seeded with a text made of the
    seed, the operator and the template): the same arguments give the same pairs on every machine, and
    leaving out an operator does not change the others' pairs.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        per_template: how many pairs for each operator and template.
        shots: how many exemplars come before the question.
        operators: any of + - * / and % ^ max min > <.
        max_number: the largest operand and result.
        templates: which of the six templates, 0 to 5; all by default, but for number words those without
            symbols.
        differ: "operands" (and the results), "same_result" (other operands, one result) or "operator" (the
            same operands under two of the operators; exemplars follow the prompt's operator).
        numbers: "numerals" or "words".
        answers: "one" token, or of any length as "text" or as "ids".

    Returns:
        the pairs, with labels op1, operator, op2 and last (of several tokens the last; op1_first is the
        first) and meta task, differ, numbers, operator, template, shots, clean_fact and corrupted_fact, and
        where operators differ corrupted_operator; and what was dropped.

    Raises:
        DeltapatchError: an option out of range; no tokenizer or a slow one; no usable numbers or pairs.
    """
    check_differ(differ)
    check_writing(numbers)
    check_answers(answers)
    indices = _checked_options(per_template, shots, operators, max_number, templates, differ, numbers)
    known = number_range(tokenizer, max_number, numbers, answers)
    dropped = Dropped(notes=known.notes(max_number))
    tables = {symbol: _table(symbol, known, dropped) for symbol in operators}
    pairs = []
    for symbol in operators:
        others = {o: table for o, table in tables.items() if o != symbol}
        for index in indices:
            # The kind of pair is part of the seed; the paper's main kind goes without saying.
            kind = "" if differ == "operands" else f" {differ}"
            rng = random.Random(f"{seed} {symbol} {index}{kind}")
            draws = Draws(rng, differ, symbol, tables[symbol], others)
            found = _draw(
                tokenizer,
                draws,
                index=index,
                wanted=per_template,
                shots=shots,
                known=known,
                answers=answers,
                numbers=numbers,
                dropped=dropped,
            )
            if len(found) < per_template:
                dropped.notes.append(
                    f"Only {len(found)} of {per_template} pairs exist for {symbol}, template {index}, "
                    f"with results up to {known.write(known.results)}."
                )
            pairs += found
    if not pairs:
        raise DeltapatchError(
            f"No arithmetic pairs are possible with operands up to {known.operands} and results up to "
            f"{known.results}; raise the largest number or choose other operators."
        )
    return pairs, dropped


def ask(symbol: str, index: int, fact: Fact, numbers: NumberRange) -> Question:
    """A fact as a question in one of its operator's wordings, with spans op1, operator and op2."""
    x, y, result = fact
    operator = ALL_OPERATORS[symbol]
    template, word = operator.templates[index], operator.words[index]
    # Between the operands if it stands there, else before them: so it is never found inside another word.
    at = template.index(word, template.index("{x}") if word in template[template.index("{x}") :] else 0)
    marked = template[:at] + "{operator}" + template[at + len(word) :]
    pieces = {"op1": numbers.write(x), "operator": word, "op2": numbers.write(y)}
    text, spans = fill(marked.replace("{x}", "{op1}").replace("{y}", "{op2}"), pieces)
    answer = result if isinstance(result, str) else numbers.write(result)
    return Question(text, answer, {name: spans[name] for name in pieces})


def _checked_options(
    per_template: int,
    shots: int,
    operators: str | Sequence[str],
    max_number: int,
    templates: Sequence[int] | None,
    differ: str,
    numbers: str,
) -> list[int]:
    """The template indices, once every option is seen to be in range."""
    if per_template < 1:
        raise DeltapatchError(f"The number of pairs per template must be at least 1, not {per_template}.")
    if shots < 0:
        raise DeltapatchError(f"The number of exemplars (shots) cannot be negative: {shots}.")
    if max_number < 2:
        raise DeltapatchError(f"The largest number must be at least 2, not {max_number}.")
    unknown = [o for o in operators if o not in ALL_OPERATORS]
    if unknown or not operators or len(set(operators)) < len(operators):
        raise DeltapatchError(
            f"Operators must be some of {' '.join(ALL_OPERATORS)}, each once, not {operators!r}."
        )
    if differ == "operator" and len(operators) < 2:
        raise DeltapatchError("Pairs that differ by the operator need at least two operators.")
    every = [i for i in range(6) if numbers != "words" or i != _SYMBOLIC]
    indices = every if templates is None else list(templates)
    if not indices or any(i not in range(6) for i in indices):
        raise DeltapatchError(f"Templates are numbered 0 to 5, not {indices}.")
    if any(i not in every for i in indices):
        raise DeltapatchError("Template 5 is in symbols and takes no number words; choose among 0 to 4.")
    return indices


def _table(symbol: str, known: NumberRange, dropped: Dropped) -> list[Fact]:
    """The facts of an operator that need some arithmetic; how many do not is noted."""
    operator = ALL_OPERATORS[symbol]
    every = facts(symbol, known.operands, known.results, known.possible)
    table = [fact for fact in every if not operator.trivial(fact[0], fact[1])]
    if len(table) < len(every):
        dropped.notes.append(
            f"{len(every) - len(table)} of {len(every)} facts with {symbol} are left out, because they "
            f"{operator.why}."
        )
    return table


def _draw(
    tokenizer: Any,
    draws: Draws,
    *,
    index: int,
    wanted: int,
    shots: int,
    known: NumberRange,
    answers: str,
    numbers: str,
    dropped: Dropped,
) -> list[PromptPair]:
    """Up to `wanted` pairs of one operator and template; fewer where the draws run dry."""
    if not draws.enough(shots):
        return []
    # A word follows without a space of its own, whatever numbers do.
    in_words = ALL_OPERATORS[draws.symbol].in_words
    pairing = Pairing(tokenizer, "" if in_words else known.ending, answers)

    def question(asked: Asked) -> Question:
        return ask(asked[0], index, asked[1], known)

    taken: set[Drawn] = set()

    def attempt() -> PromptPair | str:
        drawn = draws.draw()
        if isinstance(drawn, str):
            return drawn
        if drawn in taken:  # whatever exemplars there were
            return TWICE
        (symbol, clean), (other, corrupted) = drawn
        exemplars = draws.exemplars(shots, drawn)
        meta = {
            "task": "arithmetic",
            "differ": draws.differ,
            "numbers": numbers,
            "operator": symbol,
            "template": index,
            "shots": shots,
            "clean_fact": list(clean),
            "corrupted_fact": list(corrupted),
        }
        if draws.differ == "operator":
            meta["corrupted_operator"] = other
        shown = ["".join(question(shot[i]).solved for shot in exemplars) for i in (0, 1)]
        made = pairing.pair(question(drawn[0]), question(drawn[1]), meta, (shown[0], shown[1]))
        if isinstance(made, PromptPair):
            taken.add(drawn)
        return made

    return collect(wanted, attempt, dropped)
