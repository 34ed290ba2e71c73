"""What the arguments of sweeps and runs may be: what is plainly meant is taken, all else is one sentence.

Every whole number, position, seed and amount of memory that a user gives goes through here, in Python and in
the shell. Torch and numpy are not needed, so that `--help` does not wait for them.
"""

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from deltapatch.errors import DeltapatchError, shown

# Words of the tool where positions are given or averaged over: a label may be called so only where it means
# the same.
WORDS = ("last", "first", "all", "each", "together", "any", "early", "middle", "between", "late")

_SIZES = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 2 ** (10 * power) for power, unit in enumerate("kmgt", 1)}


def whole(value: object, must: str) -> int:
    """A whole number of any type, numpy's and torch's too; True and 2.0 are none.

    Args:
        must: what it must be, for the sentence, for example "a layer must be a whole number".

    Raises:
        DeltapatchError: it is something else.
    """
    if type(value) is int:
        return value
    try:
        if "bool" in type(value).__name__ or "bool" in str(getattr(value, "dtype", "")):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]  # a TypeError is what it is asked for
    except (TypeError, ValueError):
        raise DeltapatchError(f"{must}, not {shown(value)}") from None


def position(value: object, must: str = "a position must be a whole number or a label") -> int | str:
    """A position as a user names it: a whole number or a label. DeltapatchError where it is none."""
    return str(value) if isinstance(value, str) else whole(value, must)


def several(values: object, what: str, example: str) -> Iterator[object]:
    """The values of an argument that takes one or many: each by itself, ranges spread out.

    Args:
        what: the argument's name.
        example: what it may be.

    Raises:
        DeltapatchError: it is neither.
    """
    if isinstance(values, Iterable) and not isinstance(values, str | bytes | dict) and _dim(values) != 0:
        for item in values:
            if isinstance(item, range):
                yield from item
            else:
                yield item
    elif values is None or isinstance(values, bytes | dict):
        raise DeltapatchError(f"{what} must be {example}, not {shown(values)}")
    else:
        yield values


def choice(value: object, names: Iterable[str], what: str) -> str:
    """One of some names. DeltapatchError where it is none of them."""
    if not isinstance(value, str) or value not in names:
        raise DeltapatchError(f"unknown {what} {shown(value)}: choose from {', '.join(names)}")
    return value


def seed(value: object) -> int:
    """A seed: a whole number, 0 or more. DeltapatchError where it is something else."""
    number = whole(value, "a seed must be a whole number, 0 or more")
    if number < 0:
        raise DeltapatchError(f"a seed must be a whole number, 0 or more, not {number}")
    return number


def count(value: object, what: str) -> int | None:
    """How many of something, 0 or more, or None. DeltapatchError where it is something else."""
    if value is None:
        return None
    number = whole(value, f"{what} must be a whole number, 0 or more")
    if number < 0:
        raise DeltapatchError(f"{what} must be 0 or more, not {number}")
    return number


def scale(value: object, what: str) -> float:
    """A number, 0 or more. DeltapatchError where it is something else."""
    try:
        found = math.nan if isinstance(value, str | bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = math.nan
    if not 0 <= found < math.inf:
        raise DeltapatchError(f"{what} must be a number, 0 or more, not {shown(value)}")
    return found


def prompts(value: object, what: str) -> list[Any] | None:
    """Prompts, each a text, token ids, or a dictionary of one of these and labels, at least one; or None.

    DeltapatchError where there are none.
    """
    if value is None:
        return None
    must = f"{what} must be a list of prompts, each a text, a list of token ids, or one with labels"
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise DeltapatchError(f"{must}, not {shown(value)}")
    found: list[Any] = []
    for number, one in enumerate(several(value, what, "a list of prompts")):
        if isinstance(one, Mapping):
            if set(one) != {"prompt", "labels"} or not isinstance(one["labels"], Mapping):
                raise DeltapatchError(
                    f'{what}: prompt {number} with labels must be {{"prompt": ..., "labels": {{...}}}}, not '
                    f"{shown(one)}"
                )
            (prompt,) = prompts([one["prompt"]], f"prompt {number} of {what}") or [""]
            found.append({"prompt": prompt, "labels": dict(one["labels"])})
        elif isinstance(one, str):
            found.append(str(one))
        elif isinstance(one, Iterable):
            of_one = f"a token of prompt {number} of {what} must be a whole number"
            found.append([whole(token, of_one) for token in one])
        else:
            raise DeltapatchError(f"{must}, and prompt {number} is {shown(one)}")
    if not found:
        raise DeltapatchError(f"{what} has no prompts: give at least one, or leave it out")
    return found


def n_bytes(value: object, what: str) -> int | None:
    """An amount of memory: a number of bytes, or text such as 2GB or 512MiB; None stays None.

    Raises:
        DeltapatchError: it is something else, or less than a byte.
    """
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", value.lower())
        number = round(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
        if number < 1:
            raise DeltapatchError(f"{what} {shown(value)} is not an amount of memory such as 2GB or 512MiB")
        return number
    if isinstance(value, float) and value.is_integer():  # 2e9
        value = int(value)
    number = whole(value, f"{what} must be an amount of memory such as '2GB' or a number of bytes")
    if number < 1:
        raise DeltapatchError(f"{what} must be positive, not {number}")
    return number


def in_bytes(number: float) -> str:
    """An amount of memory for people: 1.5 GB."""
    return scaled(number, _SIZES)


def at_most_bytes(number: float) -> str:
    """As `in_bytes`, to four digits and never more than it is: for what is not enough."""
    return _cut(number, math.floor)


def at_least_bytes(number: float) -> str:
    """As `in_bytes`, to four digits and never less than it is: for what would be enough."""
    return _cut(number, math.ceil)


def _cut(number: float, towards: Callable[[float], int]) -> str:
    power = max(0, min(len(_SIZES) - 1, int(math.log10(max(number, 1))) // 3))
    digits = 3 - int(math.log10(max(number, 1))) % 3 if power else 0
    return f"{towards(number / 1000**power * 10**digits) / 10**digits:g} {_SIZES[power]}"


def scaled(number: float, units: tuple[str, ...]) -> str:
    """A number for people, in the unit that leaves it below 1000, to three digits."""
    power = 0
    while round(number, 0) >= 1000 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {units[power]}"


def label_name(name: object, where: str) -> str:
    """The name of a label that can be told from numbers and from lists of names.

    Raises:
        DeltapatchError: it is no text, empty, or has a comma or a space at its end.
    """
    if not isinstance(name, str):
        raise DeltapatchError(f"{where}: a label must be text, not {shown(name)}")
    if not name.strip() or name != name.strip() or "," in name:
        raise DeltapatchError(
            f"{where}: label {shown(name)} cannot be told from a list of positions: "
            "give it a name without commas and without spaces at its ends"
        )
    return name


def check_label(name: str, place: int, length: int, where: str) -> None:
    """Check that a label does not say something else than the tool's own words and numbers do.

    Args:
        place: its position, from 0.
        length: tokens of the prompt.

    Raises:
        DeltapatchError: it does.
    """
    means = {"last": length - 1, "first": 0}.get(name)
    if re.fullmatch(r"[+-]?\d{1,18}", name):
        number = int(name)
        means = number + length if number < 0 else number
    elif name not in WORDS:
        return
    if means != place:
        own = "where positions are given" if means is None else f"for position {means} of this prompt"
        raise DeltapatchError(
            f"{where}: label {name!r} is at position {place}, but {name} stands {own}; "
            "give the label another name"
        )


def _dim(value: Any) -> Any:
    """How many axes an array has; None of anything else."""
    return getattr(value, "ndim", None)


def names(text: str) -> list[str]:
    """Names with commas between."""
    return [item.strip() for item in text.split(",") if item.strip()]


def number_or_label(text: str) -> int | str:
    """One position, as text."""
    return int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else text


def positions(text: str) -> str | list[int | str]:
    """`all`, `last`, or numbers and label names with commas between."""
    items = [item.strip() for item in text.split(",")]
    if items in (["all"], ["last"]):
        return items[0]
    if not all(items):
        raise DeltapatchError(
            f"--positions {text!r} is not all, last, or numbers and labels such as 3,-1,op1"
        )
    return [number_or_label(item) for item in items]


def layers(text: str) -> str | list[int]:
    """`all`, or numbers and ranges with commas between; a range includes its end."""
    if text.strip() == "all":
        return "all"
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", item)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise DeltapatchError(f"--layers {text!r} is not all, or numbers and ranges such as 0-5,9")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found
