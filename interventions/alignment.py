"""What of a pair's two prompts lines up: which position of the one is the counterpart of which other."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from deltapatch.arguments import whole
from deltapatch.errors import DeltapatchError, shown

ENDS = "prefix+suffix"
Align = str | Sequence[Sequence[int]] | None
REMEDY = f'line them up with align="{ENDS}", or with a list of [clean position, corrupted position]'


class Column(NamedTuple):
    """What stands side by side: positions of the clean and the corrupted prompt, None where there is none."""

    clean: int | None
    corrupted: int | None


def lined_up(
    align: Align, clean: Sequence[int], corrupted: Sequence[int], name: str
) -> list[list[int]] | None:
    """The pairs of positions, [clean, corrupted], that line up; None where each lines up with itself.

    Args:
        align: as of a `PromptPair`; None for prompts of one length.
        clean, corrupted: token ids.
        name: what errors call the pair.

    Raises:
        DeltapatchError: `align` is something else, or no map that keeps the order; nothing lines up.
    """
    if align is None:
        return None
    sizes = len(clean), len(corrupted)
    if isinstance(align, str):
        if align != ENDS:
            raise DeltapatchError(
                f"{name}: align must be {ENDS!r} or a list of positions, not {shown(align)}."
            )
        found = _ends(clean, corrupted)
        if not found:
            raise DeltapatchError(
                f"{name}: the prompts begin and end in different tokens: nothing lines up by {ENDS!r}; give "
                "align as a list of [clean position, corrupted position]."
            )
    else:
        found = _given(align, sizes, name)
    return None if sizes[0] == sizes[1] == len(found) else found


def makes_sense(align: list[list[int]] | None, sizes: tuple[int, int]) -> bool:
    """Whether what was read of a file is what `lined_up` may give for prompts of so many tokens."""
    if align is None:
        return sizes[0] == sizes[1]
    if not align or any(len(one) != 2 for one in align):
        return False
    inside = all(0 <= at < size for one in align for at, size in zip(one, sizes, strict=True))
    return inside and _ascends(align)


def side_by_side(align: list[list[int]] | None, sizes: tuple[int, int]) -> list[Column]:
    """Both prompts side by side, in order: what lines up in one column, all else in one of its own."""
    if align is None:
        return [Column(at, at) for at in range(sizes[0])]
    out: list[Column] = []
    done = (0, 0)
    for clean, corrupted in [*align, list(sizes)]:
        out += [Column(at, None) for at in range(done[0], clean)]
        out += [Column(None, at) for at in range(done[1], corrupted)]
        out.append(Column(clean, corrupted))
        done = clean + 1, corrupted + 1
    return out[:-1]


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    both = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in both if a != b), min(len(first), len(second)))


def _ends(clean: Sequence[int], corrupted: Sequence[int]) -> list[list[int]]:
    """The common beginning and end; all of prompts of one length."""
    n, m = len(clean), len(corrupted)
    if n == m:
        return [[at, at] for at in range(n)]
    first = common(clean, corrupted)
    last = min(common(clean[::-1], corrupted[::-1]), min(n, m) - first)
    return [[at, at] for at in range(first)] + [[n - at, m - at] for at in range(last, 0, -1)]


def _given(align: Any, sizes: tuple[int, int], name: str) -> list[list[int]]:
    """A list of positions, checked and counted from 0."""
    must = f"{name}: align must be {ENDS!r} or a list of [clean position, corrupted position]"
    align = align.tolist() if hasattr(align, "tolist") else align  # of an array
    if not isinstance(align, Sequence) or isinstance(align, bytes) or not align:
        raise DeltapatchError(f"{must}, not {shown(align)}.")
    found = []
    for one in align:
        if not isinstance(one, Sequence) or isinstance(one, str | bytes) or len(one) != 2:
            raise DeltapatchError(f"{must}, and {shown(one)} is none.")
        own = []
        for at, size, which in zip(one, sizes, ("clean", "corrupted"), strict=True):
            place = whole(at, must)
            if not -size <= place < size:
                raise DeltapatchError(
                    f"{name}: align has position {place} of the {which} prompt, which has {size} tokens "
                    f"(positions 0 to {size - 1}, or -1 to {-size} from the end)."
                )
            own.append(place % size)
        found.append(own)
    if not _ascends(found):
        raise DeltapatchError(
            f"{name}: the positions of align must ascend in both prompts, each once: a token sees those "
            "before it, and what lines up must keep that order."
        )
    return found


def _ascends(align: list[list[int]]) -> bool:
    return all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(align))
