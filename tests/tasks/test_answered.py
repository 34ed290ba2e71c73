"""The correctness filter, with a model whose answers are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import PromptPair
from deltapatch.tasks import Dropped, answered, keep_answered


class Next:
    """Answers every token n with n + 1, but the token 5 with 9."""

    tokenizer = None
    spec = SimpleNamespace(d_vocab=12)

    def logits(self, ids: list[int]) -> torch.Tensor:
        out = torch.zeros(len(ids), 12)
        for i, n in enumerate(ids):
            out[i, 9 if n == 5 else n + 1] = 2.0
            out[i, n + 1] += 1.0
        return out


PAIRS = [
    PromptPair([1, 2], [1, 3], 3, 4),
    PromptPair([1, 2], [1, 5], 3, 6),
    PromptPair([1, 5], [1, 4], 6, 4),
]


def test_right_and_wrong_prompts() -> None:
    assert answered(Next(), PAIRS).tolist() == [[True, True], [True, False], [False, False]]
    # 9 is no answer of these pairs, and then 5 is followed by 6.
    assert answered(Next(), PAIRS, "answers").tolist() == [[True, True], [True, True], [True, False]]


def test_an_answer_of_several_tokens_is_right_if_all_its_tokens_are() -> None:
    pairs = [PromptPair([1], [2], [2, 3, 4], [3, 4, 6]), PromptPair([3], [3], [4, 5, 6], [4])]
    assert answered(Next(), pairs).tolist() == [[True, False], [False, True]]


def test_the_filter_counts() -> None:
    dropped = Dropped()
    assert keep_answered(Next(), PAIRS, dropped) == PAIRS[:1]
    assert dropped.lines() == [
        "The model answers 50.0% of 6 prompts right, and both of 1 of 3 pairs.",
        "2 draws were dropped because the model does not answer both of its prompts right.",
    ]
    with pytest.raises(DeltapatchError, match="answers both prompts of no pair right"):
        keep_answered(Next(), PAIRS[2:], dropped)
    with pytest.raises(DeltapatchError, match="vocabulary or the answers"):
        answered(Next(), PAIRS, "words")


def test_text(gpt2_like) -> None:
    class Asked(Next):
        tokenizer = gpt2_like
        spec = SimpleNamespace(d_vocab=len(gpt2_like))

        def logits(self, ids: list[int]) -> torch.Tensor:
            out = torch.zeros(len(ids), len(gpt2_like))
            out[-1, gpt2_like(" 7")["input_ids"][0]] = 1
            return out

    pairs = [PromptPair("3 + 4 =", "4 + 4 =", " 7", " 8")]
    np.testing.assert_array_equal(answered(Asked(), pairs), [[True, False]])
    with pytest.raises(DeltapatchError, match="no tokenizer"):
        answered(Next(), pairs)
