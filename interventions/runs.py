"""Continuations: what a pair's answers add to its prompt, and which of their tokens is read where.

The run of a pair is its prompt and then the tokens of its answers, all but the last of each, which is only
read. What both answers begin with comes once. Where they part the run forks: the clean answer's own tokens
come first, then the corrupted answer's, which see none of them and count their positions from the fork. So
one run, and one row for each intervention, has both answers teacher-forced; each token of an answer is read
at the position before it. Answers of one token add nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.models.spec import ModelSpec, RopeSpec

NONE = -1  # no token
Fork = tuple[int, int]  # as in kernels/segments.py, which takes torch to import


class RunShape(NamedTuple):
    """The shape of a run: its prompt, and what the answers add.

    Attributes:
        prompt: tokens up to the first position that is read, the end of the prompt.
        length: all tokens.
        fork: where the run parts into two branches, if it does.
        beside: tokens of the source's run, where that is a prompt of its own and not a difference.
    """

    prompt: int
    length: int
    fork: Fork | None = None
    beside: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens there are with those of the source's own run."""
        return self.length + self.beside

    @property
    def reads(self) -> int:
        """How many tokens are read from: the last of the prompt and all after it."""
        return self.length - self.prompt + 1

    @property
    def positions(self) -> np.ndarray:
        """[token], each token's position; the second branch counts from the fork."""
        position = np.arange(self.length)
        if self.fork is not None:
            position[self.fork[1] :] -= self.fork[1] - self.fork[0]
        return position

    @property
    def order(self) -> tuple[int, int, Fork | tuple[()]]:
        """What pairs are ordered by: those of one prompt length together, and among them those alike."""
        return self.prompt, self.length, self.fork or ()


class Continuation(NamedTuple):
    """What follows a prompt.

    Attributes:
        tokens: after the prompt.
        fork: where two branches begin among them, if they do.
        targets: for the end of the prompt and each of the tokens, the next token of the clean answer and of
            the corrupted one; NONE for an answer that does not go on from there. First come the reads that
            both answers share, the last of which is where they part; then those of one alone.
        others: (of the clean answer, of the corrupted one), tokens at the end of the prompt that count as the
            answer beside its target.
    """

    tokens: list[int]
    fork: tuple[int, int] | None
    targets: list[tuple[int, int]]
    others: tuple[Sequence[int], Sequence[int]] = ((), ())

    def shape(self, prompt: int) -> RunShape:
        """Of the run, after a prompt of so many tokens."""
        fork = None if self.fork is None else (prompt + self.fork[0], prompt + self.fork[1])
        return RunShape(prompt, prompt + len(self.tokens), fork)


def continuation(clean: Sequence[int], corrupted: Sequence[int]) -> Continuation:
    """Of a clean and a corrupted answer, each at least one token."""
    shared = 0
    while shared < min(len(clean), len(corrupted)) - 1 and clean[shared] == corrupted[shared]:
        shared += 1
    first, second = clean[shared:-1], corrupted[shared:-1]
    targets = list(zip(clean[: shared + 1], corrupted[: shared + 1], strict=True))
    targets += [(token, NONE) for token in clean[shared + 1 :]]
    targets += [(NONE, token) for token in corrupted[shared + 1 :]]
    fork = (shared, shared + len(first)) if first and second else None
    return Continuation([*clean[:shared], *first, *second], fork, targets)


def continuation_of(pair: EncodedPair) -> Continuation:
    """What follows the prompts of a pair."""
    found = continuation(pair.clean_answer, pair.corrupted_answer)
    return found._replace(others=(pair.clean_others, pair.corrupted_others))


def any_targets(continued: Sequence[Continuation]) -> np.ndarray:
    """The targets of some pairs, [read, (clean, corrupted), token].

    The first is the target, those after it count beside it; NONE where there are fewer.
    """
    most = 1 + max(len(some) for one in continued for some in one.others)
    out = np.full((sum(len(one.targets) for one in continued), 2, most), NONE, dtype=np.int64)
    read = 0
    for one in continued:
        out[read : read + len(one.targets), :, 0] = one.targets
        for which, some in enumerate(one.others):
            out[read, which, 1 : 1 + len(some)] = some
        read += len(one.targets)
    return out


def check_length(pair: EncodedPair, number: int, spec: ModelSpec) -> None:
    """Raise DeltapatchError where a model has no embedding for a position of the pair."""
    n_tokens = _longer(pair) + pair.answer_tokens - 1
    if spec.learned_positions and n_tokens > spec.context:
        raise DeltapatchError(
            f"pair {number} has {n_tokens} tokens, and the model knows {spec.context} positions: shorten it"
        )


def check_rotary(pair: EncodedPair, number: int, rope: RopeSpec) -> None:
    """Check that what follows a prompt leaves the prompt as it is.

    Raises:
        DeltapatchError: an answer has several tokens, and the angles of all depend on how many there are.
    """
    n_tokens = _longer(pair) + pair.answer_tokens - 1
    # Longrope's frequencies are the same for all that is beyond the original context.
    shorter = min(len(pair.clean), len(pair.corrupted))
    settled = rope.scaling == "longrope" and rope.depends_on_length(shorter)
    if pair.answer_tokens > 1 and rope.depends_on_length(n_tokens) and not settled:
        raise DeltapatchError(
            f"pair {number} has an answer of {pair.answer_tokens} tokens and goes beyond the context of a "
            f"model with {rope.scaling} rotary scaling, where its tokens change all those before them: give "
            "answers of one token, or shorter prompts"
        )


def run_alike(pair: EncodedPair, lengths: tuple[int, int], spec: ModelSpec) -> int:
    """How many tokens at the beginning are the same, and run the same, in both prompts of a pair.

    What sees only these is equal in both runs, unless rotary angles depend on how long a run is.

    Args:
        lengths: tokens of both runs.
    """
    unequal = lengths[0] != lengths[1]
    if unequal and any(rope.depends_on_length(max(lengths)) for rope in spec.all_ropes()):
        return 0
    return pair.shared


def _longer(pair: EncodedPair) -> int:
    """Tokens of the longer prompt."""
    return max(len(pair.clean), len(pair.corrupted))
