"""Numbers as they are written: in numerals, or in English words."""

from collections.abc import Callable

from deltapatch.errors import DeltapatchError

_SMALL = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def spell(n: int) -> str:
    """A number from 0 to 999,999 in words, for example one hundred and twenty-three."""
    if not 0 <= n < 1_000_000:
        raise DeltapatchError(f"Numbers from 0 to 999999 can be spelled out, not {n}.")
    if n < 20:
        return _SMALL[n]
    if n < 100:
        return _TENS[n // 10] + (f"-{_SMALL[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{_SMALL[n // 100]} hundred" + (f" and {spell(n % 100)}" if n % 100 else "")
    joint = " and " if n % 1000 < 100 else " "
    return f"{spell(n // 1000)} thousand" + (f"{joint}{spell(n % 1000)}" if n % 1000 else "")


WRITINGS: dict[str, Callable[[int], str]] = {"numerals": str, "words": spell}


def check_writing(writing: str) -> None:
    """Raise DeltapatchError where `writing` is none of WRITINGS."""
    if writing not in WRITINGS:
        raise DeltapatchError(f"Numbers are written in {' or '.join(WRITINGS)}, not {writing!r}.")
