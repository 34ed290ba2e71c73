"""Read-out with a Triton kernel that takes in the vocabulary piece by piece; see readout.py.

The products stay with the library that is fastest at them. A piece of logit changes is made by one, taken in
by the kernel and forgotten, so rows x vocabulary never exists. Sums over tokens are float32: with the mean
m out,
    Σ_j p_j expm1(D_j - m) = rest + excess,  rest = Σ_j p_j (D_j - m) (nothing but rounding),
    excess = Σ_j p_j (expm1(D_j - m) - (D_j - m)),
and no term of excess is negative, so the KL divergence, log1p(rest + excess) - rest, keeps its digits. So
does the change of entropy, which rest leaves as it is but for what is of third order.

Where logits are capped, D is what the cap makes of the products as they are taken in, and rest is of second
order: the formulas are the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltapatch.kernels.answers import Answers, Moved, with_beyond
from deltapatch.kernels.lang import capped_change, expm1_minus, jit, on_device, tl
from deltapatch.kernels.pieces import ForEach, in_turn
from deltapatch.kernels.product import NarrowedByPiece, Operand, Scaled, narrow_triton, product
from deltapatch.kernels.readout import OFF, BaseReadout, ReadRows, Unembedding
from deltapatch.kernels.tiles import pair_of_rows, pair_tiles

CELLS = 1 << 25  # logit changes held at a time: 128 MiB
_ROWS = 8  # of a tile
_HUGE = 60.0  # as in readout.py: beyond it the patched distribution is taken directly


def readout_triton(
    rows: ReadRows,
    unembedding: Unembedding,
    base: BaseReadout,
    *,
    measured: Sequence[str],
    pool: ForEach = in_turn,
) -> dict[str, Tensor]:
    """The same as `readout`; the host never waits for the device."""
    dn, segments, first_reads = rows
    tiles = pair_tiles(segments, first_reads, _ROWS, dn.device)
    read = pair_of_rows(segments, first_reads, dn.device)
    columns, linear, moved = _answers(rows, unembedding.exact, base)
    # One product with the difference of the columns: their common part never enters.
    vectors = [base.mean, linear[:, 0] - base.mean, linear[:, 1] - base.mean, linear[:, 0] - linear[:, 1]]
    if moved is None and base.cap is not None:
        vectors += [columns[:, 0], columns[:, 1]]
    dots = torch.empty(len(vectors), len(dn), dtype=dn.dtype, device=dn.device)
    with on_device(dn):
        _dots_kernel[(len(tiles),)](
            p_out=dots,
            p_d=dn,
            p_vectors=torch.stack(vectors, 1),
            p_tiles=tiles,
            n_rows=len(dn),
            s_d=dn.stride(0),
            HAS_CAP=len(vectors) > 4,
            D_MODEL=dn.shape[1],
            BLOCK_R=_ROWS,
            BLOCK_N=128,
        )
    if moved is None and base.cap is not None:
        moved = base.behind_cap(dots[4:].T, read)
    if moved is not None:
        dots[0], answer, dots[3] = with_beyond(dots[0], dots[1:3].T, dots[3], moved, base.cap)
        dots[1:3] = answer.T
    if all(name == "logit_diff" for name in measured):
        return dict.fromkeys(measured, dots[3])
    narrowed = narrow_triton(dn, unembedding.weight.precision)
    made = (unembedding.weight, base, tiles, read)
    found = _distribution(narrowed, dots, *made, entropy="entropy" in measured)
    found["logit_diff"] = dots[3]
    return {name: found[name].to(dn.dtype) for name in measured}


def _answers(rows: ReadRows, unembedding: Tensor, base: BaseReadout) -> tuple[Tensor, Tensor, Moved | None]:
    """The answers' columns, and those of the linear parts of their changes, [read, 2, d_model] each.

    Of answers that are any of several tokens also their changes; of single tokens a kernel makes these.
    """
    dn = rows.dn
    if base.others is None:
        columns = unembedding[base.answers].to(dn.dtype)
        return (
            columns,
            columns if base.cap is None else columns * base.slopes().to(dn.dtype).unsqueeze(2),
            None,
        )
    linear = dn.new_zeros(len(base.answers), 2, dn.shape[1])
    moved = Moved(*(dn.new_empty(len(dn), 2, dtype=torch.float64) for _ in range(2)))
    for some, read in rows.spans():
        linear[read], found = base.answer_change(dn[some], read, unembedding)
        assert found is not None
        moved.linear[some], moved.whole[some] = found
    return linear, linear, moved


def _distribution(
    dn: Scaled,
    dots: Tensor,
    weight: Operand | NarrowedByPiece,
    base: BaseReadout,
    tiles: Tensor,
    read: Tensor,
    *,
    entropy: bool,
) -> dict[str, Tensor]:
    """The numbers that need every token. dots: [vector, row], as `_dots_kernel` has them; read: [row]."""
    mean, answer = dots[0], dots[1:3].double()
    n_rows, d_vocab = len(mean), len(weight.values)
    lead = base.logits - base.logits.amax(-1, keepdim=True)  # [read, d_vocab], <= 0
    lead64 = lead.double()
    own = torch.bmm(base.p.unsqueeze(1), lead64.unsqueeze(2)).flatten()  # [read], Σ_j p_j lead_j
    # Of no tokens yet: rest, excess, highest change, highest patched logit, sum of exp relative to it, the
    # likeliest token (float32 holds every number of a vocabulary); where the entropy is asked for also
    # Σ_j p_j expm1(x_j) (l_j + x_j), and the sum of exp times what it is the exponential of.
    state = mean.new_zeros(n_rows, 8)
    state[:, 2:4] = -1e30
    # A multiple of 128: rows of logit changes then begin where wide loads may.
    width = min(d_vocab, max(1024, CELLS // max(1, n_rows) // 128 * 128))
    for first in range(0, d_vocab, width):
        change, scale = product(dn, weight.rows(slice(first, first + width)))  # [row, piece]
        with on_device(change):
            _take_in_kernel[(len(tiles),)](
                p_state=state,
                p_change=change,
                p_scale=scale,
                p_mean=mean,
                p_p=base.p,
                p_lead=lead,
                p_own=own.to(mean.dtype),
                p_uncapped=base.uncapped,
                p_tiles=tiles,
                first=first,
                width=change.shape[1],
                d_vocab=d_vocab,
                s_change=change.stride(0),
                cap=base.cap or 0.0,
                HAS_CAP=base.cap is not None,
                ENTROPY=entropy,
                BLOCK_R=_ROWS,
                BLOCK_N=128,
            )
    rest, excess, high, best, total, likeliest, turned, fall = state.double().unbind(1)
    mass = rest + excess
    direct = (high > _HUGE) | (rest < OFF)
    before = lead64.logsumexp(-1)
    lse = torch.where(direct, best + total.log() - before[read], mass.log1p())
    far = total.log() - fall / total - (before - own)[read]
    said = Answers(base.answers, base.others).all[read]  # [row, 2, token]
    return {
        "entropy": torch.where(direct, far, lse - (turned + rest) / (1 + mass)),
        "kl": (lse - rest).clamp(min=0),
        "flip": likeliest != base.logits.argmax(-1)[read],
        "says_clean": (likeliest.unsqueeze(1) == said[:, 0]).any(1),
        "says_corrupted": (likeliest.unsqueeze(1) == said[:, 1]).any(1),
        "dlogp_clean": answer[0] - lse,
        "dlogp_corrupted": answer[1] - lse,
    }


@jit(do_not_specialize=["n_rows"])
def _dots_kernel(  # type: ignore[no-untyped-def]
    p_out,
    p_d,
    p_vectors,
    p_tiles,
    n_rows,
    s_d,
    HAS_CAP: tl.constexpr,
    D_MODEL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of rows of one pair times the vectors of that pair, four or six: [vector, row]."""
    p_tile = p_tiles + tl.program_id(0) * 3
    row = tl.load(p_tile).to(tl.int64)
    count = tl.load(p_tile + 1)
    p_vectors += tl.load(p_tile + 2).to(tl.int64) * ((6 if HAS_CAP else 4) * D_MODEL)
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < count
    sum0 = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    sum1 = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    sum2 = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    sum3 = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    if HAS_CAP:
        sum4 = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        sum5 = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for n0 in range(0, D_MODEL, BLOCK_N):
        o_n = n0 + tl.arange(0, BLOCK_N)
        m_n = o_n < D_MODEL
        d = tl.load(
            p_d + (row + o_r)[:, None] * s_d + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0
        )
        sum0 += d * tl.load(p_vectors + o_n, mask=m_n, other=0.0)[None, :]
        sum1 += d * tl.load(p_vectors + D_MODEL + o_n, mask=m_n, other=0.0)[None, :]
        sum2 += d * tl.load(p_vectors + 2 * D_MODEL + o_n, mask=m_n, other=0.0)[None, :]
        sum3 += d * tl.load(p_vectors + 3 * D_MODEL + o_n, mask=m_n, other=0.0)[None, :]
        if HAS_CAP:
            sum4 += d * tl.load(p_vectors + 4 * D_MODEL + o_n, mask=m_n, other=0.0)[None, :]
            sum5 += d * tl.load(p_vectors + 5 * D_MODEL + o_n, mask=m_n, other=0.0)[None, :]
    p_out += row + o_r
    tl.store(p_out, tl.sum(sum0, 1), mask=m_r)
    tl.store(p_out + n_rows, tl.sum(sum1, 1), mask=m_r)
    tl.store(p_out + 2 * n_rows, tl.sum(sum2, 1), mask=m_r)
    tl.store(p_out + 3 * n_rows, tl.sum(sum3, 1), mask=m_r)
    if HAS_CAP:
        tl.store(p_out + 4 * n_rows, tl.sum(sum4, 1), mask=m_r)
        tl.store(p_out + 5 * n_rows, tl.sum(sum5, 1), mask=m_r)


@jit
def _take_in_kernel(  # type: ignore[no-untyped-def]
    p_state,
    p_change,
    p_scale,
    p_mean,
    p_p,
    p_lead,
    p_own,
    p_uncapped,
    p_tiles,
    first,
    width,
    d_vocab,
    s_change,
    cap,
    HAS_CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of rows of one pair takes in a piece of the vocabulary.

    Sums and maxima are kept for each lane and joined at the end: no step waits for another warp.
    """
    p_tile = p_tiles + tl.program_id(0) * 3
    row = tl.load(p_tile).to(tl.int64)
    count = tl.load(p_tile + 1)
    pair = tl.load(p_tile + 2).to(tl.int64)
    own = tl.load(p_own + pair)
    p_p += pair * d_vocab + first
    p_lead += pair * d_vocab + first
    if HAS_CAP:
        p_uncapped += pair * d_vocab + first
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < count
    mean = tl.load(p_mean + row + o_r, mask=m_r, other=0.0)
    if p_scale is not None:
        scale = tl.load(p_scale + row + o_r, mask=m_r, other=0.0)
    p_change += (row + o_r)[:, None] * s_change

    rest = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    excess = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    turned = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    fall = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    high = tl.full([BLOCK_R, BLOCK_N], -1e30, tl.float32)
    best = tl.full([BLOCK_R, BLOCK_N], -1e30, tl.float32)
    likeliest = tl.zeros([BLOCK_R, BLOCK_N], tl.int32)
    for n0 in range(0, width, BLOCK_N):
        o_n = n0 + tl.arange(0, BLOCK_N)
        m_n = o_n < width
        p = tl.load(p_p + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        lead = tl.load(p_lead + o_n, mask=m_n, other=-2e30)[None, :]
        change = tl.load(p_change + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0)
        if p_scale is not None:
            change *= scale[:, None]
        if HAS_CAP:
            uncapped = tl.load(p_uncapped + o_n, mask=m_n, other=0.0)[None, :]
            change = capped_change(uncapped, change, cap)
        change -= mean[:, None]
        rest += p * change
        more = expm1_minus(change)
        excess += p * more
        if ENTROPY:
            # Where the change is that large, the patched distribution is taken directly.
            turned += p * tl.minimum(more + change, 1e30) * (lead - own + change)
        high = tl.maximum(high, tl.where(m_n[None, :], change, -1e30))
        # One exponential both for a new maximum and for a term below the old one.
        step = lead + change - best
        less = tl.exp(-tl.abs(step))
        if ENTROPY:
            fall = tl.where(step > 0, (fall - step * total) * less, fall + step * less)
        total = tl.where(step > 0, total * less + 1.0, total + less)
        likeliest = tl.where(step > 0, (first + o_n)[None, :], likeliest)
        best = tl.maximum(best, lead + change)

    p_state += (row + o_r) * 8
    old_best = tl.load(p_state + 3, mask=m_r, other=-1e30)
    old_total = tl.load(p_state + 4, mask=m_r, other=0.0)
    top = tl.max(best, 1)
    likeliest = tl.min(tl.where(best == top[:, None], likeliest, 1 << 30), 1)  # of equal ones the first
    old_likeliest = tl.load(p_state + 5, mask=m_r, other=0.0)
    new_best = tl.maximum(old_best, top)
    under = best - new_best[:, None]
    new_total = old_total * tl.exp(old_best - new_best) + tl.sum(total * tl.exp(under), 1)
    if ENTROPY:
        old_fall = tl.load(p_state + 7, mask=m_r, other=0.0)
        new_fall = (old_fall + (old_best - new_best) * old_total) * tl.exp(old_best - new_best)
        new_fall += tl.sum((fall + under * total) * tl.exp(under), 1)
        tl.store(p_state + 6, tl.load(p_state + 6, mask=m_r, other=0.0) + tl.sum(turned, 1), mask=m_r)
        tl.store(p_state + 7, new_fall, mask=m_r)
    tl.store(p_state, tl.load(p_state, mask=m_r, other=0.0) + tl.sum(rest, 1), mask=m_r)
    tl.store(p_state + 1, tl.load(p_state + 1, mask=m_r, other=0.0) + tl.sum(excess, 1), mask=m_r)
    tl.store(p_state + 2, tl.maximum(tl.load(p_state + 2, mask=m_r, other=-1e30), tl.max(high, 1)), mask=m_r)
    tl.store(p_state + 3, new_best, mask=m_r)
    tl.store(p_state + 4, new_total, mask=m_r)
    tl.store(p_state + 5, tl.where(top > old_best, likeliest.to(tl.float32), old_likeliest), mask=m_r)
