"""The correctness filter: which pairs a model answers right."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.pairs import PromptPair
from deltapatch.interventions.pairs_file import Pairs, as_pairs
from deltapatch.tasks.pairing import Dropped

if TYPE_CHECKING:
    from deltapatch.models.model import Model

WRONG = "the model does not answer both of its prompts right"
AMONG = ("vocabulary", "answers")


def answered(model: "Model", pairs: Pairs, among: str = "vocabulary") -> np.ndarray:
    """Whether a model answers each prompt right: bool, [pair, (clean, corrupted)].

    An answer of several tokens is right if each of its tokens is the most likely one after those before it.

    Args:
        among: "vocabulary" asks for the most likely token of all, "answers" for the most likely of the
            tokens that any of these pairs has in an answer, as the paper does with its numbers.

    Raises:
        DeltapatchError: a pair is wrong, see `encode_pairs`.
    """
    if among not in AMONG:
        raise DeltapatchError(
            f"The right answer is looked for among the {' or the '.join(AMONG)}: {among!r}."
        )
    given, names = as_pairs(pairs)
    encoded = [
        asked
        for pair in encode_pairs(given, model.tokenizer, model.spec.d_vocab, names)
        for asked in (
            (pair.clean, pair.clean_answer, pair.clean_others),
            (pair.corrupted, pair.corrupted_answer, pair.corrupted_others),
        )
    ]
    some = np.array(sorted({token for _, answer, others in encoded for token in (*answer, *others)}))
    known: dict[tuple[int, ...], list[int]] = {}  # prompt and answer -> the likeliest tokens
    for prompt, answer, _ in encoded:
        key = (*prompt, -1, *answer[:-1])
        if key not in known:
            logits = model.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :].cpu().numpy()  # [token, vocab]
            best = logits.argmax(-1) if among == "vocabulary" else some[logits[:, some].argmax(-1)]
            known[key] = best.tolist()
    found = [
        (said := known[(*prompt, -1, *answer[:-1])]) == answer or (len(said) == 1 and said[0] in others)
        for prompt, answer, others in encoded
    ]
    return np.array(found, dtype=bool).reshape(-1, 2)


def keep_answered(
    model: "Model", pairs: Sequence[PromptPair], dropped: Dropped, among: str = "vocabulary"
) -> list[PromptPair]:
    """The pairs whose two prompts the model answers right; the others are counted in `dropped`.

    Raises:
        DeltapatchError: the model answers no pair right.
    """
    right = answered(model, pairs, among)
    kept = [pair for pair, (clean, corrupted) in zip(pairs, right, strict=True) if clean and corrupted]
    dropped.notes.append(
        f"The model answers {right.mean():.1%} of {right.size} prompts right, and both of {len(kept)} of "
        f"{len(pairs)} pairs."
    )
    if len(kept) < len(pairs):
        dropped.reasons[WRONG] += len(pairs) - len(kept)
    if not kept:
        raise DeltapatchError(
            "The model answers both prompts of no pair right; make pairs that it can answer, or keep all."
        )
    return kept
