"""What two prompts of an arithmetic pair ask: the three kinds of pairs, and the exemplars that go before."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from deltapatch.errors import DeltapatchError
from deltapatch.tasks.pairing import SAME_QUESTION, SAME_RESULT
from deltapatch.tasks.templates import Result

Fact = tuple[int, int, Result]  # x, y and the result
Asked = tuple[str, Fact]  # the operator's symbol, and the fact
Drawn = tuple[Asked, Asked]  # of the clean and of the corrupted prompt

# operands: other operands, another result. same_result: other operands, the same result. operator: another
# operator on the same operands, another result.
DIFFER = ("operands", "same_result", "operator")


def check_differ(differ: str) -> None:
    """Raise DeltapatchError where `differ` is none of DIFFER."""
    if differ not in DIFFER:
        raise DeltapatchError(f"Pairs differ by {', '.join(DIFFER)}, not {differ!r}.")


@dataclass
class Draws:
    """Draws of one operator's questions, as pairs.

    Attributes:
        symbol: the operator, of the clean prompt where they differ.
        table: its facts.
        others: the facts of the operators that may stand in the corrupted prompt, where operators differ.
    """

    rng: random.Random
    differ: str
    symbol: str
    table: list[Fact]
    others: dict[str, list[Fact]]

    def __post_init__(self) -> None:
        """Sort the facts as the kind of pair needs them."""
        self.by_result: dict[Result, list[Fact]] = {}
        if self.differ == "same_result":
            for fact in self.table:
                self.by_result.setdefault(fact[2], []).append(fact)
        # Facts whose operands another operator takes too, to another result: [other operator].
        self.shared: dict[str, list[Drawn]] = {}
        if self.differ == "operator":
            for other, table in self.others.items():
                results = {(x, y): r for x, y, r in table}
                found: list[Drawn] = [
                    ((self.symbol, (x, y, r)), (other, (x, y, results[x, y])))
                    for x, y, r in self.table
                    if results.get((x, y), r) != r
                ]
                if found:
                    self.shared[other] = found

    def enough(self, shots: int) -> bool:
        """Whether there can be a pair and its exemplars."""
        if self.differ == "operator":
            self.shared = {other: found for other, found in self.shared.items() if len(found) > shots}
            return bool(self.shared)
        return len(self.table) >= shots + 2

    def draw(self) -> Drawn | str:
        """Two questions, or why the draw makes no pair."""
        if self.differ == "operator":
            return self.rng.choice(self.shared[self.rng.choice(list(self.shared))])
        clean = self.rng.choice(self.table)
        same = self.differ == "same_result"
        corrupted = self.rng.choice(self.by_result[clean[2]] if same else self.table)
        if clean == corrupted:
            return SAME_QUESTION
        if not same and clean[2] == corrupted[2]:
            return SAME_RESULT
        return (self.symbol, clean), (self.symbol, corrupted)

    def exemplars(self, shots: int, drawn: Drawn) -> Sequence[Drawn]:
        """Different questions, none of them asked; the same in both prompts, but for the operator.

        Where operators differ, each prompt shows its own operator on the same operands.
        """
        chosen: list[Drawn] = []
        other = drawn[1][0]
        asked = {fact[:2] for _, fact in drawn}
        while len(chosen) < shots:
            if self.differ == "operator":
                shown = self.rng.choice(self.shared[other])
            else:
                fact = self.rng.choice(self.table)
                shown = ((self.symbol, fact), (self.symbol, fact))
            if shown not in chosen and shown[0][1][:2] not in asked:
                chosen.append(shown)
        return chosen
