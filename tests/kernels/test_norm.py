"""Residual add and norm difference against norm(x + sum) - norm(x)."""

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
    head_swaps,
    is_rounded,
    pack,
    packings,
    random_swaps,
    seeds,
    swap_one_by_one,
)

from deltapatch.kernels import norm as norm_module
from deltapatch.kernels.edits import Swap
from deltapatch.kernels.norm import Norms, Part, add_norm
from deltapatch.kernels.product import PRECISIONS, Scaled

EPS = 1e-5
TOLERANCE = {"fp32": 3e-6, "fp64": 1e-12}


def norm(x, weight, centred):
    if centred:
        x = x - x.mean()
    return x / np.sqrt((x * x).mean() + EPS) * weight


def by_definition(packing, dx, x, weight, centred):
    d, base, w = exact(dx) if isinstance(dx, torch.Tensor) else dx, exact(x), exact(weight)
    out = np.empty_like(d)
    for t in packing.tokens:
        out[t.at] = norm(base[t.base] + d[t.at], w, centred) - norm(base[t.base], w, centred)
    return out


def difference(dx, x, weight, centred, packing):
    """The norm alone, in dx's own precision."""
    precision = PRECISIONS["fp64" if dx.dtype == torch.float64 else "fp32"]
    (got,) = add_norm(
        [Part(Scaled(dx), [])], [], Norms(x, [weight], EPS, centred), packing.segments, precision
    )
    assert got.scale is None
    return got.values


def test_segments_together_take_no_more_of_their_runs_than_they_meet(monkeypatch):
    packing = pack([(30, 2)], [(0, 0, 1, 3, 2), (0, 0, 1, 2, 1), (0, 1, 1, 1, 4)])
    met, statistics = [], norm_module._statistics
    monkeypatch.setattr(
        norm_module, "_statistics", lambda x, norms: met.append(len(x)) or statistics(x, norms)
    )
    draw = drawer(4, torch.float64)
    dx, x, weight = draw(len(packing.tokens), 6), draw(packing.n_base, 6), draw(6)
    got = difference(dx, x, weight, True, packing)
    assert distance(got, by_definition(packing, dx, x, weight, True)) < TOLERANCE["fp64"]
    assert met == [4]


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e3])
def test_norm_difference(scale, precision, centred):
    @settings(max_examples=15, deadline=None)
    @given(packings(), seeds)
    def check(packing, seed):
        draw = drawer(seed, DTYPES[precision])
        dx, x = draw(len(packing.tokens), 37, scale=scale), draw(packing.n_base, 37) + 0.5
        weight = draw(37)
        got = difference(dx, x, weight, centred, packing)
        assert got.dtype == dx.dtype
        assert distance(got, by_definition(packing, dx, x, weight, centred)) < TOLERANCE[precision]

    check()


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("left", [0.3, 1e-2, 1e-3, 0.0])
def test_a_patch_that_takes_most_of_the_vector_away(left, precision, centred):
    packing = pack([(3, 2)], [(0, 0, 2, 2, 3)])
    draw = drawer(0, DTYPES[precision])
    x, weight = draw(packing.n_base, 33), draw(33)
    dx = torch.stack([x[t.base] * (left - 1) for t in packing.tokens])
    dx[::2] = draw(len(dx[::2]), 33, scale=1e-4)  # neighbours that hardly change must not suffer
    got = difference(dx, x, weight, centred, packing)
    want = by_definition(packing, dx, x, weight, centred)
    assert distance(got[::2], want[::2]) < TOLERANCE[precision]
    # A norm undoes mere shrinking, so that the difference is small beside what it is the difference of
    before = np.stack([norm(exact(x)[t.base], exact(weight), centred) for t in packing.tokens])
    shrunk = slice(1, None, 2)
    error = np.linalg.norm(exact(got)[shrunk] - want[shrunk]) / np.linalg.norm(before[shrunk])
    assert error < {"fp32": 6e-7, "fp64": 6e-15}[precision] / max(left, 1e-2)


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("precision", DTYPES)
def test_a_base_far_from_zero(precision, centred):
    """A mean a hundred times the spread: LayerNorm takes it out before anything is squared."""
    packing = pack([(2, 1)], [(0, 0, 1, 2, 2)])
    draw = drawer(1, torch.float64)
    x, dx, weight = draw(2, 65) + 100, draw(4, 65, scale=1e-4), draw(65)
    x, dx, weight = (a.to(DTYPES[precision]) for a in (x, dx, weight))
    got = difference(dx, x, weight, centred, packing)
    tolerance = {"fp32": 1e-4, "fp64": 1e-12}[precision]
    assert distance(got, by_definition(packing, dx, x, weight, centred)) < tolerance


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
def test_no_change_gives_exactly_zero(centred):
    packing = pack([(4, 2)], [(0, 0, 2, 3, 2)])
    draw = drawer(2, torch.float32)
    dx = draw(len(packing.tokens), 16)
    dx[1::3] = 0
    got = difference(dx, draw(packing.n_base, 16), draw(16), centred, packing)
    assert (got[1::3] == 0).all()
    assert (got[0::3] != 0).any()


@pytest.mark.parametrize("each", [True, False], ids=["weights-of-its-own", "one-weight"])
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("precision", DTYPES)
def test_norms_of_heads(precision, centred, each):
    """Of a tensor that lies apart, with scales, and with patches of heads."""

    @settings(max_examples=15, deadline=None)
    @given(packings(), seeds, st.booleans(), st.lists(st.just(False), max_size=2))
    def check(packing, seed, scaled, kinds):
        draw, n, heads = drawer(seed, DTYPES[precision]), len(packing.tokens), 3
        d, x = draw(n, 2, heads, 8)[:, 1], draw(packing.n_base, heads, 8) + 0.5
        weight = draw(heads, 8) if each else draw(8)
        scale = torch.exp2(torch.arange(n) % 5 - 2.0) if scaled else None
        swaps = head_swaps(seed, d.dtype, n, heads, 8, kinds)
        norms = Norms(x, [weight], EPS, centred)
        part = Part(Scaled(d, scale), swaps)
        (got,) = add_norm([part], [], norms, packing.segments, PRECISIONS[precision])
        assert got.values.shape == (n, heads, 8)
        moved = exact(d if scale is None else d * scale[:, None, None])
        swap_one_by_one(moved, swaps)
        for h in range(heads):
            w = weight[h] if each else weight
            want = by_definition(packing, moved[:, h], x[:, h], w, centred)
            assert distance(got.values[:, h], want) < TOLERANCE[precision]

    check()


# ------------------------------------------------------------------------------- parts, swaps, and their sum

kinds = st.lists(st.booleans(), max_size=3)  # of the swaps of a place: whole vectors or coordinates


@pytest.mark.parametrize("precision", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    packings(), seeds, st.lists(st.tuples(st.booleans(), st.booleans(), kinds), max_size=3), kinds, st.data()
)
def test_parts_are_swapped_and_added_and_the_sum_swapped(precision, packing, seed, parts, last, data):
    draw, n, width = drawer(seed, DTYPES[precision]), len(packing.tokens), 7
    given_parts, want = [], np.zeros((n, width), np.longdouble)
    for i, (held, scaled, swaps) in enumerate(parts):
        d = draw(n, width) if held else draw(n, width) * 0
        scale = torch.exp2(torch.arange(n) % 5 - 2.0) if scaled else None
        swaps = random_swaps(seed + i, d.dtype, n, width, swaps)
        given_parts.append(Part(Scaled(d, scale) if held else None, swaps))
        part = exact(d if scale is None else d * scale[:, None])
        swap_one_by_one(part, swaps)
        want += part
    swaps = random_swaps(seed + 3, DTYPES[precision], n, width, last)
    swap_one_by_one(want, swaps)
    before = [None if p.d is None else p.d.values.clone() for p in given_parts]

    x, weight, out = draw(packing.n_base, width), draw(width), draw(n + 2, width)
    to = None
    if data.draw(st.booleans()):
        to = torch.randperm(n + 2, generator=torch.Generator().manual_seed(seed))[:n]
    place = torch.arange(n) if to is None else to
    untouched = out[[i for i in range(n + 2) if i not in place.tolist()]]
    got = add_norm(
        given_parts,
        swaps,
        Norms(x, [weight, 2 * weight], EPS, True),
        packing.segments,
        PRECISIONS[precision],
        out=out,
        to=to,
    )
    assert distance(out[place], want) < {"fp32": 1e-6, "fp64": 1e-15}[precision]
    assert torch.equal(out[[i for i in range(n + 2) if i not in place.tolist()]], untouched)
    assert distance(got[0].plain(), by_definition(packing, want, x, weight, True)) < TOLERANCE[precision]
    assert torch.allclose(got[1].plain(), 2 * got[0].plain())
    assert all(b is None or torch.equal(b, p.d.values) for b, p in zip(before, given_parts, strict=True))


def test_a_sum_may_replace_a_part_of_it():
    packing = pack([(3, 1)], [(0, 0, 1, 2, 2)])
    draw = drawer(3, torch.float32)
    a, b = draw(4, 5), draw(4, 5)
    want = a + b
    want[2, 1] = 7
    swap = Swap(torch.tensor([2]), torch.tensor([0]), torch.tensor([1]), torch.full((1, 5), 7.0))
    parts = [Part(Scaled(a), []), Part(Scaled(b), [])]
    assert add_norm(parts, [swap], None, packing.segments, PRECISIONS["fp32"], out=a) == []
    assert torch.equal(a, want)


@pytest.mark.parametrize("precision", ["fp16", "fp8", "bf16", "tf32"])
def test_a_narrowed_norm_is_the_norm_rounded(precision):
    packing = pack([(3, 2)], [(0, 0, 2, 2, 3)])
    draw = drawer(4, torch.float32)
    x, weight = draw(packing.n_base, 33), draw(33)
    dx = draw(12, 33) * 10.0 ** torch.linspace(-30, 3, 12)[:, None]
    dx[4] = 0
    (got,) = add_norm(
        [Part(Scaled(dx), [])], [], Norms(x, [weight], EPS, True), packing.segments, PRECISIONS[precision]
    )
    want = difference(dx, x, weight, True, packing)
    assert is_rounded(got, precision)
    assert (got.plain()[4] == 0).all()
    bound = {"fp16": 3e-4, "fp8": 5e-2, "bf16": 3e-3, "tf32": 5e-4}[precision]
    for row in (*range(4), *range(5, 12)):
        assert distance(got.plain()[row], exact(want)[row]) <= bound
