"""Read-out against log-softmaxes of whole vocabularies."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from kernels_packing import DTYPES, distance, drawer, exact, pack, packings, seeds, wide

from deltapatch.kernels import readout as module
from deltapatch.kernels.product import PRECISIONS, narrow_weight
from deltapatch.kernels.readout import BaseReadout, ReadRows, Unembedding, readout
from deltapatch.kernels.softcap import cap_slope, softcap

SAID = ("flip", "says_clean", "says_corrupted")  # 1 or 0
MEASURED = ("logit_diff", "dlogp_clean", "dlogp_corrupted", "kl", "entropy", *SAID)
VOCAB, WIDTH = 67, 11
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-10}
HUGE = {"fp32": 1e-3, "fp64": 1e-10}  # a log-probability near 0 of logits in the thousands has lost digits


def base_of(n_pairs, draw, weight, spread=2.0, cap=None):
    logits = draw(n_pairs, VOCAB, scale=spread)
    uncapped, logits = (None, logits) if cap is None else (logits, softcap(logits, cap))
    p = logits.double().softmax(-1)
    answers = torch.stack([row.topk(2).indices for row in logits + draw(n_pairs, VOCAB)])
    linear = p if uncapped is None else p * cap_slope(uncapped.double(), cap)
    mean = linear.to(weight.dtype) @ weight
    return BaseReadout(logits, p, mean, answers, cap=cap, uncapped=uncapped)


def read(dn, weight, base, packing, measured=MEASURED, precision=None):
    """The numbers asked for; products in dn's own precision unless told otherwise."""
    chosen = PRECISIONS[precision or ("fp64" if dn.dtype == torch.float64 else "fp32")]
    unembedding = Unembedding(weight, narrow_weight(weight, chosen))
    rows = ReadRows(dn, packing.segments, packing.first_pairs)
    return readout(rows, unembedding, base, measured=measured)


def log_softmax(x):
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def expm1_minus_x(x):
    """e^x - 1 - x without cancellation."""
    series, term = x * x / 2, x * x / 2
    for n in range(3, 40):
        term = term * x / n
        series = series + term
    return np.where(np.abs(x) < 1, series, np.expm1(x) - x)


def entropy_change(logp, centred):
    """-Σ p expm1(c) log p - Σ p e^c c, each sum without its first-order terms that cancel."""
    p = np.exp(logp)
    c = centred - np.log1p(p @ expm1_minus_x(centred))
    return -(p * np.expm1(c)) @ (logp - p @ logp) - p @ (c * np.expm1(c) - expm1_minus_x(c))


def by_definition(packing, dn, weight, base):
    out = {name: np.empty(packing.n_rows, dtype=wide) for name in MEASURED}
    logits, w, answers = exact(base.logits), exact(weight), base.answers.numpy()
    for t in packing.tokens:
        before, change = logits[t.pair], w @ exact(dn[t.row])
        if base.cap is not None:
            uncapped, cap = exact(base.uncapped[t.pair]), wide(base.cap)
            change = cap * np.tanh((uncapped + change) / cap) - cap * np.tanh(uncapped / cap)
        clean, corrupted = answers[t.pair]
        moved = log_softmax(before + change) - log_softmax(before)
        out["logit_diff"][t.row] = change[clean] - change[corrupted]
        out["dlogp_clean"][t.row], out["dlogp_corrupted"][t.row] = moved[clean], moved[corrupted]
        p = np.exp(log_softmax(before))
        centred = change - p @ change
        if np.abs(centred).max() < 10:
            out["kl"][t.row] = np.log1p(p @ expm1_minus_x(centred))
            out["entropy"][t.row] = entropy_change(log_softmax(before), centred)
        else:
            out["kl"][t.row] = -p @ moved
            after = log_softmax(before + change)
            out["entropy"][t.row] = p @ log_softmax(before) - np.exp(after) @ after
        likeliest = (before + change).argmax()
        out["flip"][t.row] = likeliest != before.argmax()
        out["says_clean"][t.row], out["says_corrupted"][t.row] = likeliest == clean, likeliest == corrupted
    return out


def assert_right(packing, dn, weight, base, tolerance):
    want = by_definition(packing, dn, weight, base)
    found = read(dn, weight, base, packing)
    assert set(found) == set(MEASURED)
    # float64 sums terms of first order to a KL of second order
    second = {"kl": max(tolerance, 1e-8)} | dict.fromkeys(SAID, 0)
    # An answer may change nearly as the others do: then its own change is told as well as theirs are.
    spread = np.linalg.norm(exact(dn) @ exact(weight).T) / np.sqrt(VOCAB)
    for name in MEASURED:
        if name in second:
            assert distance(found[name], want[name]) <= second[name], name
        else:
            off, size = (np.linalg.norm(v) for v in (exact(found[name]) - want[name], want[name]))
            assert off <= tolerance * max(size, spread / 10), name
    return found


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("cap", [1.5, 30.0])
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e3])
def test_capped_logits(scale, cap, precision):
    """Rows that leave most logits at the cap among them: of these the linear parts say nothing."""

    @settings(max_examples=15, deadline=None)
    @given(packings(one_position=True), seeds)
    def check(packing, seed):
        draw = drawer(seed, DTYPES[precision])
        weight = draw(VOCAB, WIDTH)
        base = base_of(len(packing.prompts), draw, weight, cap=cap)
        dn = draw(packing.n_rows, WIDTH, scale=scale)
        dn[::3] *= 1e-3  # beside them some that hardly move
        found, want = read(dn, weight, base, packing), by_definition(packing, dn, weight, base)
        spread = np.linalg.norm(want["dlogp_clean"]) + np.linalg.norm(want["dlogp_corrupted"])
        for name in MEASURED[:5]:  # of logits at the cap, which are alike, any is the likeliest
            bound = max(1e-7, (HUGE if scale > 1 else TOLERANCE)[precision])
            # Of second order: float64 leaves seven digits of what changes of 1e-9 do.
            bound *= 10 if name == "kl" and scale < 1e-5 else 1
            # Where one sure token gives way to another the entropy hardly changes beside what moved.
            size = np.linalg.norm(want[name]) + (spread / 10 if name != "kl" else 0)
            assert np.linalg.norm(exact(found[name]) - want[name]) <= bound * size, name

    check()


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e3])
def test_readout(scale, precision):
    @settings(max_examples=15, deadline=None)
    @given(packings(one_position=True), seeds)
    def check(packing, seed):
        draw = drawer(seed, DTYPES[precision])
        weight = draw(VOCAB, WIDTH)
        base = base_of(len(packing.prompts), draw, weight)
        dn = draw(packing.n_rows, WIDTH, scale=scale)
        assert_right(packing, dn, weight, base, (HUGE if scale > 1 else TOLERANCE)[precision])

    check()


@pytest.mark.parametrize("precision", DTYPES)
def test_the_likely_token_taken_away_beside_a_row_that_hardly_moves(precision):
    packing = pack([(3, 1)], [(0, 0, 1, 1, 3)])
    draw = drawer(0, DTYPES[precision])
    weight = draw(VOCAB, WIDTH)
    base = base_of(1, draw, weight)
    base.logits[0, 5] += 12  # all but certain
    p = base.logits.double().softmax(-1)
    base = base._replace(p=p, mean=p.to(weight.dtype) @ weight, answers=torch.tensor([[5, 6]]))
    dn = torch.stack([-4 * weight[5], 1e-5 * weight[6], 200 * weight[6]])
    found = assert_right(packing, dn, weight, base, 2e-5 if precision == "fp32" else 1e-10)
    assert found["flip"].tolist() == [1, 0, 1]
    assert found["says_clean"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("spread", [0.0, 2.0, 10.0])
def test_entropy_of_changes_of_every_size(spread, precision):
    """Where all tokens are alike it is of second order; where one is all but certain there is hardly any."""
    packing, sizes = pack([(3, 1)], [(0, 0, 1, 1, 8)]), 10.0 ** torch.arange(-6.0, 2.0)
    draw = drawer(6, DTYPES[precision])
    weight = draw(VOCAB, WIDTH)
    base = base_of(1, draw, weight, spread)
    dn = draw(8, WIDTH) * sizes.to(weight.dtype)[:, None]
    want = by_definition(packing, dn, weight, base)["entropy"]
    found = read(dn, weight, base, packing, ("entropy",))["entropy"]
    for row in range(8):
        # float64 sums terms of first order to what may be of second order
        bound = max(TOLERANCE[precision], 1e-15 / float(sizes[row]) if spread == 0 else 0)
        assert distance(found[row], want[row]) < bound, row


@pytest.mark.parametrize("precision", DTYPES)
def test_pieces_of_vocabulary(precision, monkeypatch):
    packing = pack([(2, 2)], [(0, 0, 2, 1, 7)])
    draw = drawer(1, DTYPES[precision])
    weight = draw(VOCAB, WIDTH)
    base = base_of(2, draw, weight)
    monkeypatch.setattr("deltapatch.kernels.pieces._PIECES", 3)
    for scale, tolerance in ((1e-3, TOLERANCE), (3.0, TOLERANCE), (300.0, HUGE)):
        assert_right(packing, draw(14, WIDTH, scale=scale), weight, base, tolerance[precision])


def test_the_order_of_pieces_does_not_matter():
    packing = pack([(2, 2)], [(0, 0, 2, 1, 3)])
    draw = drawer(5, torch.float32)
    weight = draw(VOCAB, WIDTH)
    base, dn = base_of(2, draw, weight), draw(6, WIDTH)
    unembedding = Unembedding(weight, narrow_weight(weight, PRECISIONS["fp32"]))
    arguments = (ReadRows(dn, packing.segments, packing.first_pairs), unembedding, base)

    def backwards(work, items):
        for item in reversed(list(items)):
            work(item)

    one, other = (readout(*arguments, measured=MEASURED, **p) for p in ({}, {"pool": backwards}))
    assert all(torch.equal(one[name], other[name]) for name in MEASURED)


def test_pieces_cover_the_vocabulary():
    for d_vocab, most in ((1, 5), (8, 8), (67, 1000), (67, 5), (50304, 1024)):
        pieces = module.vocabulary_pieces(d_vocab, most)
        assert [j for piece in pieces for j in range(d_vocab)[piece]] == list(range(d_vocab))
        assert max(piece.stop - piece.start for piece in pieces) <= min(most, max(1, d_vocab))


@pytest.mark.parametrize(
    "asked",
    [
        ("logit_diff",),
        ("dlogp_clean",),
        ("dlogp_clean", "flip"),
        ("kl",),
        ("entropy",),
        ("flip",),
        SAID[1:],
        MEASURED,
    ],
    ids=str,
)
def test_what_is_asked_for_alone_is_what_it_is_among_all(asked):
    packing = pack([(2, 2)], [(0, 0, 2, 1, 3)])
    draw = drawer(2, torch.float32)
    weight = draw(VOCAB, WIDTH)
    base, dn = base_of(2, draw, weight), draw(6, WIDTH)
    few, every = (read(dn, weight, base, packing, names) for names in (asked, MEASURED))
    assert set(few) == set(asked)
    assert all(torch.allclose(few[name], every[name], rtol=1e-5) for name in asked)


@pytest.mark.parametrize("pieces", [1, 5, 67])
def test_of_equally_likely_tokens_the_first_is_said(pieces, monkeypatch):
    """As argmax has it, wherever the tokens lie; a row that changes nothing says what the base run says."""
    monkeypatch.setattr("deltapatch.kernels.pieces._PIECES", pieces)
    packing = pack([(2, 1)], [(0, 0, 1, 1, 3)])
    weight = torch.zeros(VOCAB, WIDTH)
    weight[[7, 40, 60], 0] = 2.0  # what the last two rows raise: all three alike
    weight[60, 1] = 1.0  # what only the last row raises
    dn = torch.zeros(3, WIDTH)
    dn[1:, 0] = 8.0
    dn[2, 1] = 1.0
    logits = torch.zeros(1, VOCAB)
    logits[0, [11, 52]] = 1.0
    p = logits.double().softmax(-1)
    for answers, want in (
        ((11, 52), ([1, 0, 0], [0, 0, 0])),
        ((7, 40), ([0, 1, 0], [0, 0, 0])),
        ((60, 7), ([0, 0, 1], [0, 1, 0])),
    ):
        base = BaseReadout(logits, p, p.float() @ weight, torch.tensor([answers]))
        found = read(dn, weight, base, packing)
        assert (found["says_clean"].tolist(), found["says_corrupted"].tolist()) == want
        assert found["flip"].tolist() == [0, 1, 1]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16", "fp8"])
def test_no_change_gives_exactly_zero(precision):
    packing = pack([(2, 1)], [(0, 0, 1, 1, 3)])
    draw = drawer(3, torch.float32)
    weight = draw(VOCAB, WIDTH)
    base, dn = base_of(1, draw, weight), draw(3, WIDTH)
    dn[1] = 0
    found = read(dn, weight, base, packing, precision=precision)
    for i, name in enumerate(SAID[1:]):
        assert found[name][1] == (base.logits[0].argmax() == base.answers[0, i])
    changes = [name for name in MEASURED if not name.startswith("says_")]
    assert all(found[name][1] == 0 for name in changes)
    assert all(found[name][0] != 0 for name in changes if name != "flip")


@pytest.mark.parametrize(
    ("precision", "bound"), [("tf32", 2e-3), ("bf16", 2e-2), ("fp16", 2e-3), ("fp8", 0.3)]
)
def test_narrow_products_of_rows_of_every_size(precision, bound):
    """Only the normaliser is rounded: the answers' logits are exact. A row where it is huge is among them."""
    packing = pack([(2, 1)], [(0, 0, 1, 1, 5)])
    draw = drawer(4, torch.float32)
    weight = draw(VOCAB, WIDTH)
    base = base_of(1, draw, weight)
    dn = draw(5, WIDTH) * torch.tensor([1e-6, 1e-3, 1.0, 30.0, 300.0])[:, None]
    found, want = (
        read(dn, weight, base, packing, precision=precision),
        by_definition(packing, dn, weight, base),
    )
    assert distance(found["logit_diff"], want["logit_diff"]) < 1e-6
    for name in ("dlogp_clean", "dlogp_corrupted", "kl"):
        for row in range(5):
            assert distance(found[name][row], want[name][row]) < bound, (name, row)
