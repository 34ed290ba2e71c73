"""The expansion of the read-out: never further off than it says, and used only where that is little."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_packing import drawer, pack, seeds

from deltapatch.kernels import readout_tail
from deltapatch.kernels.product import PRECISIONS, narrow, narrow_weight
from deltapatch.kernels.readout import BaseReadout, ReadRows, Unembedding, readout
from deltapatch.kernels.readout_tail import TOLERANCE, expand, make_tail, worth_a_tail

MEASURED = ("logit_diff", "dlogp_clean", "dlogp_corrupted")


def one_by_one(work, items):
    for item in items:
        work(item)


def problem(seed, dtype, sure, sizes, vocab=300, width=12):
    """Base read-out of one pair, sure of a token or not, and rows of these sizes."""
    draw = drawer(seed, dtype)
    weight = draw(vocab, width)
    logits = draw(1, vocab)
    logits[0, 7] += sure
    p = logits.double().softmax(-1)
    base = BaseReadout(logits, p, p.to(dtype) @ weight, torch.tensor([[7, 9]]))
    dn = torch.stack([draw(width) * size for size in sizes])
    return weight, base, dn


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from([0.0, 4.0, 12.0]))
def test_the_bound_holds(seed, sure):
    sizes = [1e-6, 1e-4, 1e-2, 0.1, 0.3, 1.0, 3.0, 100.0, 0.0]
    weight, base, dn = problem(seed, torch.float64, sure, sizes)
    precision = PRECISIONS["fp64"]
    tail = make_tail(base.p[0], base.mean[0], weight, narrow_weight(weight, precision), one_by_one)
    mean = dn @ base.mean[0]
    lse, bound, spread = expand(dn, narrow(dn, precision), mean.unsqueeze(1), tail)
    change = dn @ weight.T - mean.unsqueeze(1)
    true = torch.log1p((base.p[0] * torch.expm1(change)).sum(1))
    fine = torch.isfinite(true)
    assert ((lse - true).abs() <= bound + 1e-15)[fine].all()
    assert (bound[:2] < 1e-2 * true[:2]).all()
    assert lse[-1] == bound[-1] == spread[-1] == 0
    whole = (base.p[0] * change**2).sum(1).sqrt()
    assert (spread <= whole * (1 + 1e-12)).all()  # that of unlikely tokens
    if not sure:
        assert (spread >= 0.5 * whole).all()


@pytest.mark.parametrize("precision", sorted(TOLERANCE))
@pytest.mark.parametrize("sure", [0.0, 12.0])
def test_every_effect_is_within_its_precision(precision, sure):
    sizes = [10.0 ** (k / 8 - 5) for k in range(48)]
    weight, base, dn = problem(0, torch.float32, sure, sizes)
    segments = pack([(3, 1)], [(0, 0, 1, 1, len(dn))]).segments
    mode = PRECISIONS[precision]
    operand = narrow_weight(weight, mode)

    def read(base):
        rows = ReadRows(dn, segments, [0])
        return readout(rows, Unembedding(weight, operand), base, measured=MEASURED)

    tail = make_tail(base.p[0], base.mean[0], weight, operand, one_by_one)
    whole, got = read(base), read(base._replace(tails={0: tail}))
    assert torch.equal(whole["logit_diff"], got["logit_diff"])
    exact = PRECISIONS["fp64"]
    base64 = BaseReadout(*(t.double() if t.is_floating_point() else t for t in base[:4]))
    wide = weight.double()
    unembedding = Unembedding(wide, narrow_weight(wide, exact))
    true = readout(ReadRows(dn.double(), segments, [0]), unembedding, base64, measured=MEASURED)
    for name in MEASURED[1:]:
        for few in torch.arange(len(dn)).split(8):  # of about one size
            right = true[name][few]
            error, before = ((found[name][few].double() - right).norm() for found in (got, whole))
            assert error <= before + TOLERANCE[precision] * right.norm()
    changed = sum((got[n] != whole[n]) for n in MEASURED[1:]) > 0
    assert changed[0]
    assert not changed[-1], "a large change takes every token as it is"


def test_pairs_without_a_tail_are_as_before():
    weight, base, dn = problem(1, torch.float32, 0.0, [1e-3] * 6)
    other = BaseReadout(*(torch.cat([t, t.flip(0)]) for t in base[:4]))
    packing = pack([(3, 2)], [(0, 0, 2, 1, 3)])
    mode = PRECISIONS["bf16"]
    operand = narrow_weight(weight, mode)
    tail = make_tail(base.p[0], base.mean[0], weight, operand, one_by_one)
    arguments = (ReadRows(dn, packing.segments, [0]), Unembedding(weight, operand))
    whole = readout(*arguments, other, measured=MEASURED)
    got = readout(*arguments, other._replace(tails={1: tail}), measured=MEASURED)
    off = (got["dlogp_clean"] - whole["dlogp_clean"]).abs() / whole["dlogp_clean"].abs()
    assert off[:3].max() < 1e-6  # rounding of float32
    assert 1e-5 < off[3:].max() < TOLERANCE["bf16"]


def test_when_it_is_worth_it():
    bf16 = PRECISIONS["bf16"]
    assert worth_a_tail(1024, 50304, 512, bf16, MEASURED)
    assert not worth_a_tail(100, 50304, 512, bf16, MEASURED)
    assert not worth_a_tail(4096, 1000, 512, bf16, MEASURED)
    assert not worth_a_tail(4096, 50304, 512, PRECISIONS["fp32"], MEASURED)
    assert not worth_a_tail(4096, 50304, 512, bf16, (*MEASURED, "kl"))


def test_no_tolerance_is_finer_than_what_it_rests_on():
    assert set(readout_tail.TOLERANCE) == set(PRECISIONS) - {"fp64", "fp32"}
