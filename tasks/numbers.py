"""How numbers are written, which of them a tokenizer leaves in one piece, and where pieces of a text lie."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.tokens import tokenise
from deltapatch.tasks.answers import answer_ids, need_fast_tokenizer

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


# One sentence in which numbers follow a space, and one that begins with a number.
_CONTEXTS = ("Q: How much is {n} plus {n}? A:", "{n} + {n} =")


@dataclass(frozen=True)
class NumberRange:
    """The numbers that a tokenizer leaves usable.

    Attributes:
        operands, results: the largest of each; both begin at 1.
        ending: what a prompt ends in so that the answer is one more token: nothing, or a space.
        split: operands of more than one token occur.
        write: a number as the prompts and answers have it.
        possible: the results that can be, where these are not all of 1..results.
    """

    operands: int
    results: int
    ending: str
    split: bool
    write: Callable[[int], str] = str
    possible: frozenset[int] | None = None

    def allows(self, result: int) -> bool:
        """Whether a number can be an answer."""
        return 1 <= result <= self.results and (self.possible is None or result in self.possible)

    def notes(self, max_number: int) -> list[str]:
        """What the user should know, in sentences."""
        found = []
        if self.possible is not None:
            found.append(
                f"Results are the {len(self.possible)} number words up to {self.write(self.results)} that "
                f"are one token; operands go up to {self.write(self.operands)} and have as many tokens in "
                "both prompts of a pair."
            )
        elif self.split:
            limited = f"results are limited to 1..{self.results}, " if self.results < max_number else ""
            found.append(
                f"This tokenizer splits numbers: {limited}operands go up to "
                f"{self.operands} and have as many tokens in both prompts of a pair."
            )
            if limited:
                found.append("Answers of any length, as text, have all results.")
        elif min(self.operands, self.results) < max_number:
            found.append(
                f"Operands and results go from 1 to {self.results}, the largest number that is one token."
            )
        if self.ending:
            found.append("Prompts end in a space, because this tokenizer puts it in a token of its own.")
        return found


def number_range(
    tokenizer: Any, max_number: int, writing: str = "numerals", answers: str = "one"
) -> NumberRange:
    """The largest range 1..n, up to `max_number`, whose numbers are single tokens where templates use them.

    Where fewer than ten numbers are (LLaMA's tokenizer: one token a digit), operands may be split. Numbers in
    words may always be: most have several tokens, and the results are those that have one.

    Args:
        writing: a key of WRITINGS.
        answers: one of `answers.ANSWERS`; all but "one" let results, and so operands, have several tokens.

    Raises:
        DeltapatchError: no tokenizer, a slow one, or one in which not even two results are possible.
    """
    need_fast_tokenizer(tokenizer, "Arithmetic pairs")
    write = WRITINGS[writing]
    endings = {ending: partial(_is_answer, tokenizer, ending, write) for ending in ("", " ")}
    if writing == "words":
        found = {
            e: frozenset(filter(is_answer, range(1, max_number + 1))) for e, is_answer in endings.items()
        }
        ending = max(found, key=lambda e: len(found[e]))  # of two that are equal, the first
        if answers != "one":
            return NumberRange(max_number, max_number, ending, True, write)
        if len(found[ending]) < 2:
            raise _no_answers()
        return NumberRange(max_number, max(found[ending]), ending, True, write, found[ending])
    largest = {ending: _largest(is_answer, max_number) for ending, is_answer in endings.items()}
    ending = max(largest, key=lambda e: largest[e])
    results = largest[ending]
    whole = _largest(partial(_is_whole, tokenizer), max_number)
    if answers != "one":
        return NumberRange(max_number, max_number, ending, split=whole < max_number)
    if results < 2:
        raise _no_answers()
    if whole < min(10, max_number):
        return NumberRange(max_number, results, ending, split=True)
    both = min(whole, results)
    return NumberRange(both, both, ending, split=False)


def _no_answers() -> DeltapatchError:
    return DeltapatchError(
        "This tokenizer has no numbers that are one token after a prompt: ask for answers of any length, as "
        "text, instead of one token."
    )


def token_spans(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[range]]:
    """Tokenise a text and find pieces of it.

    Args:
        spans: [start, end) of each piece, in characters.

    Returns:
        the token ids, as a prompt has them, and for each piece the range of tokens that hold it (with a space
        before it, perhaps); an empty range where a token holds more than the piece, so that the piece has no
        tokens of its own.
    """
    encoded = tokenise(tokenizer, text, offsets=True)
    offsets = encoded.offsets
    found = []
    for start, end in spans:
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        # A space that the tokenizer puts before the whole text is no part of a piece that begins it.
        while len(inside) > 1 and not tokenizer.decode([encoded.ids[inside[0]]]).strip(" ▁"):
            inside.pop(0)
        own = all(a >= start or text[a:start].isspace() for a, _ in (offsets[i] for i in inside))
        own = own and all(offsets[i][1] <= end for i in inside)
        found.append(range(inside[0], inside[-1] + 1) if inside and own else range(0))
    return encoded.ids, found


def _largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest n up to the limit such that it holds for all of 1..n."""
    for n in range(1, limit + 1):
        if not holds(n):
            return n - 1
    return limit


def _is_whole(tokenizer: Any, n: int) -> bool:
    """Whether every mention of n is one token."""
    for context in _CONTEXTS:
        text, digits = context.format(n=n), len(str(n))
        first = text.index(str(n))
        second = text.index(str(n), first + digits)
        spans = [(first, first + digits), (second, second + digits)]
        if any(len(tokens) != 1 for tokens in token_spans(tokenizer, text, spans)[1]):
            return False
    return True


def _is_answer(tokenizer: Any, ending: str, write: Callable[[int], str], n: int) -> bool:
    """Whether n adds exactly one token to prompts with this ending."""
    for context in _CONTEXTS if write is str else _CONTEXTS[:1]:
        prompt = context.format(n=write(1)) + ending
        added = answer_ids(tokenizer, prompt, ("" if ending else " ") + write(n))
        if added is None or len(added) != 1:
            return False
    return True
