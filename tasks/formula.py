"""Formulas of word problems, such as ``a + b * 2``: read without running them as code, and exact."""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from deltapatch.errors import DeltapatchError, shown

_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}

_LONGEST = 500  # characters: all that is done with a formula goes down its tree


@dataclass(frozen=True)
class Formula:
    """A formula of + - * / // % and brackets over whole numbers and names."""

    text: str
    tree: ast.expr

    @property
    def names(self) -> set[str]:
        """The names in it."""
        return {node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)}

    @property
    def numbers(self) -> list[int]:
        """The numbers in it, as often as they stand there."""
        found = (node.value for node in ast.walk(self.tree) if isinstance(node, ast.Constant))
        return [int(value) for value in found if isinstance(value, int | float)]

    def value(self, names: Mapping[str, int]) -> int | None:
        """Its value, where it and every part of it is a whole number that is not negative; else None."""
        found = _value(self.tree, names)
        return None if found is None else int(found)

    def named(self, names: Mapping[int, str]) -> "Formula":
        """The formula with names in the places of numbers."""
        tree = _Naming(names).visit(ast.parse(self.text, mode="eval")).body
        return Formula(ast.unparse(tree), tree)


def read_formula(text: str, where: str) -> Formula:
    """Read a formula; DeltapatchError where it is none."""
    text = text.strip()
    if len(text) > _LONGEST:
        raise DeltapatchError(f"{where}: {shown(text)} is no formula such as 'a + b * 2', but far too long.")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise DeltapatchError(f"{where}: {text!r} is no formula such as 'a + b * 2'.") from None
    for node in ast.walk(tree):
        known = isinstance(node, ast.BinOp | ast.Name | ast.Load)
        if isinstance(node, ast.operator):
            known = type(node) in _OPERATIONS
        elif isinstance(node, ast.Constant) and not isinstance(node.value, bool):
            known = isinstance(node.value, int | float) and node.value % 1 == 0
        if not known:
            raise DeltapatchError(
                f"{where}: the formula {text!r} may hold + - * / // % and brackets, whole numbers and names."
            )
    return Formula(text, tree)


def _value(node: ast.expr, names: Mapping[str, int]) -> Fraction | None:
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, names), _value(node.right, names)
        if left is None or right is None:
            return None
        if right == 0 and not isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
            return None
        result = _OPERATIONS[type(node.op)](left, right)
    elif isinstance(node, ast.Name):
        result = Fraction(names[node.id])
    else:
        assert isinstance(node, ast.Constant) and isinstance(node.value, int | float)  # noqa: PT018 - read_formula
        result = Fraction(int(node.value))
    return result if result.denominator == 1 and result >= 0 else None


class _Naming(ast.NodeTransformer):
    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        assert isinstance(node.value, int | float)
        name = self.names.get(int(node.value))
        return node if name is None else ast.Name(name, ast.Load())
