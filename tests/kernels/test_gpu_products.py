"""Products on a GPU in every precision, of few and many rows as long as the longest in use."""

import pytest
import torch

from deltapatch.kernels.product import PRECISIONS, narrow, narrow_weight, product

# Relative to the product's norm. Hopper cuts operands in tf32 off and adds float8 up in 14 bits.
ERROR = {"fp64": 1e-13, "fp32": 1e-5, "tf32": 2e-3, "bf16": 5e-3, "fp16": 6e-4, "fp8": 6e-2}
WIDTH, OUTPUTS = 16384, 256


@pytest.fixture(scope="module")
def operands():
    """Rows of very different sizes, a weight, and their product in float64, on the host."""
    draw = torch.Generator().manual_seed(0)
    d = torch.randn(4097, WIDTH, generator=draw) * 10.0 ** (torch.arange(4097) % 20 - 15.0)[:, None]
    weight = torch.randn(OUTPUTS, WIDTH, generator=draw) * WIDTH**-0.5
    return d, weight, d.double() @ weight.double().T


@pytest.mark.gpu
@pytest.mark.parametrize("n_rows", [1, 17, 255, 256, 257, 4097])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_of_long_rows(precision, n_rows, operands):
    d, weight, exact = operands
    chosen = PRECISIONS[precision]
    x = narrow(d[:n_rows].to("cuda", chosen.base), chosen)
    got = product(x, narrow_weight(weight.to("cuda", chosen.base), chosen))
    assert got.values.dtype == chosen.base
    off = (got.plain().cpu().double() - exact[:n_rows]).norm(dim=1) / exact[:n_rows].norm(dim=1)
    assert off.max() < ERROR[precision]
