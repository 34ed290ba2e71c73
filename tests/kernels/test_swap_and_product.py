"""Swaps, columns of neurons, products in every precision, uploads and last positions: element by element."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_packing import drawer, is_rounded, pack, packings, seeds

from deltapatch.errors import DeltapatchError
from deltapatch.kernels import product as product_module
from deltapatch.kernels.device import upload
from deltapatch.kernels.edits import Swap, apply_edits, gather_columns
from deltapatch.kernels.product import PRECISIONS, Operand, Scaled, by_matrix, narrow, narrow_weight, product
from deltapatch.kernels.segments import keep_reads, read_segments


@pytest.mark.parametrize("shape", [(7,), (3, 4)], ids=["vectors", "heads"])
def test_swaps_replace_whatever_arrived(shape):
    draw = drawer(0, torch.float64)
    d, delta = draw(9, *shape), draw(5, *shape)
    whole = Swap(torch.tensor([8, 2]), torch.tensor([1, 1]), None, delta)
    single = Swap(torch.tensor([0, 0, 5]), torch.tensor([4, 0, 3]), torch.tensor([2, 0, 1]), delta)
    want = d.clone()
    for token, source in ((8, 1), (2, 1)):
        want[token] = delta[source]
    for token, source, at in ((0, 4, 2), (0, 0, 0), (5, 3, 1)):
        want[token, at] = delta[source, at]
    apply_edits(d, [whole, single])
    assert torch.equal(d, want)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(0, 40), max_size=2), seeds)
def test_columns_of_neurons(n_tokens, sizes, seed):
    """Few of them and so many that the matrix is transposed; several at one token add up."""
    draw = drawer(seed, torch.float64)
    rng = torch.Generator().manual_seed(seed)
    swaps, weight = [], draw(7, 20)
    want = torch.zeros(n_tokens, 7, dtype=torch.float64)
    for n in sizes:
        token, source, at = (torch.randint(k, (n,), generator=rng) for k in (n_tokens, 6, 20))
        swaps.append(Swap(token, source, at, draw(6, 20)))
        for t, s, j in zip(token.tolist(), source.tolist(), at.tolist(), strict=True):
            want[t] += swaps[-1].delta[s, j] * weight[:, j]
    got = gather_columns(swaps, weight, n_tokens)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------------- products

# What rounding both operands costs, relative to each row of the product, where terms hardly cancel
ERROR = {"fp64": 1e-15, "fp32": 3e-7, "tf32": 5e-4, "bf16": 5e-3, "fp16": 5e-4, "fp8": 6e-2}
EVERY = pytest.mark.parametrize("precision", PRECISIONS)
SCALED = pytest.mark.parametrize("precision", ["fp16", "fp8"])


def times(d, weight, precision):
    """The product of a difference with a weight, both narrowed."""
    chosen = PRECISIONS[precision]
    got = product(narrow(d.to(chosen.base), chosen), narrow_weight(weight.to(chosen.base), chosen))
    assert got.values.dtype == chosen.base
    return got.plain()


@EVERY
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 200])
def test_products_of_any_number_of_rows(rows, precision):
    """On a CPU rows are filled up to a multiple: nothing of that may be seen."""
    draw = drawer(rows, torch.float32)
    d, weight = draw(rows, 33, scale=1e-4), draw(17, 33)
    got = times(d, weight, precision)
    want = d.double() @ weight.double().T
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= ERROR[precision] * want.norm()


@pytest.mark.parametrize("shape", [(12, 700), (1, 15, 700), (3, 4, 700), (9, 700), (16, 700)], ids=str)
def test_large_matrices_and_few_rows(shape):
    x, matrix = torch.randn(shape), torch.randn(800, 700)  # as large as those that may take the outputs first
    got = by_matrix(x, matrix)
    want = x.double() @ matrix.double().t()
    assert got.shape == (*shape[:-1], 800)
    assert got.is_contiguous()
    assert (got - want).norm() < 1e-6 * want.norm()


@EVERY
def test_rows_of_very_different_sizes_are_each_right(precision):
    draw = drawer(1, torch.float32)
    d, weight = draw(25, 40) * 10.0 ** torch.arange(-15, 10)[:, None], draw(64, 40)
    d[7] = 0
    got = times(d, weight, precision).double()
    want = d.double() @ weight.double().T
    assert (got[7] == 0).all()
    off = (got - want).norm(dim=1) / want.norm(dim=1)
    assert off[[i for i in range(25) if i != 7]].max() < ERROR[precision]


@SCALED
@settings(max_examples=60, deadline=None)
@given(st.floats(2.0**-149, 2.0**127, width=32), st.integers(0, 4))
def test_scales_are_powers_of_two_and_rows_fill_the_type(precision, largest, at):
    d = torch.full((2, 5), largest / 3, dtype=torch.float32)
    d[0, at] = -largest
    values, scale = narrow(d, PRECISIONS[precision])
    assert torch.frexp(scale).mantissa.eq(0.5).all()
    top = values.float().abs().amax(1)
    low, high = {"fp16": (2**13, 2**14), "fp8": (224, 448)}[precision]
    assert (top <= high).all()
    if largest > 1e-30:  # smaller ones would take a scale that is not a normal number
        assert (top >= low).all()
        assert torch.allclose(
            values.float() * scale[:, None], d, rtol={"fp16": 2**-11, "fp8": 2**-4}[precision]
        )


@EVERY
def test_a_product_with_no_change_is_exactly_zero(precision):
    assert (times(torch.zeros(3, 16), drawer(0, torch.float32)(8, 16), precision) == 0).all()


def test_a_product_keeps_the_scale_for_who_reads_it():
    chosen = PRECISIONS["fp16"]
    d, weight = drawer(2, torch.float32)(4, 8, scale=1e-9), drawer(3, torch.float32)(5, 8)
    x = narrow(d, chosen)
    assert product(x, narrow_weight(weight, chosen)).scale is x.scale
    assert torch.equal(Scaled(x.values).plain(), x.values.float())
    heads = Scaled(torch.ones(2, 3, 5), torch.tensor([2.0, 0.5])).plain()
    assert heads[:, 0, 0].tolist() == [2, 0.5]


@EVERY
def test_what_has_its_type_already_is_not_copied(precision):
    chosen = PRECISIONS[precision]
    weight = torch.ones(3, 4).to(chosen.operand)
    if precision != "tf32":  # on a CPU its rounding takes a copy
        assert narrow_weight(weight, chosen).values is weight
        assert narrow(weight, chosen).values is weight


def test_half_weights_stay_as_they_are():
    half = drawer(4, torch.float16)(6, 8)
    assert torch.equal(narrow_weight(half.float(), PRECISIONS["fp16"]).values, half.float())


@pytest.mark.parametrize("fast", [False, True], ids=["no-bf16", "bf16"])
@EVERY
def test_a_cpu_rounds_what_it_cannot_multiply_and_keeps_it_wide(precision, fast, monkeypatch):
    monkeypatch.setattr("deltapatch.kernels.product.fast_bfloat16", lambda: fast)
    chosen = PRECISIONS[precision]
    draw = drawer(6, chosen.base)
    d, weight = draw(70, 24), draw(5, 24)
    x, w = narrow(d, chosen), narrow_weight(weight, chosen)
    kept = torch.bfloat16 if fast and precision == "bf16" else chosen.base
    for got, exact in ((x, d), (w, weight)):
        assert got.values.dtype == kept
        assert is_rounded(got, precision)
        whole = got.values.double() * (1 if got.scale is None else got.scale[:, None])
        assert (whole - exact).abs().max() <= ERROR[precision] * exact.abs().max()
    want = x.values.double() @ w.values.double().T * (1 if w.scale is None else w.scale)
    got = product(x, w).values  # a narrow one rounds its result
    assert (got - want).norm() <= (4e-3 if kept == torch.bfloat16 else 1e-6) * want.norm()


def test_some_outputs_of_a_weight():
    chosen, weight = PRECISIONS["fp8"], drawer(5, torch.float32)(6, 8) * torch.arange(1.0, 7)[:, None]
    x, narrowed = narrow(torch.ones(2, 8), chosen), narrow_weight(weight, chosen)
    part = product(x, narrowed.rows(slice(2, 5))).values
    assert torch.equal(part, product(x, narrowed).values[:, 2:5])


def refusing(rows, outputs):
    """A stand-in for `torch._scaled_mm` that refuses fewer long rows and other outputs, and what it took."""
    taken = []

    def scaled_mm(x, matrix, *, scale_a, scale_b, out_dtype, use_fast_accum):
        if out_dtype not in outputs:
            raise ValueError("Only bf16 high precision output types are supported for row-wise scaling.")
        if len(x) < rows and x.shape[1] > 9000:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED")
        assert scale_a.shape == (len(x), 1)
        assert scale_b.shape == (1, matrix.shape[1])
        taken.append((len(x), out_dtype))
        return (x.float() @ matrix.float() * scale_a * scale_b).to(out_dtype)

    return scaled_mm, taken


F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("n_rows", [1, 256, 257, 300])
@pytest.mark.parametrize(
    ("refused", "outputs", "want"),
    [
        (257, (F32, BF16), F32),
        (257, (BF16,), BF16),
        (0, (F32,), F32),
        (1000, (F32, BF16), None),
        (0, (), None),
    ],
    ids=["hopper", "cuda12.8", "any-rows", "no-long-rows", "no-fp8"],
)
def test_products_in_fp8_where_a_gpu_refuses_some(n_rows, refused, outputs, want, monkeypatch):
    stand_in, taken = refusing(refused, outputs)
    monkeypatch.setattr(torch, "_scaled_mm", stand_in)
    monkeypatch.setattr(product_module, "FP8_OUTPUTS", {})
    draw, chosen = drawer(n_rows, torch.float32), PRECISIONS["fp8"]
    d, weight = draw(n_rows, 9216), draw(32, 9216) * 2.0 ** torch.arange(-16, 16)[:, None]
    x, matrix = narrow(d, chosen).values.to(chosen.operand), narrow_weight(weight, chosen)
    operand = matrix._replace(values=matrix.values.to(chosen.operand))
    exact = x.double() @ operand.values.double().T
    for _ in range(2):
        got = product_module._product_in_fp8(x, operand)
        assert got.dtype == torch.float32
        off = (got / operand.scale - exact).norm() / exact.norm()
        assert off <= (4e-3 if want == BF16 else 1e-5)
    assert taken == ([] if want is None else [(max(n_rows, 272), want)] * 2)
    assert list(product_module.FP8_OUTPUTS.values()) == [want]


def test_a_product_in_fp8_that_finds_no_memory_says_so(monkeypatch):
    """It is not taken for one that the GPU refuses."""

    def full(*operands, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "_scaled_mm", full)
    monkeypatch.setattr(product_module, "FP8_OUTPUTS", {})
    x = torch.ones(2, 16).to(torch.float8_e4m3fn)
    with pytest.raises(torch.OutOfMemoryError):
        product_module._product_in_fp8(x, Operand(x[:1].expand(16, 16), None, PRECISIONS["fp8"]))
    assert product_module.FP8_OUTPUTS == {}


def test_a_weight_that_float16_does_not_hold():
    weight = torch.tensor([[1.0, -70000.0]])
    with pytest.raises(
        DeltapatchError, match=r"weight of 70000 is larger than float16 holds .*precision='bf16'"
    ):
        narrow_weight(weight, PRECISIONS["fp16"])
    assert narrow_weight(weight, PRECISIONS["bf16"]).values[0, 1] == -70144


@settings(max_examples=60, deadline=None)
@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_tf32_has_ten_bits_to_the_nearest_even(x):
    weight = torch.tensor([[x]], dtype=torch.float32)
    got = narrow_weight(weight, PRECISIONS["tf32"]).values
    mantissa, exponent = np.frexp(weight.double().numpy())
    want = np.ldexp(np.round(mantissa * 2**11), exponent - 11)  # numpy rounds ties to even
    if abs(x) > 2.0**-126:
        assert got.double().numpy() == want


# ---------------------------------------------------------------------------------------- uploads, positions


@pytest.mark.parametrize(
    "array", [np.arange(6).reshape(2, 3).T, np.broadcast_to(np.arange(3), (2, 3)), np.empty((0, 2))], ids=str
)
def test_uploads(array):
    got = upload(array, torch.device("cpu"))
    assert got.is_contiguous()
    assert np.array_equal(got.numpy(), array)
    assert upload(array, "cpu").dtype == torch.from_numpy(array.copy()).dtype


@settings(max_examples=25, deadline=None)
@given(packings())
def test_what_is_read_out_is_kept(packing):
    packed = torch.arange(len(packing.tokens))[:, None] * torch.ones(2)
    kept = keep_reads(packed, packing.segments)
    read = sorted((t for t in packing.tokens if t.read >= 0), key=lambda t: t.read)
    assert kept[:, 0].tolist() == [t.at for t in read]
    places = [
        torch.arange(len(kept))[s.token : s.token + s.n_tokens].tolist()
        for s in read_segments(packing.segments)
    ]
    assert [i for place in places for i in place] == list(range(packing.n_reads))


def test_segments_say_which_base_tokens_are_theirs():
    packing = pack([(3, 2), (5, 3)], [(1, 1, 2, 2, 3), (0, 0, 2, 3, 1)])
    base = torch.arange(packing.n_base)
    for segment in packing.segments:
        own = segment.own(base).expand(-1, -1, segment.rows).flatten().tolist()
        mine = packing.tokens[segment.token : segment.token + segment.n_tokens]
        assert own == [t.base for t in mine]
