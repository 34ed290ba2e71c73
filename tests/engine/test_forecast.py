"""The plan before the run counts what the run then does; a forecast is its counts times what things take."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_tiny import hf_model, pairs, true_model
from hypothesis import given, settings
from hypothesis import strategies as st

import deltapatch
from deltapatch import DeltapatchError
from deltapatch.bench.true_shapes import CONFIGS
from deltapatch.engine import calibration
from deltapatch.engine.audit import Audit
from deltapatch.engine.calibration import Line, Rates
from deltapatch.engine.forecast import forecast, forecasts, seconds
from deltapatch.engine.memory import Costs
from deltapatch.engine.plan import plan
from deltapatch.engine.pool import Map
from deltapatch.engine.prepare import Options, prepare
from deltapatch.engine.readout import ReadOut
from deltapatch.engine.rows import WHOLE
from deltapatch.engine.timed import Amount
from deltapatch.engine.unpatched import Unpatched
from deltapatch.engine.wavefront import Wavefront
from deltapatch.kernels.product import PRECISIONS
from deltapatch.models.stand_in import stand_in

CPU = torch.device("cpu")
NOTHING = Rates(1, 0.0, *[Line()] * 9, 0.0, 0.0, 0.0)


def model(variant="neox-parallel"):
    return deltapatch.from_transformers(hf_model(variant))


def drawn(variant="neox-parallel", lengths=(5, 3, 5, 4, 5)):
    return [deltapatch.PromptPair(*pair) for pair in pairs(true_model(variant), lengths)]


# ------------------------------------------------------------------------------------- what is counted


class Counted:
    """What sweeps do, counted where they do it."""

    def __init__(self, monkeypatch, n_layers):
        self.flying, self.entering = np.zeros(n_layers, dtype=int), np.zeros(n_layers, dtype=int)
        self.base_tokens, self.pairs, self.reads, self.row_reads = [], [], [], []
        self.patch, self.n_layers = monkeypatch, n_layers
        self.around(Wavefront, "_advance", self.advance)
        self.around(Unpatched, "base", self.base)
        self.around(ReadOut, "read", self.read)

    def around(self, cls, name, note):
        method = getattr(cls, name)

        def noted(it, *arguments):
            note(it, *arguments)
            return method(it, *arguments)

        self.patch.setattr(cls, name, noted)

    def advance(self, it, ready, l, parts, *rest):
        for stage, layout in parts:
            (self.flying if stage == WHOLE else self.entering)[l] += layout.n_tokens

    def base(self, it, x, *rest):
        self.base_tokens.append(len(x))

    def read(self, it, ends, x, dx, rows, row_reads):
        self.pairs.append(len(it.prompts.shapes.runs))
        self.reads.append(len(row_reads.reads.token))
        self.row_reads.append(len(rows))


@pytest.mark.parametrize("long", [False, True], ids=["one token", "several"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("budget", [None, 600])
@pytest.mark.parametrize(
    ("sites", "positions", "source"),
    [
        (["mlp_out", "k", "mlp_post"], "all", "counterpart"),
        (["resid_pre", "z"], [-1, 1], "mean"),
        (["mlp_out"], ["subject", "last"], "resample"),
    ],
)
def test_the_plan_counts_what_the_sweep_does(sites, positions, source, budget, stream, long, monkeypatch):
    if budget is not None:
        monkeypatch.setattr(Costs, "of", classmethod(lambda cls, *args: Costs(0, 0, 0, 10, 10)))
    labels = {"subject": 1}
    given = [replace(pair, labels=labels) for pair in drawn(lengths=(5, 3, 5, 3, 5))]
    if long:
        given[1::2] = [replace(pair, clean_answer=[4, 2, 7], corrupted_answer=[4, 3]) for pair in given[1::2]]
    it = model()
    monkeypatch.setattr(it, "stream", stream)
    options = {"source": source, "memory_budget": budget, "noise_sample": 0}
    found = forecast(it, given, Options(sites, positions, **options), timed=False)
    counted = Counted(monkeypatch, it.spec.n_layers)
    effects = deltapatch.sweep(it, given, sites, positions, progress=False, **options)

    made = found.plan
    assert (len(made.passes), made.rows) == (effects.meta["passes"], effects.meta["rows"])
    assert (len(made.passes) > 1) == (budget is not None)
    assert made.in_flight.tolist() == counted.flying.tolist()
    # In the last layer only what can reach the read-out enters.
    assert made.entering[1:-1].tolist() == counted.entering[:-1].tolist()
    assert [used.base_tokens for used in made.passes] == counted.base_tokens[:: it.spec.n_layers]
    assert [used.pairs for used in made.passes] == counted.pairs
    assert [used.reads for used in made.passes] == counted.reads
    assert sum(used.row_reads for used in made.passes) >= sum(counted.row_reads)
    measured = sum(a.nbytes for s in effects.sites.values() for a in s.measured.values())
    assert made.memory["results"] == measured
    assert found.precision == effects.meta["precision"]


def test_a_plan_says_what_it_needs_where_there_is_no_room():
    with pytest.raises(DeltapatchError, match=r"a memory budget of 1 B is too small: .* at least"):
        forecast(model(), drawn(), Options(memory_budget=1), timed=False)


def test_memory_of_the_plan():
    ready = prepare(model(), drawn(), Options("mlp_out", memory_budget=1 << 30))
    job = ready.job
    made = plan(job, ready.grid, ready.work, PRECISIONS["fp32"], 2)
    costs = job.costs({"mlp_out"}, PRECISIONS["fp32"], 2)
    assert made.memory["pass"] == costs.total(5, 22, made.passes[0].row_tokens, made.rows)
    assert made.memory["model"] == job.model.n_bytes == made.memory["peak"] - made.memory["pass"]


# ------------------------------------------------------------------------------------- what it takes


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0, 10),
    st.floats(0, 1),
    st.tuples(st.integers(1, 50), st.integers(1, 4)),
    st.tuples(st.integers(60, 500), st.integers(1, 4)),
)
def test_a_line_through_two_measurements(call, each, small, large):
    line = Line(call, each)
    amounts = [Amount(n, calls, line(n, calls)) for n, calls in (small, large)]
    found = Line.through(*amounts)
    assert found.call >= 0
    assert found.each >= 0
    assert found(*large) == pytest.approx(line(*large), rel=1e-6, abs=1e-9)
    if small[0] * large[1] < large[0] * small[1]:
        assert found.call == pytest.approx(call, rel=1e-5, abs=1e-6)


def test_a_line_through_nothing():
    assert Line.through(Amount(), Amount()) == Line()
    assert Line.through(Amount(), Amount(4, 1, 2.0)) == Line(0.0, 0.5)
    assert Line.through(Amount(2, 1, 5.0), Amount(4, 1, 2.0)) == Line(0.0, 0.5)  # the clock was wrong


class Case:
    """A sweep of two sites, and what it spends its time on at given rates."""

    def __init__(self, **options):
        ready = prepare(model(), drawn(), Options(["mlp_out", "z"], noise_sample=0, **options))
        self.job, self.grid = ready.job, ready.grid
        self.plan = plan(self.job, self.grid, ready.work, PRECISIONS["fp32"], 1)
        self.audit = Audit(self.job, ready.work, Map())

    def takes(self, kept=False, **rates):
        return seconds(self.job, self.plan, replace(NOTHING, **rates), self.audit, kept)


def test_seconds_are_counts_times_rates():
    case = Case()
    n_layers, base = case.job.model.spec.n_layers, 22
    flying = int(case.plan.in_flight[:-1].sum())
    last = int(case.plan.in_flight[-1])
    one = Line(0.0, 1.0)

    def only(name, amount, **rates):
        found = case.takes(**rates)
        assert found.pop(name) == pytest.approx(amount)
        assert not any(found.values()), found

    only("rows", flying, rows=one)
    only("rows", last, last=one)
    only("rows", int(case.plan.entering[1:].sum()), entering=one)
    only("unpatched runs", base * n_layers, unpatched=one)
    only("unpatched runs", 2.0 * n_layers, weights=2.0)
    only("unpatched runs", 3 * n_layers, unpatched=Line(1.0, 0.0))  # prompts of three lengths
    only("read-out", case.plan.rows, read_out=one)
    only("read-out", 5, distribution=one)
    only("passes", 1 + case.plan.rows, whole=Line(1.0, 1.0))
    only("rows", n_layers * (1 + case.plan.rows), layer=Line(1.0, 1.0))
    only("first pass", 3.0, first=3.0)
    only("tables", 5 + case.plan.rows, table=Line(1.0, 1.0))
    only("waiting for the file", 2.0 * (n_layers + 1) + 0.5, reading=2.0, reading_ends=0.5)
    assert case.takes(kept=True, table=one)["tables"] == 2 * case.plan.rows


def test_reading_and_the_next_layer_go_on_meanwhile():
    case = Case()
    busy = {"rows": Line(0.0, 1.0), "last": Line(0.0, 1.0), "weights": 0.25}
    alone = case.takes(**busy)
    # A layer that takes longer than reading the next one hides it, but for the first.
    assert case.takes(**busy, reading=0.25)["waiting for the file"] == pytest.approx(0.25)
    # With threads, preparing a layer is shared.
    shared = case.takes(**busy, threads=4)
    assert sum(shared.values()) < sum(alone.values())


def test_every_pass_reads_and_runs_the_prompts_again():
    case = Case()
    rates = {"weights": 1.0, "reading": 2.0, "reading_ends": 3.0, "unpatched": Line(0.0, 1.0)}
    once = sum(case.takes(**rates).values())
    halves = [replace(case.plan.passes[0], row_tokens=case.plan.passes[0].row_tokens // 2)] * 2
    case.plan = replace(case.plan, passes=halves)
    assert sum(case.takes(**rates).values()) == pytest.approx(2 * once)


def test_the_noise_floor_is_counted(monkeypatch):
    case = Case(precision="bf16")
    monkeypatch.setattr(case.job, "noise_sample", 8)
    assert case.audit.expects() == ["fp64"]
    found = case.takes(weights=1.0)
    assert found["noise floor"] == pytest.approx(2 * case.job.model.spec.n_layers)


@pytest.mark.parametrize("source", ["counterpart", "mean", "resample", "noise"])
@pytest.mark.parametrize("variant", ["neox-parallel", "llama-grouped"])
def test_a_piece_is_timed(variant, source, monkeypatch):
    it, given = model(variant), drawn(variant, (5, 3, 5, 3, 5))
    sizes = []
    real = calibration._timed
    monkeypatch.setattr(calibration, "_timed", lambda *args: sizes.append(args[-1]) or real(*args))
    found = forecast(it, given, Options(["mlp_out", "mlp_post"], "all", source=source))
    assert found.total > 0
    assert all(s >= 0 for s in found.seconds.values())
    small, large = sizes[0], max(sizes, key=lambda size: size.row_tokens)
    assert 8 * small.row_tokens <= large.row_tokens <= found.plan.in_flight.sum()
    text = json.dumps(found.as_dict())
    assert json.loads(text)["predicted_seconds"] == pytest.approx(found.total, abs=1e-3)


@pytest.mark.parametrize("layers", ["all", [0], [2]])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "k"])
def test_any_layers_can_be_timed(site, layers):
    assert forecast(model(), drawn(), Options(site, [-1], layers)).total > 0
    one = deltapatch.from_transformers(hf_model("one-layer"))
    given = [deltapatch.PromptPair(*p) for p in pairs(true_model("one-layer"), (4,))]
    assert forecast(one, given, Options(site, [-1])).total > 0


def test_timing_leaves_no_trace():
    it, given = model(), drawn()
    before = deltapatch.sweep(it, given, "mlp_out", progress=False)
    forecast(it, given, Options("mlp_out"))
    after = deltapatch.sweep(it, given, "mlp_out", progress=False)
    assert np.array_equal(before.values("kl"), after.values("kl"), equal_nan=True)


def test_sweeps_that_are_alike_share_a_piece(monkeypatch):
    calls = []
    real = calibration.calibrate
    monkeypatch.setattr(
        "deltapatch.engine.forecast.calibrate", lambda *args: calls.append(args) or real(*args)
    )
    found = forecasts(model(), drawn(), [Options("mlp_out", "last"), Options("mlp_post", "last")])
    assert len(calls) == 1
    assert found[0].plan.rows < found[1].plan.rows
    assert found[0].total < found[1].total


# ------------------------------------------------------------------------------------- stand-ins


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("variant", ["neox-sequential", "gptj", "llama-grouped"])
def test_a_stand_in_has_the_plan_of_the_model(variant, stream):
    it = model(variant)
    fields = it_fields(variant)
    other = stand_in(fields, "config.json", CPU, stream)
    assert other.spec == it.spec
    assert other.n_bytes == it.n_bytes
    given = drawn(variant)
    asked = Options(["mlp_out", "mlp_post"], "last")
    bounded = replace(asked, memory_budget=1 << 28)
    one, two = (forecast(m, given, bounded, timed=False).as_dict() for m in (it, other))
    if not stream:
        assert one["memory_bytes"].pop("peak") - it.n_bytes == two["memory_bytes"].pop("peak")
        assert one == two
    assert forecast(other, given, asked).total > 0


def it_fields(variant):
    return hf_model(variant).config.to_dict()


def test_a_stand_in_of_a_large_model_takes_little():
    big = stand_in(CONFIGS["llama-7b"] | {"dtype": "bfloat16"}, "config.json", CPU, True)
    assert big.dtype == torch.bfloat16
    assert 13e9 < big.n_bytes < 14e9
    given = [deltapatch.PromptPair([1, 2, 3], [1, 4, 3], 5, 6)]
    made = forecast(big, given, Options("mlp_post", "last", memory_budget=1 << 33), timed=False)
    assert made.plan.rows == 32 * 11008
    assert made.as_dict()["passes"] == len(made.plan.passes) >= 1
