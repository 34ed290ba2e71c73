"""Read-out of many rows of one pair: unlikely tokens by an expansion, with a bound on what it leaves out.

With the mean m of the logit changes D under the base's p taken out, x_j = D_j - m and Σ_j p_j x_j = 0, so
    Σ_j p_j expm1(x_j) = Σ_kept p_j (expm1(x_j) - x_j) + ½ dnᵀ C dn + r,   C = Σ_rest p_j c_j c_jᵀ,
where c_j = W_j - Σ_i p_i W_i, "kept" are the likeliest tokens and "rest" all others. With R the longest c_j
of the rest, |x_j| <= b = R |dn|, and the Taylor remainder obeys |r| <= b e^b / 6 · dnᵀ C dn. The sum is
never negative, so the change of the log-sum-exp is off by at most |r|. Rows for which that is more than
their precision allows go through the whole vocabulary.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from deltapatch.kernels.each import Each
from deltapatch.kernels.product import Operand, Precision, Scaled, narrow, narrow_weight, product

# What may be left out, relative to each effect: about what the products' own rounding leaves uncertain.
TOLERANCE = {"bf16": 2e-3, "fp16": 2.5e-4, "tf32": 2.5e-4, "fp8": 1e-2}
KEPT = 32  # one token in so many is kept
_PIECE = 4096  # tokens whose share of C is taken at a time
_MEASURED = {"logit_diff", "dlogp_clean", "dlogp_corrupted"}  # KL is itself of second order


class Tail(NamedTuple):
    """What the expansion needs of one pair."""

    kept: Operand  # [kept, d_model], the unembedding of the likeliest tokens
    p: Tensor  # [kept], their probabilities
    moment: Tensor  # [d_model, d_model], C
    radius: Tensor  # scalar, R


def worth_a_tail(
    n_rows: int, d_vocab: int, d_model: int, precision: Precision, measured: Iterable[str]
) -> bool:
    """Whether a pair has so many rows that preparing its expansion costs less than it saves."""
    enough = n_rows >= 4 * d_model and d_vocab >= 8 * d_model
    return enough and precision.name in TOLERANCE and set(measured) <= _MEASURED


def make_tail(
    p: Tensor,
    mean: Tensor,
    exact: Tensor,
    weight: Operand,
    each: Each,
) -> Tail:
    """Prepare the expansion of one pair.

    Args:
        p: [d_vocab], the base's probabilities, float64.
        mean: [d_model], Σ_j p_j W_j.
        exact: [d_vocab, d_model], the unembedding in the base dtype.
        weight: the same as the sweep's products take it.
        each: does pieces of the vocabulary, perhaps side by side.
    """
    kept = p.topk(max(1, len(p) // KEPT)).indices
    rest = p.to(exact.dtype, copy=True)
    rest[kept] = 0
    pieces = [slice(a, a + _PIECE) for a in range(0, len(p), _PIECE)]
    moments: list[Tensor] = [mean] * len(pieces)
    radii: list[Tensor] = [mean] * len(pieces)

    def take(i: int) -> None:
        centred = exact[pieces[i]] - mean
        there = rest[pieces[i]]
        radii[i] = torch.where(there > 0, torch.linalg.vector_norm(centred, dim=1), 0).max()
        half = (centred * there.sqrt().unsqueeze(1)).T.contiguous()  # [d_model, token]
        precision = weight.precision
        moments[i] = product(narrow(half, precision), narrow_weight(half, precision)).plain()

    each(take, range(len(pieces)))
    return Tail(
        weight.rows(kept),
        p[kept].to(exact.dtype),
        torch.stack(moments).sum(0),
        torch.stack(radii).max(),
    )


def expand(dn: Tensor, narrowed: Scaled, mean: Tensor, tail: Tail) -> tuple[Tensor, Tensor]:
    """The change of the log-sum-exp once the mean is out, and the most that it can be off: [row] twice.

    Args:
        dn: [row, d_model], difference of the final norm's output.
        narrowed: the same as products take it.
        mean: [row, 1], m.
        tail: of the rows' pair.
    """
    change = product(narrowed, tail.kept).plain().sub_(mean)  # [row, kept]
    # Where a change is huge the row goes through the whole vocabulary; here it must only not overflow.
    mass = (torch.expm1(change.clamp(max=60)) - change) @ tail.p
    second = (torch.mm(dn, tail.moment) * dn).sum(1).clamp_(min=0)  # [row]
    b = tail.radius * torch.linalg.vector_norm(dn, dim=1)
    bound = b / 6 * b.clamp(max=60).exp() * second
    bound.masked_fill_(change.amax(1) >= 60, torch.inf)
    return torch.log1p(mass + second / 2), bound
