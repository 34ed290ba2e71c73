"""Read-out: what each row did to the output distribution, without ever storing rows x vocabulary.

With base probabilities p, logit change D and its mean m = Σ_j p_j D_j (which no probability depends on):
    change of log P(i) = (D_i - m) - log1p(Σ_j p_j expm1(D_j - m))
The sum is never negative, since expm1(x) >= x, so nothing cancels. The mean needs no logits: it is the row's
product with Σ_j p_j W_j, one vector a pair.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from deltapatch.kernels.product import Operand, Precision, Scaled, narrow, product
from deltapatch.kernels.readout_tail import TOLERANCE, Tail, expand
from deltapatch.kernels.segments import Segment

CELLS = 1 << 20  # logit changes held at a time: few enough to stay in the cache
_HUGE = 60.0  # above it exp overflows float32 too soon; below it nothing that float32 rounds to 0 matters


class BaseReadout(NamedTuple):
    """The base runs' output distribution at the read-out position."""

    logits: Tensor  # [pair, d_vocab]
    p: Tensor  # [pair, d_vocab], float64
    mean: Tensor  # [pair, d_model], Σ_j p_j W_j
    answers: Tensor  # [pair, 2] int64: clean answer, corrupted answer
    tails: Mapping[int, Tail] = {}  # of the pairs that have one; the others take every token as it is


def readout(
    dn: Tensor,
    exact: Tensor,
    weight: Operand,
    precision: Precision,
    base: BaseReadout,
    first_pairs: list[int],
    segments: list[Segment],
    measured: tuple[str, ...],
) -> dict[str, Tensor]:
    """The measured numbers of each row.

    Args:
        dn: [row, d_model], difference of the final norm's output at the read-out position.
        exact: [d_vocab, d_model], the unembedding in dn's dtype; the answers' logits are taken with it.
        weight: the same as the sweep's products take it.
        precision: of these products.
        base: of every pair in the pass.
        first_pairs: for each segment, its first pair.
        segments: one position a row, covering all rows in order.
        measured: which of `engine.metrics.MEASURED` to return.

    Returns:
        name -> [row], in dn's dtype.
    """
    out = {name: dn.new_empty(len(dn)) for name in measured}
    spans = [
        (slice(s.token + i * s.rows, s.token + (i + 1) * s.rows), first + i)
        for s, first in zip(segments, first_pairs, strict=True)
        for i in range(s.pairs)
    ]
    mean, answer = dn.new_empty(len(dn), 1), dn.new_empty(len(dn), 2)
    for rows, pair in spans:
        columns = exact[base.answers[pair]]  # [2, d_model]
        mean[rows, 0] = dn[rows] @ base.mean[pair]
        answer[rows] = dn[rows] @ (columns - base.mean[pair]).T
        if "logit_diff" in out:
            # One product with the difference of the columns: their common part never enters.
            out["logit_diff"][rows] = dn[rows] @ (columns[0] - columns[1])
    if any(name != "logit_diff" for name in measured):
        narrowed = narrow(dn, precision)
        left = _expanded(dn, narrowed, mean, answer, precision, base, spans, out)
        if left is None:
            _distribution(narrowed, mean, answer, weight, base, spans, out)
        elif len(left):
            few = {name: values.new_empty(len(left)) for name, values in out.items() if name != "logit_diff"}
            _distribution(
                _rows(narrowed, left), mean[left], answer[left], weight, base, _some(spans, left), few
            )
            for name, values in few.items():
                out[name][left] = values
    return out


def _expanded(
    dn: Tensor,
    narrowed: Scaled,
    mean: Tensor,
    answer: Tensor,
    precision: Precision,
    base: BaseReadout,
    spans: list[tuple[slice, int]],
    out: dict[str, Tensor],
) -> Tensor | None:
    """Take rows of pairs with a tail by its expansion; returns the rows still to be done, None for all."""
    if not any(pair in base.tails for _, pair in spans):
        return None
    done = torch.zeros(len(dn), dtype=torch.bool)
    for rows, pair in spans:
        if pair not in base.tails:
            continue
        some = Scaled(narrowed.values[rows], None if narrowed.scale is None else narrowed.scale[rows])
        lse, bound = expand(dn[rows], some, mean[rows], base.tails[pair])
        done[rows] = True
        for i, name in enumerate(("dlogp_clean", "dlogp_corrupted")):
            if name in out:
                torch.sub(answer[rows, i], lse, out=out[name][rows])
                done[rows] &= bound <= TOLERANCE[precision.name] * out[name][rows].abs()
    return (~done).nonzero().squeeze(1)


def _rows(d: Scaled, which: Tensor) -> Scaled:
    return Scaled(d.values[which], None if d.scale is None else d.scale[which])


def _some(spans: list[tuple[slice, int]], which: Tensor) -> list[tuple[slice, int]]:
    """The spans of some rows, which ascend, when these stand alone."""
    edges = torch.tensor([[rows.start, rows.stop] for rows, _ in spans])
    found = torch.searchsorted(which, edges).tolist()
    return [(slice(a, b), pair) for (a, b), (_, pair) in zip(found, spans, strict=True) if b > a]


def _distribution(
    dn: Scaled,
    mean: Tensor,
    answer: Tensor,
    weight: Operand,
    base: BaseReadout,
    spans: list[tuple[slice, int]],
    out: dict[str, Tensor],
) -> None:
    """The numbers that need every token: mean [row, 1], answer [row, 2] less it, spans (rows, their pair)."""
    n_rows, d_vocab = len(mean), len(weight.values)
    # KL is of second order in D. float64 carries it through the cancellation of its first-order part.
    wide = torch.float64 if "kl" in out else mean.dtype
    mass = torch.zeros(n_rows, dtype=wide, device=mean.device)  # Σ_j p_j expm1(D_j - m)
    rest = torch.zeros_like(mass)  # Σ_j p_j (D_j - m): not quite zero, since products are rounded
    highest = torch.full_like(answer[:, 0], -torch.inf)
    best, at_top = highest.clone(), highest.clone()  # of base logit - base's top logit + D - m; the top's own
    tops = base.logits.argmax(-1).tolist()
    for piece in _pieces(n_rows, d_vocab):
        change = product(dn, weight.rows(piece)).plain().sub_(mean)  # [row, piece]
        highest = torch.maximum(highest, change.amax(-1))
        change_wide = change.to(wide)
        grown = torch.expm1(change_wide)
        for rows, pair in spans:
            p = base.p[pair, piece].to(wide)
            mass[rows] += grown[rows] @ p
            if "kl" in out:
                rest[rows] += change_wide[rows] @ p
            if "flip" in out:
                top = tops[pair]
                lead = base.logits[pair, piece] - base.logits[pair, top]  # [piece], <= 0
                best[rows] = torch.maximum(best[rows], (change[rows] + lead).amax(-1))
                if piece.start <= top < piece.stop:
                    at_top[rows] = change[rows, top - piece.start]
    lse = torch.log1p(mass)
    kl = lse - rest

    pair_of = torch.repeat_interleave(
        torch.tensor([pair for _, pair in spans]), torch.tensor([rows.stop - rows.start for rows, _ in spans])
    ).to(mean.device)
    direct = (highest > _HUGE).nonzero().squeeze(1)
    for some in direct.split(max(1, CELLS // d_vocab)):
        # log p + D: its exponential cannot overflow once the largest is taken out, and no term is negative.
        far = product(_rows(dn, some), weight).plain().sub_(mean[some]).double()  # [row, d_vocab]
        before = base.logits[pair_of[some]].double()
        lse[some] = ((before + far).logsumexp(-1) - before.logsumexp(-1)).to(wide)
        kl[some] = lse[some] - (far * base.p[pair_of[some]]).sum(-1).to(wide)

    if "flip" in out:
        out["flip"].copy_(best > at_top)
    if "kl" in out:
        out["kl"].copy_(kl.clamp_(min=0))
    for i, name in enumerate(("dlogp_clean", "dlogp_corrupted")):
        if name in out:
            torch.sub(answer[:, i], lse.to(mean.dtype), out=out[name])


def _pieces(n_rows: int, d_vocab: int) -> list[slice]:
    """The vocabulary in pieces that the cache holds for so many rows."""
    width = max(1024, CELLS // n_rows)
    return [slice(a, min(a + width, d_vocab)) for a in range(0, d_vocab, width)]
