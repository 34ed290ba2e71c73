"""Activation difference, plain and gated, against two evaluations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_packing import (
    DTYPES,
    distance,
    drawer,
    exact,
    is_rounded,
    pack,
    packings,
    random_swaps,
    seeds,
    swap_one_by_one,
)

from deltapatch.kernels import activation
from deltapatch.kernels.activation import Neurons, activation_difference
from deltapatch.kernels.product import PRECISIONS, Scaled
from deltapatch.models import forward

ACTIVATIONS = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
}
# The definition is subtracted in float64, which knows a change of 1e-6 to 1e-10 of it
TOLERANCE = {"fp32": 1e-6, "fp64": 1e-8}


def by_definition(packing, name, du, u, dg, g):
    at = [t.at for t in packing.tokens]
    base = [t.base for t in packing.tokens]
    act = ACTIVATIONS[name]
    d, b = du.double()[at], u.double()[base]
    if dg is None:
        return exact(act(b + d) - act(b))
    gate = g.double()[base]
    return exact(act(gate + dg.double()[at]) * (b + d) - act(gate) * b)


def difference(act, du, u, segments, dg=None, g=None, swaps=(), precision=None):
    """In the precision of du, without scales."""
    if precision is None:
        precision = "fp64" if du.dtype == torch.float64 else "fp32"
    gate = None if dg is None else Neurons(Scaled(dg), g)
    return activation_difference(
        act, Neurons(Scaled(du), u), gate, segments, list(swaps), PRECISIONS[precision]
    )


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_difference(name, scale, precision, gated):
    @settings(max_examples=8, deadline=None)
    @given(packings(), seeds, st.sampled_from([1, 13, 50]))
    def check(packing, seed, width):
        draw = drawer(seed, DTYPES[precision])
        du, u = draw(len(packing.tokens), width, scale=scale), draw(packing.n_base, width, scale=2)
        dg, g = (draw(*du.shape, scale=scale), draw(*u.shape, scale=2)) if gated else (None, None)
        want = by_definition(packing, name, du, u, dg, g)
        swaps = random_swaps(seed, du.dtype, *du.shape, [False])
        swap_one_by_one(want, swaps)
        got = difference(forward.activation(name), du, u, packing.segments, dg, g, swaps)
        assert got.scale is None
        assert distance(got.values, want) < TOLERANCE[precision]

    check()


def gelu_integrated(base, d):
    """gelu(base + d) - gelu(base), in float64: the integral of its derivative, which has no cancellation."""
    at, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(200))
    t = base[..., None] + d[..., None] * (at + 1) / 2
    slope = torch.erfc(-t / 2**0.5) / 2 + t * torch.exp(-t * t / 2) / (2 * np.pi) ** 0.5
    return d * (slope @ weight) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("size", [1e-8, 1e-5, 1e-3, 0.1, 0.5, 1.0, 10.0, None])
def test_gelu_is_exact_at_every_size(size, gated, dtype):
    """Far into both tails, row by row; the last case has all sizes in each row."""
    packing = pack([(3, 1)], [(0, 0, 1, 2, 5)])
    generator = torch.Generator().manual_seed(3)
    base = (24 * torch.rand(packing.n_base, 128, generator=generator) - 12).to(dtype)
    d = torch.randn(10, 128, generator=generator, dtype=dtype)
    d *= 10 * torch.exp2(-30 * torch.rand(d.shape, generator=generator)) if size is None else size
    own = base[[t.base for t in packing.tokens]].double()
    want = gelu_integrated(own, d.double())
    if gated:  # gelu(g + dg)(u + du) - gelu(g) u, where all four are the same as here
        want = want * own + torch.nn.functional.gelu(own + d.double()) * d.double()
    got = difference(
        forward.activation("gelu"), d.clone(), base, packing.segments, d if gated else None, base
    )
    off = (got.values.double() - want).norm(dim=1) / want.norm(dim=1)
    # Of float64 the sum with the base keeps 1e-16 of the base.
    assert (off < (1e-7 if dtype == torch.float32 else 1e-14) + 1e-15 / (size or 1)).all()


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_like_rows_change_alike(name):
    draw = drawer(4, torch.float32)
    packing = pack([(4, 1)], [(0, 0, 1, 1, 70)])
    du, u = draw(1, 2048).repeat(70, 1), draw(packing.n_base, 2048)
    got = difference(forward.activation(name), du, u, packing.segments).values
    assert (got == got[0]).all()


@pytest.mark.parametrize("cells", [1, 2, 7, 14, 28])  # one neuron vector, some rows, positions, pairs
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_pieces_give_what_the_whole_gives(gated, cells, monkeypatch):
    packing = pack([(3, 2)], [(0, 0, 2, 2, 7)])
    draw = drawer(0, torch.float32)
    du, u = draw(len(packing.tokens), 9), draw(packing.n_base, 9)
    dg, g = (draw(*du.shape), draw(*u.shape)) if gated else (None, None)
    act = forward.activation("gelu")
    whole = difference(act, du.clone(), u, packing.segments, dg, g).values
    monkeypatch.setattr(activation, "CELLS", 9 * cells)
    assert torch.allclose(difference(act, du, u, packing.segments, dg, g).values, whole, rtol=1e-6)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_no_change_gives_exactly_zero(gated):
    packing = pack([(4, 1)], [(0, 0, 1, 4, 3)])
    draw = drawer(1, torch.float32)
    du, u = draw(len(packing.tokens), 21), draw(packing.n_base, 21)
    dg, g = (draw(*du.shape), draw(*u.shape)) if gated else (None, None)
    for d in (du, dg) if gated else (du,):
        d[2::5] = 0
    got = difference(forward.activation("gelu"), du, u, packing.segments, dg, g).values
    assert (got[2::5] == 0).all()
    assert (got[3::5] != 0).any()


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_scaled_differences_come_and_go(precision, gated):
    """Rows of very different sizes, whose scales the product left for us; and the result in its own type."""
    packing = pack([(4, 2)], [(0, 0, 2, 3, 2)])
    draw, n = drawer(2, torch.float32), 12
    du, dg = draw(n, 21), draw(n, 21)
    scale = torch.exp2(torch.arange(n) * 6.0 - 40)
    u, g, act = draw(packing.n_base, 21), draw(packing.n_base, 21), forward.activation("gelu")
    swaps = random_swaps(5, torch.float32, n, 21, [False])
    wide = [(d * scale[:, None]).double() for d in (du, dg)]
    gate = (wide[1], g.double()) if gated else (None, None)
    want = difference(act, wide[0], u.double(), packing.segments, *gate).values.numpy()
    swap_one_by_one(want, swaps)
    got = activation_difference(
        act,
        Neurons(Scaled(du, scale), u),
        Neurons(Scaled(dg, scale), g) if gated else None,
        packing.segments,
        swaps,
        PRECISIONS[precision],
    )
    assert is_rounded(got, precision)
    bound = {"fp32": 1e-6, "bf16": 3e-3, "fp16": 3e-4, "fp8": 5e-2}[precision]
    assert all(distance(a, b) < bound for a, b in zip(got.plain(), want, strict=True))
