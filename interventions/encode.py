"""Prompt pairs checked and tokenised: text, ids and conversations become an `EncodedPair`."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import isfinite
from numbers import Real
from typing import Any

from deltapatch.arguments import check_label, label_name, whole
from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.alignment import REMEDY, Align, lined_up
from deltapatch.interventions.pairs import Answer, AnyOf, EncodedPair, Prompt, PromptPair, Weights
from deltapatch.interventions.tokens import (
    Tokens,
    after,
    around,
    conversation,
    pieces,
    text_before,
    tokenise,
)

_DEEPEST = 100  # that the meta of a pair may be nested
_SHOWN = 4  # answers that count as one, in a text


def encode_pairs(
    pairs: Sequence[PromptPair],
    tokenizer: Any,
    d_vocab: int,
    names: Sequence[str] | None = None,
    align: Align = None,
) -> list[EncodedPair]:
    """Tokenise and check pairs.

    Prompts given as text are tokenised with the special tokens that the tokenizer puts at the front, once,
    and none at the end (see `tokens.py`); prompts given as ids are used as they are. An answer given as text
    is tokenised in context: the tokens of prompt + answer must be those of the prompt and one or several
    more. It is tried as given and, where the prompt does not end in a space and the answer does not begin
    with one, with a space between them; what makes fewer tokens counts, as given where both make as many. The
    context of a prompt given as ids is the text that has these ids, or of its last token. An unknown-word
    token is no answer. A conversation is tokenised as `apply_chat_template` does: no special token is added
    to those of the template.

    Args:
        pairs: at least one pair.
        tokenizer: a Hugging Face tokenizer, or None where prompts and answers are ids.
        d_vocab: ids must be below it.
        names: what errors call each pair, for example "pairs.jsonl, line 7"; "pair 0" and so on by default.
        align: of pairs of unequal length that have none.

    Raises:
        DeltapatchError: no pairs; text without a tokenizer; an empty prompt or answer; prompts of unequal
            length that are not lined up, or an `align` that lines nothing up; a token id or a label position
            out of range; a label that says something else than the word of the tool that it is; an answer
            that changes the tokens of its prompt or is unknown to the tokenizer; a prompt of ids that ends in
            an end token; `AnyOf` nothing, of answers that are not one token each or come twice, or of one
            that the other answer, of several tokens, begins with; `weights` that are no finite numbers, or of
            what is not one token each, or comes twice.

    Warns:
        where a prompt's tokens are not those that the tokenizer itself would make of it.
    """
    if not pairs:
        raise DeltapatchError("There are no prompt pairs: give at least one.")
    if names is None:
        names = [f"pair {i}" for i in range(len(pairs))]
    encoder = _Encoder(tokenizer, d_vocab, align)
    encoded = [encoder.encode(pair, name) for pair, name in zip(pairs, names, strict=True)]
    for note in encoder.notes.values():
        warnings.warn(note, stacklevel=2)
    return encoded


def encode_prompts(
    prompts: Sequence[Any], tokenizer: Any, d_vocab: int, names: Sequence[str]
) -> list[tuple[list[int], dict[str, int]]]:
    """Token ids and labels of prompts that are of no pair, tokenised and checked as those of `encode_pairs`.

    Args:
        prompts: as `arguments.prompts` gives them.
        names: what errors call each.

    Raises:
        DeltapatchError: text without a tokenizer; an empty prompt; a token id out of range; a prompt of ids
            that ends in an end token; a label that is at no position.
    """
    encoder = _Encoder(tokenizer, d_vocab)
    out = []
    for one, name in zip(prompts, names, strict=True):
        labelled = one if isinstance(one, Mapping) else {"prompt": one, "labels": {}}
        prompt = labelled["prompt"]
        ids = encoder._prompt(prompt if isinstance(prompt, str) else list(prompt), "given", name)
        out.append((ids, encoder._labels(labelled["labels"], prompt, ids, name)))
    return out


class _Encoder:
    """Encodes pairs for one tokenizer.

    Attributes:
        notes: what was done that users would not expect, each kind once.
    """

    def __init__(self, tokenizer: Any, d_vocab: int, align: Align = None) -> None:
        self.tokenizer, self.d_vocab, self.align = tokenizer, d_vocab, align
        self.notes: dict[str, str] = {}
        self._texts: dict[int, str] = {}  # of every token that was met

    def encode(self, pair: PromptPair, name: str) -> EncodedPair:
        """The checked form of a pair."""
        texts = [self._text(p, w, name) for p, w in ((pair.clean, "clean"), (pair.corrupted, "corrupted"))]
        clean, corrupted = (
            self._prompt(p, w, name) for p, w in zip(texts, ("clean", "corrupted"), strict=True)
        )
        align = getattr(pair, "align", None)  # which pairs that are no `PromptPair` need not have
        if align is None and len(clean) != len(corrupted):
            align = self.align
        if align is None and len(clean) != len(corrupted):
            raise DeltapatchError(
                f"{name}: the prompts must have the same number of tokens, but clean has {len(clean)} "
                f"{self._pieces(clean)} and corrupted has {len(corrupted)} {self._pieces(corrupted)}; "
                f"{REMEDY}."
            )
        clean_any = self._any_of(pair.clean_answer, texts[0], clean, "clean_answer", name)
        corrupted_any = self._any_of(pair.corrupted_answer, texts[1], corrupted, "corrupted_answer", name)
        _check_apart(clean_any, corrupted_any, name)
        for field_, value in (("labels", pair.labels), ("meta", pair.meta)):
            if not isinstance(value, Mapping):
                raise DeltapatchError(f"{name}: {field_} must be a dictionary, not {shown(value)}")
        return EncodedPair(
            clean=clean,
            corrupted=corrupted,
            clean_answer=clean_any[0],
            corrupted_answer=corrupted_any[0],
            labels=self._labels(pair.labels, texts[0], clean, name),
            meta=_checked_meta(pair.meta, name),
            clean_text=self._pieces(clean),
            corrupted_text=self._pieces(corrupted),
            clean_answer_text=self._any_text(clean_any),
            corrupted_answer_text=self._any_text(corrupted_any),
            clean_others=[token for (token,) in clean_any[1:]],
            corrupted_others=[token for (token,) in corrupted_any[1:]],
            align=lined_up(align, clean, corrupted, name),
            weights=self._weights(getattr(pair, "weights", None), texts[0], clean, name),
        )

    def _text(self, prompt: Prompt, which: str, name: str) -> str | list[int]:
        """A prompt as text or ids: a conversation as the text that the tokenizer makes of it."""
        if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence) or not prompt:
            return prompt  # type: ignore[return-value]  # ids, or what is refused as such
        if not any(isinstance(part, Mapping) for part in prompt):
            return prompt  # type: ignore[return-value]
        self._need(which, name)
        try:
            return conversation(self.tokenizer, prompt)  # type: ignore[arg-type]  # which checks them
        except DeltapatchError as error:
            raise DeltapatchError(f"{name}: {which}: {error}.") from error.__cause__

    def _prompt(self, prompt: str | list[int], which: str, name: str) -> list[int]:
        """The token ids of a prompt, every one checked."""
        if not isinstance(prompt, str):
            ids = self._ids(prompt, which, name)
            self._check_ends(ids, which, name)
        elif not prompt:
            ids = []  # a BOS alone would be a prompt that the user did not write
        else:
            self._need(which, name)
            found = tokenise(self.tokenizer, prompt)
            ids = self._ids(found.ids, which, name)
            if found.own_front:
                begun = self._as_one(ids[: len(self._around.front)])
                self.notes["own"] = (
                    f"{name}: the {which} prompt begins with {begun!r} itself, so the tokenizer's own is not "
                    "put before it (the same of others that do)"
                )
            if found.end:
                self.notes["end"] = (
                    f"the tokenizer puts {self._as_one(found.end)!r} at the end of a text: it is left out, "
                    "since the answer follows there"
                )
        if not ids:
            raise DeltapatchError(f"{name}: the {which} prompt is empty.")
        return ids

    def _labels(
        self, given: Mapping[str, Any], prompt: str | list[int], ids: list[int], name: str
    ) -> dict[str, int]:
        """The positions of labels; of texts in a prompt those of each of their tokens."""
        labels: dict[str, int] = {}
        for label, at in given.items():
            own = label_name(label, name)
            if not isinstance(at, str):
                labels[own] = _place(own, at, len(ids), name)
                continue
            found = self._tokens_of(at, prompt, ids, f"{name}: label {shown(label)}")
            spots = {f"{own}[{i}]": p for i, p in enumerate(found)}
            spots |= {f"{own}[{i}]": found[i] for i in range(-len(found), 0)} | {own: found[-1]}
            for spot, place in spots.items():
                labels[spot] = _place(spot, place, len(ids), name)
        return labels

    def _tokens_of(self, text: str, prompt: str | list[int], ids: list[int], where: str) -> list[int]:
        """The positions of a text's tokens in a prompt.

        Raises:
            DeltapatchError: the prompt is no text, or the text is not there, or more than once.
        """
        if not isinstance(prompt, str) or self.tokenizer is None:
            raise DeltapatchError(f"{where} is a text, and the clean prompt is token ids: give its position")
        count = prompt.count(text) if text.strip() else 0
        if count != 1:
            there = "not in the clean prompt" if not count else f"{count} times in the clean prompt"
            raise DeltapatchError(
                f"{where}: {shown(text)} is {there}: give a text that is there once, or a position"
            )
        begin = prompt.index(text)
        end = begin + len(text.rstrip())
        begin += len(text) - len(text.lstrip())
        found = tokenise(self.tokenizer, prompt, offsets=True)
        return [i for i, (a, b) in enumerate(found.offsets) if a < end and b > begin]

    def _check_ends(self, ids: list[int], which: str, name: str) -> None:
        """Check that a prompt of ids has no end token, and note where it begins twice."""
        if self.tokenizer is None:
            return
        front, end = self._around.front, self._around.end
        if end and ids[-len(end) :] == end:
            raise DeltapatchError(
                f"{name}: the {which} prompt ends in {self._as_one(end)!r}, which the tokenizer puts at the "
                "end of a text: leave it out, since the answer follows there, or give the prompt as text"
            )
        if front and ids[: 2 * len(front)] == 2 * front:
            self.notes["twice"] = (
                f"{name}: the {which} prompt, given as ids, begins with {self._as_one(front)!r} twice"
            )

    @cached_property
    def _around(self) -> Tokens:
        """What the tokenizer puts around a text."""
        return around(self.tokenizer)

    def _any_of(
        self, answer: Answer, prompt: str | list[int], ids: list[int], which: str, name: str
    ) -> list[list[int]]:
        """The tokens of an answer; those of each where any of several is one."""
        if not isinstance(answer, AnyOf):
            return [self._answer(answer, prompt, ids, which, name)]
        several = answer.any
        if isinstance(several, str) or not isinstance(several, Iterable) or not (several := list(several)):
            raise DeltapatchError(
                f"{name}: {which} is any of several answers: give a list of them, not {shown(several)}."
            )
        found = [self._answer(one, prompt, ids, which, name) for one in several]
        for one, tokens in zip(several, found, strict=True):
            if len(tokens) > 1:
                raise DeltapatchError(
                    f"{name}: {which} is any of several answers, and {shown(one)} has {len(tokens)} tokens: "
                    "each must be one token."
                )
            if found.count(tokens) > 1:
                raise DeltapatchError(
                    f"{name}: {which} is any of several answers, and {shown(one)} is there twice: its "
                    "probability would count twice."
                )
        return found

    def _weights(
        self, weights: Weights, prompt: str | list[int], ids: list[int], name: str
    ) -> list[tuple[int, float]] | None:
        """The tokens that are weighted, by id."""
        if weights is None:
            return None
        found: dict[int, float] = {}
        for token, weight in weighted(weights, name):
            tokens = self._answer(token, prompt, ids, "weights", name)
            if len(tokens) > 1:
                raise DeltapatchError(
                    f"{name}: weights are of one token each, and {shown(token)} has {len(tokens)}: weight "
                    "its first, or another."
                )
            if tokens[0] in found:
                raise DeltapatchError(
                    f"{name}: weights have the token {self._as_one(tokens)!r} twice, as {shown(token)} too: "
                    "add its weights up."
                )
            found[tokens[0]] = weight
        return list(found.items())

    def _any_text(self, answers: list[list[int]]) -> str:
        """An answer as one string, several with bars between."""
        text = " | ".join(self._as_one(tokens) for tokens in answers[:_SHOWN])
        return text if len(answers) <= _SHOWN else f"{text} | {len(answers) - _SHOWN} more"

    def _answer(
        self, answer: str | int | list[int], prompt: str | list[int], ids: list[int], which: str, name: str
    ) -> list[int]:
        """The tokens of an answer, in the context of its prompt. `encode_pairs` says how they are found."""
        if not isinstance(answer, str):
            one = not isinstance(answer, Iterable) or getattr(answer, "ndim", 1) == 0
            found = self._ids([answer] if one else answer, which, name)
            if not found:
                raise DeltapatchError(
                    f"{name}: {which} is empty; give the tokens that should follow the prompt."
                )
            return found
        self._need(which, name)
        if not answer:
            raise DeltapatchError(f"{name}: {which} is empty; give what should follow the prompt.")
        context = (prompt, ids) if isinstance(prompt, str) else text_before(self.tokenizer, ids)
        if context is None:
            raise DeltapatchError(
                f"{name}: {which} {answer!r} cannot follow a prompt of ids; give its token ids."
            )
        text, before = context
        candidates = [answer]
        if not text.endswith(" ") and not answer.startswith(" "):
            candidates.append(" " + answer)
        tried = [(candidate, after(self.tokenizer, text, before, candidate)) for candidate in candidates]
        added = [tokens for _, tokens in tried if not isinstance(tokens, str)]
        if added:
            return self._ids(min(added, key=len), which, name)
        remedy = ", or drop the space that ends the prompt" if text.endswith(" ") else ""
        seen = " and ".join(f"{candidate!r} {why}" for candidate, why in tried)
        raise DeltapatchError(
            f"{name}: {which} {answer!r} must add tokens to its prompt, but {seen}; "
            f"choose another answer{remedy}."
        )

    def _need(self, which: str, name: str) -> None:
        if self.tokenizer is None:
            raise DeltapatchError(
                f"{name}: {which} is text, but this model has no tokenizer; give token ids instead."
            )

    def _ids(self, tokens: Any, which: str, name: str) -> list[int]:
        """Token ids, every one checked."""
        must = f"{name}: {which} must be text or token ids (whole numbers)"
        if not isinstance(tokens, Iterable) or isinstance(tokens, bytes | Mapping | set):
            raise DeltapatchError(f"{must}, not {shown(tokens)}.")
        ids = [whole(token, must) for token in tokens]
        for token in ids:
            if not 0 <= token < self.d_vocab:
                raise DeltapatchError(
                    f"{name}: token {token} of {which} is out of range; "
                    f"the model's tokens go from 0 to {self.d_vocab - 1}."
                )
        return ids

    def _pieces(self, ids: list[int]) -> list[str]:
        return pieces(self.tokenizer, ids, self._texts)

    def _as_one(self, ids: list[int]) -> str:
        """Tokens as one string."""
        return (" " if self.tokenizer is None else "").join(self._pieces(ids))


def weighted(weights: Any, name: str) -> list[tuple[str | int, float]]:
    """Tokens, as text or ids, and the weights of their logits, as they are given.

    Raises:
        DeltapatchError: they are something else, or none, or a weight is no finite number.
    """
    given = weights.items() if isinstance(weights, Mapping) else weights
    try:
        found = [(token, weight) for token, weight in given]
    except (TypeError, ValueError):
        found = []
    if not found:
        raise DeltapatchError(
            f'{name}: weights must be of tokens, such as {{" yes": 1, " no": -1}}, or a list of '
            f"[text or token id, weight], not {shown(weights)}."
        )
    for token, weight in found:
        if isinstance(weight, bool) or not isinstance(weight, Real) or not isfinite(weight):
            raise DeltapatchError(
                f"{name}: the weight of {shown(token)} must be a finite number, not {shown(weight)}."
            )
    return [(token, float(weight)) for token, weight in found]


def _check_apart(clean: list[list[int]], corrupted: list[list[int]], name: str) -> None:
    """Refuse an answer of several tokens that begins with one that counts for the other."""
    for several, other in ((clean, corrupted), (corrupted, clean)):
        if len(several) > 1 and len(other[0]) > 1 and [other[0][0]] in several:
            raise DeltapatchError(
                f"{name}: one answer has {len(other[0])} tokens, and its first is one of the other answer's: "
                "what such a run says would count for both. Leave that token out."
            )


def _place(label: str, at: Any, length: int, name: str) -> int:
    """A label's position, counted from 0."""
    number = whole(at, f"{name}: label {label!r} must be a position (a whole number)")
    if not -length <= number < length:
        raise DeltapatchError(
            f"{name}: label {label!r} is at position {number}, but the prompt has {length} tokens "
            f"(positions 0 to {length - 1}, or -1 to {-length} from the end)."
        )
    check_label(label, number % length, length, name)
    return number % length


def _checked_meta(meta: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of what travels with a pair, seen to be something that can be written down."""
    level: list[Any] = [meta]
    for _ in range(_DEEPEST):
        level = [
            value
            for part in level
            for value in (part.values() if isinstance(part, dict) else part)
            if isinstance(value, dict | list | tuple)
        ]
        if not level:
            return dict(meta)
    raise DeltapatchError(
        f"{name}: meta is nested more than {_DEEPEST} deep, or holds itself; flatten it, or leave it out."
    )
