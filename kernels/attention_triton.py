"""Attention difference by a Triton kernel; the mathematics is described in attention.py.

A program has one head and a tile of queries that meet the same keys of the base run, so that these are loaded
once for all of them: several rows at one position (rows with few own positions, and the last layer), or
several positions of one row. Where a block of keys holds the whole prompt, its scores are computed once; else
the program goes over the keys twice, for the softmaxes of base and patched run and for the values.

Only the distance of query and key matters to rotary. So rows at one position are left as they are, and what
they meet is turned back by that position instead: the base's query and keys, once for all rows, and the rows'
own keys at earlier positions. Those at the position itself need no turning.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltapatch.kernels.attention import HUGE, QKV, AttentionBase, attention_difference
from deltapatch.kernels.edits import Edit, swaps_of
from deltapatch.kernels.lang import capped_change, expm1, jit, next_power_of_two, on_device, tl
from deltapatch.kernels.product import Precision, Scaled, narrow
from deltapatch.kernels.segments import Segment, read_segments
from deltapatch.kernels.tiles import query_tiles

_LONGEST_BLOCK = 64  # keys; prompts up to it go through one block


def attention_difference_triton(
    changes: QKV,
    base: AttentionBase,
    segments: list[Segment],
    swaps: Mapping[str, Sequence[Edit]],
    precision: Precision,
    *,
    reads_only: bool,
    pattern: Tensor | None = None,
) -> Scaled:
    """The same as `attention_difference`: one launch for each of the two kinds of tiles.

    Where the result needs a scale, it is written in float32 and narrowed afterwards. The kernel holds no
    query's probabilities whole: where they are patched, which is one layer of a row, or asked for, the
    reference takes its place.
    """
    if pattern is not None or swaps.get("pattern"):
        return attention_difference(
            changes, base, segments, swaps, precision, reads_only=reads_only, pattern=pattern
        )
    dq, dk, dv, scale_of_rows = changes
    q, k, v, rotary = base[:4]
    n_heads, d_head = dq.shape[1:]
    n_kv = dk.shape[1]
    n_out = sum(s.n_tokens for s in (read_segments(segments) if reads_only else segments))
    dtype = torch.float32 if precision.scaled else precision.operand
    out = torch.empty(n_out, n_heads * d_head, dtype=dtype, device=dq.device)
    # One variant of the kernel for patches of any of q, k and v, since one takes seconds to compile.
    has_qkv, has_z = (any(swaps.get(place) for place in places) for places in ("qkv", "z"))
    places: dict[str, Tensor | None] = {}
    for place, lines, heads, wanted in (
        ("q", len(dq), n_heads, has_qkv),
        ("k", len(dk), n_kv, has_qkv),
        ("v", len(dv), n_kv, has_qkv),
        ("z", n_out, n_heads, has_z),
    ):
        found = _patched(swaps.get(place, []), lines, heads, q) if wanted else (None, None)
        places[f"p_from_{place}"], places[f"p_new_{place}"] = found
    strides = {
        f"s_{name}_{axis}": array.stride(i)
        for name, array in (("dq", dq), ("dk", dk), ("dv", dv), ("q", q), ("k", k), ("v", v))
        for i, axis in enumerate(("token", "head"))
    }
    longest = max((s.length for s in segments), default=0)
    earlier = any(s.positions > 1 for s in segments)
    forks = any(s.fork is not None for s in segments)
    sizes = [_sizes(by_rows, longest, d_head, earlier) for by_rows in (True, False)]
    tables = query_tiles(segments, reads_only, sizes[0]["BLOCK_Q"], sizes[1]["BLOCK_Q"], dq.device)
    for tiles, by_rows, size in zip(tables, (True, False), sizes, strict=True):
        if not len(tiles):
            continue
        with on_device(dq):
            _attention_kernel[(len(tiles) * n_heads,)](
                p_out=out,
                p_dq=dq,
                p_dk=dk,
                p_dv=dv,
                p_scale=scale_of_rows,
                **places,
                p_q=q,
                p_k=k,
                p_v=v,
                p_cos=rotary.cos.contiguous(),
                p_sin=rotary.sin.contiguous(),
                p_tiles=tiles,
                **strides,
                logit_scale=base.logit_scale,
                softcap=base.softcap or 0.0,
                window=base.window or 0,
                BY_ROWS=by_rows,
                HAS_EARLIER=earlier,
                HAS_FORK=forks,
                HAS_SCALE=scale_of_rows is not None,
                HAS_QKV=has_qkv,
                HAS_WINDOW=base.window is not None and base.window < longest,
                HAS_CAP=base.softcap is not None,
                HAS_Z=has_z,
                N_HEADS=n_heads,
                N_KV=n_kv,
                D_HEAD=d_head,
                PAIRS=rotary.cos.shape[1],
                INTERLEAVED=rotary.interleaved,
                HUGE=HUGE,
                **size,
            )
    return narrow(out, precision) if precision.scaled else Scaled(out)


def _sizes(by_rows: bool, longest: int, d_head: int, earlier: bool) -> dict[str, Any]:
    """Blocks of queries, keys and coordinates, as large as registers allow: see bench/compile_kernels.py.

    Args:
        by_rows: of tiles of rows, else of queries.
        longest: prompt.
        d_head: any.
        earlier: whether any row has several own positions.
    """
    block_c = max(16, next_power_of_two(d_head))
    keys = max(16, next_power_of_two(longest))
    whole = keys <= _LONGEST_BLOCK
    short = keys <= 32
    warps = 4 if by_rows or not short else 2
    narrow = not whole and block_c <= 64
    return {
        "WHOLE": whole,
        "BLOCK_Q": 64 if by_rows and short else 16,
        "BLOCK_K": keys if whole else 32 if by_rows or block_c <= 128 else 16,
        "BLOCK_C": block_c,
        "BLOCK_S": 16,
        "num_warps": warps if whole or block_c <= 64 else 8,
        "num_stages": 1,
        # Left to itself, the assembler spills a little there to have more programs side by side.
        "maxnreg": 255 if narrow or (earlier and not (by_rows and short)) else None,
    }


def _patched(edits: Sequence[Edit], lines: int, heads: int, some: Tensor) -> tuple[Tensor, Tensor]:
    """Where a kernel finds what takes the place of heads: no host waits for it.

    Args:
        edits: swaps of heads; there may be none.
        lines, heads: of what is patched.
        some: any array in the base dtype, where there is nothing to be found.

    Returns:
        [line, head] int64, where a head's replacement begins, -1 for a head that is not patched; and the
        array that it lies in.
    """
    swaps = swaps_of(edits)
    if not swaps:
        delta, first = some, []
    elif len(swaps) == 1:
        delta, first = swaps[0].delta, [0]
    else:
        delta = torch.cat([s.delta for s in swaps])
        first = [sum(len(s.delta) for s in swaps[:i]) for i in range(len(swaps))]
    begins = torch.full((lines, heads), -1, dtype=torch.int64, device=delta.device)
    for swap, line in zip(swaps, first, strict=True):
        assert swap.at is not None
        at = (swap.source + line) * delta.stride(0) + swap.at * delta.stride(1)
        begins.index_put_((swap.token, swap.at), at)
    return begins, delta


@jit
def _attention_kernel(  # type: ignore[no-untyped-def]
    p_out,
    p_dq,
    p_dk,
    p_dv,
    p_scale,
    p_from_q,
    p_new_q,
    p_from_k,
    p_new_k,
    p_from_v,
    p_new_v,
    p_from_z,
    p_new_z,
    p_q,
    p_k,
    p_v,
    p_cos,
    p_sin,
    p_tiles,
    s_dq_token,
    s_dq_head,
    s_dk_token,
    s_dk_head,
    s_dv_token,
    s_dv_head,
    s_q_token,
    s_q_head,
    s_k_token,
    s_k_head,
    s_v_token,
    s_v_head,
    logit_scale,
    softcap,
    window,
    BY_ROWS: tl.constexpr,
    HAS_EARLIER: tl.constexpr,
    HAS_FORK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_QKV: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_Z: tl.constexpr,
    N_HEADS: tl.constexpr,
    N_KV: tl.constexpr,
    D_HEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HUGE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One tile of queries, one head. Where BY_ROWS, the queries have one position and so one base query."""
    # Heads come first, so that neighbouring programs read the same rows, and groups of heads the same keys.
    i_head = tl.program_id(0) % N_HEADS
    i_kv = i_head // (N_HEADS // N_KV)
    p_tile = p_tiles + (tl.program_id(0) // N_HEADS) * 10
    query = tl.load(p_tile).to(tl.int64)
    to = tl.load(p_tile + 1).to(tl.int64)
    own = tl.load(p_tile + 2).to(tl.int64)
    count = tl.load(p_tile + 3)
    stride = tl.load(p_tile + 4)
    base = tl.load(p_tile + 5).to(tl.int64)
    start = tl.load(p_tile + 6)
    position = tl.load(p_tile + 7)

    o_q = tl.arange(0, BLOCK_Q)
    m_q = o_q < count
    if BY_ROWS:
        o_row = o_q  # from one row's token to the next's
        o_at = position + tl.arange(0, 1)  # [1], the position of all
        end = position + 1
    else:
        o_row = o_q * stride
        o_at = position + o_q  # [query]
        end = position + count
    branches = (end, end)
    if HAS_FORK:
        branches = (tl.load(p_tile + 8), tl.load(p_tile + 9))
    tile = (query + o_row, o_q, count, own, stride, o_at, start, position, end)
    rows_q = (p_dq + i_head * s_dq_head, s_dq_token, p_scale, p_from_q, p_new_q, i_head)
    rows_k = (p_dk + i_kv * s_dk_head, s_dk_token, p_scale, p_from_k, p_new_k, i_kv)
    rows_v = (p_dv + i_kv * s_dv_head, s_dv_token, p_scale, p_from_v, p_new_v, i_kv)
    base_q = (p_q + base * s_q_token + i_head * s_q_head, s_q_token)
    base_k = (p_k + base * s_k_token + i_kv * s_k_head, s_k_token)
    angles = (p_cos + base * PAIRS, p_sin + base * PAIRS)
    scores = (logit_scale, softcap, window)
    p_v += base * s_v_token + i_kv * s_v_head
    to += o_row

    if WHOLE:
        logit, change = _scores(
            tile, branches, rows_q, rows_k, base_q, base_k, angles, scores, 0,
            BY_ROWS, HAS_EARLIER, HAS_FORK, HAS_SCALE, HAS_QKV, HAS_WINDOW, HAS_CAP,
            N_HEADS, N_KV, D_HEAD, PAIRS, INTERLEAVED, BLOCK_Q, BLOCK_K, BLOCK_S,
        )  # fmt: skip
        p, w = _weights(logit, change, HUGE)
        o_k = tl.arange(0, BLOCK_K)
        last = tl.sum(tl.where((o_k == position)[None, :], p + w, 0.0), 1)
        for c0 in range(0, D_HEAD, BLOCK_S):
            o_c = c0 + tl.arange(0, BLOCK_S)
            m_c = o_c < D_HEAD
            values = tl.load(
                p_v + o_k[:, None].to(tl.int64) * s_v_token + o_c[None, :],
                mask=(o_k < end)[:, None] & m_c[None, :],
                other=0.0,
            )
            acc = tl.dot(w, values, input_precision="tf32x3")
            acc = _add_own_values(
                acc,
                p + w,
                last,
                tile,
                rows_v,
                o_c,
                0,
                BY_ROWS,
                HAS_EARLIER,
                HAS_SCALE,
                HAS_QKV,
                N_KV,
                D_HEAD,
                BLOCK_K,
            )
            _store(p_out, p_from_z, p_new_z, acc, to, m_q, i_head, o_c, HAS_Z, N_HEADS, D_HEAD)
    else:
        begin = 0
        if HAS_WINDOW and not HAS_FORK:  # keys that no query of the tile sees are left out
            begin = tl.maximum(position - window + 1, 0) // BLOCK_K * BLOCK_K
        # Base and patched softmax, and the mean of the logit changes under the base's.
        high = tl.full([BLOCK_Q], -1e30, tl.float32)  # of the changes
        top = tl.full([1 if BY_ROWS else BLOCK_Q], -1e30, tl.float32)
        total = tl.zeros_like(top)
        mean = tl.zeros([BLOCK_Q], tl.float32)
        new_top = tl.full([BLOCK_Q], -1e30, tl.float32)
        new_total = tl.zeros([BLOCK_Q], tl.float32)
        for k0 in tl.range(begin, end, BLOCK_K, disable_licm=True):
            logit, change = _scores(
                tile, branches, rows_q, rows_k, base_q, base_k, angles, scores, k0,
                BY_ROWS, HAS_EARLIER, HAS_FORK, HAS_SCALE, HAS_QKV, HAS_WINDOW, HAS_CAP,
                N_HEADS, N_KV, D_HEAD, PAIRS, INTERLEAVED, BLOCK_Q, BLOCK_K, BLOCK_S,
            )  # fmt: skip
            high = tl.maximum(high, tl.max(tl.where(logit > -1e30, change, -1e30), 1))
            higher = tl.maximum(top, tl.max(logit, 1))
            shrink = tl.exp(top - higher)
            weight = tl.exp(logit - higher[:, None])
            total = total * shrink + tl.sum(weight, 1)
            mean = mean * shrink + tl.sum(weight * change, 1)
            top = higher
            new = logit + change
            higher = tl.maximum(new_top, tl.max(new, 1))
            new_total = new_total * tl.exp(new_top - higher) + tl.sum(tl.exp(new - higher[:, None]), 1)
            new_top = higher
        if HAS_WINDOW:  # queries that are none, at the tile's end, may see nothing
            total = tl.maximum(total, 1e-30)
            new_total = tl.maximum(new_total, 1e-30)
        mean = mean / total
        log_total = top + tl.log(total)
        new_log_total = new_top + tl.log(new_total)
        direct = high - mean > HUGE

        # The changes of the weights, up to a factor and a share of the base's (see `rest`), and the values.
        o_c = tl.arange(0, BLOCK_C)
        a = tl.zeros([BLOCK_Q], tl.float32)
        acc = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
        z = tl.zeros([1 if BY_ROWS else BLOCK_Q, BLOCK_C], tl.float32)
        for k0 in tl.range(begin, end, BLOCK_K, disable_licm=True):
            logit, change = _scores(
                tile, branches, rows_q, rows_k, base_q, base_k, angles, scores, k0,
                BY_ROWS, HAS_EARLIER, HAS_FORK, HAS_SCALE, HAS_QKV, HAS_WINDOW, HAS_CAP,
                N_HEADS, N_KV, D_HEAD, PAIRS, INTERLEAVED, BLOCK_Q, BLOCK_K, BLOCK_S,
            )  # fmt: skip
            p = tl.exp(logit - log_total[:, None])
            new = tl.exp(logit + change - new_log_total[:, None])
            w = tl.where(direct[:, None], new - p, p * expm1(change - mean[:, None]))
            a += tl.sum(w, 1)
            o_k = k0 + tl.arange(0, BLOCK_K)
            values = tl.load(
                p_v + o_k[:, None].to(tl.int64) * s_v_token + o_c[None, :],
                mask=(o_k < end)[:, None] & (o_c < D_HEAD)[None, :],
                other=0.0,
            )
            acc = tl.dot(w, values, acc, input_precision="tf32x3")
            if BY_ROWS:
                z += tl.sum(tl.trans(p) * values, 0)[None, :]
            else:
                z = tl.dot(p, values, z, input_precision="tf32x3")
            last = tl.sum(tl.where((o_k == position)[None, :], p + w, 0.0), 1)
            acc = _add_own_values(
                acc,
                p + w,
                last,
                tile,
                rows_v,
                o_c,
                k0,
                BY_ROWS,
                HAS_EARLIER,
                HAS_SCALE,
                HAS_QKV,
                N_KV,
                D_HEAD,
                BLOCK_K,
            )
        rest = tl.where(direct, 0.0, a)
        acc = (acc - rest[:, None] * z) / (1.0 + rest)[:, None]
        _store(p_out, p_from_z, p_new_z, acc, to, m_q, i_head, o_c, HAS_Z, N_HEADS, D_HEAD)


@jit
def _scores(  # type: ignore[no-untyped-def]
    tile, branches, rows_q, rows_k, base_q, base_k, angles, scores, k0,
    BY_ROWS: tl.constexpr, HAS_EARLIER: tl.constexpr, HAS_FORK: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_QKV: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    N_HEADS: tl.constexpr, N_KV: tl.constexpr, D_HEAD: tl.constexpr,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Base logits [query or 1, key], -2e30 at keys that queries do not see, and their changes [query, key].

    Dimensions go in slices: whole queries, in the two parts that float32 products take, would spill.
    """
    token, o_q, count, own, stride, o_at, start, position, end = tile
    m_q = o_q < count
    o_k = k0 + tl.arange(0, BLOCK_K)
    m_k = o_k < end
    change = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    if BY_ROWS:
        # A loop of its own for the base, since both at once take many more registers.
        terms = tl.zeros([BLOCK_K, BLOCK_S], tl.float32)
        for c0 in range(0, D_HEAD, BLOCK_S):
            o_c = c0 + tl.arange(0, BLOCK_S)
            m_c = o_c < D_HEAD
            terms += _base(base_q, o_at, o_at < end, o_c, m_c) * _base(base_k, o_k, m_k, o_c, m_c)
        logit = tl.sum(terms, 1)[None, :]
        own_terms = tl.zeros([BLOCK_Q, BLOCK_S], tl.float32)  # of the change at the queries' own position
        m_last = o_q < tl.where(k0 + BLOCK_K > position, count, 0)
        for c0 in range(0, D_HEAD, BLOCK_S):
            o_c = c0 + tl.arange(0, BLOCK_S)
            cos, sin = _angles(angles, o_at, o_at < end, o_c, PAIRS, INTERLEAVED)
            keys = _turned(base_k, o_k, m_k, o_c, cos, -sin, D_HEAD, PAIRS, INTERLEAVED)
            dq = _changes(rows_q, token, m_q, o_c, D_HEAD, HAS_SCALE, HAS_QKV, N_HEADS)
            change = tl.dot(dq, tl.trans(keys), change, input_precision="tf32x3")
            q = _turned(base_q, o_at, o_at < end, o_c, cos, -sin, D_HEAD, PAIRS, INTERLEAVED)
            dk = _changes(rows_k, token, m_last, o_c, D_HEAD, HAS_SCALE, HAS_QKV, N_KV)
            own_terms += (q + dq) * dk
        change += tl.where((o_k == position)[None, :], tl.sum(own_terms, 1)[:, None], 0.0)
        if HAS_EARLIER:
            for j in range(tl.maximum(k0, start), tl.minimum(k0 + BLOCK_K, position)):
                own_terms = tl.zeros([BLOCK_Q, BLOCK_S], tl.float32)
                o_j = j + tl.arange(0, 1)
                for c0 in range(0, D_HEAD, BLOCK_S):
                    o_c = c0 + tl.arange(0, BLOCK_S)
                    cos, sin = _angles(angles, o_at, o_at < end, o_c, PAIRS, INTERLEAVED)
                    cos_j, sin_j = _angles(angles, o_j, o_j < end, o_c, PAIRS, INTERLEAVED)
                    q = _turned(base_q, o_at, o_at < end, o_c, cos, -sin, D_HEAD, PAIRS, INTERLEAVED)
                    dq = _changes(rows_q, token, m_q, o_c, D_HEAD, HAS_SCALE, HAS_QKV, N_HEADS)
                    dk = _turned_changes(
                        rows_k, own + o_q + (j - start) * stride, m_q, o_c,
                        cos_j * cos + sin_j * sin, sin_j * cos - cos_j * sin,
                        D_HEAD, PAIRS, INTERLEAVED, HAS_SCALE, HAS_QKV, N_KV,
                    )  # fmt: skip
                    own_terms += (q + dq) * dk
                change += tl.where((o_k == j)[None, :], tl.sum(own_terms, 1)[:, None], 0.0)
    else:
        logit = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        m_own = m_k & (o_k >= start)
        for c0 in range(0, D_HEAD, BLOCK_S):
            o_c = c0 + tl.arange(0, BLOCK_S)
            m_c = o_c < D_HEAD
            q = _base(base_q, o_at, m_q, o_c, m_c)
            keys = _base(base_k, o_k, m_k, o_c, m_c)
            cos, sin = _angles(angles, o_at, m_q, o_c, PAIRS, INTERLEAVED)
            dq = _turned_changes(
                rows_q, token, m_q, o_c, cos, sin,
                D_HEAD, PAIRS, INTERLEAVED, HAS_SCALE, HAS_QKV, N_HEADS,
            )  # fmt: skip
            logit = tl.dot(q, tl.trans(keys), logit, input_precision="tf32x3")
            change = tl.dot(dq, tl.trans(keys), change, input_precision="tf32x3")
            if k0 + BLOCK_K > start:
                cos_k, sin_k = _angles(angles, o_k, m_own, o_c, PAIRS, INTERLEAVED)
                dk = _turned_changes(
                    rows_k, own + (o_k - start) * stride, m_own, o_c, cos_k, sin_k,
                    D_HEAD, PAIRS, INTERLEAVED, HAS_SCALE, HAS_QKV, N_KV,
                )  # fmt: skip
                change = tl.dot(q + dq, tl.trans(dk), change, input_precision="tf32x3")
    seen = (o_k[None, :] <= o_at[:, None]) & m_k[None, :]
    if HAS_FORK:  # the second branch sees nothing of the first
        first, second = branches
        seen &= ((o_k < first) | (o_k >= second))[None, :] | (o_at < second)[:, None]
    logit_scale, softcap, window = scores
    if HAS_WINDOW:  # of positions: those of the second branch begin where those of the first do
        passed = o_at[:, None] - o_k[None, :]
        if HAS_FORK:
            first, second = branches
            back = second - first
            passed += tl.where(o_k >= second, back, 0)[None, :] - tl.where(o_at >= second, back, 0)[:, None]
        seen &= passed < window
    logit *= logit_scale
    change *= logit_scale
    if HAS_CAP:
        change = capped_change(logit, change, softcap)
        logit = capped_change(tl.zeros_like(logit), logit, softcap)
    return tl.where(seen, logit, -2e30), tl.where(seen, change, 0.0)


@jit
def _weights(logit, change, HUGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Base weights [query or 1, key] and their changes [query, key], where all scores are at hand."""
    p = tl.exp(logit - tl.max(logit, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    change -= tl.sum(p * change, 1)[:, None]
    high = tl.max(tl.where(logit > -1e30, change, -1e30), 1)
    w = expm1(change)
    a = tl.sum(p * w, 1)
    w = p * (w - a[:, None]) / (1.0 + a)[:, None]
    new = logit + change
    new = tl.exp(new - tl.max(new, 1)[:, None])
    new = new / tl.sum(new, 1)[:, None]
    return p, tl.where((high > HUGE)[:, None], new - p, w)


@jit
def _add_own_values(  # type: ignore[no-untyped-def]
    acc, weights, last, tile, rows_v, o_c, k0,
    BY_ROWS: tl.constexpr, HAS_EARLIER: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_QKV: tl.constexpr,
    N_KV: tl.constexpr, D_HEAD: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the rows' own changes of values, times new weights [query, key]; `last` is that of `position`."""
    token, o_q, count, own, stride, _, start, position, end = tile
    m_q = o_q < count
    o_k = k0 + tl.arange(0, BLOCK_K)
    if BY_ROWS:
        m_last = o_q < tl.where(k0 + BLOCK_K > position, count, 0)
        acc += last[:, None] * _changes(rows_v, token, m_last, o_c, D_HEAD, HAS_SCALE, HAS_QKV, N_KV)
        if HAS_EARLIER:
            for j in range(tl.maximum(k0, start), tl.minimum(k0 + BLOCK_K, position)):
                dv = _changes(
                    rows_v, own + o_q + (j - start) * stride, m_q, o_c, D_HEAD, HAS_SCALE, HAS_QKV, N_KV
                )
                acc += tl.sum(tl.where((o_k == j)[None, :], weights, 0.0), 1)[:, None] * dv
    elif k0 + BLOCK_K > start:
        m_own = (o_k >= start) & (o_k < end)
        dv = _changes(rows_v, own + (o_k - start) * stride, m_own, o_c, D_HEAD, HAS_SCALE, HAS_QKV, N_KV)
        acc = tl.dot(weights, dv, acc, input_precision="tf32x3")
    return acc


@jit
def _store(  # type: ignore[no-untyped-def]
    p_out, p_from, p_new, acc, to, m_q, i_head, o_c,
    HAS_Z: tl.constexpr, N_HEADS: tl.constexpr, D_HEAD: tl.constexpr,
):  # fmt: skip
    """Write some coordinates of one head, [query, coordinate], with the swaps of z."""
    mask = m_q[:, None] & (o_c < D_HEAD)[None, :]
    if HAS_Z:
        begin = tl.load(p_from + to * N_HEADS + i_head, mask=m_q, other=-1)
        patched = (begin >= 0)[:, None]
        new = tl.load(p_new + begin[:, None] + o_c[None, :], mask=mask & patched, other=0.0)
        acc = tl.where(patched, new, acc)
    p_out += to[:, None] * (N_HEADS * D_HEAD) + i_head * D_HEAD + o_c[None, :]
    tl.store(p_out, acc.to(p_out.dtype.element_ty), mask=mask)


@jit
def _changes(  # type: ignore[no-untyped-def]
    rows, token, m_token, o_c,
    D_HEAD: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NEW: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Changes of one head of N at some tokens, [token, coordinate]: scaled, or what takes their place."""
    p, s_token, p_scale, p_from, p_new, i_head = rows
    mask = m_token[:, None] & (o_c < D_HEAD)[None, :]
    d = tl.load(p + token[:, None] * s_token + o_c[None, :], mask=mask, other=0.0)
    if HAS_SCALE:
        d *= tl.load(p_scale + token, mask=m_token, other=0.0)[:, None]
    if HAS_NEW:
        begin = tl.load(p_from + token * N + i_head, mask=m_token, other=-1)
        patched = (begin >= 0)[:, None]
        new = tl.load(p_new + begin[:, None] + o_c[None, :], mask=mask & patched, other=0.0)
        d = tl.where(patched, new, d)
    return d


@jit
def _turned_changes(  # type: ignore[no-untyped-def]
    rows, token, m_token, o_c, cos, sin,
    D_HEAD: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_NEW: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The same, turned."""
    d = _changes(rows, token, m_token, o_c, D_HEAD, HAS_SCALE, HAS_NEW, N)
    if PAIRS > 0:
        o_p = _partners(o_c, PAIRS, INTERLEAVED)
        d = d * cos + _changes(rows, token, m_token, o_p, D_HEAD, HAS_SCALE, HAS_NEW, N) * sin
    return d


@jit
def _base(base, o_at, m_at, o_c, m_c):  # type: ignore[no-untyped-def]
    """Base queries or keys at some positions, [position, coordinate]."""
    p, s_token = base
    at = o_at.to(tl.int64)[:, None] * s_token + o_c[None, :]
    return tl.load(p + at, mask=m_at[:, None] & m_c[None, :], other=0.0)


@jit
def _turned(  # type: ignore[no-untyped-def]
    base, o_at, m_at, o_c, cos, sin, D_HEAD: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """The same, turned."""
    x = _base(base, o_at, m_at, o_c, o_c < D_HEAD)
    if PAIRS > 0:
        o_p = _partners(o_c, PAIRS, INTERLEAVED)
        x = x * cos + _base(base, o_at, m_at, o_p, o_c < 2 * PAIRS) * sin
    return x


@jit
def _partners(o_c, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The other coordinate of each one's pair; any, from the head's end on, for those in no pair."""
    if INTERLEAVED:
        return tl.where(o_c < 2 * PAIRS, o_c ^ 1, 1 << 30)
    other = tl.where(o_c < PAIRS, o_c + PAIRS, tl.where(o_c < 2 * PAIRS, o_c - PAIRS, 1 << 30))
    side_by_side: tl.constexpr = 4 if PAIRS % 4 == 0 else 2 if PAIRS % 2 == 0 else 1
    return tl.max_contiguous(tl.multiple_of(other, side_by_side), side_by_side)


@jit
def _angles(  # type: ignore[no-untyped-def]
    angles, o_at, m_at, o_c, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Factors of coordinates and of their partners, whose sum is turned: [position, coordinate] twice."""
    p_cos, p_sin = angles
    if INTERLEAVED:
        pair = o_c // 2
        second = o_c % 2 == 1
    else:
        second = o_c >= PAIRS
        side_by_side: tl.constexpr = 4 if PAIRS % 4 == 0 else 2 if PAIRS % 2 == 0 else 1
        pair = tl.where(second, o_c - PAIRS, o_c)
        pair = tl.max_contiguous(tl.multiple_of(pair, side_by_side), side_by_side)
    at = o_at.to(tl.int64)[:, None] * PAIRS + pair[None, :]
    mask = m_at[:, None] & (o_c < 2 * PAIRS)[None, :]
    cos = tl.load(p_cos + at, mask=mask, other=1.0)
    sin = tl.load(p_sin + at, mask=mask, other=0.0)
    return cos, tl.where(second[None, :], sin, -sin)
