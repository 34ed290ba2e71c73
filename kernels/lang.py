"""Triton where it is installed (Linux), and the few functions that its language lacks.

Elsewhere `HAS_TRITON` is false and the kernels are plain functions that nobody calls.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Multiply and add in one step: Triton asks to be told, since its default is about to change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:
    HAS_TRITON = False

    class tl:  # type: ignore[no-redef]
        """What the kernels' annotations need."""

        constexpr = int

    def jit(fn: Any = None, **options: Any) -> Any:
        """Nothing to compile with."""
        return jit if fn is None else fn
else:
    HAS_TRITON = True


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return HAS_TRITON and triton.knobs.runtime.interpret


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make that the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def next_power_of_two(n: int) -> int:
    """The width of a block that holds n elements."""
    return 1 << max(0, n - 1).bit_length()


@jit
def expm1(x):  # type: ignore[no-untyped-def]
    """e^x - 1 with a relative error below 2e-7; beyond 88 it stays at e^88, the largest that is finite.

    x = n log 2 + r with |r| <= log(2)/2, so e^x - 1 = 2^n expm1(r) + (2^n - 1): no term cancels, and n = 0
    leaves the series of a small x as it is.
    """
    x = tl.minimum(tl.maximum(x, -88.0), 88.0)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    # log 2 in two parts; the first has so few digits that its product with n is exact.
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    t = _expm1_series(r)
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)  # 2^n
    return power * t + (power - 1.0)


@jit
def _expm1_series(x):  # type: ignore[no-untyped-def]
    """e^x - 1 where |x| is at most 0.5."""
    t = 1.0 / 5040 + x * (1.0 / 40320)
    t = 1.0 / 720 + x * t
    t = 1.0 / 120 + x * t
    t = 1.0 / 24 + x * t
    t = 1.0 / 6 + x * t
    t = 0.5 + x * t
    return x + x * x * t


@jit
def expm1_below_zero(x):  # type: ignore[no-untyped-def]
    """e^x - 1 of an x that is not positive, with a relative error below 6e-7: half the steps of `expm1`."""
    return tl.where(x > -0.5, _expm1_series(tl.maximum(x, -0.5)), tl.exp(x) - 1.0)


@jit
def expm1_minus(x):  # type: ignore[no-untyped-def]
    """e^x - 1 - x, which is never negative, with a relative error below 1e-6."""
    t = 2.0 / 40320 + x * (2.0 / 362880)
    t = 2.0 / 5040 + x * t
    t = 2.0 / 720 + x * t
    t = 2.0 / 120 + x * t
    t = 2.0 / 24 + x * t
    t = 2.0 / 6 + x * t
    t = 1.0 + x * t
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * t, expm1(x) - x)


@jit
def capped_change(x, d, cap):  # type: ignore[no-untyped-def]
    """cap * tanh((x + d) / cap) - cap * tanh(x / cap); see softcap.py."""
    a = x / cap
    b = d / cap
    after = tl.abs(a + b)
    a = tl.abs(a)
    size = tl.abs(b)
    grown = -2.0 * cap * expm1(-2.0 * size) * tl.exp(size - a - after)
    grown = grown / (1.0 + tl.exp(-2.0 * a)) / (1.0 + tl.exp(-2.0 * after))
    return tl.where(b < 0, -grown, grown)


@jit
def power_scale(largest, TOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The power of two that brings a row's largest number to just below 2^TOP, and its inverse.

    As `product._powers`: from the exponent's bits, so it is exact. float8 (TOP 9) ends at 448, not at 512.
    """
    bits = largest.to(tl.int32, bitcast=True)
    if TOP == 9:
        bits += 0x1FFFFF
    exponent = tl.maximum(bits >> 23, TOP)
    zero = largest == 0.0
    scale = tl.where(zero, 127, exponent + (1 - TOP))
    inverse = tl.where(zero, 127, 253 + TOP - exponent)
    return (scale << 23).to(tl.float32, bitcast=True), (inverse << 23).to(tl.float32, bitcast=True)
