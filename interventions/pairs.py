"""Prompt pairs, and their checked, tokenised form, which encode.py makes: what every sweep starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from deltapatch import markup
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.alignment import Align, Column, common, side_by_side


@dataclass(frozen=True)
class AnyOf:
    """Several answers that count as one: their probabilities add up.

    `AnyOf([" yes", " Yes"])`, or all years above 45 against all below. Each is one token, as text or id.

    Attributes:
        any: the answers.
    """

    any: Sequence[str | int]


Answer = str | int | list[int] | AnyOf
Prompt = str | list[int] | list[dict[str, str]]
Weights = Mapping[str | int, float] | Sequence[tuple[str | int, float]] | None


@dataclass(frozen=True)
class PromptPair:
    """Two prompts and their answers.

    Attributes:
        clean, corrupted: text, or a list of token ids, or a conversation, a list of messages as in
            `[{"role": "user", "content": "..."}]`, of which the tokenizer's chat template makes the text.
        clean_answer, corrupted_answer: text (tokenised in context, to one token or several), a token id, a
            list of them, or `AnyOf` several answers of one token.
        labels: name -> position, for example ``{"op1": 4, "subject": -3}``; or a text of the clean prompt,
            ``{"subject": "Eiffel Tower"}``, whose tokens are then `subject[0]`, `subject[1]` and so on,
            `subject[-1]` and just `subject` the last. A word of the tool, as `last`, names only what it means
            without a label. Positions count in the clean prompt, in both directions.
        meta: anything else that should travel with the pair (template, operands, ...).
        align: which positions line up, where prompts have unequal numbers of tokens: "prefix+suffix", the
            tokens that both begin and end with, or a list of ``[clean position, corrupted position]``, which
            ascend in both. A position that has no counterpart cannot be patched from the other prompt. None
            for prompts of equal length, of which each position lines up with itself.
        weights: token -> the weight of its logit in the metric `weighted_logits`, for example
            ``{" yes": 1, " Yes": 0.5, " no": -1}``. A token is text, found as an answer to the clean prompt
            is, or an id. None of pairs of which that metric is not asked.
    """

    clean: Prompt
    corrupted: Prompt
    clean_answer: Answer
    corrupted_answer: Answer
    labels: Mapping[str, int | str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    align: Align = None
    weights: Weights = None

    def _repr_html_(self) -> str:
        rows = [
            ("clean", self.clean, self.clean_answer),
            ("corrupted", self.corrupted, self.corrupted_answer),
        ]
        return markup.table("PromptPair", rows, ("", "prompt", "answer"), _notes(self.labels))


@dataclass(frozen=True)
class EncodedPair:
    """A checked pair in token ids, with the pieces of text that tables and plots show.

    Attributes:
        clean, corrupted: token ids, of equal length unless `align` is given.
        clean_answer, corrupted_answer: token ids, one or several.
        labels: name -> position in the clean prompt, from 0.
        meta: as in the `PromptPair`.
        clean_text, corrupted_text: one string a token; ``str(id)`` without a tokenizer.
        clean_answer_text, corrupted_answer_text: likewise, in one string.
        clean_others, corrupted_others: tokens that count as the answer beside the one above (see `AnyOf`).
        align: [clean position, corrupted position] of what lines up, ascending; None: every position lines up
            with itself.
        weights: (token id, weight of its logit in the metric `weighted_logits`), if there are any.
    """

    clean: list[int]
    corrupted: list[int]
    clean_answer: list[int]
    corrupted_answer: list[int]
    labels: dict[str, int]
    meta: dict[str, Any]
    clean_text: list[str]
    corrupted_text: list[str]
    clean_answer_text: str
    corrupted_answer_text: str
    clean_others: list[int] = field(default_factory=list)
    corrupted_others: list[int] = field(default_factory=list)
    align: list[list[int]] | None = None
    weights: list[tuple[int, float]] | None = None

    @property
    def answer_tokens(self) -> int:
        """How many tokens the longer answer has."""
        return max(len(self.clean_answer), len(self.corrupted_answer))

    @cached_property
    def counterparts(self) -> list[int | None]:
        """[clean position], the position of the corrupted prompt that it lines up with, if there is one."""
        return [column.corrupted for column in self.columns if column.clean is not None]

    @property
    def columns(self) -> list[Column]:
        """Both prompts side by side: what lines up in one column."""
        return side_by_side(self.align, (len(self.clean), len(self.corrupted)))

    @property
    def in_step(self) -> bool:
        """Whether the prompts have one length, and what lines up has the same position in both."""
        return self.align is None or (
            len(self.clean) == len(self.corrupted) and all(a == b for a, b in self.align)
        )

    @property
    def shared(self) -> int:
        """How many tokens both prompts begin with."""
        return common(self.clean, self.corrupted)

    @property
    def changed(self) -> list[bool]:
        """[clean position], whether it has another token in the corrupted prompt, or no counterpart there."""
        there = zip(self.clean, self.counterparts, strict=True)
        return [at is None or self.corrupted[at] != token for token, at in there]

    @property
    def first_difference(self) -> int:
        """The first position of the clean prompt that is `changed`; the last one where none is."""
        return next((i for i, differs in enumerate(self.changed) if differs), len(self.clean) - 1)

    def _repr_html_(self) -> str:
        clean, corrupted = zip(*self.columns, strict=True)
        changed = self.changed
        rows = [
            ("position", *("" if at is None else at for at in clean), "answer"),
            ("clean", *("" if at is None else self.clean_text[at] for at in clean), self.clean_answer_text),
            (
                "corrupted",
                *("" if at is None else self.corrupted_text[at] for at in corrupted),
                self.corrupted_answer_text,
            ),
            ("", *("changed" if at is None or changed[at] else "" for at in clean), ""),
        ]
        return markup.table("EncodedPair", rows, notes=_notes(self.labels))

    def resolve(self, position: int | str) -> int | None:
        """The place in the clean prompt, from 0, of an int (negative: from the end) or a label, if any."""
        if isinstance(position, str):
            return len(self.clean) - 1 if position == "last" else self.labels.get(position)
        place = position + len(self.clean) if position < 0 else position
        return place if 0 <= place < len(self.clean) else None


def _notes(labels: Mapping[str, int | str]) -> list[str]:
    return ["labels: " + ", ".join(f"{name} {place}" for name, place in labels.items())] if labels else []


def read_at(readout: int | str, number: int, pair: EncodedPair) -> tuple[int, int]:
    """Where the effect on a pair is read, in the clean and in the corrupted prompt: the last is that of each.

    Raises:
        DeltapatchError: the pair has no such position, or that has no counterpart, or is before the end of a
            prompt with an answer of several tokens.
    """
    at = pair.resolve(readout)
    if at is None:
        raise DeltapatchError(f"pair {number} has no position {readout!r} to read the effect at")
    if at == len(pair.clean) - 1:
        return at, len(pair.corrupted) - 1
    if pair.answer_tokens > 1:
        raise DeltapatchError(
            f"pair {number} has an answer of {pair.answer_tokens} tokens, and these are read from the end of "
            f"its prompt on: leave out readout={readout!r}, or give answers of one token"
        )
    there = pair.counterparts[at]
    if there is None:
        raise DeltapatchError(
            f"position {readout!r} of pair {number} has no counterpart in the corrupted prompt: effects are "
            "read in both, at the last of each or where they line up"
        )
    return at, there
