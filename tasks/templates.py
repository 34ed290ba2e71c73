"""The wording of two-operand questions: six templates an operator, the paper's for its four operators."""

from collections.abc import Callable
from dataclasses import dataclass

Result = int | str  # a comparison is answered in words

# What needs no working out, and would say little of how a model works things out.
Trivial = Callable[[int, int], bool]


@dataclass(frozen=True)
class Operator:
    """One operator: its six templates, and for each the word that names the operation.

    A template holds ``{x}`` and ``{y}`` once each, in this order. Templates of the same index are the same
    sentence for all of + - * /; the last one is in symbols.

    Attributes:
        function: its result, or None where there is none (a division with a remainder).
        trivial: whether two operands give away the result.
        why: what makes them do so, for the user.
    """

    symbol: str
    templates: tuple[str, ...]
    words: tuple[str, ...]
    function: Callable[[int, int], Result | None]
    trivial: Trivial
    why: str

    def apply(self, x: int, y: int) -> Result | None:
        """The result of x operator y, or None where there is none."""
        return self.function(x, y)

    @property
    def in_words(self) -> bool:
        """Whether the answer is a word and no number."""
        return isinstance(self.function(1, 2), str)


_NO_ARITHMETIC = "multiply or divide by 1 or divide a number by itself, which needs no arithmetic"


def _operator(
    symbol: str,
    between: str,
    noun: str,
    function: Callable[[int, int], int | None],
    *,
    question: str = "of",
    statement: str = "of",
    joint: str = "and",
    names: str | None = None,
    trivial: Trivial = lambda x, y: False,
    why: str = _NO_ARITHMETIC,
) -> Operator:
    return Operator(
        symbol,
        (
            f"Q: How much is {{x}} {between} {{y}}? A:",
            f"Q: What is {{x}} {between} {{y}}? A:",
            f"Q: What is the result of {{x}} {between} {{y}}? A:",
            f"Q: What is the {noun} {question} {{x}} {joint} {{y}}? A:",
            f"The {noun} {statement} {{x}} {joint} {{y}} is",
            f"{{x}} {symbol} {{y}} =",
        ),
        (between, between, between, names or noun, names or noun, symbol),
        function,
        trivial,
        why,
    )


def _choice(symbol: str, word: str, noun: str, function: Callable[[int, int], int]) -> Operator:
    templates = (
        f"Q: How much is the {word} of {{x}} and {{y}}? A:",
        f"Q: What is the {word} of {{x}} and {{y}}? A:",
        f"Q: Which number is {word}, {{x}} or {{y}}? A:",
        f"Q: What is the {noun} of {{x}} and {{y}}? A:",
        f"The {noun} of {{x}} and {{y}} is",
        f"{symbol}({{x}}, {{y}}) =",
    )
    words = (word, word, word, noun, noun, symbol)
    return Operator(symbol, templates, words, function, lambda x, y: x == y, "have two equal operands")


def _comparison(symbol: str, words: tuple[str, str, str], yes: Callable[[int, int], bool]) -> Operator:
    first, second, third = words
    templates = (
        f"Q: Is {{x}} {first} than {{y}}? A:",
        f"Q: Is {{x}} {second} than {{y}}? A:",
        f"Q: Is the number {{x}} {first} than {{y}}? A:",
        f"Q: Is {{x}} a {second} number than {{y}}? A:",
        f"Q: Does {{x}} come {third} {{y}}? A:",
        f"Q: {{x}} {symbol} {{y}}? A:",
    )

    def answer(x: int, y: int) -> str:
        return "yes" if yes(x, y) else "no"

    named = (first, second, first, second, third, symbol)
    return Operator(symbol, templates, named, answer, lambda x, y: x == y, "have two equal operands")


OPERATORS: dict[str, Operator] = {
    "+": _operator("+", "plus", "sum", lambda x, y: x + y),
    "-": _operator("-", "minus", "difference", lambda x, y: x - y, question="between", statement="between"),
    "*": _operator("*", "times", "product", lambda x, y: x * y, trivial=lambda x, y: 1 in (x, y)),
    "/": _operator(
        "/",
        "over",
        "ratio",
        lambda x, y: None if y == 0 or x % y else x // y,
        question="between",
        trivial=lambda x, y: y in (1, x),
    ),
}

MORE_OPERATORS: dict[str, Operator] = {
    "%": _operator(
        "%",
        "modulo",
        "remainder",
        lambda x, y: x % y if y else None,
        joint="divided by",
        trivial=lambda x, y: x < y,
        why="divide by a number that is larger, so that the remainder is the first operand",
    ),
    "^": _operator(
        "^",
        "to the power",
        "value",
        lambda x, y: x**y if y * x.bit_length() < 64 else None,
        joint="raised to",
        names="raised",
        trivial=lambda x, y: 1 in (x, y),
        why="have 1 as base or exponent",
    ),
    "max": _choice("max", "larger", "maximum", max),
    "min": _choice("min", "smaller", "minimum", min),
    ">": _comparison(">", ("greater", "larger", "after"), lambda x, y: x > y),
    "<": _comparison("<", ("less", "smaller", "before"), lambda x, y: x < y),
}
ALL_OPERATORS = OPERATORS | MORE_OPERATORS


def facts(
    symbol: str, max_number: int, max_result: int | None = None, possible: frozenset[int] | None = None
) -> list[tuple[int, int, Result]]:
    """All (x, y, result) of an operator, operands in 1..max_number, in ascending order.

    Results are yes and no, or numbers in 1..max_result, which is max_number by default, of those `possible`.
    """
    apply = ALL_OPERATORS[symbol].apply
    numbers = range(1, max_number + 1)
    limit = max_number if max_result is None else max_result
    found = []
    for x in numbers:
        for y in numbers:
            r = apply(x, y)
            if r is None or (isinstance(r, int) and not 1 <= r <= limit):
                continue
            if possible is None or isinstance(r, str) or r in possible:
                found.append((x, y, r))
    return found
