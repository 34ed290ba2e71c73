"""Roles: which prompt of a pair is the base and which the source, and where a patch of it falls.

Positions count in the clean prompt, in both directions, wherever users and results name one. Rows and patch
tables count in the base run: where that is of the corrupted prompt, a position stands for its counterpart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.sources import DIFFERING, Source

T = TypeVar("T")
_BY_POSITION = ("mean", "resample")  # sources that go position by position through prompts of one length


@dataclass(frozen=True)
class Roles:
    """Who is who in the pairs of a run.

    Attributes:
        direction: "denoise": the corrupted prompt is the base, the clean one the source; "noise": the other
            way round.
        source: with "noise" both are the clean prompt, one of them with noise on its embeddings.
    """

    direction: Literal["denoise", "noise"] = "denoise"
    source: Source = "counterpart"

    def of(self, clean: T, corrupted: T) -> tuple[T, T]:
        """What is of the base and what of the source, of what is of each prompt."""
        other = clean if self.source == "noise" else corrupted
        return (other, clean) if self.direction == "denoise" else (clean, other)

    def prompts(self, pair: EncodedPair) -> tuple[list[int], list[int]]:
        """The token ids of base and source."""
        return self.of(pair.clean, pair.corrupted)

    @property
    def adding(self) -> "Roles":
        """Those of patches that take nothing from the source run."""
        return self if self.source == "noise" else replace(self, source="zero")

    def in_step(self, pair: EncodedPair) -> bool:
        """Whether what lines up is at the same position in both runs, which have one length.

        Then the source run is carried as a difference; else it is run as a prompt of its own.
        """
        return self.source == "noise" or pair.in_step

    def everywhere(self, pair: EncodedPair) -> bool:
        """Whether there is something to take for every position of the base run."""
        return pair.align is None or self.source in ("noise", "zero")

    def place(self, pair: EncodedPair, position: int | str) -> int | None:
        """Where in the base run a patch of a position of the clean prompt is; None where there is none.

        That is so where the pair has no such position, and where the position has no counterpart but needs
        one: to stand for it in the base run, or to take from.
        """
        at = pair.resolve(position)
        if at is None or pair.align is None or self.source == "noise":
            return at
        if self.direction == "noise" and self.source != "counterpart":
            return at
        there = pair.counterparts[at]
        return at if there is not None and self.direction == "noise" else there

    def mapped(self, pair: EncodedPair) -> list[tuple[int, int]]:
        """The positions of base and source run that line up."""
        if pair.align is None or self.source == "noise":
            return [(at, at) for at in range(len(pair.clean))]
        return [self.of(a, b) for a, b in pair.align]

    def brings_from(self, pair: EncodedPair) -> int:
        """The position of the base run before which a source has nothing else to say than the base run."""
        return self.first(pair) if self.in_step(pair) else 0

    def first(self, pair: EncodedPair) -> int:
        """The first position of the base run at which patching all of them changes anything."""
        return pair.first_difference if self.source in DIFFERING else 0


def check_everywhere(pairs: Sequence[EncodedPair], what: str, roles: Roles | None = None) -> None:
    """Raise DeltapatchError where something needs prompts that line up entirely, and a pair's do not.

    Args:
        what: needs it, in the plural.
        roles: in these nothing else will do either; None: whatever they are.
    """
    for number, pair in enumerate(pairs):
        if pair.align is not None and not (roles and roles.everywhere(pair)):
            raise DeltapatchError(
                f"{what} need prompts that line up entirely, and of the {len(pair.clean)} and "
                f"{len(pair.corrupted)} tokens of pair {number} {len(pair.align)} do: give prompts of equal "
                "length"
            )


def check_source_fits(pairs: Sequence[EncodedPair], roles: Roles) -> None:
    """Raise DeltapatchError where a source goes position by position, and the prompts of a pair do not."""
    for number, pair in enumerate(pairs):
        if roles.source in _BY_POSITION and not pair.in_step:
            raise DeltapatchError(
                f"source {roles.source!r} goes position by position, and the prompts of pair {number} (of "
                f"{len(pair.clean)} and {len(pair.corrupted)} tokens) line up at other positions: choose "
                "counterpart, zero or noise"
            )


def no_place(pair: EncodedPair, position: int | str) -> str:
    """Why a pair has no place for a patch at a position, where `place` gives None."""
    if pair.resolve(position) is None:
        return (
            f"its pair has no position {position!r}; the prompt has {len(pair.clean)} tokens and labels "
            f"{sorted(pair.labels) or 'none'}"
        )
    return (
        f"position {position!r} has no counterpart in the other prompt, so that nothing can be patched there "
        "(`deltapatch pairs --show FILE` shows what lines up)"
    )
