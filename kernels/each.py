"""How an operation does the pieces of its work: one by one, unless its caller has threads for them."""

from collections.abc import Callable, Iterable
from typing import Any

Each = Callable[[Callable[[Any], None], Iterable[Any]], None]


def in_turn(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Do `work` for every item."""
    for item in items:
        work(item)
