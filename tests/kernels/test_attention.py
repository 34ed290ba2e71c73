"""Attention difference against two softmaxes over the whole prompt."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_attention_inputs import as_arguments, draw_attention
from kernels_packing import DTYPES, distance, exact, is_rounded, pack, packings, seeds, wide

from deltapatch.kernels import attention
from deltapatch.kernels.attention import attention_difference
from deltapatch.kernels.edits import Swap
from deltapatch.kernels.product import PRECISIONS

# Logits in the thousands carry 1e-4 themselves in float32, whatever the method
TOLERANCE = {
    "fp32": {1e-6: 1e-5, 1e-2: 1e-5, 1.0: 1e-5, 1e3: 1e-3},
    "fp64": dict.fromkeys((1e-6, 1e-2, 1.0, 1e3), 1e-11),
}
READS_ONLY = pytest.mark.parametrize("reads_only", [False, True], ids=["all", "read"])
PACKING = pack([(5, 2, 2, (2, 4)), (3, 1)], [(0, 0, 2, 4, 3), (1, 0, 1, 2, 2)])


def difference(inputs, precision):
    """[token or row, head, d_head], in the precision's base dtype."""
    out = attention_difference(**as_arguments(inputs), precision=PRECISIONS[precision]).plain()
    return out.unflatten(1, inputs["q"].shape[1:])


def attend(q, k, v, inputs, fork):
    """z [position, head, d_head] of one run; heads share keys and values in order."""
    group = q.shape[1] // k.shape[1]
    scale, cap, window = (inputs[name] for name in ("logit_scale", "softcap", "window"))
    place = [
        t if fork is None or t < fork[1] else t - fork[1] + fork[0] for t in range(len(q))
    ]  # in its prompt
    z = np.empty_like(q)
    for t in range(len(q)):
        seen = [i for i in range(t + 1) if fork is None or t < fork[1] or not fork[0] <= i < fork[1]]
        seen = [i for i in seen if window is None or place[t] - place[i] < window]
        for h in range(q.shape[1]):
            logits = k[seen, h // group] @ q[t, h] * wide(scale)
            logits = logits if cap is None else wide(cap) * np.tanh(logits / wide(cap))
            p = np.exp(logits - logits.max())
            z[t, h] = p @ v[seen, h // group] / p.sum()
    return z


def turn(d, rotary, tokens):
    """Every pair of coordinates of d [token, head, d_head] by the angle of its token's base token."""
    out = d.copy()
    for t in tokens:
        for i, (c, s) in enumerate(zip(exact(rotary.cos[t.base]), exact(rotary.sin[t.base]), strict=True)):
            a, b = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + rotary.cos.shape[1])
            out[t.at, :, a] = c * d[t.at, :, a] - s * d[t.at, :, b]
            out[t.at, :, b] = s * d[t.at, :, a] + c * d[t.at, :, b]
    return out


def swap(d, swaps):
    for swap in swaps:
        token, source, at, delta = swap.token, swap.source, swap.at, swap.delta
        d[token.numpy(), at.numpy()] = exact(delta)[source.numpy(), at.numpy()]


def by_definition(packing, inputs):
    reads_only, swaps, scale = (inputs[name] for name in ("reads_only", "swaps", "scale_of_rows"))
    changes = {}
    for place in "qkv":
        d = exact(inputs[f"d{place}"])
        if scale is not None:
            d = d * exact(scale)[:, None, None]
        swap(d, swaps.get(place, []))
        changes[place] = d if place == "v" else turn(d, inputs["rotary"], packing.tokens)
    base = [exact(inputs[place]) for place in "qkv"]
    out = np.empty((packing.n_reads if reads_only else len(packing.tokens), *base[0].shape[1:]), dtype=wide)
    fork_of = [s.fork for s in packing.segments for _ in range(s.pairs * s.rows)]  # [row]
    for row in packing.rows():
        before = [b[packing.prompts[row[0].pair]] for b in base]
        after = [b.copy() for b in before]
        for t in row:
            for a, d in zip(after, changes.values(), strict=True):
                a[t.position] += d[t.at]
        change = np.subtract(*(attend(*values, inputs, fork_of[row[0].row]) for values in (after, before)))
        for t in row:
            if not reads_only:
                out[t.at] = change[t.position]
            elif t.read >= 0:
                out[t.read] = change[t.position]
    swap(out, swaps.get("z", []))
    return out


@READS_ONLY
@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e3])
def test_attention_difference(scale, precision, heads, reads_only):
    @settings(max_examples=5, deadline=None)
    @given(
        packings(),
        seeds,
        st.sampled_from([0, 2, 4]),
        st.booleans(),
        st.sets(st.sampled_from("qkvz")),
        st.sampled_from([None, 1, 2, 4]),
    )
    def check(packing, seed, turned, interleaved, swapped, window):
        inputs = draw_attention(
            packing,
            seed,
            DTYPES[precision],
            (scale,) * 3,
            heads,
            turned=turned,
            interleaved=interleaved,
            scaled=bool(seed % 2),
            swapped=sorted(swapped),
            reads_only=reads_only,
            window=window,
        )
        got = difference(inputs, precision)
        assert distance(got, by_definition(packing, inputs)) < TOLERANCE[precision][scale]

    check()


@READS_ONLY
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("cap", [0.5, 3.0, 50.0])
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0])
def test_soft_caps(scale, cap, precision, reads_only):
    @settings(max_examples=5, deadline=None)
    @given(packings(), seeds, st.sets(st.sampled_from("qkvz")), st.sampled_from([None, 2]))
    def check(packing, seed, swapped, window):
        options = {"swapped": sorted(swapped), "reads_only": reads_only, "softcap": cap, "window": window}
        inputs = draw_attention(packing, seed, DTYPES[precision], (scale,) * 3, **options)
        got = difference(inputs, precision)
        assert distance(got, by_definition(packing, inputs)) < 3 * TOLERANCE[precision][scale]

    check()


@READS_ONLY
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("changed", [0, 1, 2], ids=["q", "k", "v"])
def test_one_of_three_changes(changed, precision, reads_only):
    scales = [1e-3 if i == changed else 0.0 for i in range(3)]
    inputs = draw_attention(PACKING, 3, DTYPES[precision], scales, reads_only=reads_only)
    want = by_definition(PACKING, inputs)
    assert distance(difference(inputs, precision), want) < TOLERANCE[precision][1e-2]


@READS_ONLY
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("place", "qkvz")
def test_a_patch_where_nothing_has_changed(place, interleaved, reads_only):
    """One line of zeros stands for all tokens, and stays as it is."""
    options = {"interleaved": interleaved, "swapped": place, "reads_only": reads_only}
    inputs = draw_attention(PACKING, 4, torch.float64, heads=(4, 2), **options)
    zeros = {name: torch.zeros_like(inputs[name][:1]) for name in ("dq", "dk", "dv")}
    inputs |= {name: zero.expand(len(PACKING.tokens), -1, -1) for name, zero in zeros.items()}
    assert distance(difference(inputs, "fp64"), by_definition(PACKING, inputs)) < 1e-12
    assert not any(zero.any() for zero in zeros.values())


def test_inputs_are_only_read():
    inputs = draw_attention(PACKING, 5, swapped="qkvz")
    before = {name: t.clone() for name, t in inputs.items() if isinstance(t, torch.Tensor)}
    difference(inputs, "fp32")
    assert all(torch.equal(inputs[name], t) for name, t in before.items())


def test_a_later_swap_of_a_head_replaces_an_earlier_one():
    inputs = draw_attention(PACKING, 6, torch.float64, swapped="k")
    want = difference(inputs, "fp64")
    (true,) = inputs["swaps"]["k"]
    inputs["swaps"]["k"] = [Swap(true.token, true.source, true.at, torch.randn(9, 4, 5).double()), true]
    assert torch.equal(difference(inputs, "fp64"), want)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("strength", [30.0, 300.0, 1e4])
def test_logit_changes_of_any_size(strength, precision):
    """One query turned towards, or away from, the key that it attended to: finite, and right where the
    base's weight is all but taken away, and where it is nothing to begin with."""
    packing = pack([(4, 1)], [(0, 0, 1, 1, 3)])
    inputs = draw_attention(packing, 4, DTYPES[precision], (0.0, 0.0, 1e-3), (2, 2), turned=0)
    dq, q, k = (inputs[name] for name in ("dq", "q", "k"))
    q[-1] = 3 * k[1]
    dq[0] = strength * k[2]
    dq[1] = -strength * k[1]
    dq[2] = 1e-4 * k[2]  # a small change beside the huge ones
    got = difference(inputs, precision)
    want = by_definition(packing, inputs)
    assert torch.isfinite(got).all()
    for row, tolerance in enumerate((1e-5, 1e-5, 1e-5) if precision == "fp32" else (1e-11,) * 3):
        assert distance(got[row], want[row]) < tolerance * max(1, strength / 30)


def test_a_huge_change_is_nothing_to_the_queries_before_it():
    packing = pack([(5, 1)], [(0, 0, 1, 3, 1)])
    inputs = draw_attention(packing, 7, scales=(1e-6, 1e-6, 1e-6))
    inputs["dk"][2] *= 1e10
    got = difference(inputs, "fp32")
    want = by_definition(packing, inputs)
    assert all(distance(got[at], want[at]) < 1e-5 for at in (0, 1))


def test_heads_in_pieces_give_what_all_at_once_give(monkeypatch):
    packing = pack([(5, 2)], [(0, 0, 2, 3, 4)])
    inputs = draw_attention(packing, 5, torch.float64, heads=(6, 3))
    whole = difference(inputs, "fp64")
    monkeypatch.setattr(attention, "CELLS", 2 * packing.segments[0].n_tokens * 5)  # two heads of six
    assert torch.allclose(difference(inputs, "fp64"), whole, rtol=1e-12)


@READS_ONLY
@pytest.mark.parametrize("cells", [1, 40, 150])
def test_queries_in_pieces_give_what_all_at_once_give(cells, reads_only, monkeypatch):
    @settings(max_examples=40, deadline=None)
    @given(packings(), seeds, st.sets(st.sampled_from("qkvz")))
    def check(packing, seed, swapped):
        inputs = draw_attention(
            packing, seed, torch.float64, heads=(4, 2), swapped=sorted(swapped), reads_only=reads_only
        )
        with monkeypatch.context() as patch:
            whole = difference(inputs, "fp64")
            patch.setattr(attention, "CELLS", cells)
            assert torch.allclose(difference(inputs, "fp64"), whole, rtol=1e-12, atol=1e-14)

    check()


@READS_ONLY
@pytest.mark.parametrize("heads", [(3, 3), (4, 2)], ids=str)
@pytest.mark.parametrize(("reads", "fork"), [(1, None), (3, (2, 5))], ids=["plain", "forked"])
@pytest.mark.parametrize("scores", [{}, {"softcap": 2.0}, {"window": 3}], ids=["plain", "capped", "windowed"])
def test_segments_together_give_what_each_gives(scores, reads, fork, heads, reads_only, monkeypatch):
    """Rows that start at many positions of runs, here all together and there one segment at a time."""
    cuts = [
        (0, first, pairs, positions, 1 + positions % 3)
        for first, pairs in ((0, 1), (1, 1), (0, 2))
        for positions in range(8, 2, -1)
    ]
    packing = pack([(9, 2, reads, fork)], cuts)
    inputs = draw_attention(packing, 7, torch.float64, heads=heads, reads_only=reads_only, **scores)
    joined = []
    together = attention._together
    monkeypatch.setattr(attention, "_together", lambda *a: joined.append(len(a[2])) or together(*a))
    found = difference(inputs, "fp64")
    assert joined == [6, 6, 6]
    assert distance(found, by_definition(packing, inputs)) < 1e-11
    monkeypatch.setattr(attention, "CELLS", 1)
    assert torch.allclose(found, difference(inputs, "fp64"), rtol=1e-12, atol=1e-14)
    assert joined == [6, 6, 6]


def test_segments_together_take_no_more_of_their_run_than_they_reach(monkeypatch):
    packing = pack([(30, 1)], [(0, 0, 1, 3, 2), (0, 0, 1, 2, 1)])
    queries, scores = [], attention._scores
    monkeypatch.setattr(
        attention, "_scores", lambda q, *rest: queries.append(q.shape[-2]) or scores(q, *rest)
    )
    inputs = draw_attention(packing, 3, torch.float64)
    assert distance(difference(inputs, "fp64"), by_definition(packing, inputs)) < 1e-11
    assert queries == [3]


@READS_ONLY
def test_no_change_gives_exactly_zero(reads_only):
    packing = pack([(5, 1)], [(0, 0, 1, 3, 3)])
    inputs = draw_attention(packing, 6, scales=(1.0, 10.0, 1.0), scaled=True, reads_only=reads_only)
    still = [t.at for t in packing.tokens if t.row == 1]
    for name in ("dq", "dk", "dv"):
        inputs[name][still] = 0
    got = difference(inputs, "fp32")
    assert (got[1 if reads_only else still] == 0).all()
    assert (got != 0).any()


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 4e-3), ("fp16", 5e-4), ("fp8", 4e-2)])
def test_the_result_is_narrowed(precision, tolerance):
    inputs = draw_attention(PACKING, 8)
    out = attention_difference(**as_arguments(inputs), precision=PRECISIONS[precision])
    assert is_rounded(out, precision)
    assert (out.scale is None) == (precision == "bf16")
    assert distance(difference(inputs, precision), by_definition(PACKING, inputs)) < tolerance
