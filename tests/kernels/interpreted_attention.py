"""The attention kernel in Triton's interpreter: test_triton.py runs this file in a process of its own.

The truth is the reference in float64, which test_attention.py holds against the definition.
"""

from dataclasses import replace

import pytest
import torch
from kernels_attention_inputs import as_arguments, draw_attention
from kernels_packing import drawer, is_rounded, pack

from deltapatch.kernels.attention import Rotary, attention_difference
from deltapatch.kernels.attention_triton import attention_difference_triton
from deltapatch.kernels.backend import TRITON
from deltapatch.kernels.edits import Swap
from deltapatch.kernels.product import PRECISIONS

# One, few and many own positions; rows beyond a tile, and one row; prompts within and beyond a block of keys.
ONE = pack([(3, 2), (37, 1)], [(0, 0, 2, 1, 3), (1, 0, 1, 1, 66)])
FEW = pack([(5, 2), (4, 1)], [(0, 0, 2, 3, 3), (1, 0, 1, 2, 5)])
MANY = pack([(11, 2), (20, 1)], [(0, 0, 2, 9, 1), (1, 0, 1, 19, 2)])
LONG = pack([(70, 1), (66, 1)], [(0, 0, 1, 9, 1), (1, 0, 1, 2, 2)])
# Runs that fork: with few own positions and many, beside one that does not; and beyond a block of keys.
FORKS = pack(
    [(8, 1, 4, (5, 6)), (14, 1, 9, (6, 10)), (5, 1)], [(0, 0, 1, 4, 2), (1, 0, 1, 11, 1), (2, 0, 1, 2, 2)]
)
LONG_FORKS = pack([(69, 1, 7, (63, 66)), (66, 1, 3, (64, 65))], [(0, 0, 1, 9, 1), (1, 0, 1, 3, 2)])
MANY_FORKED_ROWS = pack([(6, 1, 3, (4, 5))], [(0, 0, 1, 4, 34)])
PACKINGS = pytest.mark.parametrize("packing", [ONE, FEW, MANY, LONG], ids=["one", "few", "many", "long"])
KINDS = pytest.mark.parametrize("packing", [FEW, MANY, LONG], ids=["few", "many", "long"])


def double(value):
    """Arguments in float64."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, Rotary):
        return Rotary(value.cos.double(), value.sin.double(), value.interleaved)
    if isinstance(value, Swap):
        return replace(value, delta=value.delta.double())
    if isinstance(value, dict):
        return {key: double(v) for key, v in value.items()}
    if isinstance(value, list):
        return [double(v) for v in value]
    return value


def error(got, want):
    """Norm of the error over the norm of what is right; NaN where anything is."""
    return float((got.double() - want).norm()) / (float(want.norm()) or 1)


def compare(inputs, precision="fp32"):
    """The kernel's result, the float64 reference's, and how far they are apart."""
    out = attention_difference_triton(**as_arguments(inputs), precision=PRECISIONS[precision])
    assert is_rounded(out, precision)
    want = attention_difference(**as_arguments(double(inputs)), precision=PRECISIONS["fp64"]).values
    got = out.plain()
    assert got.shape == want.shape
    return got, want, error(got, want)


@pytest.mark.parametrize("reads_only", [False, True], ids=["all", "read"])
@pytest.mark.parametrize(
    ("packing", "scale"),
    [(ONE, 1.0), (FEW, 1.0), (FEW, 1e-6), (FEW, 1e3), (MANY, 1.0), (LONG, 1.0)],
    ids=["one", "few", "few-tiny", "few-huge", "many", "long"],
)
def test_attention(packing, scale, reads_only):
    inputs = draw_attention(packing, 0, scales=(scale,) * 3, heads=(2, 1), d_head=20, reads_only=reads_only)
    # Logits in the thousands carry 1e-4 themselves in float32, whatever the method
    assert compare(inputs)[2] < (1e-3 if scale == 1e3 else 1e-5)


@pytest.mark.parametrize(
    ("window", "cap"), [(None, 2.0), (1, None), (3, 50.0), (40, None), (40, 2.0)], ids=str
)
@pytest.mark.parametrize(
    "packing", [FEW, LONG, FORKS, LONG_FORKS], ids=["few", "long", "forks", "long forks"]
)
def test_windows_and_soft_caps(packing, window, cap):
    options = {"heads": (2, 1), "d_head": 12, "swapped": "kz", "window": window, "softcap": cap}
    inputs = draw_attention(packing, 21, scales=(0.3,) * 3, reads_only=packing is FEW, **options)
    assert compare(inputs)[2] < 1e-5


@pytest.mark.parametrize("reads_only", [False, True], ids=["all", "read"])
@pytest.mark.parametrize("packing", [FORKS, LONG_FORKS, MANY_FORKED_ROWS], ids=["short", "long", "many rows"])
@pytest.mark.parametrize("swapped", ["", "kz"])
def test_runs_that_fork(packing, swapped, reads_only):
    options = {"heads": (2, 1), "d_head": 12, "swapped": swapped, "reads_only": reads_only}
    assert compare(draw_attention(packing, 12, scales=(0.3,) * 3, **options))[2] < 1e-5


def test_a_branch_sees_nothing_of_the_other():
    """Huge changes of the first branch's keys and values leave the second as it is, to the bit."""
    for packing in (FORKS, LONG_FORKS):
        inputs = draw_attention(packing, 13, scales=(0.3,) * 3, heads=(1, 1), d_head=12)
        before = compare(inputs)[0]
        fork = [s.fork for s in packing.segments for _ in range(s.pairs * s.rows)]
        hidden = [
            t.at for t in packing.tokens if fork[t.row] and fork[t.row][0] <= t.position < fork[t.row][1]
        ]
        second = [t.at for t in packing.tokens if fork[t.row] and t.position >= fork[t.row][1]]
        for name in ("dk", "dv"):
            inputs[name][hidden] *= 1e3
        after = compare(inputs)[0]
        assert torch.equal(after[second], before[second])
        assert (after[hidden] != before[hidden]).any()


@pytest.mark.parametrize("swapped", ["q", "k", "v", "z", "qkvz"])
@KINDS
def test_swaps_and_scales(packing, swapped):
    reads_only = swapped in ("v", "z")
    options = {"heads": (2, 1), "d_head": 12, "interleaved": len(swapped) == 1, "reads_only": reads_only}
    inputs = draw_attention(packing, 1, scales=(0.3,) * 3, scaled=True, swapped=swapped, **options)
    assert compare(inputs)[2] < 1e-5


def test_swaps_out_of_several_arrays():
    inputs = draw_attention(FEW, 2, scales=(0.1,) * 3, heads=(2, 2), swapped="kz")
    for place in "kz":
        (first,) = inputs["swaps"][place]
        token, at = first.token[:2], first.at[:2]
        lines = drawer(3, torch.float32)(2, 3, 2, 5)[:, 1]  # [source token, head, d_head], lines lie apart
        inputs["swaps"][place].append(Swap(token, torch.tensor([1, 0]), at, lines))
    assert compare(inputs)[2] < 1e-5


@KINDS
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("turned", [0, 10, 20])
def test_rotary(packing, interleaved, turned):
    options = {"d_head": 20, "turned": turned, "interleaved": interleaved}
    assert compare(draw_attention(packing, 3, scales=(0.1,) * 3, heads=(1, 1), **options))[2] < 1e-5


@pytest.mark.parametrize(
    ("heads", "d_head", "turned"),
    [
        ((3, 3), 16, 16),
        ((4, 2), 5, 2),
        ((3, 1), 40, 10),
        ((1, 1), 80, 20),
        ((1, 1), 96, 96),
        ((1, 1), 256, 64),
    ],
    ids=str,
)
def test_heads_of_any_width(heads, d_head, turned):
    packing = pack([(9, 1), (4, 1)], [(0, 0, 1, 8, 1), (1, 0, 1, 2, 2)])
    options = {"heads": heads, "d_head": d_head, "turned": turned}
    assert compare(draw_attention(packing, 4, scales=(0.1,) * 3, **options))[2] < 1e-5


@PACKINGS
@pytest.mark.parametrize("changed", [0, 1, 2], ids=["q", "k", "v"])
def test_one_of_three_changes(packing, changed):
    scales = [1e-3 if i == changed else 0.0 for i in range(3)]
    assert compare(draw_attention(packing, 5, scales=scales, heads=(1, 1), d_head=16))[2] < 1e-5


@pytest.mark.parametrize("strength", [30.0, 1e4])
@pytest.mark.parametrize("length", [10, 70], ids=["whole", "blocks"])
@pytest.mark.parametrize("positions", [1, 9], ids=["rows", "queries"])
def test_logit_changes_of_any_size(strength, positions, length):
    """One query turned towards, or away from, the key that it attended to, beside one that hardly moves."""
    packing = pack([(length, 1)], [(0, 0, 1, positions, 3)])
    inputs = draw_attention(packing, 4, scales=(0.0, 0.0, 1e-3), heads=(2, 2), d_head=16, turned=0)
    q, k, last = inputs["q"], inputs["k"], inputs["dq"][-3:]
    q[-1] = 3 * k[1]
    last[0], last[1], last[2] = strength * k[2], -strength * k[1], 1e-4 * k[2]
    got, want, _ = compare(inputs)
    assert torch.isfinite(got).all()
    for row in (-3, -2, -1):
        assert error(got[row], want[row]) < 1e-5 * max(1, strength / 30)


@pytest.mark.parametrize("length", [5, 70], ids=["whole", "blocks"])
def test_a_huge_change_is_nothing_to_the_queries_before_it(length):
    packing = pack([(length, 1)], [(0, 0, 1, 9 if length > 9 else 3, 1)])
    inputs = draw_attention(packing, 7, scales=(1e-6, 1e-6, 1e-6), heads=(1, 1))
    inputs["dk"][2:] *= 1e10
    got, want, _ = compare(inputs)
    assert error(got[:2], want[:2]) < 1e-5


@PACKINGS
def test_no_change_leaves_attention_as_it_is(packing):
    inputs = draw_attention(packing, 5, scales=(1.0, 10.0, 1.0), heads=(2, 1), d_head=16)
    still = [t.at for t in packing.tokens if t.row == 1]
    for name in ("dq", "dk", "dv"):
        inputs[name][still] = 0
    got, _, _ = compare(inputs)
    assert (got[still] == 0).all()
    assert (got != 0).any()


@KINDS
def test_one_line_of_zeros_for_all_tokens(packing):
    inputs = draw_attention(packing, 6, heads=(2, 1), swapped="kz")
    for name in ("dq", "dk", "dv"):
        inputs[name] = torch.zeros_like(inputs[name][:1]).expand(len(packing.tokens), -1, -1)
    assert compare(inputs)[2] < 1e-5
    inputs["swaps"] = {}
    assert not compare(inputs)[0].any()


def test_heads_that_lie_apart():
    """Queries, keys and values out of one fused product, as GPT-NeoX has them."""
    inputs = draw_attention(FEW, 6, heads=(2, 2), d_head=8)
    draw = drawer(6, torch.float32)
    inputs |= dict(zip(("dq", "dk", "dv"), draw(len(FEW.tokens), 2, 3, 8).unbind(2), strict=True))
    inputs |= dict(zip("qkv", draw(FEW.n_base, 2, 3, 8).unbind(2), strict=True))
    assert compare(inputs)[2] < 1e-5


# The interpreter rounds to bfloat16 by cutting off
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 1e-2), ("fp16", 5e-4), ("fp8", 4e-2)])
def test_the_result_is_narrowed(precision, tolerance):
    inputs = draw_attention(FEW, 8, scaled=True, swapped="z")
    assert compare(inputs, precision)[2] < tolerance


@pytest.mark.parametrize(("positions", "rows", "reads_only"), [(1, 3, False), (9, 1, False), (40, 1, True)])
def test_a_long_prompt(positions, rows, reads_only):
    length = 2048
    packing = pack([(length, 1)], [(0, 0, 1, positions, rows)])
    inputs = draw_attention(packing, 9, scales=(0.1,) * 3, heads=(1, 1), d_head=16, reads_only=reads_only)
    assert compare(inputs)[2] < 1e-5


def test_nothing_to_do():
    inputs = draw_attention(ONE, 10)
    inputs |= {name: inputs[name][:0] for name in ("dq", "dk", "dv")} | {"segments": []}
    assert attention_difference_triton(**as_arguments(inputs), precision=PRECISIONS["bf16"]).values.shape == (
        0,
        20,
    )


def test_double_is_the_references():
    inputs = double(draw_attention(FEW, 11, swapped="q"))
    out = TRITON.attention_difference(**as_arguments(inputs), precision=PRECISIONS["fp64"])
    want = attention_difference(**as_arguments(inputs), precision=PRECISIONS["fp64"])
    assert torch.equal(out.values, want.values)
