"""Residual add, and norm difference: norm(x + d) - norm(x), without cancellation.

With xc and dc the centred base and difference (an RMSNorm does not centre), v the mean square of xc,
dv = mean(dc (2 xc + dc)), s = sqrt(v + eps), s' = sqrt(v + dv + eps):
    difference = weight * (dc / s' - xc dv / ((s + s') s s'))
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltapatch.kernels.edits import Edit, apply_edits
from deltapatch.kernels.product import Precision, Scaled, narrow
from deltapatch.kernels.segments import Segment, base_lines, gather, span

# Where the patched norm is this much smaller than the base's, the form above would itself cancel.
COLLAPSE = 1 / 16
_NUMBERS = 1 << 18  # of small segments that are taken together: they stay in the cache


class Part(NamedTuple):
    """What is added to the residual stream at one place: a difference and the patches of the place."""

    d: Scaled | None  # [token, d_model]; None: zero
    swaps: Sequence[Edit]


class Norms(NamedTuple):
    """Norms of one vector of the residual stream, or of heads, each by itself.

    Attributes:
        x: [base token, d_model], what is normalised in the base run; of heads, each by itself,
            [base token, head, d_head].
        weights: [d_model] of up to two norms; a shift cancels out. Of heads [d_head], or [head, d_head].
        eps: added to the mean square.
        centred: LayerNorm, else RMSNorm.
    """

    x: Tensor
    weights: list[Tensor]
    eps: float
    centred: bool


def add_norm(
    parts: list[Part],
    swaps: Sequence[Edit],
    norms: Norms | None,
    segments: list[Segment],
    precision: Precision,
    *,
    out: Tensor | None = None,
    to: Tensor | None = None,
) -> list[Scaled]:
    """Add up differences of the residual stream, and take that of its norms.

    Where the norms are of heads, there is one part, [token, head, d_head], whose swaps are of heads, and
    neither swaps of the sum nor `out`.

    Args:
        parts: what is added up, up to three, each after its own swaps; their arrays stay as they are.
        swaps: of the sum. A later swap overrides an earlier one, here and in the parts.
        norms: what the sum goes through; None: nothing.
        segments: where the rows lie and what their base is.
        precision: of the products that take the result.
        out: [place, d_model] in the base dtype, receives the sum; no part lies in it unless `to` is None.
        to: [token] int64, each token's place in `out`; None: the first ones.

    Returns:
        For each norm the difference of its output, [token, d_model], narrowed; of heads as these are.
    """
    n_tokens = sum(s.n_tokens for s in segments)
    like = norms.x if out is None and norms is not None else out
    assert like is not None
    shape = (n_tokens, *like.shape[1:])
    total = add_up(parts, swaps, like, shape, out[:n_tokens] if out is not None and to is None else None)
    if out is not None and to is not None:
        out.index_copy_(0, to, total)
    elif out is not None and total.data_ptr() != out.data_ptr():
        out[:n_tokens] = total
    if norms is None or not norms.weights:
        return []
    return [narrow(d, precision) for d in norm_difference(total, norms, segments)]


def add_up(
    parts: Sequence[Part],
    swaps: Sequence[Edit],
    like: Tensor,
    shape: Sequence[int],
    place: Tensor | None = None,
) -> Tensor:
    """The sum of the parts, each after its own edits, after those of the sum; it may be the one part itself.

    Args:
        like: says in which dtype and where.
        shape: of the sum.
        place: where it may be written; none of the parts lies there.
    """
    terms = []
    for d, patches in parts:
        if patches or d is not None:
            term = None if d is None else d.plain()
            terms.append(_edited(like.new_zeros(shape) if term is None else term, patches, own=term is None))
    total = terms[0] if terms else like.new_zeros(shape)
    if len(terms) > 1:
        total = torch.add(terms[0], terms[1], out=place)
        for term in terms[2:]:
            total += term
    return _edited(total, swaps, own=len(terms) != 1)


def _edited(d: Tensor, edits: Sequence[Edit], own: bool) -> Tensor:
    """A difference after the edits of its place; a copy where there are any, unless it is our own."""
    if edits:
        d = d if own else d.clone()
        apply_edits(d, edits)
    return d


def norm_difference(dx: Tensor, norms: Norms, segments: list[Segment]) -> list[Tensor]:
    """LayerNorm (centred) or RMSNorm differences of packed rows: [token, ..., width] for each weight [width].

    Args:
        dx: [token, width], the rows' differences; of heads [token, head, width], each normalised by itself.
        norms: of the same vector, at least one.
        segments: where the rows lie and what their base is.
    """
    outs = [torch.empty_like(dx) for _ in norms.weights]
    for group in gather(segments, lambda s: s.n_tokens * norms.x[0].numel(), _NUMBERS):
        together = segments[group]
        if len(together) == 1:
            (segment,) = together
            base = _statistics(segment.own(norms.x), norms)
            _difference(segment.tokens(dx), base, norms, [segment.tokens(out) for out in outs])
            continue
        met, line = base_lines(together, dx.device)
        base = _statistics(norms.x.index_select(0, met), norms)
        base, tokens = _Base(*(each.index_select(0, line) for each in base)), span(together)
        _difference(dx[tokens], base, norms, [out[tokens] for out in outs])
    return outs


class _Base(NamedTuple):
    """What a norm takes of the base runs."""

    x: Tensor  # [..., width], centred where the norm centres
    square: Tensor  # [..., 1], the mean of x²


def _statistics(x: Tensor, norms: Norms) -> _Base:
    x = x - x.mean(-1, keepdim=True) if norms.centred else x
    return _Base(x, x.square().mean(-1, keepdim=True))


def _difference(d: Tensor, base: _Base, norms: Norms, outs: list[Tensor]) -> None:
    """The norms' differences of d, [..., width]; the base has one line for all rows, or one for each."""
    (b, v), o, width = base, outs[0], d.shape[-1]
    dc = torch.sub(d, d.mean(-1, keepdim=True), out=o) if norms.centred else o.copy_(d)
    square = torch.linalg.vector_norm(dc, dim=-1, keepdim=True).square_()
    shared = d.ndim == 4 and b.shape[2] == 1
    along = torch.matmul(dc, b.transpose(-1, -2)) if shared else (dc * b).sum(-1, keepdim=True)
    dv = along.mul_(2).add_(square).div_(width)
    s = (v + norms.eps).sqrt_()
    s2 = (v + dv).clamp_(min=0).add_(norms.eps).sqrt_()
    collapsed = v + dv < COLLAPSE * v
    direct = None
    if bool(collapsed.any()):
        whole = b + dc
        direct = whole / (whole.square().mean(-1, keepdim=True) + norms.eps).sqrt_() - b / s
    o.div_(s2).addcmul_(b, dv.neg_().div_((s + s2) * s * s2))
    if direct is not None:
        o.copy_(torch.where(collapsed, direct, o))
    for out, weight in zip(outs[1:], norms.weights[1:], strict=True):
        torch.mul(o, weight, out=out)
    o.mul_(norms.weights[0])
