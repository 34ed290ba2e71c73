"""Read-out of many rows of one read: unlikely tokens by an expansion, with a bound on what it leaves out.

With the mean m of the logit changes D under the base's p taken out, x_j = D_j - m and Σ_j p_j x_j = 0, so
    Σ_j p_j expm1(x_j) = Σ_kept p_j (expm1(x_j) - x_j) + ½ dnᵀ C dn + r,   C = Σ_rest p_j c_j c_jᵀ,
where c_j = W_j - Σ_i p_i W_i, "kept" are the likeliest tokens and "rest" all others. With R the longest c_j
of the rest, |x_j| <= b = R |dn|, and the Taylor remainder obeys |r| <= b e^b / 6 · dnᵀ C dn. The sum is
never negative, so the change of the log-sum-exp is off by at most |r|. Rows for which that is more than
their precision allows go through the whole vocabulary. Each read (see readout.py) is held to it by itself, as
each is rounded by itself.
"""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from deltapatch.kernels.pieces import ForEach, vocabulary_pieces
from deltapatch.kernels.product import NarrowedByPiece, Operand, Precision, Scaled, narrow_weight, product

# What may be left out, relative to the effect or to the spread of the row's logit changes, whichever is more:
# what the products' own rounding leaves uncertain.
TOLERANCE = {"bf16": 2e-3, "fp16": 2.5e-4, "tf32": 2.5e-4, "fp8": 1e-2}
KEPT = 32  # one token in so many is kept
_ENTRIES = 1 << 21  # of the unembedding that are weighed at a time
_STRIP = 128  # columns of C that are multiplied together, down from the diagonal: C is symmetric
_MEASURED = {"logit_diff", "dlogp_clean", "dlogp_corrupted"}  # KL is itself of second order


class Tail(NamedTuple):
    """What the expansion needs of one read."""

    kept: Operand  # [kept, d_model], the unembedding of the likeliest tokens
    p: Tensor  # [kept], their probabilities
    moment: Tensor  # [d_model, d_model], C
    radius: Tensor  # scalar, R


def worth_a_tail(
    n_rows: int, d_vocab: int, d_model: int, precision: Precision, measured: Iterable[str]
) -> bool:
    """Whether a read has so many rows that preparing its expansion costs less than it saves."""
    possible = _may_expand(d_vocab, d_model, precision) and set(measured) <= _MEASURED
    return possible and n_rows >= 2 * d_model


def _may_expand(d_vocab: int, d_model: int, precision: Precision) -> bool:
    return d_vocab >= 8 * d_model and precision.name in TOLERANCE


def tail_bytes(d_vocab: int, d_model: int, size: int, precision: Precision) -> int:
    """Of a read's expansion, in numbers of so many bytes; 0 where no read has one."""
    kept = max(1, d_vocab // KEPT)
    return (d_model + kept) * d_model * size if _may_expand(d_vocab, d_model, precision) else 0


def workspace(d_vocab: int, d_model: int, size: int, precision: Precision) -> int:
    """Bytes that preparing one takes, whatever the threads: some tokens twice, and what C gains next."""
    tokens = min(d_vocab, _tokens(d_model))
    return (2 * tokens + d_model) * d_model * size if _may_expand(d_vocab, d_model, precision) else 0


def _tokens(d_model: int) -> int:
    return max(1024, _ENTRIES // d_model)


def make_tail(
    p: Tensor,
    mean: Tensor,
    exact: Tensor,
    weight: Operand | NarrowedByPiece,
    pool: ForEach,
) -> Tail:
    """Prepare the expansion of one read.

    Args:
        p: [d_vocab], the base's probabilities, float64.
        mean: [d_model], Σ_j p_j W_j.
        exact: [d_vocab, d_model], the unembedding; it is taken in the mean's dtype.
        weight: the same as the sweep's products take it.
        pool: does strips and pieces, perhaps side by side.
    """
    kept = p.topk(max(1, len(p) // KEPT)).indices
    rest = p.to(mean.dtype, copy=True)
    rest[kept] = 0
    d_model, n = len(mean), _tokens(len(mean))
    moment, radius = mean.new_zeros(d_model, d_model), mean.new_zeros(())
    strips = [slice(a, a + _STRIP) for a in range(0, d_model, _STRIP)]
    for start in range(0, len(p), n):
        half, longest = _weigh(rest[start : start + n], mean, exact[start : start + n], pool)
        radius = torch.maximum(radius, longest)
        pool(partial(_add_square, moment, narrow_weight(half, weight.precision)), strips)
    moment.tril_()
    moment += moment.tril(-1).T
    return Tail(weight.rows(kept), p[kept].to(mean.dtype), moment, radius)


def _weigh(p: Tensor, mean: Tensor, exact: Tensor, pool: ForEach) -> tuple[Tensor, Tensor]:
    """√p_j c_j of some tokens, [d_model, token], and the longest c_j of those that have a p_j, scalar."""
    half = mean.new_empty(len(p), len(mean)).T
    pieces = vocabulary_pieces(len(p), len(p))
    longest = mean.new_empty(len(pieces))

    def take(i: int) -> None:
        some = pieces[i]
        centred = exact[some].to(mean.dtype) - mean
        longest[i] = torch.where(p[some] > 0, torch.linalg.vector_norm(centred, dim=1), 0).max()
        half[:, some] = centred.mul_(p[some].sqrt().unsqueeze(1)).T

    pool(take, range(len(pieces)))
    return half, longest.max()


def _add_square(to: Tensor, half: Operand, strip: slice) -> None:
    """Add half @ half.T to some columns, from the diagonal on down."""
    below = half.rows(slice(strip.start, None))
    to[strip.start :, strip] += product(Scaled(below.values, below.scale), half.rows(strip)).plain()


def expand(dn: Tensor, narrowed: Scaled, mean: Tensor, tail: Tail) -> tuple[Tensor, Tensor, Tensor]:
    """The change of the log-sum-exp once the mean is out, and the most that it can be off.

    Args:
        dn: [row, d_model], difference of the final norm's output.
        narrowed: the same as products take it.
        mean: [row, 1], m.
        tail: of the rows' read.

    Returns:
        change, bound: [row]; and the spread of the logit changes, [row], at least so large: √Σ_rest p_j x_j².
    """
    change = product(narrowed, tail.kept).plain().sub_(mean)  # [row, kept]
    # Where a change is huge the row goes through the whole vocabulary; here it must only not overflow.
    mass = (torch.expm1(change.clamp(max=60)) - change) @ tail.p
    second = (torch.mm(dn, tail.moment) * dn).sum(1).clamp_(min=0)  # [row]
    b = tail.radius * torch.linalg.vector_norm(dn, dim=1)
    bound = b / 6 * b.clamp(max=60).exp() * second
    bound.masked_fill_(change.amax(1) >= 60, torch.inf)
    return torch.log1p(mass + second / 2), bound, second.sqrt()
