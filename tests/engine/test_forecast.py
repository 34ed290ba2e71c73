"""The plan before the run counts what the run then does; a forecast is its counts over measured rates."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_tiny import hf_model, pairs, true_model

import deltapatch
from deltapatch import DeltapatchError, Intervention, Patch
from deltapatch.bench.true_shapes import CONFIGS
from deltapatch.engine.audit import Audit
from deltapatch.engine.options import Options, SweepOptions
from deltapatch.engine.passes import memory_costs
from deltapatch.engine.planning import forecast as forecasting
from deltapatch.engine.planning.costs import layer_parameters
from deltapatch.engine.planning.forecast import forecast, forecasts, seconds
from deltapatch.engine.planning.memory import Costs
from deltapatch.engine.planning.plan import plan
from deltapatch.engine.planning.rates import Rates
from deltapatch.engine.question import ask
from deltapatch.engine.wavefront.loop import Wavefront
from deltapatch.engine.wavefront.pool import Pool
from deltapatch.engine.wavefront.readout import ReadOut
from deltapatch.engine.wavefront.rows import WHOLE
from deltapatch.engine.wavefront.unpatched import Unpatched
from deltapatch.kernels.product import PRECISIONS
from deltapatch.models import memory
from deltapatch.models.model import Model, Origin
from deltapatch.models.model_weights import Streamed
from deltapatch.models.stand_in import stand_in

CPU = torch.device("cpu")


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
        self.around(Unpatched, "both", self.both)
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

    def both(self, it, dx, layer, number, here, places):
        self.base_tokens.append(len(here.base.resid_pre))

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
        monkeypatch.setattr(Costs, "of", classmethod(lambda cls, *args, **named: Costs(0, 0, 0, 10, 10)))
    labels = {"subject": 1}
    given = [replace(pair, labels=labels) for pair in drawn(lengths=(5, 3, 5, 3, 5))]
    if long:
        given[1::2] = [replace(pair, clean_answer=[4, 2, 7], corrupted_answer=[4, 3]) for pair in given[1::2]]
    it = model()
    monkeypatch.setattr(it, "stream", stream)
    options = {"source": source, "memory_budget": budget, "noise_sample": 0}
    asked = SweepOptions(sites=sites, positions=positions, **options)
    found = forecast(ask(it, given, asked), timed=False)
    counted = Counted(monkeypatch, it.spec.n_layers)
    effects = deltapatch.sweep(it, given, sites=sites, positions=positions, progress=False, **options)

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
        forecast(ask(model(), drawn(), SweepOptions(memory_budget=1)), timed=False)


def test_memory_of_the_plan():
    question = ask(model(), drawn(), SweepOptions(sites="mlp_out", memory_budget=1 << 30))
    made = plan(question, PRECISIONS["fp32"], 2)
    costs = memory_costs(question, question.decided(PRECISIONS["fp32"]), 2)
    assert made.memory["pass"] == costs.total(5, 22, made.passes[0].row_tokens, made.rows)
    assert made.memory["model"] == question.model.n_bytes == made.memory["peak"] - made.memory["pass"]


def test_the_plan_of_given_interventions_is_that_of_the_grid_that_they_are():
    it, given = model(), drawn()
    cells = [
        Intervention(i, [Patch("mlp_out", layer, at)])
        for i, pair in enumerate(given)
        for layer in range(it.spec.n_layers)
        for at in range(len(pair.clean))
    ]
    made = [
        forecast(question, timed=False).as_dict()
        for question in (
            ask(it, given, SweepOptions(sites="mlp_out", memory_budget=1 << 30)),
            ask(it, given, Options(memory_budget=1 << 30), cells),
        )
    ]
    for one in made:
        del one["memory_bytes"]["results"]  # a grid has cells that no pair has
    assert made[0] == made[1]


# ------------------------------------------------------------------------------------- what it takes


ENDLESS = Rates(*[float("inf")] * 7)


class Case:
    """A sweep of two sites, and what it spends its time on at given rates."""

    def __init__(self, stream=False, **options):
        options = {"sites": ["mlp_out", "z"], "noise_sample": 0, "memory_budget": 1 << 30} | options
        asked = model()
        if stream:
            asked = Model(Streamed(asked._weights.checkpoint), Origin("streamed"))
        self.question = ask(asked, drawn(), SweepOptions(**options))
        self.plan = plan(self.question, PRECISIONS["fp32"], 1)
        self.audit = Audit(self.question, Pool())

    def takes(self, **rates):
        measured, precision = replace(ENDLESS, **rates), self.question.precision or PRECISIONS["fp32"]
        found = seconds(self.question, self.plan, precision, measured, self.audit, 1)
        return {name: spent for name, spent in found.items() if spent and name != "tables"}


def test_seconds_are_flops_over_rates():
    case = Case()
    spec = case.question.model.spec
    flying, entries = int(case.plan.in_flight.sum()), 2 * spec.d_model * spec.d_vocab
    layer = 2 * layer_parameters(spec)
    slower = 1 / forecasting.BESIDE_OTHERS
    assert case.takes() == {}
    assert case.takes(products=1.0) == {"rows": pytest.approx(layer * flying * slower)}
    runs = 2 * 22 * spec.n_layers * layer  # base and source
    assert case.takes(exact=1.0) == {"unpatched runs": pytest.approx(runs * slower)}
    reads = case.plan.rows + 4 * 5
    assert case.takes(read_out=1.0) == {"read-out": pytest.approx(reads * entries * slower)}
    assert set(case.takes(numbers=1.0)) == {"rows", "unpatched runs", "read-out"}
    assert set(case.takes(calls=1.0)) == {"calls"}


def test_every_pass_reads_and_runs_the_prompts_again(monkeypatch):
    case = Case(stream=True, precision="bf16")
    rates = {"weights": 1.0, "file": 2.0, "exact": 1.0, "calls": 1.0}
    once = case.takes(**rates)
    whole = case.plan.passes[0]
    case.plan = replace(case.plan, passes=[whole, replace(whole, rows=0, row_reads=0, row_tokens=0)])
    twice = case.takes(**rates)
    for name in ("weights", "unpatched runs"):
        assert twice[name] == pytest.approx(2 * once[name])
    # What is computed meanwhile hides the reading, but for a first layer.
    n_bytes, n_layers = case.question.model.n_bytes, case.question.model.spec.n_layers
    assert once["waiting for the file"] == pytest.approx(n_bytes / 2 / n_layers)
    alone = Case(stream=True, precision="bf16")
    assert alone.takes(file=2.0)["waiting for the file"] == pytest.approx(n_bytes / 2)


def test_the_noise_floor_is_counted():
    case = Case(precision="bf16", noise_sample=8)
    assert case.audit.expects() == ["fp64"]
    assert case.takes(exact=1.0)["noise floor"] == pytest.approx(
        case.audit.takes() / forecasting.BESIDE_OTHERS
    )


@pytest.mark.parametrize("source", ["counterpart", "mean", "resample", "noise"])
@pytest.mark.parametrize("variant", ["neox-parallel", "llama-grouped"])
def test_rates_are_measured(variant, source):
    it, given = model(variant), drawn(variant, (5, 3, 5, 3, 5))
    found = forecast(ask(it, given, SweepOptions(sites=["mlp_out", "mlp_post"], source=source)))
    assert found.total > 0
    assert all(s >= 0 for s in found.seconds.values())
    text = json.dumps(found.as_dict())
    assert json.loads(text)["predicted_seconds"] == pytest.approx(found.total, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{"sites": "mlp_out"}, {"sites": "mlp_post", "positions": "last"}])
def test_a_forecast_is_near_what_happens(asked):
    it = deltapatch.load_model("builtin:gpt-neox-arithmetic")
    draw = np.random.default_rng(0)
    given = [deltapatch.PromptPair(*draw.integers(0, 200, (2, 12)).tolist(), 3, 4) for _ in range(16)]
    expected = forecast(ask(it, given, SweepOptions(**asked))).total
    # The machine is shared: the fastest of three.
    took = min(deltapatch.sweep(it, given, progress=False, **asked).meta["seconds"] for _ in range(3))
    assert took / 5 < expected < 5 * took


@pytest.mark.parametrize("layers", ["all", [0], [2]])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "k"])
def test_any_layers_are_forecast(site, layers):
    asked = SweepOptions(sites=site, positions=[-1], layers=layers)
    assert forecast(ask(model(), drawn(), asked)).total > 0
    one = deltapatch.from_transformers(hf_model("one-layer"))
    given = [deltapatch.PromptPair(*p) for p in pairs(true_model("one-layer"), (4,))]
    assert forecast(ask(one, given, replace(asked, layers="all"))).total > 0


def test_timing_leaves_no_trace():
    it, given = model(), drawn()
    before = deltapatch.sweep(it, given, sites="mlp_out", progress=False)
    forecast(ask(it, given, SweepOptions(sites="mlp_out")))
    after = deltapatch.sweep(it, given, sites="mlp_out", progress=False)
    assert np.array_equal(before.values("kl"), after.values("kl"), equal_nan=True)


def test_rates_are_measured_once(monkeypatch):
    calls = []
    real = forecasting.measure
    monkeypatch.setattr(forecasting, "measure", lambda *args: calls.append(args) or real(*args))
    asked = [SweepOptions(sites=site, positions="last") for site in ("mlp_out", "mlp_post")]
    found = forecasts([ask(model(), drawn(), one) for one in asked])
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
    asked = SweepOptions(sites=["mlp_out", "mlp_post"], positions="last")
    bounded = replace(asked, memory_budget=1 << 28)
    one, two = (forecast(ask(m, given, bounded), timed=False).as_dict() for m in (it, other))
    if not stream:
        assert one["memory_bytes"].pop("peak") - it.n_bytes == two["memory_bytes"].pop("peak")
        assert one == two
    assert forecast(ask(other, given, asked)).total > 0


def it_fields(variant):
    return hf_model(variant).config.to_dict()


def test_a_stand_in_that_would_not_fit_is_streamed(monkeypatch):
    fields = it_fields("llama-grouped")
    n_bytes = stand_in(fields, "config.json", CPU, False).n_bytes
    for free, streams in ((n_bytes * 4 // 3 + 1, False), (n_bytes, True)):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        assert stand_in(fields, "config.json", CPU, False).stream == streams


def test_a_stand_in_of_a_large_model_takes_little():
    big = stand_in(CONFIGS["llama-7b"] | {"dtype": "bfloat16"}, "config.json", CPU, True)
    assert big.dtype == torch.bfloat16
    assert 13e9 < big.n_bytes < 14e9
    given = [deltapatch.PromptPair([1, 2, 3], [1, 4, 3], 5, 6)]
    asked = SweepOptions(sites="mlp_post", positions="last", memory_budget=1 << 33)
    made = forecast(ask(big, given, asked), timed=False)
    assert made.plan.rows == 32 * 11008
    assert made.as_dict()["passes"] == len(made.plan.passes) >= 1
