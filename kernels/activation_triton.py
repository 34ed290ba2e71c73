"""Activation difference, swaps and narrowing in one Triton kernel; see activation.py."""

from collections.abc import Callable, Sequence

from torch import Tensor

from deltapatch.errors import DeltapatchError
from deltapatch.kernels.activation import Neurons, name_of
from deltapatch.kernels.edits import Edit
from deltapatch.kernels.edits_triton import order_patches
from deltapatch.kernels.lang import expm1_below_zero, jit, next_power_of_two, on_device, power_scale, tl
from deltapatch.kernels.product import Precision, Scaled
from deltapatch.kernels.segments import Segment, base_of_tokens

_BLOCK = 2048  # neurons of a row worked on at a time
_BESIDE = {False: 16384, True: 12288}  # by whether there is a gate: the longest of two rows held side by side


def activation_difference_triton(
    act: Callable[[Tensor], Tensor],
    up: Neurons,
    gate: Neurons | None,
    segments: list[Segment],
    swaps: Sequence[Edit],
    precision: Precision,
) -> Scaled:
    """The same as `activation_difference`, in float32: every form in it is free of cancellation."""
    (du, du_scale), u = up
    n_tokens, width = du.shape
    in_place = precision.operand == du.dtype
    out = du if in_place else du.new_empty(n_tokens, width, dtype=precision.operand)
    scale = du.new_empty(n_tokens) if precision.scaled else None
    base = base_of_tokens(segments, du.device)
    (dg, dg_scale), g = gate or ((None, None), None)
    assert du.stride(1) == 1
    assert dg is None or dg.stride(1) == 1
    patches = order_patches([swaps], n_tokens)
    first, source, at, (delta,) = patches or (None, None, None, (None,))
    block = min(_BLOCK, next_power_of_two(width))
    held = precision.scaled and patches is None  # until the row's scale is known
    # Of held rows two share a multiprocessor, if registers allow: while one is read, the other is worked on.
    beside = held and block < width <= _BESIDE[gate is not None]
    if held and width > block:
        block *= 2  # else with as many threads as a block may have, so that each holds few
    warps = max(4, block // (128 if held and not beside else 256))
    with on_device(du):
        _activation_kernel[(n_tokens,)](
            p_out=out,
            p_scale=scale,
            p_du=du,
            p_by_u=du_scale,
            p_u=u,
            p_dg=dg,
            p_by_g=dg_scale,
            p_g=g,
            p_base=base,
            p_first=first,
            p_source=source,
            p_at=at,
            p_delta=delta,
            s_out=out.stride(0),
            s_du=du.stride(0),
            s_u=u.stride(0),
            s_dg=0 if dg is None else dg.stride(0),
            s_g=0 if g is None else g.stride(0),
            width=width,
            ACT=_name(act),
            HAS_GATE=gate is not None,
            HAS_SWAPS=patches is not None,
            TOP=precision.top,
            HELD=-(-width // block) if held else 0,
            BLOCK_P=min(1024, block),
            BLOCK_N=block,
            num_warps=warps,
            maxnreg=64 if beside else None,
        )
    return Scaled(out, scale)


def _name(act: Callable[[Tensor], Tensor]) -> str:
    """Which of the kernel's forms computes this function."""
    name = name_of(act)
    if name is None:
        raise DeltapatchError(f"the triton backend has no activation {act}: use backend='reference'")
    return name


@jit(do_not_specialize=["p_by_u", "p_by_g"])  # some rows' scales begin anywhere
def _activation_kernel(  # type: ignore[no-untyped-def]
    p_out,
    p_scale,
    p_du,
    p_by_u,
    p_u,
    p_dg,
    p_by_g,
    p_g,
    p_base,
    p_first,
    p_source,
    p_at,
    p_delta,
    s_out,
    s_du,
    s_u,
    s_dg,
    s_g,
    width,
    ACT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SWAPS: tl.constexpr,
    TOP: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row, some neurons at a time.

    Where it is to be scaled, its changes are kept in registers until the largest is known: all its HELD
    blocks. With patches, which may be anywhere in the row, they are kept in place of du.
    """
    token = tl.program_id(0).to(tl.int64)
    base = tl.load(p_base + token).to(tl.int64)
    p_out += token * s_out
    p_du += token * s_du
    p_u += base * s_u
    by_u = 1.0 if p_by_u is None else tl.load(p_by_u + token)
    if HAS_GATE:
        p_dg += token * s_dg
        p_g += base * s_g
        by_g = 1.0 if p_by_g is None else tl.load(p_by_g + token)
    else:
        by_g = 1.0
    rows = (p_du, by_u, p_u, p_dg, by_g, p_g)
    if HELD > 0:
        changes = ()
        top = 0.0
        for i in tl.static_range(HELD):
            change = _change(rows, i * BLOCK_N + tl.arange(0, BLOCK_N), width, ACT, HAS_GATE)
            changes = changes + (change,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no other way)
            # Joined block by block: else the compiler works on all at once, which takes too many registers.
            top = tl.maximum(top, tl.max(tl.abs(change)))
        scale, inverse = power_scale(top, TOP)
        tl.store(p_scale + token, scale)
        for i in tl.static_range(HELD):
            o_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
            tl.store(p_out + o_n, (changes[i] * inverse).to(p_out.dtype.element_ty), mask=o_n < width)
        return

    p_change = p_out
    if TOP > 0:
        p_change = p_du
    for n0 in range(0, width, BLOCK_N):
        o_n = n0 + tl.arange(0, BLOCK_N)
        change = _change(rows, o_n, width, ACT, HAS_GATE)
        tl.store(p_change + o_n, change.to(p_change.dtype.element_ty), mask=o_n < width)

    if HAS_SWAPS:
        begin = tl.load(p_first + token)
        end = tl.load(p_first + token + 1)
        if begin < end:
            tl.debug_barrier()  # every change is written before any is overwritten
            for p0 in range(begin, end, BLOCK_P):
                o_p = p0 + tl.arange(0, BLOCK_P)
                m_p = o_p < end
                source = tl.load(p_source + o_p, mask=m_p, other=0)
                at = tl.load(p_at + o_p, mask=m_p, other=0)
                value = tl.load(p_delta + source * width + at, mask=m_p, other=0.0)
                tl.store(p_change + at, value.to(p_change.dtype.element_ty), mask=m_p)

    if TOP > 0:
        tl.debug_barrier()  # a thread may read what another wrote
        top = tl.zeros([BLOCK_N], tl.float32)
        for n0 in range(0, width, BLOCK_N):
            o_n = n0 + tl.arange(0, BLOCK_N)
            top = tl.maximum(top, tl.abs(tl.load(p_change + o_n, mask=o_n < width, other=0.0)))
        scale, inverse = power_scale(tl.max(top), TOP)
        tl.store(p_scale + token, scale)
        for n0 in range(0, width, BLOCK_N):
            o_n = n0 + tl.arange(0, BLOCK_N)
            change = tl.load(p_change + o_n, mask=o_n < width, other=0.0) * inverse
            tl.store(p_out + o_n, change.to(p_out.dtype.element_ty), mask=o_n < width)


@jit
def _change(rows, o_n, width, ACT: tl.constexpr, HAS_GATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The changes of some neurons of a row."""
    p_du, by_u, p_u, p_dg, by_g, p_g = rows
    m_n = o_n < width
    b = tl.load(p_u + o_n, mask=m_n, other=0.0)
    d = tl.load(p_du + o_n, mask=m_n, other=0.0) * by_u
    if HAS_GATE:
        gate = tl.load(p_g + o_n, mask=m_n, other=0.0)
        d_gate = tl.load(p_dg + o_n, mask=m_n, other=0.0) * by_g
        # act(g + dg)(u + du) - act(g) u = change (u + du) + act(g) du = change u + act(g + dg) du: the form
        # with the smaller factor of du, which does not bring in a large term only to take it out.
        before, after, change = _act(gate, d_gate, ACT)
        early = tl.abs(before) < tl.abs(after)
        out = change * tl.where(early, b + d, b) + tl.where(early, before, after) * d
    else:
        _, _, out = _act(b, d, ACT)
    return out


@jit
def _act(b, d, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(b), act(b + d) and the change, which no difference of the two is taken for.

    All but relu are x s(x) with s from 0 to 1: the change is d s(b + d) + b Δs.
    """
    if ACT == "relu":
        before, after = tl.maximum(b, 0.0), tl.maximum(b + d, 0.0)
        change = tl.where(b > 0, tl.maximum(d, -b), after)
    else:
        if ACT == "gelu":
            s, s2, step = _cdf(b), _cdf(b + d), _cdf_difference(b, d)
        elif ACT == "silu":
            s, s2, step = _sigmoids(b, b + d, d)
        else:
            grown = 1.5957691216057308 * d * (1.0 + 0.044715 * (3.0 * b * (b + d) + d * d))
            s, s2, step = _sigmoids(_twice_u(b), _twice_u(b + d), grown)
        before, after, change = b * s, (b + d) * s2, d * s2 + b * step
    return before, after, change


@jit
def _twice_u(x):  # type: ignore[no-untyped-def]
    """gelu_tanh(x) is x sigmoid(2u) with this 2u: 2 sqrt(2/π) (x + 0.044715 x³)."""
    return 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)


@jit
def _sigmoids(x, y, d):  # type: ignore[no-untyped-def]
    """sigmoid(x), sigmoid(y) and sigmoid(y) - sigmoid(x), from d = y - x, with one division.

    The difference is sigmoid(upper) sigmoid(-lower) (1 - exp(-|d|)), signed.
    """
    p = tl.exp(tl.minimum(tl.minimum(x, y), 80.0))  # so that no product overflows
    r = tl.exp(tl.minimum(-tl.maximum(x, y), 80.0))
    both = 1.0 / ((1.0 + p) * (1.0 + r))
    lower, upper = p * (1.0 + r) * both, (1.0 + p) * both
    step = expm1_below_zero(-tl.abs(d)) * both
    down = d < 0
    return tl.where(down, upper, lower), tl.where(down, lower, upper), tl.where(down, step, -step)


@jit
def _cdf(x):  # type: ignore[no-untyped-def]
    """The normal distribution function; gelu(x) is x times it."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@jit
def _cdf_difference(b, d):  # type: ignore[no-untyped-def]
    """The integral of the normal density from b to b + d; a short step by its series around the middle."""
    m = b + 0.5 * d
    m2 = m * m
    h2 = 0.25 * d * d
    # Hermite polynomials of even order, He6, He4 and He2, with (d/2)^2k / (2k + 1)!
    t = (((m2 - 15.0) * m2 + 45.0) * m2 - 15.0) * (1.0 / 5040)
    t = ((m2 - 6.0) * m2 + 3.0) * (1.0 / 120) + h2 * t
    t = (m2 - 1.0) * (1.0 / 6) + h2 * t
    series = 0.3989422804014327 * tl.exp(-0.5 * m2) * d * (1.0 + h2 * t)
    far = 0.5 * (tl.erf((b + d) * 0.7071067811865476) - tl.erf(b * 0.7071067811865476))
    return tl.where(tl.abs(d) < 0.5, series, far)
