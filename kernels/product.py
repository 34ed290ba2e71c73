"""Products of differences with weights, in the sweep's precision.

A product is linear in the difference, so rounding its operands is an error relative to the effect, not to the
activation: that is why 16-bit products are precise enough here and nowhere else. Linear also means that a
power of two may be taken out of each row before and put back after: so float16 and float8, which hold few
sizes, hold every row.

A CPU multiplies bfloat16 where it has instructions for that. Any other narrow operand is rounded there, kept
in float32, and multiplied as such, as a GPU does, which rounds no product of two of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltapatch.errors import DeltapatchError
from deltapatch.kernels.device import fast_bfloat16, float32_products
from deltapatch.kernels.lang import HAS_TRITON
from deltapatch.kernels.narrow_triton import narrow_rows

_ROWS = 64  # on a CPU products in bfloat16 take a multiple of so many
# MKL takes 9 to 15 rows as long as 24, but for matrices that stay in the cache: there the outputs go first.
_SLOW, _LARGE = range(9, 16), 1 << 19
_WIDTHS = 16  # products in float8 take multiples of so many columns on both sides
_ROWS_IN_FP8 = 272  # of long rows cuBLAS refuses fewer than 257 where it scales them
_LARGEST_HALF = 65504.0
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Precision:
    """What a sweep computes in.

    Attributes:
        name: as the user gives it.
        base: of the base runs and of everything that is not linear.
        operand: of both operands of a product.
        scaled: whether each row of a difference is brought to the size that `operand` holds best.
    """

    name: str
    base: torch.dtype
    operand: torch.dtype
    scaled: bool = False

    @property
    def top(self) -> int:
        """Rows are scaled so that their largest number lies just below 2 to this power; 0: they are not."""
        return {torch.float16: 14, torch.float8_e4m3fn: 9}[self.operand] if self.scaled else 0

    @property
    def exact(self) -> "Precision":
        """That of the base runs."""
        return PRECISIONS["fp64" if self.base == torch.float64 else "fp32"]


PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp64", torch.float64, torch.float64),
        Precision("fp32", torch.float32, torch.float32),
        Precision("tf32", torch.float32, torch.float32),  # rounded by the product
        Precision("bf16", torch.float32, torch.bfloat16),
        Precision("fp16", torch.float32, torch.float16, scaled=True),
        Precision("fp8", torch.float32, torch.float8_e4m3fn, scaled=True),
    )
}


def cpu_multiplies(precision: Precision) -> bool:
    """Whether a CPU has products of this precision; else it rounds the operands and multiplies float32."""
    return precision.name in ("fp64", "fp32") or (precision.name == "bf16" and fast_bfloat16())


class Scaled(NamedTuple):
    """A difference as products take it and give it: values * scale.

    `values` is [token, ...], as `narrow` gives it or, as a product's result, in float32 or float64.
    `scale` is [token] float32, powers of two; None: all ones.
    """

    values: Tensor
    scale: Tensor | None = None

    def plain(self) -> Tensor:
        """The difference itself, in float32 or float64; `values` where there is nothing to do."""
        values = self.values if self.values.dtype in _WIDE else self.values.float()
        if self.scale is None:
            return values
        return values * self.scale.view(-1, *(1,) * (values.dim() - 1))


class Operand(NamedTuple):
    """A weight matrix as products take it: `values` [out, in] in a precision, times `scale` [out] in fp8."""

    values: Tensor
    scale: Tensor | None
    precision: Precision

    def rows(self, which: slice | Tensor) -> "Operand":
        """Some of the outputs."""
        scale = None if self.scale is None else self.scale[which]
        return Operand(self.values[which], scale, self.precision)


class NarrowedByPiece(NamedTuple):
    """A weight matrix as the model keeps it, narrowed where a product takes it: never a copy of the whole."""

    values: Tensor  # [out, in]
    precision: Precision

    def rows(self, which: slice | Tensor) -> Operand:
        """Some of the outputs."""
        return narrow_weight(self.values[which], self.precision)


def narrow(d: Tensor, precision: Precision) -> Scaled:
    """A difference as products take it: in the precision's operand dtype, or rounded to it on a CPU.

    Args:
        d: [token, in], float32, or float64 in fp64.
        precision: of the products.

    Returns:
        `d` itself where there is nothing to do. In fp16 the largest number of each row lies in [2^13, 2^14),
        in fp8 in (224, 448], unless the row is zero or so small that the scale would not be a normal number.
    """
    if d.is_cuda and HAS_TRITON and d.dtype != precision.operand:
        return narrow_triton(d, precision)
    if precision.scaled and d.dtype != precision.operand:
        scale, inverse = _powers(d, precision.top)
        return Scaled(_rounded(d * inverse.unsqueeze(1), precision), scale)
    ready = d.dtype == precision.operand
    if d.device.type != "cpu" or ready or not cpu_multiplies(precision):
        return Scaled(_rounded(d, precision))
    # oneDNN makes and keeps a program for every new number of rows: let a few numbers serve all blocks.
    rows = -(-len(d) // _ROWS) * _ROWS
    values = d.new_empty(rows, d.shape[1], dtype=precision.operand)
    values[: len(d)] = d
    values[len(d) :] = 0
    return Scaled(values[: len(d)])


def narrow_triton(d: Tensor, precision: Precision) -> Scaled:
    """The same with one Triton kernel for rows that are scaled."""
    if precision.scaled:
        return Scaled(*narrow_rows(d, precision.operand, precision.top))
    return Scaled(d.to(precision.operand))


def narrow_weight(weight: Tensor, precision: Precision) -> Operand:
    """A weight as products take it; no copy where it is that already.

    A weight that float16 cannot hold is told here on a CPU; on a GPU, which nobody waits for, it is infinite.

    Args:
        weight: [out, in].
        precision: of the products.

    Raises:
        DeltapatchError: fp16, and a number is larger than float16 holds.
    """
    if precision.scaled and precision.operand != torch.float16:
        if weight.dtype == precision.operand:
            return Operand(weight, None, precision)
        weight = weight.float()
        scale, inverse = _powers(weight, precision.top)
        return Operand(_rounded(weight * inverse.unsqueeze(1), precision), scale, precision)
    if precision.operand == torch.float16 and weight.dtype != torch.float16 and weight.device.type == "cpu":
        largest = float(torch.linalg.vector_norm(weight, torch.inf)) if weight.numel() else 0.0
        if largest > _LARGEST_HALF:
            raise DeltapatchError(
                f"a weight of {largest:.6g} is larger than float16 holds ({_LARGEST_HALF:.0f}): "
                "use precision='bf16'"
            )
    return Operand(_rounded(weight, precision), None, precision)


def product(x: Scaled, weight: Operand) -> Scaled:
    """x @ weight.T.

    Args:
        x: [token, in], as `narrow` gives it.
        weight: [out, in].

    Returns:
        [token, out] in the precision's base dtype; x's scale is still to be applied by who reads it.
    """
    precision = weight.precision
    if x.values.is_cuda:
        values = _product_on_gpu(x.values, weight)
    elif x.values.dtype == weight.values.dtype == torch.bfloat16:
        values = torch.mm(_filled_up(x.values), weight.values.t())[: len(x.values)].to(precision.base)
    else:
        d, matrix = x.values.to(precision.base), weight.values.to(precision.base)
        values = by_matrix(d, matrix)
        if weight.scale is not None:
            values *= weight.scale
    return Scaled(values, x.scale)


def by_matrix(x: Tensor, matrix: Tensor) -> Tensor:
    """x [..., in] @ matrix.T, of [out, in], as the device does it best."""
    n = x.numel() // x.shape[-1]
    if x.is_cuda or n not in _SLOW or matrix.numel() < _LARGE:
        return F.linear(x, matrix)
    return torch.mm(matrix, x.reshape(n, -1).t()).t().contiguous().view(*x.shape[:-1], -1)


def _product_on_gpu(x: Tensor, weight: Operand) -> Tensor:
    precision, matrix = weight.precision, weight.values.t()  # [in, out]
    if precision.name == "fp8":
        return _product_in_fp8(x, weight)
    if precision.operand in _WIDE:
        with float32_products("tf32" if precision.name == "tf32" else "ieee"):
            return torch.mm(x, matrix)
    return torch.mm(x, matrix, out_dtype=precision.base)


def _product_in_fp8(x: Tensor, weight: Operand) -> Tensor:
    scale = x.new_ones(len(weight.values), dtype=torch.float32) if weight.scale is None else weight.scale
    if len(x) and not any(n % _WIDTHS for n in weight.values.shape):
        out = _scaled_by_row(x, weight.values, scale)
        if out is not None:
            return out
    with float32_products("tf32"):  # exact here: a float8 has fewer digits
        return torch.mm(x.float(), weight.values.float().t()).mul_(scale)


# What `torch._scaled_mm` gives with matrices of a device and shape, as far as it was asked; None: nothing.
# cuBLAS gives float32 on Hopper from CUDA 12.9 on, CUTLASS only bfloat16 in older versions of PyTorch.
FP8_OUTPUTS: dict[tuple[torch.device, torch.Size], torch.dtype | None] = {}


def _scaled_by_row(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor | None:
    """x @ weight.T * scale in float32; None where this device has no such product of these shapes."""
    n_tokens, key = len(x), (x.device, weight.shape)
    if n_tokens < _ROWS_IN_FP8:
        filled = x.new_empty(_ROWS_IN_FP8, x.shape[1])  # what the rows after ours hold does not matter
        filled[:n_tokens] = x
        x = filled
    ones = x.new_ones(len(x), 1, dtype=torch.float32)
    known = FP8_OUTPUTS.get(key, torch.float32)
    for out_dtype in (torch.float32, torch.bfloat16):
        if known is None or out_dtype.itemsize > known.itemsize:
            continue
        try:  # a product that is refused is refused by the host, before anything runs
            out = torch._scaled_mm(
                x,
                weight.t(),
                scale_a=ones,
                scale_b=scale.unsqueeze(0),
                out_dtype=out_dtype,
                use_fast_accum=True,
            )
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):
            continue
        FP8_OUTPUTS[key] = out_dtype
        return out[:n_tokens].float()
    FP8_OUTPUTS[key] = None
    return None


def _powers(d: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Powers of two that bring each row's largest number to just below 2^top, and their inverses.

    Args:
        d: [row, column] float32.
        top: 9 takes account of float8's largest number being 448, not 512.

    Returns:
        scale, inverse: [row] float32. d * inverse is exact but for numbers too small to matter.
    """
    largest = torch.linalg.vector_norm(d, torch.inf, dim=1) if d.shape[1] else d.new_zeros(len(d))
    bits = largest.view(torch.int32)
    exponent = ((bits + (0x1FFFFF if top == 9 else 0)) >> 23).clamp_(min=top)  # biased by 127
    zero = largest == 0
    scale = (exponent + (1 - top)).masked_fill_(zero, 127)
    inverse = (253 + top - exponent).masked_fill_(zero, 127)
    return (scale << 23).view(torch.float32), (inverse << 23).view(torch.float32)


def _rounded(x: Tensor, precision: Precision) -> Tensor:
    """In the operand's dtype, or as a CPU takes it; `x` itself where it is in that dtype already."""
    if x.device.type != "cpu" or cpu_multiplies(precision):
        return x.to(precision.operand)
    if precision.name == "tf32":
        return _round_to_tf32(x.to(precision.base))
    return x if x.dtype == precision.operand else x.to(precision.operand).to(precision.base)


def _round_to_tf32(x: Tensor) -> Tensor:
    """To ten bits after the leading one, ties to even."""
    bits = x.view(torch.int32)
    return (bits + (0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def _filled_up(x: Tensor) -> Tensor:
    """[token, in] with rows after it up to a multiple of `_ROWS`; what they hold does not matter."""
    rows = -(-len(x) // _ROWS) * _ROWS
    reach = x.storage_offset() + rows * x.stride(0)
    if rows == len(x):
        return x
    if x.stride(1) == 1 and reach * x.element_size() <= x.untyped_storage().nbytes():
        return x.as_strided((rows, x.shape[1]), x.stride())  # `narrow` has made room for them
    filled = x.new_zeros(rows, x.shape[1])
    filled[: len(x)] = x
    return filled


def has_float8(device: torch.device) -> bool:
    """Whether products of float8 run there; elsewhere than on a GPU they are computed in float32."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
