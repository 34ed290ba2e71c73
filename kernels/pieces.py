"""Pieces of an operation's work: one by one, unless the caller has threads for them."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

_PIECES = 8  # at least that many pieces of the vocabulary, so that cores share few rows


class ForEach(Protocol):
    """Does some work for every item, perhaps on several threads, and returns when all is done."""

    def __call__(self, work: Callable[[Any], None], items: Iterable[Any], /) -> None:
        """Do `work` for every item."""
        ...


def in_turn(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Do `work` for every item."""
    for item in items:
        work(item)


def vocabulary_pieces(d_vocab: int, most: int) -> list[slice]:
    """The vocabulary in pieces of at most so many tokens. They do not depend on how many cores there are."""
    width = min(most, -(-d_vocab // _PIECES))
    return [slice(a, min(a + width, d_vocab)) for a in range(0, d_vocab, width)]
