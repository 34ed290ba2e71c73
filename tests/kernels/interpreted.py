"""Triton kernels, all but attention's, in Triton's interpreter: test_triton.py runs this file by itself.

The truth is the reference in float64, which the other files of this folder hold against definitions. Kernels
are tested in fp32 and fp16: the interpreter truncates where a GPU rounds to bfloat16 or float8.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_packing import drawer, generator_of, head_swaps, here, pack, random_swaps, seeds
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Qwen3Config,
    StableLmConfig,
)

import deltapatch
from deltapatch.kernels.activation import Neurons
from deltapatch.kernels.backend import REFERENCE, TRITON, choose_backend
from deltapatch.kernels.edits import Swap
from deltapatch.kernels.lang import expm1, expm1_below_zero, expm1_minus, interpreted
from deltapatch.kernels.norm import Norms, Part
from deltapatch.kernels.product import (
    PRECISIONS,
    Operand,
    Precision,
    Scaled,
    narrow,
    narrow_triton,
    narrow_weight,
)
from deltapatch.kernels.readout import BaseReadout, ReadRows, Unembedding
from deltapatch.kernels.softcap import cap_slope, softcap
from deltapatch.models.autoencoder import Autoencoder

SCALES = (1e-6, 1e-2, 1.0, 1e3)
# Rows beyond a tile and one row; one, few and many own positions.
ONE = pack([(3, 2), (5, 1)], [(0, 0, 2, 1, 3), (1, 0, 1, 1, 19)])
FEW = pack([(5, 2), (4, 1)], [(0, 0, 2, 3, 3), (1, 0, 1, 2, 10)])
NARROW = {"fp32": 3e-6, "fp16": 2**-11}  # tolerance of what is narrowed
PRECISION = pytest.mark.parametrize("precision", NARROW)
SMALL = pack([(4, 2), (3, 1)], [(0, 0, 2, 2, 2), (1, 0, 1, 1, 3)])
PACKINGS = pytest.mark.parametrize("packing", [ONE, FEW], ids=["one", "few"])


def each_tensor(change, value):
    """The same arguments with every tensor of floats changed."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, Swap):
        return replace(value, delta=change(value.delta))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(each_tensor(change, v) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(each_tensor(change, v) for v in value)
    return value


def double(value):
    """Arguments in float64."""
    if isinstance(value, Precision):
        return PRECISIONS["fp64"]
    if isinstance(value, Operand):
        return narrow_weight(value.values.double(), PRECISIONS["fp64"])
    if isinstance(value, Scaled):
        return Scaled(value.plain().double())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(double, value))
    if isinstance(value, list):
        return [double(v) for v in value]
    return each_tensor(torch.Tensor.double, value)


def error(got, want):
    """Norm of the error over the norm of what is right; NaN where anything is."""
    scale = float(want.double().norm())
    return float((got.double() - want.double()).norm()) / (scale or 1)


def worst_row(got, want):
    """The error of the row that has the largest."""
    return max((error(a, b) for a, b in zip(got, want, strict=True)), default=0)


def plain(result):
    """An operation's result as named tensors."""
    if isinstance(result, dict):
        return result
    results = result if isinstance(result, list) else [result]
    return {i: r.plain() if isinstance(r, Scaled) else r for i, r in enumerate(results)}


def assert_same(name, arguments, tolerance, measure=error, **options):
    """The kernel's result is the float64 reference's, and so it is the reference's in the same precision."""
    copies = [each_tensor(torch.clone, arguments) for _ in range(2)]
    result = getattr(TRITON, name)(*arguments, **options)
    got, want = plain(result), plain(getattr(REFERENCE, name)(*double(copies[0]), **options))
    same = plain(getattr(REFERENCE, name)(*copies[1], **options))
    assert got.keys() == want.keys()
    for key in got:
        assert got[key].dtype == same[key].dtype
        assert got[key].shape == same[key].shape
        bound = 0 if key in SAID else tolerance
        assert measure(got[key], want[key]) <= bound, key
        assert measure(got[key], same[key]) <= 2 * bound, key
    return result


# ---------------------------------------------------------------------------------- elementwise operations


@triton.jit
def _all(p_x, p_expm1, p_minus, p_below, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + o)
    tl.store(p_below + o, expm1_below_zero(-tl.abs(x)))
    tl.store(p_expm1 + o, expm1(x))
    tl.store(p_minus + o, expm1_minus(x))


def test_expm1_of_any_size():
    draw = drawer(0, torch.float32)
    x = torch.cat([draw(1024, scale=s) for s in (1e-30, 1e-6, 1e-2, 0.3, 1.0, 5.0, 20.0, 0.0)])
    got, minus, below = (torch.empty_like(x) for _ in range(3))
    _all[(8,)](x, got, minus, below, BLOCK=1024)
    wide = x.cpu().numpy().astype(np.longdouble)
    want = np.expm1(wide)
    off = np.abs(got.cpu().numpy() - want) / np.where(want == 0, 1, np.abs(want))
    assert off.max() < 2e-7
    want = np.expm1(-np.abs(wide))
    assert (np.abs(below.cpu().numpy() - want) / np.where(want == 0, 1, -want)).max() < 6e-7
    series = sum(wide**k / np.longdouble(float(np.prod(np.arange(1.0, k + 1)))) for k in range(2, 20))
    want = np.where(np.abs(wide) < 0.5, series, want - wide)
    known = np.abs(wide) > 1e-15  # below, the square is less than float32 can hold
    assert (np.abs(minus.cpu().numpy() - want) / np.where(known, want, 1))[known].max() < 1e-6
    assert (minus >= 0).all()


def norm(dx, x, weight, centred, packing, precision="fp32"):
    """The norm alone."""
    arguments = ([], Norms(x, [weight], 1e-5, centred), packing.segments, PRECISIONS[precision])
    return [[Part(Scaled(dx), [])], *arguments]


@PRECISION
@PACKINGS
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
def test_norm(packing, centred, precision):
    draw = drawer(0, torch.float32)
    for scale in SCALES:
        dx, x = draw(len(packing.tokens), 37, scale=scale), draw(packing.n_base, 37) + 0.5
        dx[1] = 0
        arguments = norm(dx, x, draw(37), centred, packing, precision)
        (got,) = assert_same("add_norm", arguments, NARROW[precision])
        assert got.values.dtype == PRECISIONS[precision].operand
        assert (got.plain()[1] == 0).all()


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("left", [0.3, 1e-2, 0.0])
def test_norm_of_a_vector_that_is_nearly_taken_away(left, centred):
    draw = drawer(1, torch.float32)
    x, weight = draw(FEW.n_base, 33), draw(33)
    dx = torch.stack([x[t.base] * (left - 1) for t in FEW.tokens])
    dx[::2] = draw(len(dx[::2]), 33, scale=1e-4)  # neighbours that hardly change must not suffer
    arguments = norm(dx, x, weight, centred, FEW)
    (got,), (want,) = TRITON.add_norm(*arguments), REFERENCE.add_norm(*double(arguments))
    got, want = got.values, want.values
    assert error(got[::2], want[::2]) < 1e-6
    # A norm undoes mere shrinking, so that the difference is small beside what it is the difference of
    gone = norm(torch.stack([-x[t.base] for t in FEW.tokens]), x, weight, centred, FEW)
    before = REFERENCE.add_norm(*double(gone))[0].values[1::2].norm()
    assert (got.double() - want)[1::2].norm() / before < 6e-7 / max(left, 1e-2)


@pytest.mark.parametrize("each", [True, False], ids=["weights-of-its-own", "one-weight"])
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@PACKINGS
def test_norms_of_heads(packing, centred, each):
    for seed, scale in enumerate(SCALES):
        draw, n, heads, width = drawer(seed, torch.float32), len(packing.tokens), 3, 20
        d = draw(n, 2, heads, width, scale=scale)[:, 1]
        d[1] = 0
        powers = torch.exp2(torch.arange(n) % 5 * 20 - 60.0) if seed % 2 else None
        swaps = head_swaps(seed, torch.float32, n, heads, width, [False, False][: seed - 1])
        swaps = [replace(swap, token=2 + swap.token % (n - 2)) for swap in swaps]
        weight = draw(heads, width) if each else draw(width)
        norms = Norms(draw(packing.n_base, heads, width) + 0.5, [weight], 1e-5, centred)
        arguments = [[Part(Scaled(d, powers), swaps)], [], norms, packing.segments, PRECISIONS["fp32"]]
        (got,) = assert_same("add_norm", arguments, NARROW["fp32"], worst_row)
        assert got.values.shape == (n, heads, width)
        assert (got.values[1] == 0).all()


def test_norms_of_heads_of_one_line_for_all_tokens():
    draw, n = drawer(3, torch.float32), len(FEW.tokens)
    swaps = head_swaps(1, torch.float32, n, 2, 16, [False])
    part = [Part(Scaled(torch.zeros(1, 2, 16).expand(n, -1, -1)), swaps)]
    norms = Norms(draw(FEW.n_base, 2, 16), [draw(16)], 1e-5, False)
    assert_same("add_norm", [part, [], norms, FEW.segments, PRECISIONS["fp32"]], NARROW["fp32"])


kinds = st.lists(st.booleans(), max_size=2)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([SMALL, pack([(1, 1)], [(0, 0, 1, 1, 1)])]),
    seeds,
    st.lists(st.tuples(st.booleans(), st.booleans(), kinds), max_size=3),
    kinds,
    st.integers(0, 2),
    st.sampled_from(["", "out", "to"]),
    st.sampled_from(list(NARROW)),
)
def test_parts_swaps_and_norms_of_any_kind(packing, seed, parts, last, n_norms, place, precision):
    draw, n, width = drawer(seed, torch.float32), len(packing.tokens), 9
    given_parts = []
    for i, (held, scaled, swaps) in enumerate(parts):
        scale = torch.exp2(torch.arange(n) % 5 * 20 - 60.0) if scaled else None
        d = Scaled(draw(n, width), scale) if held else None
        given_parts.append(Part(d, random_swaps(seed + i, torch.float32, n, width, swaps)))
    out = draw(n + 2, width)
    to = (
        here(torch.randperm(n + 2, generator=generator_of(seed), device="cpu"))[:n] if place == "to" else None
    )
    outs = [out.clone(), out.double(), out.clone()] if place else [None] * 3
    x, weights = draw(packing.n_base, width), [draw(width) for _ in range(n_norms)]
    swaps = random_swaps(seed + 3, torch.float32, n, width, last)
    arguments = [given_parts, swaps, Norms(x, weights, 1e-5, True), packing.segments, PRECISIONS[precision]]
    got = TRITON.add_norm(*arguments, out=outs[0], to=to)
    want = REFERENCE.add_norm(*double(arguments), out=outs[1], to=to)
    REFERENCE.add_norm(*arguments, out=outs[2], to=to)
    assert len(got) == n_norms
    for a, b in zip(got, want, strict=True):
        assert worst_row(a.plain(), b.plain()) < NARROW[precision]
    assert not place or torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("act", "precision"),
    [
        (F.gelu, "fp32"),
        (partial(F.gelu, approximate="tanh"), "fp32"),
        (F.silu, "fp32"),
        (F.silu, "fp16"),
        (F.gelu, "fp16"),
        (partial(F.gelu, approximate="tanh"), "fp16"),
        (F.relu, "fp32"),
    ],
    ids=["gelu", "tanh", "silu", "silu-fp16", "gelu-fp16", "tanh-fp16", "relu"],
)
def test_activation(act, precision, gated, monkeypatch):
    monkeypatch.setattr("deltapatch.kernels.activation_triton._BLOCK", 32)  # so that rows take several
    draw, chosen = drawer(2, torch.float32), PRECISIONS[precision]
    for scale in SCALES:
        for width in (50, 1) if scale == 1 else (50,):
            packing = SMALL
            n, base = (len(packing.tokens), width), (packing.n_base, width)
            du, u = draw(*n, scale=scale), draw(*base, scale=2)
            dg, g = (draw(*n, scale=scale), draw(*base, scale=2)) if gated else (None, None)
            for d in (du, dg) if gated else (du,):
                d[1] = 0
            gate = Neurons(Scaled(dg), g) if gated else None
            arguments = [act, Neurons(Scaled(du), u), gate, packing.segments, [], chosen]
            got = assert_same("activation_difference", arguments, 2**-11 if chosen.scaled else 1e-6)
            assert got.values.dtype == chosen.operand
            assert (got.plain()[1] == 0).all()


@PRECISION
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("block", [8, 64])
def test_activation_of_scaled_rows_with_patches(block, gated, precision, monkeypatch):
    """Rows from 1e-7 to 1e7 out of one fused product; no patch, few, all neurons of a row, tiny and huge."""
    monkeypatch.setattr("deltapatch.kernels.activation_triton._BLOCK", block)
    draw, n, width = drawer(3, torch.float32), len(SMALL.tokens), 37
    both = draw(n, 2, width)
    scale = torch.exp2(torch.arange(n) * 4.0 - 2 * n)
    up, gate = Scaled(both[:, 0], scale), Scaled(both[:, 1], scale.flip(0)) if gated else None
    u, g = draw(SMALL.n_base, width), draw(SMALL.n_base, width) if gated else None
    every = torch.arange(width)
    token = torch.cat([every * 0 + 5, every[:20] * 0 + 2, torch.tensor([0, 7, n - 1])])
    at = torch.cat([every, every[:20], torch.tensor([36, 0, 3])])
    mixed = here(torch.randperm(len(token), generator=generator_of(0), device="cpu"))
    delta = draw(4, width) * torch.tensor([1e-12, 1.0, 1e12, 1.0])[:, None]
    swaps = [Swap(token[mixed], token[mixed] % 4, at[mixed], delta)]
    for some in ([], swaps):
        act = partial(F.gelu, approximate="tanh")
        copy = each_tensor(torch.clone, both)
        arguments = [
            act,
            Neurons(up._replace(values=copy[:, 0]), u),
            None if gate is None else Neurons(gate, g),
            SMALL.segments,
            some,
            PRECISIONS[precision],
        ]
        assert_same("activation_difference", arguments, NARROW[precision], worst_row)


@pytest.mark.parametrize(
    "act", [F.gelu, partial(F.gelu, approximate="tanh"), F.silu], ids=["gelu", "tanh", "silu"]
)
def test_a_huge_change_that_a_gate_keeps_out(act):
    """A gate that closes on a huge du, and one that opens on a u that du takes away."""
    dg, g = torch.tensor([[-1e3, 1e3, -1e3]]), torch.tensor([[1.3, -5.0, 700.0]])
    du, u = torch.tensor([[1e3, -0.999, 1e4]]), torch.tensor([[1.0, 1.0, -2.0]])
    segments = pack([(1, 1)], [(0, 0, 1, 1, 1)]).segments
    arguments = [act, Neurons(Scaled(du), u), Neurons(Scaled(dg), g), segments, [], PRECISIONS["fp32"]]
    want = REFERENCE.activation_difference(*double(arguments)).values
    got = TRITON.activation_difference(*arguments).values
    assert all(error(a, b) < 1e-6 for a, b in zip(got[0], want[0], strict=True))


def test_an_activation_without_a_kernel():
    d, segments = torch.zeros(1, 1), pack([(1, 1)], [(0, 0, 1, 1, 1)]).segments
    with pytest.raises(deltapatch.DeltapatchError, match=r"no activation .*tanh.*: use backend='reference'"):
        TRITON.activation_difference(
            torch.tanh, Neurons(Scaled(d), d), None, segments, [], PRECISIONS["fp32"]
        )


@pytest.mark.parametrize("width", [1, 37, 5000])
def test_narrow(width):
    """Rows from the smallest to the largest float32, one of zeros, in an array of wider rows."""
    size = torch.exp2(torch.arange(-149.0, 125.0, 13))
    d = torch.cat([torch.rand(len(size), width + 3).sub_(0.5) * size[:, None], torch.zeros(1, width + 3)])
    d = d[:, :width]
    # On a GPU `narrow` is the kernel itself: what is right is said by a CPU.
    got, want = narrow_triton(d, PRECISIONS["fp16"]), narrow(d.cpu(), PRECISIONS["fp16"])
    assert torch.equal(got.scale.cpu(), want.scale)
    assert torch.equal(got.values.cpu().float(), want.values.float())
    # Where the interpreter truncates, scales are right all the same
    got, want = narrow_triton(d, PRECISIONS["fp8"]), narrow(d.cpu(), PRECISIONS["fp8"])
    assert torch.equal(got.scale.cpu(), want.scale)
    assert error(got.values.float(), want.values.to(d.device).float()) < 0.15


# ---------------------------------------------------------------------------------------- read-out, columns

SAID = ("flip", "says_clean", "says_corrupted")  # 1 or 0
MEASURED = ("logit_diff", "dlogp_clean", "dlogp_corrupted", "kl", "entropy", *SAID)


def base_of(n_pairs, draw, weight, sure=0.0, cap=None):
    logits = draw(n_pairs, len(weight), scale=2.0)
    logits[:, 5] += sure
    uncapped, logits = (None, logits) if cap is None else (logits, softcap(logits, cap))
    p = logits.double().softmax(-1)
    answers = torch.stack([row.topk(2).indices for row in logits + draw(*logits.shape)])
    mean = (p if uncapped is None else p * cap_slope(uncapped.double(), cap)).to(weight.dtype) @ weight
    return BaseReadout(logits, p, mean, answers, cap=cap, uncapped=uncapped)


READ = [(scale, 1, cap, False) for scale in SCALES for cap in (None, 1.5, 30.0)]
READ += [(1.0, 3, cap, others) for cap in (None, 30.0) for others in (False, True)]


@pytest.mark.parametrize(("scale", "pieces", "cap", "others"), READ)
def test_readout(scale, pieces, cap, others, monkeypatch):
    packing = pack([(3, 2), (2, 1)], [(0, 0, 2, 1, 9), (1, 0, 1, 1, 3)])
    draw = drawer(7, torch.float32)
    weight = draw(2500 if pieces > 1 else 300, 37)
    monkeypatch.setattr("deltapatch.kernels.readout_triton.CELLS", 1024 if pieces > 1 else 1 << 20)
    base = base_of(3, draw, weight, cap=cap)
    if others:  # tokens that count as the answers beside these; none in one read
        some = torch.stack([torch.randperm(len(weight))[:8].view(2, 4) for _ in range(3)])
        some[0, 1, 2:], some[1] = -1, -1
        base = base._replace(others=some)
    dn = draw(packing.n_rows, 37, scale=scale)
    dn[1] = 0
    # float32 logits near a cap have lost digits of the distance to it.
    for precision, tolerance in (("fp32", 1e-5 if cap is None else 3e-5), ("fp16", 3e-3)):
        chosen = PRECISIONS[precision]
        unembedding = Unembedding(weight, narrow_weight(weight, chosen))
        arguments = [ReadRows(dn, packing.segments, packing.first_pairs), unembedding, base]
        # Of logits at the cap, which are alike, any may be the likeliest.
        measured = MEASURED if precision == "fp32" and cap is None else MEASURED[:5]
        got = assert_same("readout", arguments, tolerance, measured=measured)
        assert all(values[1] == 0 for name, values in got.items() if not name.startswith("says_"))
        few = TRITON.readout(*arguments, measured=("logit_diff",))
        assert set(few) == {"logit_diff"}
        assert torch.equal(few["logit_diff"], got["logit_diff"])


@pytest.mark.parametrize("uncapped", [0.0, 3.0, 40.0, 120.0])
def test_logits_anywhere_below_the_cap_and_far_beyond_it(uncapped):
    """Where the cap is all but flat a row that moves far comes back from there."""
    packing, draw = pack([(2, 1)], [(0, 0, 1, 1, 4)]), drawer(9, torch.float32)
    weight = draw(300, 37)
    base = base_of(1, draw, weight, cap=30.0)
    before = base.uncapped + uncapped * torch.sign(draw(1, 300))
    logits = softcap(before, 30.0)
    p = logits.double().softmax(-1)
    mean = (p * cap_slope(before.double(), 30.0)).float() @ weight
    base = base._replace(logits=logits, p=p, mean=mean, uncapped=before)
    sizes = torch.tensor([1e-5, 1e-2, 1.0, 50.0])[:, None]
    unembedding = Unembedding(weight, narrow_weight(weight, PRECISIONS["fp32"]))
    arguments = [ReadRows(draw(4, 37) * sizes, packing.segments, [0]), unembedding, base]
    got = TRITON.readout(*arguments, measured=MEASURED[:5])
    want = REFERENCE.readout(*double(arguments), measured=MEASURED[:5])
    for name in MEASURED[:5]:
        for row in range(4):
            assert error(got[name][row], want[name][row]) < 5e-5, (name, row)


def test_the_likely_token_taken_away_beside_a_row_that_hardly_moves():
    packing = pack([(3, 1)], [(0, 0, 1, 1, 3)])
    draw = drawer(8, torch.float32)
    weight = draw(67, 11)
    base = base_of(1, draw, weight, sure=12)._replace(answers=torch.tensor([[5, 6]]))
    dn = torch.stack([-4 * weight[5], 1e-5 * weight[6], 200 * weight[6]])
    unembedding = Unembedding(weight, narrow_weight(weight, PRECISIONS["fp32"]))
    arguments = [ReadRows(dn, packing.segments, [0]), unembedding, base]
    got = TRITON.readout(*arguments, measured=MEASURED)
    want = REFERENCE.readout(*double(arguments), measured=MEASURED)
    for name in MEASURED:
        for row in range(3):
            assert error(got[name][row], want[name][row]) < 2e-5, name
    assert got["flip"].tolist() == [1, 0, 1]
    assert got["says_clean"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("spread", [0.0, 2.0, 10.0])
def test_entropy_of_changes_of_every_size(spread):
    """Where all tokens are alike it is of second order; where one is all but certain there is hardly any."""
    packing, sizes = pack([(3, 1)], [(0, 0, 1, 1, 8)]), 10.0 ** torch.arange(-6.0, 2.0)
    draw = drawer(12, torch.float32)
    weight, logits = draw(67, 11), draw(1, 67, scale=spread)
    p = logits.double().softmax(-1)
    base = BaseReadout(logits, p, p.float() @ weight, torch.tensor([[5, 6]]))
    unembedding = Unembedding(weight, narrow_weight(weight, PRECISIONS["fp32"]))
    arguments = [ReadRows(draw(8, 11) * sizes[:, None], packing.segments, [0]), unembedding, base]
    assert_same("readout", arguments, 2e-5, worst_row, measured=("entropy",))


@pytest.mark.parametrize("pieces", [1, 3])
def test_of_equally_likely_tokens_the_first_is_said(pieces, monkeypatch):
    monkeypatch.setattr("deltapatch.kernels.readout_triton.CELLS", 1024 if pieces > 1 else 1 << 20)
    packing = pack([(2, 1)], [(0, 0, 1, 1, 3)])
    vocab = 2500 if pieces > 1 else 300
    tokens = torch.tensor([140, 12, vocab - 1])  # apart by lanes, steps and pieces
    weight, dn, logits = torch.zeros(vocab, 20), torch.zeros(3, 20), torch.zeros(1, vocab)
    weight[tokens, 0], dn[1:, 0] = 2.0, 8.0
    weight[tokens[2], 1], dn[2, 1] = 1.0, 1.0
    logits[0, [250, 33]] = 1.0
    p = logits.double().softmax(-1)
    unembedding = Unembedding(weight, narrow_weight(weight, PRECISIONS["fp32"]))
    for answers, want in (
        ((33, 250), ([1, 0, 0], [0, 0, 0])),
        ((12, 140), ([0, 1, 0], [0, 0, 0])),
        ((vocab - 1, 12), ([0, 0, 1], [0, 1, 0])),
    ):
        base = BaseReadout(logits, p, p.float() @ weight, torch.tensor([answers]))
        got = TRITON.readout(ReadRows(dn, packing.segments, [0]), unembedding, base, measured=MEASURED)
        assert (got["says_clean"].tolist(), got["says_corrupted"].tolist()) == want
        assert got["flip"].tolist() == [0, 1, 1]


@pytest.mark.parametrize("sizes", [(), (0,), (1,), (3, 2), (75, 0, 10), (19,)], ids=str)
def test_columns_of_neurons(sizes):
    """No patch, few, several a token; tokens without one are zero."""
    draw = drawer(11, torch.float32)
    rng = generator_of(0)
    swaps, shared = [], draw(6, 20)
    for i, n in enumerate(sizes):
        token, source, at = (here(torch.randint(k, (n,), generator=rng, device="cpu")) for k in (12, 6, 20))
        swaps.append(Swap(token, source, at, draw(6, 20) if i == 1 else shared))
    assert_same("gather_columns", [swaps, draw(70, 20), 12], 1e-6)


# ------------------------------------------------------------------------------------------- whole sweeps

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def _neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=6, max_position_embeddings=16))


def _gptj():
    sizes = {"vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 6, "n_positions": 16}
    return GPTJForCausalLM(GPTJConfig(**sizes, rotary_dim=4, bos_token_id=None, eos_token_id=None))


def _llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=6, num_key_value_heads=1))


def _gpt2():
    sizes = {"vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 6, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))


def _later(config, **options):
    """A model of a later family."""
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    sizes = SIZES | {"intermediate_size": 6, "num_key_value_heads": 1, "max_position_embeddings": 16}
    return AutoModelForCausalLM.from_config(config(**sizes, **tokens, **options))


def _qwen3():
    yarn = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
    return _later(Qwen3Config, head_dim=6, rope_parameters=yarn)


def _gemma2():
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    return _later(Gemma2Config, head_dim=6, sliding_window=2, query_pre_attn_scalar=9, **caps)


def _olmo2():
    return _later(Olmo2Config)


def _stablelm():
    return _later(StableLmConfig, qk_layernorm=True)


MODELS = pytest.mark.parametrize(
    ("make", "sites"),
    [
        (_neox, ("resid_pre", "mlp_post", "q", "v")),
        (_gptj, ("mlp_out", "k", "z", "mlp_out.dim", "mlp_post")),
        (_llama, ("resid_mid", "attn_out", "mlp_post", "pattern", "z")),
        (_gpt2, ("resid_pre", "q", "mlp_out")),
        (_qwen3, ("k", "attn_out", "q")),
        (_gemma2, ("z", "attn_out", "v", "mlp_post")),
        (_olmo2, ("mlp_post", "resid_mid", "k")),
        (_stablelm, ("mlp_out", "q", "k")),
    ],
    ids=["gpt_neox", "gptj", "llama", "gpt2", "qwen3", "gemma2", "olmo2", "stablelm"],
)
ANSWERS = [([5, 1, 2], [5, 7]), (3, 4), ([8, 9], [10, 11, 12])]


def assert_same_sweep(make, sites, precision, answers, longer=0):
    torch.manual_seed(0)
    hf = make()
    for weight in hf.parameters():
        weight.data.normal_(0, 0.3)
    model = deltapatch.from_transformers(hf.eval())
    rng = np.random.default_rng(0)
    pairs = [
        deltapatch.PromptPair(
            rng.integers(0, 31, n).tolist(),
            rng.integers(0, 31, n + longer).tolist(),
            *both,
            align=[[0, 0], [-1, -1]] if longer else None,
        )
        for n, both in zip((3, 4, 4), answers, strict=False)
    ]
    options = {"sites": list(sites), "positions": [0, -1], "precision": precision, "progress": False}
    got = deltapatch.sweep(model, pairs, backend="triton", **options)
    # The reference has an error of its own: of answers that move alike, as large as what they differ by.
    truth = options | ({"precision": "fp64"} if precision == "fp32" else {})
    want = deltapatch.sweep(model, pairs, backend="reference", **truth)
    assert got.meta["backend"] == "triton"
    for site in sites:
        # ie and logit_diff are differences of what the answers' logits do, which may nearly cancel.
        moved = [
            np.linalg.norm(np.nan_to_num(want.values(f"dlogp_{a}", site))) for a in ("clean", "corrupted")
        ]
        for metric in ("ie", "logit_diff", "kl", "dlogp_clean", "dlogp_corrupted"):
            a, b = got.values(metric, site), want.values(metric, site)
            assert np.array_equal(np.isnan(a), np.isnan(b))
            sizes = [np.linalg.norm(np.nan_to_num(b)), *(moved if metric in ("ie", "logit_diff") else ())]
            # A rounding to float16 may fall on the other side where float32 differs in its last digit.
            tolerance = 1e-5 if precision == "fp32" else 1e-3
            assert np.linalg.norm(np.nan_to_num(a - b)) <= tolerance * max(sizes), (site, metric)


@MODELS
def test_edges_are_what_the_reference_finds(make, sites):
    torch.manual_seed(1)
    hf = make()
    for weight in hf.parameters():
        weight.data.normal_(0, 0.3)
    model = deltapatch.from_transformers(hf.eval())
    pair = deltapatch.PromptPair([3, 7, 9], [3, 8, 9], 4, 5)
    options = {"senders": ["input", "a0.h1", "m0"], "receivers": ["a1", "m1", "logits"], "effect": "both"}
    got, want = (
        deltapatch.sweep_edges(model, [pair], backend=name, precision="fp32", progress=False, **options)
        for name in ("triton", "reference")
    )
    for effect in ("total", "direct"):
        a, b = got.flat("logit_diff", effect), want.flat("logit_diff", effect)
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize(("make", "precision"), [(_neox, "fp32"), (_llama, "fp16"), (_gemma2, "fp32")])
def test_edits_that_are_not_fused_go_beside_the_kernels(make, precision):
    """Directions and steering at every kind of place, and jointly with swaps."""
    torch.manual_seed(2)
    hf = make()
    for weight in hf.parameters():
        weight.data.normal_(0, 0.3)
    model = deltapatch.from_transformers(hf.eval())
    spec, rng = model.spec, np.random.default_rng(2)
    pairs = [deltapatch.PromptPair([3, 7, 9, 2], [3, 8, 9, 5], 4, 5)]
    places = ["attn_out", "mlp_out", "resid_post", "q", "k", "v", "z"]
    places += [] if spec.parallel else ["resid_mid"]
    asked = []
    for place in places:
        head = 1 if place in "qz" else 0 if place in "kv" else None
        width = spec.d_model if head is None else spec.d_head
        along = deltapatch.Patch(place, 0, 1, head, along=rng.normal(size=(2, width)))
        add = deltapatch.Patch(place, 0, 2, head, add=rng.normal(size=width))
        swap = deltapatch.Patch(place, 0, 3, head)
        asked.append(deltapatch.Intervention(0, [along, add, swap]))
    for place, before in (("resid_post", "attn_out"), ("z", "resid_pre")):  # features, behind another patch
        sae = _autoencoder(place, spec.n_heads * spec.d_head if place == "z" else spec.d_model)
        features = [deltapatch.Patch(place, 0, 3, feature=(sae, j)) for j in range(0, sae.d_sae, 2)]
        asked.append(deltapatch.Intervention(0, [deltapatch.Patch(before, 0, 3), *features]))
    options = {"precision": precision, "progress": False, "noise_sample": 0}
    want = deltapatch.run(model, pairs, asked, backend="reference", **options)
    got = deltapatch.run(model, pairs, asked, backend="triton", **options)
    for metric in ("logit_diff", "kl"):
        a, b = got.values(metric), want.values(metric)
        assert np.linalg.norm(a - b) <= (1e-5 if precision == "fp32" else 2e-3) * np.linalg.norm(b)


def _autoencoder(site, width):
    draw = torch.Generator().manual_seed(width)
    shapes = {"w_enc": (width, 6), "w_dec": (6, width), "b_dec": (width,), "b_enc": (6,)}
    weights = {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    return Autoencoder("drawn", site, 0, "relu", "none", weights, subtracts=True)


@MODELS
def test_a_sweep_gives_what_the_reference_gives(make, sites):
    assert_same_sweep(make, sites[-2:], "fp32", ANSWERS[:1])


def test_prompts_of_unequal_length():
    assert_same_sweep(_llama, ("z", "mlp_out"), "fp32", ANSWERS[1:2], longer=2)


@pytest.mark.slow
@MODELS
@pytest.mark.parametrize("precision", NARROW)
def test_sweeps_of_several_pairs_and_sites(make, sites, precision):
    assert_same_sweep(make, sites if precision == "fp32" else sites[:1], precision, ANSWERS)


def test_float64_goes_through_the_references():
    draw = drawer(12, torch.float64)
    arguments = norm(draw(len(FEW.tokens), 8), draw(FEW.n_base, 8), draw(8), True, FEW, "fp64")
    (got,), (want,) = TRITON.add_norm(*arguments), REFERENCE.add_norm(*arguments)
    assert torch.equal(got.values, want.values)
    weight = draw(8, 5)
    swaps = [Swap(torch.tensor([1]), torch.tensor([0]), torch.tensor([2]), draw(1, 5))]
    assert torch.equal(TRITON.gather_columns(swaps, weight, 3), REFERENCE.gather_columns(swaps, weight, 3))


@pytest.mark.skipif(not interpreted(), reason="a GPU is no interpreter")
def test_the_interpreter_is_asked_for_by_name():
    assert choose_backend("triton", "cpu") is TRITON
    assert choose_backend("auto", "cpu") is REFERENCE
