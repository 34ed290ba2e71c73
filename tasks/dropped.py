"""What became no pair, and why: counts and sentences for the user."""

from collections import Counter
from dataclasses import dataclass, field

SAME_QUESTION = "both prompts would ask the same question"
SAME_RESULT = "both prompts have the same result"
TWICE = "the same two questions were drawn before"
UNEVEN = "the operands of the two prompts have different numbers of tokens"


@dataclass(frozen=True)
class Dropped:
    """Draws that became no pair, and what else the user should know of how the pairs were made.

    Attributes:
        reasons: why -> how many draws.
        notes: sentences, for example on the range of numbers that the tokenizer leaves.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many draws were dropped."""
        return sum(self.reasons.values())

    def lines(self) -> list[str]:
        """What to tell the user, one sentence a line."""
        dropped = [
            f"{n} draw{' was' if n == 1 else 's were'} dropped because {why}."
            for why, n in sorted(self.reasons.items())
        ]
        return [*self.notes, *dropped]
