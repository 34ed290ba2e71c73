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

from deltapatch.kernels.each import Each, in_turn
from deltapatch.kernels.product import Operand, Precision, Scaled, narrow, product
from deltapatch.kernels.readout_tail import TOLERANCE, Tail, expand
from deltapatch.kernels.segments import Segment

CELLS = 1 << 20  # logit changes held at a time: few enough to stay in the cache
_PIECES = 8  # at least that many pieces of the vocabulary, so that cores share few rows
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
    each: Each = in_turn,
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
        each: does pieces of the vocabulary, perhaps side by side.

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
            _distribution(narrowed, mean, answer, weight, base, spans, out, each)
        elif len(left):
            few = {name: values.new_empty(len(left)) for name, values in out.items() if name != "logit_diff"}
            kept, there = _rows(narrowed, left), _some(spans, left)
            _distribution(kept, mean[left], answer[left], weight, base, there, few, each)
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
    each: Each,
) -> None:
    """The numbers that need every token: mean [row, 1], answer [row, 2] less it, spans (rows, their pair)."""
    n_rows, d_vocab = len(mean), len(weight.values)
    pieces = vocabulary_pieces(d_vocab, max(1024, CELLS // n_rows))
    # KL is of second order in D. float64 carries it through the cancellation of its first-order part.
    wide = torch.float64 if "kl" in out else mean.dtype
    mass = mean.new_zeros(len(pieces), n_rows, dtype=wide)  # Σ_j p_j expm1(D_j - m), of each piece
    rest = torch.zeros_like(mass)  # Σ_j p_j (D_j - m): not quite zero, since products are rounded
    highest = mean.new_full(mass.shape, -torch.inf)
    best = highest.clone()  # of base logit - base's top logit + D - m
    at_top = highest[0].clone()  # the top's own
    tops = base.logits.argmax(-1).tolist() if "flip" in out else []

    def take(i: int) -> None:
        piece = pieces[i]
        change = product(dn, weight.rows(piece), outputs_first=True).plain().sub_(mean)  # [row, piece]
        highest[i] = change.amax(-1)
        change_wide = change.to(wide)
        grown = torch.expm1(change_wide)
        for rows, pair in spans:
            p = base.p[pair, piece].to(wide)
            mass[i, rows] = grown[rows] @ p
            if "kl" in out:
                rest[i, rows] = change_wide[rows] @ p
            if "flip" in out:
                top = tops[pair]
                lead = base.logits[pair, piece] - base.logits[pair, top]  # [piece], <= 0
                best[i, rows] = (change[rows] + lead).amax(-1)
                if piece.start <= top < piece.stop:
                    at_top[rows] = change[rows, top - piece.start]

    each(take, range(len(pieces)))
    lse = torch.log1p(mass.sum(0))
    kl = lse - rest.sum(0)

    pair_of = torch.repeat_interleave(
        torch.tensor([pair for _, pair in spans]), torch.tensor([rows.stop - rows.start for rows, _ in spans])
    ).to(mean.device)
    direct = (highest.amax(0) > _HUGE).nonzero().squeeze(1)
    for some in direct.split(max(1, CELLS // d_vocab)):
        # log p + D: its exponential cannot overflow once the largest is taken out, and no term is negative.
        far = product(_rows(dn, some), weight).plain().sub_(mean[some]).double()  # [row, d_vocab]
        before = base.logits[pair_of[some]].double()
        lse[some] = ((before + far).logsumexp(-1) - before.logsumexp(-1)).to(wide)
        kl[some] = lse[some] - (far * base.p[pair_of[some]]).sum(-1).to(wide)

    if "flip" in out:
        out["flip"].copy_(best.amax(0) > at_top)
    if "kl" in out:
        out["kl"].copy_(kl.clamp_(min=0))
    for i, name in enumerate(("dlogp_clean", "dlogp_corrupted")):
        if name in out:
            torch.sub(answer[:, i], lse.to(mean.dtype), out=out[name])


def vocabulary_pieces(d_vocab: int, most: int) -> list[slice]:
    """The vocabulary in pieces of at most so many tokens. They do not depend on how many cores there are."""
    width = min(most, -(-d_vocab // _PIECES))
    return [slice(a, min(a + width, d_vocab)) for a in range(0, d_vocab, width)]
