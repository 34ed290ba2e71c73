"""Residual add, swaps, norm difference and narrowing in one Triton kernel; see norm.py."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltapatch.kernels.edits import Edit, Swap, swaps_of
from deltapatch.kernels.edits_triton import Patches, order_patches
from deltapatch.kernels.lang import jit, next_power_of_two, on_device, power_scale, tl
from deltapatch.kernels.norm import COLLAPSE, Norms, Part
from deltapatch.kernels.product import Precision, Scaled
from deltapatch.kernels.segments import Segment
from deltapatch.kernels.tiles import base_tiles

_PARTS = 3  # at most
_ROWS = 8  # that a program takes one after the other, with one load of base and weights


def add_norm_triton(
    parts: list[Part],
    swaps: Sequence[Edit],
    norms: Norms | None,
    segments: list[Segment],
    precision: Precision,
    *,
    out: Tensor | None = None,
    to: Tensor | None = None,
) -> list[Scaled]:
    """The same as `add_norm`: one read of each part, one write of the sum and of each norm."""
    x, weights, eps, centred = norms or (None, [], 0.0, False)
    if out is None and not weights:
        return []
    like = x if out is None else out
    assert like is not None
    n_tokens, width, device = sum(s.n_tokens for s in segments), like.shape[-1], like.device
    heads = like.shape[1:-1]  # () of a vector
    n_lines = n_tokens * math.prod(heads)
    parts = [p for p in parts if p.d is not None or p.swaps]
    parts += [Part(None, [])] * (_PARTS - len(parts))
    places = [*(p.swaps for p in parts), swaps]
    if heads:
        assert len(weights) == 1
        assert out is None
        assert parts[0].d is not None
        places = [_of_lines(edits, *heads) for edits in places]
    patches = order_patches(places, n_lines)
    values = [None if p.d is None else p.d.values for p in parts]
    assert all(d is None or d.stride(-1) == 1 for d in values)
    results = [torch.empty(n_tokens, *heads, width, dtype=precision.operand, device=device) for _ in weights]
    scales = [torch.empty(n_tokens, *heads, device=device) if precision.scaled else None for _ in weights]
    tiles = base_tiles(segments, _ROWS, device)
    block = next_power_of_two(width)
    if to is None and not weights:
        # Rows that leave a layer lie together in some blocks and not in others. One kernel serves both, lest
        # a sweep find one more to be compiled on its way.
        to = torch.arange(n_tokens, device=device)
    with on_device(like):
        _add_norm_kernel[(len(tiles), *heads)](
            p_out=out,
            p_to=to,
            **_numbered("p_result", _fill(results)),
            **_numbered("p_scale", _fill(scales)),
            **_numbered("p_d", values),
            **_numbered("p_by", [None if p.d is None else p.d.scale for p in parts]),
            **_tables(patches),
            p_x=x if weights else None,
            **_numbered("p_weight", _fill(weights)),
            p_tiles=tiles,
            s_out=like.stride(0),
            **_numbered("s_d", [0 if d is None else d.stride(0) for d in values]),
            s_x=0 if x is None else x.stride(0),
            **_head_strides(values[0], x, weights),
            width=width,
            eps=eps,
            OF_HEADS=bool(heads),
            HAS_SWAPS=patches is not None,
            HAS_OUT=out is not None,
            HAS_TO=to is not None,
            NORMS=len(weights),
            CENTRED=centred and bool(weights),  # one variant for all where nothing is normalised
            COLLAPSE=COLLAPSE,
            TOP=precision.top if weights else 0,
            BLOCK_N=block,
            # Few numbers a thread, so that many rows are in flight; with swaps that would spill on sm_80. The
            # sums over a head are no warp's but one.
            num_warps=1 if heads else min(16, max(4, block // (256 if patches is None else 512))),
            maxnreg=128 if block <= 1024 else None,  # as in the attention kernel
        )
    return [Scaled(*pair) for pair in zip(results, scales, strict=True)]


def _of_lines(edits: Sequence[Edit], n_heads: int) -> list[Edit]:
    """Swaps of heads as swaps of whole lines, of which every token has as many as heads."""
    lines: list[Edit] = []
    for swap in swaps_of(edits):
        assert swap.at is not None
        token, source = (at * n_heads + swap.at for at in (swap.token, swap.source))
        lines.append(Swap(token, source, None, swap.delta.flatten(0, 1)))
    return lines


def _head_strides(d: Tensor | None, x: Tensor | None, weights: Sequence[Tensor]) -> dict[str, int]:
    """From a head to the next in the difference, in the base and in the weights; 0 where there are none."""
    of_heads = d is not None and x is not None and x.dim() == 3
    each = of_heads and weights[0].dim() == 2
    return {
        "s_d_head": d.stride(1) if of_heads and d is not None else 0,
        "s_x_head": x.stride(1) if of_heads and x is not None else 0,
        "s_weight_head": weights[0].stride(0) if each else 0,
    }


def _fill(arrays: Sequence[Tensor | None]) -> list[Tensor | None]:
    """One argument for each of two norms."""
    return [*arrays, *[None] * (2 - len(arrays))]


def _numbered(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Arguments whose names end with their numbers."""
    return {f"{name}{i}": value for i, value in enumerate(values)}


def _tables(patches: Patches | None) -> dict[str, Any]:
    """The patches of the parts and of their sum, as the kernel takes them."""
    first, source, at, deltas = patches or (None, None, None, (None,) * (_PARTS + 1))
    of_parts = _numbered("p_delta", deltas[:_PARTS])
    return {"p_first": first, "p_source": source, "p_at": at, **of_parts, "p_delta": deltas[_PARTS]}


@jit
def _add_norm_kernel(  # type: ignore[no-untyped-def]
    p_out,
    p_to,
    p_result0,
    p_result1,
    p_scale0,
    p_scale1,
    p_d0,
    p_d1,
    p_d2,
    p_by0,
    p_by1,
    p_by2,
    p_first,
    p_source,
    p_at,
    p_delta0,
    p_delta1,
    p_delta2,
    p_delta,
    p_x,
    p_weight0,
    p_weight1,
    p_tiles,
    s_out,
    s_d0,
    s_d1,
    s_d2,
    s_x,
    s_d_head,
    s_x_head,
    s_weight_head,
    width,
    eps,
    OF_HEADS: tl.constexpr,
    HAS_SWAPS: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_TO: tl.constexpr,
    NORMS: tl.constexpr,
    CENTRED: tl.constexpr,
    COLLAPSE: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of rows with one base token; a whole row lies in registers. What is not there is None.

    Of heads it is one head of the tile's rows: a token has as many lines as there are of these.
    """
    p_tile = p_tiles + tl.program_id(0) * 3
    first = tl.load(p_tile).to(tl.int64)
    count = tl.load(p_tile + 1)
    base = tl.load(p_tile + 2).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < width
    if OF_HEADS:
        head = tl.program_id(1)
        p_d0 += head * s_d_head
        p_x += head * s_x_head
        p_weight0 += head * s_weight_head
    if NORMS > 0:
        b = tl.load(p_x + base * s_x + o_n, mask=m_n, other=0.0)
        if CENTRED:
            b = tl.where(m_n, b - tl.sum(b) / width, 0.0)
        v = tl.sum(b * b) / width
        s = tl.sqrt_rn(v + eps)
    for token in range(first, first + count):
        line = token
        if OF_HEADS:
            line = token * tl.num_programs(1) + head
        d = _part(p_d0, p_by0, token, s_d0, o_n, m_n, BLOCK_N)
        if HAS_SWAPS:
            d = _swapped(d, line * 4, p_first, p_source, p_at, p_delta0, width, o_n, m_n)
        part = _part(p_d1, p_by1, token, s_d1, o_n, m_n, BLOCK_N)
        if HAS_SWAPS:
            part = _swapped(part, line * 4 + 1, p_first, p_source, p_at, p_delta1, width, o_n, m_n)
        d += part
        part = _part(p_d2, p_by2, token, s_d2, o_n, m_n, BLOCK_N)
        if HAS_SWAPS:
            part = _swapped(part, line * 4 + 2, p_first, p_source, p_at, p_delta2, width, o_n, m_n)
        d += part
        if HAS_SWAPS:
            d = _swapped(d, line * 4 + 3, p_first, p_source, p_at, p_delta, width, o_n, m_n)
        if HAS_OUT:
            place = token
            if HAS_TO:
                place = tl.load(p_to + token)
            tl.store(p_out + place * s_out + o_n, d, mask=m_n)
        if NORMS > 0:
            if CENTRED:
                d = tl.where(m_n, d - tl.sum(d) / width, 0.0)
            dv = tl.sum(d * (2.0 * b + d)) / width
            s2 = tl.sqrt_rn(tl.maximum(v + dv, 0.0) + eps)
            change = d * (1.0 / s2) - b * (dv / ((s + s2) * s * s2))
            if v + dv < COLLAPSE * v:
                whole = b + d
                change = whole * (1.0 / tl.sqrt_rn(tl.sum(whole * whole) / width + eps)) - b * (1.0 / s)
            _store_narrow(p_result0, p_scale0, p_weight0, change, line, width, o_n, m_n, TOP)
            if NORMS > 1:
                _store_narrow(p_result1, p_scale1, p_weight1, change, line, width, o_n, m_n, TOP)


@jit
def _part(p_d, p_by, token, s_d, o_n, m_n, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """One token of a part, times its scale; zeros where there is no such part."""
    if p_d is None:
        d = tl.zeros([BLOCK_N], tl.float32)
    else:
        d = tl.load(p_d + token * s_d + o_n, mask=m_n, other=0.0)
        if p_by is not None:
            d *= tl.load(p_by + token)
    return d


@jit
def _swapped(d, key, p_first, p_source, p_at, p_delta, width, o_n, m_n):  # type: ignore[no-untyped-def]
    """One token's difference after its patches at one place, in their order."""
    for i in range(tl.load(p_first + key), tl.load(p_first + key + 1)):
        p_row = p_delta + tl.load(p_source + i) * width
        at = tl.load(p_at + i)
        if at < 0:
            d = tl.load(p_row + o_n, mask=m_n, other=0.0)
        else:
            d = tl.where(o_n == at, tl.load(p_row + at), d)
    return d


@jit
def _store_narrow(  # type: ignore[no-untyped-def]
    p_result, p_scale, p_weight, change, line, width, o_n, m_n, TOP: tl.constexpr
):
    """One norm's difference in the operands' type, with a power of two taken out where TOP is not 0."""
    result = change * tl.load(p_weight + o_n, mask=m_n, other=0.0)
    if TOP > 0:
        scale, inverse = power_scale(tl.max(tl.abs(result)), TOP)
        tl.store(p_scale + line, scale)
        result *= inverse
    tl.store(p_result + line * width + o_n, result.to(p_result.dtype.element_ty), mask=m_n)
