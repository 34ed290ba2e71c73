"""When a screened sweep has found enough: `Recall`, and how its bound is asked for again and again.

After every round of verifying, the bound on what was missed says whether that is enough, and the sweep stops
at the first round of which it does. Round k has the share 1 / (k (k + 1)) of the chance of error. These add
up to one, so the bounds of all rounds hold together with the confidence that was asked for (Bonferroni's
inequality), and so does that of the round at which it stopped, whatever made it stop there. This takes that
each round's sample is a uniform one: how large rounds are follows from estimates and from the effects of the
top, never from a sample, and all samples are the beginning of one random order.
"""

import math
from dataclasses import dataclass

from deltapatch.arguments import scale
from deltapatch.errors import DeltapatchError, shown
from deltapatch.results.strata import chance

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Recall:
    """Go on until at least this share of the effects above the threshold was found.

    Attributes:
        share: of all effects above the threshold, above 0 and below 1.
        confidence: that it was found, over the draws of the sample; from 0.5 to below 1.

    Raises:
        DeltapatchError: a number out of range.
    """

    share: float
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        for name in ("share", "confidence"):
            object.__setattr__(self, name, scale(getattr(self, name), f"{name} of recall"))
        if not 0 < self.share < 1:
            raise DeltapatchError(f"share of recall must be above 0 and below 1, not {self.share:g}")
        if not 0.5 <= self.confidence < 1:
            raise DeltapatchError(
                f"confidence of recall must be from 0.5 to below 1, not {self.confidence:g}"
            )

    def __str__(self) -> str:
        own = "" if self.confidence == CONFIDENCE else f":{self.confidence!r}"
        return f"recall:{self.share!r}{own}"

    @classmethod
    def of(cls, value: object) -> "Recall":
        """One that is given as such, or as text: recall:0.9, or recall:0.9:0.99 with its confidence.

        Raises:
            DeltapatchError: it is neither.
        """
        if isinstance(value, Recall):
            return value
        name, *numbers = value.split(":") if isinstance(value, str) else [""]
        try:
            if name != "recall" or not 1 <= len(numbers) <= 2:
                raise ValueError
            given = [float(number) for number in numbers]
        except ValueError:
            raise DeltapatchError(
                f"until must be Recall(0.9), or text: recall:0.9, or recall:0.9:0.99 with its confidence; "
                f"not {shown(value)}"
            ) from None
        return cls(*given)

    def reached(self, found: int, at_most: int) -> bool:
        """Whether that is enough, where at most so many others are large."""
        return at_most <= self.missable(found)

    def missable(self, found: int) -> int:
        """How many large effects may have been missed where so many were found."""
        return math.floor(found * (1 - self.share) / self.share + 1e-9)

    def draws(self, found: int, rest: int) -> int:
        """The smallest sample that may be enough in the first round: it is if none of it is large.

        Args:
            found: large effects at the top.
            rest: how many are not at the top.
        """
        large, alpha = self.missable(found) + 1, 1 - in_round(self.confidence, 1)
        if large > rest:
            return 0
        low, high = 0, rest  # too few, and enough
        while high - low > 1:
            n = (low + high) // 2
            low, high = (low, n) if chance(0, n, large, rest) <= alpha else (n, high)
        return high


def in_round(confidence: float, k: int) -> float:
    """The confidence of round k, from 1, so that the bounds of all rounds hold with the one given."""
    return 1 - (1 - confidence) / (k * (k + 1))
