"""Prompt pairs, and their checked, tokenised form: what every sweep starts from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deltapatch.errors import DeltapatchError, shown

_DEEPEST = 100  # that the meta of a pair may be nested


@dataclass(frozen=True)
class PromptPair:
    """Two prompts of equal token length and their answers.

    Attributes:
        clean, corrupted: text, or a list of token ids.
        clean_answer, corrupted_answer: text (tokenised in context, to one token or several), a token id, or a
            list of them.
        labels: name -> position, for example ``{"op1": 4, "last": -1}``.
        meta: anything else that should travel with the pair (template, operands, ...).
    """

    clean: str | list[int]
    corrupted: str | list[int]
    clean_answer: str | int | list[int]
    corrupted_answer: str | int | list[int]
    labels: dict[str, int] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedPair:
    """A checked pair in token ids, with the pieces of text that tables and plots show.

    Attributes:
        clean, corrupted: token ids, of equal length.
        clean_answer, corrupted_answer: token ids, one or several.
        labels: name -> position, from 0.
        meta: as in the `PromptPair`.
        clean_text, corrupted_text: one string a token; ``str(id)`` without a tokenizer.
        clean_answer_text, corrupted_answer_text: likewise, in one string.
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

    @property
    def answer_tokens(self) -> int:
        """How many tokens the longer answer has."""
        return max(len(self.clean_answer), len(self.corrupted_answer))

    def resolve(self, position: int | str) -> int | None:
        """The place, from 0, of an int (from the end where negative) or a label; None where there is none."""
        if isinstance(position, str):
            return self.labels.get(position, len(self.clean) - 1 if position == "last" else None)
        place = position + len(self.clean) if position < 0 else position
        return place if 0 <= place < len(self.clean) else None


def encode_pairs(
    pairs: Sequence[PromptPair], tokenizer: Any, d_vocab: int, names: Sequence[str] | None = None
) -> list[EncodedPair]:
    """Tokenise and check pairs.

    Prompts given as text are tokenised with the tokenizer's defaults, special tokens included (LLaMA's BOS);
    prompts given as ids are used as they are. An answer given as text is tokenised in context: the tokens of
    prompt + answer must be those of the prompt and one or several more. It is tried as given and, where the
    prompt does not end in a space and the answer does not begin with one, with a space between them; what
    makes fewer tokens counts, as given where both make as many. For a prompt given as ids there is no text to
    append to: the answer is tokenised alone, without special tokens, as given and with a leading space. An
    unknown-word token is no answer.

    Args:
        pairs: at least one pair.
        tokenizer: a Hugging Face tokenizer, or None where prompts and answers are ids.
        d_vocab: ids must be below it.
        names: what errors call each pair, for example "pairs.jsonl, line 7"; "pair 0" and so on by default.

    Raises:
        DeltapatchError: no pairs; text without a tokenizer; an empty prompt or answer; prompts of unequal
            length; a token id or a label position out of range; an answer that changes the tokens of its
            prompt or is unknown to the tokenizer.
    """
    if not pairs:
        raise DeltapatchError("There are no prompt pairs: give at least one.")
    if names is None:
        names = [f"pair {i}" for i in range(len(pairs))]
    texts: dict[int, str] = {}
    return [_encode(pair, tokenizer, d_vocab, name, texts) for pair, name in zip(pairs, names, strict=True)]


def read_at(readout: int | str, number: int, pair: EncodedPair) -> int:
    """Where the effect on a pair is read. DeltapatchError where it has no such position."""
    at = pair.resolve(readout)
    if at is None:
        raise DeltapatchError(f"pair {number} has no position {readout!r} to read the effect at")
    if pair.answer_tokens > 1 and at < len(pair.clean) - 1:
        raise DeltapatchError(
            f"pair {number} has an answer of {pair.answer_tokens} tokens, and these are read from the end of "
            f"its prompt on: leave out readout={readout!r}, or give answers of one token"
        )
    return at


def _encode(pair: PromptPair, tokenizer: Any, d_vocab: int, name: str, texts: dict[int, str]) -> EncodedPair:
    """The checked form of a pair; `texts` keeps the text of every token that was met."""
    clean = _prompt_ids(pair.clean, "clean", tokenizer, d_vocab, name)
    corrupted = _prompt_ids(pair.corrupted, "corrupted", tokenizer, d_vocab, name)
    if len(clean) != len(corrupted):
        raise DeltapatchError(
            f"{name}: the prompts must have the same number of tokens, but clean has {len(clean)} "
            f"{_shown(clean, tokenizer)} and corrupted has {len(corrupted)} {_shown(corrupted, tokenizer)}."
        )
    clean_answer = _answer_ids(pair.clean_answer, pair.clean, clean, "clean_answer", tokenizer, d_vocab, name)
    corrupted_answer = _answer_ids(
        pair.corrupted_answer, pair.corrupted, corrupted, "corrupted_answer", tokenizer, d_vocab, name
    )
    return EncodedPair(
        clean=clean,
        corrupted=corrupted,
        clean_answer=clean_answer,
        corrupted_answer=corrupted_answer,
        labels={label: _position(label, p, len(clean), name) for label, p in pair.labels.items()},
        meta=_checked_meta(pair.meta, name),
        clean_text=_pieces(clean, tokenizer, texts),
        corrupted_text=_pieces(corrupted, tokenizer, texts),
        clean_answer_text=_as_one(clean_answer, tokenizer, texts),
        corrupted_answer_text=_as_one(corrupted_answer, tokenizer, texts),
    )


def _prompt_ids(prompt: str | list[int], which: str, tokenizer: Any, d_vocab: int, name: str) -> list[int]:
    """The token ids of a prompt, every one checked."""
    if not isinstance(prompt, str):
        ids = [_checked_id(i, which, d_vocab, name) for i in prompt]
    elif not prompt:
        ids = []  # a BOS alone would be a prompt that the user did not write
    else:
        _need(tokenizer, which, name)
        ids = [_checked_id(i, which, d_vocab, name) for i in _tokens(tokenizer, prompt)]
    if not ids:
        raise DeltapatchError(f"{name}: the {which} prompt is empty.")
    return ids


def _answer_ids(
    answer: str | int | list[int],
    prompt: str | list[int],
    prompt_ids: list[int],
    which: str,
    tokenizer: Any,
    d_vocab: int,
    name: str,
) -> list[int]:
    """The tokens of an answer, in the context of its prompt. `encode_pairs` says how they are found."""
    if isinstance(answer, list | tuple):
        if not answer:
            raise DeltapatchError(f"{name}: {which} is empty; give the tokens that should follow the prompt.")
        return [_checked_id(i, which, d_vocab, name) for i in answer]
    if not isinstance(answer, str):
        return [_checked_id(answer, which, d_vocab, name)]
    _need(tokenizer, which, name)
    if not answer:
        raise DeltapatchError(f"{name}: {which} is empty; give what should follow the prompt.")
    # Candidates are appended to this text; a prompt of ids has none.
    text = prompt if isinstance(prompt, str) else ""
    candidates = [answer]
    if not text.endswith(" ") and not answer.startswith(" "):
        candidates.append(" " + answer)
    found, seen = [], []
    for candidate in candidates:
        if text:
            ids = _tokens(tokenizer, text + candidate)
            added = ids[len(prompt_ids) :] if ids[: len(prompt_ids)] == prompt_ids else None
        else:
            added = _tokens(tokenizer, candidate, add_special_tokens=False)
        if added is None:
            seen.append(f"{candidate!r} changes how the end of the prompt is tokenised")
        elif not added:
            seen.append(f"{candidate!r} adds no token")
        elif tokenizer.unk_token_id in added:
            seen.append(f"{candidate!r} is unknown to the tokenizer")
        else:
            found.append([_checked_id(i, which, d_vocab, name) for i in added])
    if found:
        return min(found, key=len)
    remedy = ", or drop the space that ends the prompt" if text.endswith(" ") else ""
    raise DeltapatchError(
        f"{name}: {which} {answer!r} must add tokens to its prompt, but {' and '.join(seen)}; "
        f"choose another answer{remedy}."
    )


def _need(tokenizer: Any, which: str, name: str) -> None:
    if tokenizer is None:
        raise DeltapatchError(
            f"{name}: {which} is text, but this model has no tokenizer; give token ids instead."
        )


def _tokens(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    except Exception as error:  # of whatever kind its library has; half a surrogate pair is enough
        reason = str(error).strip().split("\n")[0]
        raise DeltapatchError(f"the tokenizer cannot read {shown(text)} ({shown(reason)})") from error


def _checked_id(token: Any, which: str, d_vocab: int, name: str) -> int:
    if isinstance(token, bool) or not isinstance(token, int | np.integer):
        raise DeltapatchError(f"{name}: {which} must be text or token ids (whole numbers), not {token!r}.")
    if not 0 <= token < d_vocab:
        raise DeltapatchError(
            f"{name}: token {int(token)} of {which} is out of range; "
            f"the model's tokens go from 0 to {d_vocab - 1}."
        )
    return int(token)


def _position(label: str, position: Any, length: int, name: str) -> int:
    """A label's position, counted from 0."""
    if isinstance(position, bool) or not isinstance(position, int | np.integer):
        raise DeltapatchError(
            f"{name}: label {label!r} must be a position (a whole number), not {position!r}."
        )
    if not -length <= position < length:
        raise DeltapatchError(
            f"{name}: label {label!r} is at position {int(position)}, but the prompt has {length} tokens "
            f"(positions 0 to {length - 1}, or -1 to {-length} from the end)."
        )
    return int(position) % length


def _checked_meta(meta: dict[str, Any], name: str) -> dict[str, Any]:
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


def _pieces(ids: list[int], tokenizer: Any, texts: dict[int, str]) -> list[str]:
    """One string a token."""
    if tokenizer is None:
        return [str(i) for i in ids]
    for i in set(ids) - texts.keys():
        texts[i] = tokenizer.decode([i], clean_up_tokenization_spaces=False)
    return [texts[i] for i in ids]


def _as_one(ids: list[int], tokenizer: Any, texts: dict[int, str]) -> str:
    """Tokens as one string."""
    return (" " if tokenizer is None else "").join(_pieces(ids, tokenizer, texts))


def _shown(ids: list[int], tokenizer: Any) -> str:
    """Tokens as an error message shows them, for example ['Q', ':', ' 12']."""
    return str(_pieces(ids, tokenizer, {}))
