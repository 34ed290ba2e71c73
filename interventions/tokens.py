"""How text becomes tokens: decided here, once, for prompts, answers and labels.

Before a prompt come the special tokens that the tokenizer's template puts before a text, and they come once:
a prompt that begins with them itself, as text, gets no second ones. What the template puts after a text (an
end token) is left out, since the answer follows there. An answer is what prompt and answer together have more
than the prompt alone, so that no token is one that the text does not have at this place. A conversation is
the text that the tokenizer's own chat template makes of it, which has its special tokens already.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltapatch.errors import DeltapatchError, shown

Message = Mapping[str, Any]  # of a conversation: "role" and "content"
_SPACE = "▁"  # how tokenizers of LLaMA's kind write a space
# What an answer may stand behind where a prompt of ids is no text of its own.
_ANCHORS = (":", "\n", "a", "0", ".")


class Templated(str):
    """A text that has its special tokens already, as a chat template writes it."""

    __slots__ = ()

    def __add__(self, more: str) -> "Templated":
        return Templated(super().__add__(more))


@dataclass(frozen=True)
class Tokens:
    """A text in tokens, as a prompt has them.

    Attributes:
        ids: [token].
        front: of them, those that the tokenizer's template put at the front.
        end: those that it put at the end, which are left out of `ids`.
        own_front: whether the text begins with the front tokens itself, so that none were put there.
        offsets: [token], where each begins and ends in the text, in characters; (0, 0) for `front`. Empty
            unless asked for.
    """

    ids: list[int]
    front: list[int]
    end: list[int]
    own_front: bool = False
    offsets: tuple[tuple[int, int], ...] = ()


def tokenise(tokenizer: Any, text: str, offsets: bool = False) -> Tokens:
    """A prompt in tokens.

    Args:
        tokenizer: a Hugging Face tokenizer; a fast one where offsets are wanted.
        offsets: whether to say where the tokens lie.

    Raises:
        DeltapatchError: the tokenizer cannot read the text.
    """
    ids, added, places = _call(tokenizer, text, offsets)
    first = 0
    while first < len(ids) and added[first]:
        first += 1
    last = len(ids)
    while last > first and added[last - 1]:
        last -= 1
    front, own = ids[:first], ids[first:last]
    if not own:  # special tokens alone would be a text that the user did not write
        return Tokens([], front, [])
    twice = bool(front) and own[:first] == front
    start = first if twice else 0
    return Tokens(ids[start:last], [] if twice else front, ids[last:], twice, tuple(places[start:last]))


def conversation(tokenizer: Any, messages: Sequence[Message]) -> Templated:
    """The text of a conversation, up to where the model's answer begins.

    A last message of the assistant is one that it has begun, and the answer goes on with it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: each with "role" and "content", both text.

    Raises:
        DeltapatchError: a message is no such thing, or the tokenizer has no template, or one that refuses.
    """
    for number, message in enumerate(messages):
        right = isinstance(message, Mapping) and {"role", "content"} <= message.keys()
        if not right or not all(isinstance(message[key], str) for key in ("role", "content")):
            raise DeltapatchError(
                f'message {number} must be like {{"role": "user", "content": "..."}}, not {shown(message)}'
            )
    if not getattr(tokenizer, "chat_template", None):
        raise DeltapatchError(
            "a list of messages needs a tokenizer with a chat template, and this model's has none: give the "
            "prompt as text"
        )
    begun = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=not begun,
            continue_final_message=begun,
        )
    except Exception as error:  # templates are programs and raise what they like
        reason = str(error).strip().split("\n")[0]
        raise DeltapatchError(
            f"the tokenizer's chat template refuses the messages ({shown(reason)})"
        ) from error
    return Templated(text)


def after(tokenizer: Any, prompt: str, ids: Sequence[int], answer: str) -> list[int] | str:
    """The tokens that an answer adds to a prompt, or why it adds none.

    Args:
        prompt: the text before the answer.
        ids: its tokens, as `tokenise` gives them.
        answer: with the space before it, if there is to be one.
    """
    try:
        found = tokenise(tokenizer, prompt + answer).ids
    except DeltapatchError:  # another candidate may do
        return "makes a text that the tokenizer cannot read"
    added = found[len(ids) :]
    if found[: len(ids)] != list(ids):
        return "changes how the end of the prompt is tokenised"
    if not added:
        return "adds no token"
    if getattr(tokenizer, "unk_token_id", None) in added:
        return "is unknown to the tokenizer"
    return added


def text_before(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[int]] | None:
    """A text that an answer to a prompt of ids can stand behind, and its tokens.

    It is the prompt's own text where that has these tokens, else that of its last token, else a single sign:
    a tokenizer that puts a space before a whole text would put one before an answer that stood alone. None
    where the tokenizer has no token for any of them.
    """
    front = around(tokenizer).front
    own = list(ids[len(front) :]) if front and list(ids[: len(front)]) == front else list(ids)
    for some in (own, own[-1:]):
        if some:
            text = _decoded(tokenizer, some)
            found = _known(tokenizer, text)
            if text and found is not None and found.ids == [*found.front, *some]:
                return text, found.ids
    for text in _ANCHORS:
        found = _known(tokenizer, text)
        if found is not None and getattr(tokenizer, "unk_token_id", None) not in found.ids:
            return text, found.ids
    return None


def around(tokenizer: Any) -> Tokens:
    """A text without anything special in it, for the `front` and `end` that the template puts around it."""
    return next((found for text in _ANCHORS if (found := _known(tokenizer, text))), Tokens([], [], []))


def _known(tokenizer: Any, text: str) -> Tokens | None:
    """A text that was not written by the user in tokens; None where the tokenizer has none for it."""
    try:
        found = tokenise(tokenizer, text)
    except DeltapatchError:  # a word that it does not know
        return None
    return found if found.ids else None


def pieces(tokenizer: Any, ids: Sequence[int], known: dict[int, str] | None = None) -> list[str]:
    """[token], the text of each, with the space that belongs to it; ``str(id)`` without a tokenizer.

    Args:
        known: texts that were looked up before, which grow.
    """
    if tokenizer is None:
        return [str(i) for i in ids]
    known = {} if known is None else known
    for i in set(ids) - known.keys():
        known[i] = _piece(tokenizer, i)
    return [known[i] for i in ids]


def _piece(tokenizer: Any, token: int) -> str:
    alone = _decoded(tokenizer, [token])
    # Decoders drop the space that a text begins with, and here it is what tells two tokens apart.
    raw = str(tokenizer.convert_ids_to_tokens(token))
    spaces = len(raw) - len(raw.lstrip(_SPACE))
    return alone if alone.startswith(_SPACE) else " " * spaces + alone.lstrip(" ") if spaces else alone


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _call(tokenizer: Any, text: str, offsets: bool) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Token ids, which of them the template added, and where they lie."""
    wanted = {"add_special_tokens": False} if isinstance(text, Templated) else {}
    try:
        found = tokenizer(text, return_special_tokens_mask=True, return_offsets_mapping=offsets, **wanted)
        ids, added = list(found["input_ids"]), list(found["special_tokens_mask"])
        if len(ids) != len(added):
            raise ValueError("it does not say which special tokens it adds")
        return ids, added, list(found["offset_mapping"]) if offsets else []
    except Exception as error:  # of whatever kind its library has; half a surrogate pair is enough
        reason = str(error).strip().split("\n")[0]
        raise DeltapatchError(f"the tokenizer cannot read {shown(text)} ({shown(reason)})") from error
