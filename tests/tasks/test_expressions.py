"""The 29 shapes: their names, values and phrases."""

import itertools

import pytest

from deltapatch.tasks.expressions import SHAPES, Shape
from deltapatch.tasks.templates import ALL_OPERATORS


def test_there_are_29_shapes() -> None:
    assert len({shape.name for shape in SHAPES}) == len(SHAPES) == 29
    assert sum(shape.right for shape in SHAPES) == 13


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_values_are_those_of_python(shape: Shape) -> None:
    found = 0
    for x, y, z in itertools.product(range(1, 13), repeat=3):
        value = shape.value(x, y, z)
        if value is not None:
            found += 1
            assert eval(shape.name, {}, {"x": x, "y": y, "z": z}) == value >= 1
    assert found > 20


def test_only_idle_brackets_are_left_out() -> None:
    """A shape that is not there has the value of one that is, wherever either has a value."""
    for first, second in itertools.product("+-*/", repeat=2):
        right = Shape(first, second, True)
        if right in SHAPES:
            continue
        left = Shape(first, second, False)
        for x, y, z in itertools.product(range(1, 9), repeat=3):
            if right.value(x, y, z) is not None:
                assert left.value(x, y, z) == right.value(x, y, z)


def test_phrases_are_told_apart() -> None:
    assert len({shape.phrase for shape in SHAPES}) == 29
    assert Shape("+", "*", False).phrase == "the sum of {op1} and {op2}, times {op3}"
    assert Shape("-", "/", True).phrase == "{op1} minus the ratio between {op2} and {op3}"


@pytest.mark.parametrize(
    ("symbol", "x", "y", "result"),
    [
        ("%", 17, 5, 2),
        ("%", 4, 0, None),
        ("^", 3, 4, 81),
        ("^", 300, 300, None),
        ("max", 3, 9, 9),
        ("min", 3, 9, 3),
        (">", 3, 9, "no"),
        ("<", 3, 9, "yes"),
    ],
)
def test_more_operators(symbol: str, x: int, y: int, result: int | str | None) -> None:
    operator = ALL_OPERATORS[symbol]
    assert operator.apply(x, y) == result
    assert len(set(operator.templates)) == len(operator.words) == 6
    for template, word in zip(operator.templates, operator.words, strict=True):
        assert template.index("{x}") < template.index("{y}")
        assert word in template
