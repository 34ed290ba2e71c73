"""Expressions of three operands: the 29 shapes over + - * /, their values, and their phrasing."""

from dataclasses import dataclass

_VERBS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
_NOUNS = {
    "+": "the sum of {} and {}",
    "-": "the difference between {} and {}",
    "*": "the product of {} and {}",
    "/": "the ratio between {} and {}",
}
_WEIGHT = {"+": 1, "-": 1, "*": 2, "/": 2}  # how tightly an operator binds
# Brackets around the second and third operand that say nothing: x + (y + z), x + (y - z), x * (y * z). Those
# of x * (y / z) do, because y / z has to come out even.
_IDLE = {("+", "+"), ("+", "-"), ("*", "*")}


@dataclass(frozen=True)
class Shape:
    """``(x first y) second z``, or with `right` ``x first (y second z)``."""

    first: str
    second: str
    right: bool

    @property
    def inner(self) -> str:
        """The operator that is applied first."""
        return self.second if self.right else self.first

    @property
    def symbols(self) -> str:
        """The expression, with the brackets that it needs, as a template with op1, op2, op3 and operators."""
        outer = self.first if self.right else self.second
        loose, tight = _WEIGHT[self.inner], _WEIGHT[outer]
        bracket = loose < tight or (self.right and loose == tight)
        if self.right:
            part = "{op2} {operator2} {op3}"
            return "{op1} {operator1} " + (f"({part})" if bracket else part)
        part = "{op1} {operator1} {op2}"
        return (f"({part})" if bracket else part) + " {operator2} {op3}"

    @property
    def name(self) -> str:
        """The expression with x, y and z."""
        names = {"op1": "x", "op2": "y", "op3": "z", "operator1": self.first, "operator2": self.second}
        return self.symbols.format(**names)

    @property
    def phrase(self) -> str:
        """The expression in words: the part that is worked out first is a noun, the other operator a verb."""
        noun = _NOUNS[self.inner]
        if self.right:
            return f"{{op1}} {_VERBS[self.first]} {noun.format('{op2}', '{op3}')}"
        return f"{noun.format('{op1}', '{op2}')}, {_VERBS[self.second]} {{op3}}"

    def value(self, x: int, y: int, z: int) -> int | None:
        """The value, where it and what comes before it are whole and at least 1; else None."""
        if self.right:
            part = _apply(self.second, y, z)
            return None if part is None else _apply(self.first, x, part)
        part = _apply(self.first, x, y)
        return None if part is None else _apply(self.second, part, z)


SHAPES: tuple[Shape, ...] = tuple(
    Shape(first, second, right)
    for right in (False, True)
    for first in "+-*/"
    for second in "+-*/"
    if not (right and (first, second) in _IDLE)
)


def _apply(symbol: str, x: int, y: int) -> int | None:
    """x symbol y, or None where it is no whole number of at least 1."""
    if symbol == "/":
        return None if x % y else x // y
    value = x + y if symbol == "+" else x - y if symbol == "-" else x * y
    return value if value >= 1 else None
