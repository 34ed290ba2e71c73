"""The answers' share of a read-out: how their log-probabilities change, but for what all tokens share.

An answer is one token, or any of several, whose probabilities add up. With q the base probabilities among an
answer's tokens (Σ q_i = 1) and D the changes of their logits, log Σ exp(logit) changes by
    m + log1p(Σ_i q_i expm1(D_i - m)),   m = Σ_i q_i D_i.
The sum is never negative, so nothing cancels, and m is the row's product with Σ_i q_i W_i, one column as for
a single token. Behind a cap each D_i is a slope times the product, and what goes beyond that.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from deltapatch.kernels.softcap import cap_difference, cap_slope

_HUGE = 60.0  # above it the direct form is as good, and exp cannot overflow


class Answers(NamedTuple):
    """The tokens of the clean and the corrupted answer of some reads.

    Attributes:
        first: [read, 2] int64.
        others: [read, 2, other] int64, those that count beside it, -1 where there are fewer; None where no
            answer has any.
    """

    first: Tensor
    others: Tensor | None

    @classmethod
    def of(cls, tokens: Tensor) -> "Answers":
        """Of [read, 2, token], -1 where an answer has fewer than others."""
        return cls(tokens[..., 0], tokens[..., 1:] if tokens.shape[-1] > 1 else None)

    @property
    def all(self) -> Tensor:
        """[read, 2, token], -1 where an answer has fewer than others."""
        first = self.first.unsqueeze(-1)
        return first if self.others is None else torch.cat([first, self.others], -1)

    def total(self, values: Tensor, some: slice) -> Tensor:
        """[read, run, answer], log Σ exp(values) over an answer's tokens.

        Args:
            values: [read, run, d_vocab], of some reads.
        """
        tokens = self.all[some].unsqueeze(1).expand(-1, values.shape[1], -1, -1)  # [read, run, answer, token]
        own = values.unsqueeze(2).expand(-1, -1, 2, -1).gather(-1, tokens.clamp(min=0))
        return own.masked_fill(tokens < 0, -torch.inf).logsumexp(-1) if own.shape[-1] > 1 else own[..., 0]


class CappedLogits(NamedTuple):
    """Logits c tanh(x / c) of a read."""

    cap: float
    uncapped: Tensor  # [d_vocab], x


class Moved(NamedTuple):
    """How the logits of the two answers change, [row, 2] float64 each: as columns say, and altogether."""

    linear: Tensor
    whole: Tensor


def answer_change(
    dn: Tensor, unembedding: Tensor, tokens: Tensor, logits: Tensor, capped: CappedLogits | None
) -> tuple[Tensor, Moved | None]:
    """How the two answers' logits change: by products with columns, and by what goes beyond.

    Args:
        dn: [row, d_model], differences of one read.
        unembedding: [d_vocab, d_model].
        tokens: [2, token], -1 where an answer has fewer.
        logits: [d_vocab], of the base run.
        capped: where logits have a cap.

    Returns:
        [2, d_model], and the changes themselves, or None where nothing goes beyond the columns.
    """
    if tokens.shape[-1] == 1 and capped is None:
        return unembedding[tokens[:, 0]].to(dn.dtype), None
    columns, moved = [], []
    for own in tokens:  # [token]
        there = own >= 0
        own = torch.where(there, own, own[0])
        weight = unembedding[own].to(dn.dtype)
        log_share = logits[own].double().masked_fill(~there, -torch.inf).log_softmax(-1)
        share = log_share.exp()
        change = (dn @ weight.T).double()  # [row, token]
        slope = torch.ones_like(share)
        linear = change
        if capped is not None:
            x = capped.uncapped[own].double()
            slope = cap_slope(x, capped.cap)
            linear, change = slope * change, cap_difference(x, change, capped.cap)
        columns.append((share * slope).to(dn.dtype) @ weight)
        whole = change @ share
        if len(own) > 1:
            x = change - whole.unsqueeze(-1)
            direct = (x + log_share).logsumexp(-1)
            whole = whole + torch.where(x.amax(-1) > _HUGE, direct, torch.log1p(torch.expm1(x) @ share))
        moved.append((linear @ share, whole))
    linear, whole = (torch.stack(each, 1) for each in zip(*moved, strict=True))
    return torch.stack(columns), Moved(linear, whole)


def with_beyond(
    mean: Tensor, answer: Tensor, apart: Tensor, moved: Moved, cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first three with what goes beyond the columns that made them.

    Where the linear parts of a cap are larger than capped logits can change at all, nothing would be left of
    the digits of their sum: there the changes are taken as they are.

    Args:
        mean: [row], of the linear parts under the base's probabilities.
        answer: [row, 2], the answers' linear parts less that.
        apart: [row], the difference of the answers' linear parts.
        moved: how the answers' logits change.
        cap: of the logits.
    """
    linear, whole = moved
    beyond = whole - linear
    found = torch.cat([answer + beyond, (apart + beyond[:, 0] - beyond[:, 1]).unsqueeze(1)], 1)
    if cap is not None:
        most = 2 * cap
        far = (linear.abs().amax(1) > most) | (mean.abs() > most)
        mean = mean.clamp(-most, most)
        straight = torch.cat([whole - mean.unsqueeze(1), whole[:, :1] - whole[:, 1:]], 1)
        found = torch.where(far.unsqueeze(1), straight, found)
    found = found.to(mean.dtype)
    return mean, found[:, :2], found[:, 2]
