"""How a pair gives its answers: one token, as in the paper, or of any length where that is asked."""

from collections.abc import Callable
from typing import Any

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.tokens import after, tokenise

# one: answers that are one token, as text. text, ids: of any length, as text or as a list of token ids. And
# why an answer makes no pair.
ANSWERS = {
    "one": "an answer is not one token after its prompt",
    "text": "an answer changes the tokens of its prompt or is unknown to the tokenizer",
    "ids": "an answer changes the tokens of its prompt or is unknown to the tokenizer",
}


def check_answers(answers: str) -> None:
    """Raise DeltapatchError where `answers` is none of ANSWERS."""
    if answers not in ANSWERS:
        raise DeltapatchError(f"Answers are {', '.join(ANSWERS)}, not {answers!r}.")


def need_fast_tokenizer(tokenizer: Any, what: str) -> None:
    """Raise DeltapatchError where a tokenizer cannot say where its tokens lie in the text."""
    if tokenizer is None:
        raise DeltapatchError(f"{what} need a tokenizer, and this model has none.")
    if not getattr(tokenizer, "is_fast", False):
        raise DeltapatchError(
            f"{what} need a fast tokenizer (one with a tokenizer.json), "
            f"not {type(tokenizer).__name__}, which cannot say where a token lies in the text."
        )


def answer_ids(tokenizer: Any, prompt: str, answer: str) -> list[int] | None:
    """The tokens that an answer adds to a prompt; None where it changes the prompt's own, or is unknown.

    `answer` begins with a space where there is one between the two.
    """
    added = after(tokenizer, prompt, tokenise(tokenizer, prompt).ids, answer)
    return None if isinstance(added, str) else added


def answer_writer(tokenizer: Any, answers: str) -> Callable[[str, str], Any]:
    """A function of prompt and answer that gives what `PromptPair` holds; None where that cannot be."""

    def write(prompt: str, answer: str) -> Any:
        added = answer_ids(tokenizer, prompt, answer)
        if added is None or (answers == "one" and len(added) != 1):
            return None
        return added if answers == "ids" else answer

    return write
