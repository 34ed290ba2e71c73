"""Rows in a narrower type, each scaled by a power of two, by a Triton kernel; see product.py."""

import torch
from torch import Tensor

from deltapatch.kernels.lang import jit, next_power_of_two, on_device, power_scale, tl


def narrow_rows(d: Tensor, dtype: torch.dtype, top: int) -> tuple[Tensor, Tensor]:
    """Each row in `dtype` with its largest number just below 2^top, and the powers of two taken out.

    Args:
        d: [token, in] float32.
        dtype: float16 or float8_e4m3fn.
        top: `Precision.top`.

    Returns:
        [token, in] and [token] float32.
    """
    n_tokens, width = d.shape
    d = d if d.stride(1) == 1 else d.contiguous()
    values = d.new_empty(n_tokens, width, dtype=dtype)
    scale = d.new_empty(n_tokens)
    if n_tokens:
        block = min(4096, next_power_of_two(width))
        with on_device(d):
            _narrow_kernel[(n_tokens,)](
                p_values=values,
                p_scale=scale,
                p_d=d,
                s_d=d.stride(0),
                width=width,
                TOP=top,
                BLOCK_N=block,
                num_warps=max(4, block // 512),
            )
    return values, scale


@jit
def _narrow_kernel(  # type: ignore[no-untyped-def]
    p_values,
    p_scale,
    p_d,
    s_d,
    width,
    TOP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row, twice: for its largest number, and out of the cache to be written."""
    token = tl.program_id(0).to(tl.int64)
    p_d += token * s_d
    p_values += token * width
    top = tl.zeros([BLOCK_N], tl.float32)
    for n0 in range(0, width, BLOCK_N):
        o_n = n0 + tl.arange(0, BLOCK_N)
        top = tl.maximum(top, tl.abs(tl.load(p_d + o_n, mask=o_n < width, other=0.0)))
    scale, inverse = power_scale(tl.max(top), TOP)
    tl.store(p_scale + token, scale)
    for n0 in range(0, width, BLOCK_N):
        o_n = n0 + tl.arange(0, BLOCK_N)
        d = tl.load(p_d + o_n, mask=o_n < width, other=0.0)
        tl.store(p_values + o_n, (d * inverse).to(p_values.dtype.element_ty), mask=o_n < width)
