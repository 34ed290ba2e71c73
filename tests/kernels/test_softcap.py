"""Soft caps: their change against 80-bit arithmetic, over all sizes of what changes and by how much."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltapatch.kernels.softcap import cap_difference, cap_slope

EPS = {torch.float32: 2**-23, torch.float64: 2**-52}


def exact(x, d, cap):
    """c sinh(b) / (cosh(a) cosh(a + b)), in 80 bits, whose exponents reach far enough."""
    a, b = (np.asarray(t, np.longdouble) / np.longdouble(cap) for t in (x, d))
    return np.longdouble(cap) * np.sinh(b) / (np.cosh(a) * np.cosh(a + b))


@pytest.mark.parametrize("dtype", EPS)
@settings(max_examples=200, deadline=None)
@given(
    st.floats(-1e3, 1e3, allow_subnormal=False),
    st.floats(-7, 3),
    st.booleans(),
    st.sampled_from([0.5, 30.0, 50.0]),
)
def test_the_change_keeps_its_digits(dtype, x, power, up, cap):
    d = 10**power * (1 if up else -1)
    x, d = (torch.tensor([value], dtype=dtype) for value in (x, d))
    got, want = cap_difference(x, d, cap).double().numpy(), exact(x.numpy(), d.numpy(), cap)
    # Where the cap is all but reached, the digits of x / c themselves are what is left uncertain.
    uncertain = 1 + 4 * (abs(float(x)) + abs(float(d))) / cap
    assert np.isfinite(got).all()
    assert np.abs(got - want) <= 16 * EPS[dtype] * uncertain * np.abs(want) + 1e-37


def test_no_change_is_none_and_all_of_it_is_the_cap():
    x = torch.linspace(-200, 200, 9)
    assert not cap_difference(x, torch.zeros(9), 3.0).any()
    assert torch.allclose(cap_difference(torch.zeros(9), x, 3.0), 3 * torch.tanh(x / 3))


def test_the_slope_is_the_change_of_nearly_nothing():
    x = torch.linspace(-20, 20, 41, dtype=torch.float64)
    d = torch.full_like(x, 1e-7)
    assert torch.allclose(cap_difference(x, d, 5.0) / d, cap_slope(x, 5.0), rtol=1e-6)
