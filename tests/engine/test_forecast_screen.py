"""What estimates will take is counted before they are made: the counts are of what is then done."""

import time
from dataclasses import replace

import numpy as np
import pytest
from engine_tiny import build, hf_model, pairs, true_model
from torch.profiler import ProfilerActivity, profile

import deltapatch
from deltapatch.engine.options import SCREENS, EdgeOptions, SweepOptions
from deltapatch.engine.planning import screens
from deltapatch.engine.planning.costs import layer_parameters
from deltapatch.engine.planning.forecast import BESIDE_OTHERS, numbers_beside
from deltapatch.engine.planning.rates import Rates
from deltapatch.engine.planning.screens import forecast_screen, seconds, work_of
from deltapatch.engine.question import ask
from deltapatch.engine.screening.gradients import Backward
from deltapatch.engine.screening.hearing import Hearing
from deltapatch.engine.screening.lines import Lines
from deltapatch.engine.screening.screen import estimates_of
from deltapatch.engine.screening.swapped import Swapped
from deltapatch.engine.wavefront.messages import Messages
from deltapatch.engine.wavefront.unpatched import Unpatched

VARIANT = "llama-grouped"
ENDLESS = Rates(*[float("inf")] * 7)


@pytest.fixture(scope="module")
def model():
    return deltapatch.from_transformers(hf_model(VARIANT))


def asked(model, lengths=(5, 3, 5, 4, 5), **options):
    given = [deltapatch.PromptPair(*pair) for pair in pairs(true_model(VARIANT), lengths)]
    options = {"sites": ["mlp_post", "resid_post.along"], "screen": "attribution"} | options
    if "resid_post.along" in options["sites"]:
        options["directions"] = {"resid_post": np.eye(model.spec.d_model)[:3]}
    return estimates_of(ask(model, given, SweepOptions(progress=False, **options)))


class Counted:
    """Calls of some methods, and what is made of their arguments."""

    def __init__(self, monkeypatch):
        self.patch, self.sums = monkeypatch, {}

    def count(self, home, name, size=lambda *arguments: 1):
        real, key = getattr(home, name), (home, name)
        self.sums[key] = []

        def counted(*arguments, **named):
            self.sums[key].append(size(*arguments))
            return real(*arguments, **named)

        self.patch.setattr(home, name, counted)
        return self.sums[key]


@pytest.mark.parametrize("layers", ["all", [1]])
@pytest.mark.parametrize("budget", [None, 60_000])
@pytest.mark.parametrize("screen", ["attribution", "ig-inputs"])
def test_the_work_is_what_is_done(screen, budget, layers, model, monkeypatch):
    estimates = asked(model, screen=screen, memory_budget=budget, layers=layers)
    work, counted = work_of(estimates), Counted(monkeypatch)
    n_chunks = len(list(estimates.chunks()))
    assert (n_chunks > 1) == (budget is not None)
    bases, sources = (counted.count(Unpatched, name) for name in ("_base_steps", "_source_steps"))
    back = counted.count(Backward, "_piece", lambda it, segment, *rest: segment.pairs * segment.length)
    reads = counted.count(Backward, "_logits", lambda it, x, ends: len(x))
    changed = counted.count(Swapped, "_product", lambda it, g, row, slope, change: change.numel())
    estimates.run()
    calls = len(bases) * screens.BASE + len(sources) * screens.SOURCE
    assert work.calls == calls + len(back) * screens.GRADIENT + len(reads) * screens.OF_LOGITS
    assert work.reads == 2 * sum(reads)
    assert work.read_at_once == -(-sum(reads) // len(reads))
    assert work.in_a_block == -(-sum(back) // len(back))
    assert work.numbers == sum(changed)
    runs = 5 if screen == "ig-inputs" else 1
    assert work.side_by_side == -(-len(back) // (runs * estimates.n_back * n_chunks))


@pytest.mark.parametrize("positions", ["all", "together"])
def test_the_work_of_lines(positions, model, monkeypatch):
    """Each vector has one, in batches that all go through the whole model."""
    monkeypatch.setattr("deltapatch.engine.screening.lines._TOKENS", 20)
    options = {"sites": ["z", "mlp_out"], "positions": positions}
    estimates = asked(model, screen="ig-activations", screen_steps=2, **options)
    work, counted = work_of(estimates), Counted(monkeypatch)
    lines = counted.count(Lines, "_piece", lambda it, place, token, line, *rest: int(line[-1] + 1) * it.steps)
    estimates.run()
    layers = estimates.spec.n_layers
    of_a_batch = layers * screens.GRADIENT + screens.OF_LOGITS
    unpatched = 3 * layers * (screens.BASE + screens.SOURCE)  # pairs of three lengths
    assert work.calls == unpatched + len(lines) * of_a_batch
    assert work.reads == 2 * sum(lines)
    assert work.read_at_once == -(-sum(lines) // len(lines))
    assert len(lines) > 2 * layers * 5 or positions == "together"


def test_seconds_are_work_over_rates(model):
    estimates = asked(model)
    spec, work = model.spec, work_of(estimates)

    def takes(threads=1, **rates):
        return seconds(estimates, work, replace(ENDLESS, **rates), threads) * BESIDE_OTHERS

    assert takes() == 0
    layer, entries = 2 * layer_parameters(spec), 2 * spec.d_model * spec.d_vocab
    along = spec.n_layers * 22 * 3 * 4 * spec.d_model
    assert takes(exact=1.0) == pytest.approx(work.token_layers * layer + along)
    assert takes(read_out=1.0) == pytest.approx(2 * 5 * entries)
    beside = work.token_layers * numbers_beside(spec, 5) + 2 * 5 * spec.d_vocab
    changed = spec.n_layers * 22 * (spec.d_mlp + spec.d_model)
    assert takes(numbers=1.0) == pytest.approx(beside + 2 * changed)
    assert takes(calls=1.0) == work.calls
    assert work.side_by_side < 8
    assert takes(8, calls=1.0) == pytest.approx(work.calls * 8 / work.side_by_side)
    assert takes(weights=1.0) == 0
    half = deltapatch.from_transformers(build(VARIANT).bfloat16())
    other = asked(half)
    converted = seconds(other, work_of(other), replace(ENDLESS, weights=1.0), 1) * BESIDE_OTHERS
    assert converted == pytest.approx(2 * spec.n_layers * layer_parameters(spec))


def assert_operations(question):
    """About as many are carried out as is counted."""
    estimates_of(question).run()  # what is made once
    estimates = estimates_of(question)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        estimates.run()
    calls = sum(event.count for event in found.key_averages() if event.key.startswith("aten::"))
    assert calls / 1.7 < work_of(estimates).calls < 1.7 * calls


@pytest.mark.parametrize("screen", ["attribution", "relp"])
@pytest.mark.parametrize("variant", ["llama-grouped", "gptj", "gpt2", "gemma2"])
def test_blocks_are_of_about_as_many_operations_as_is_counted(variant, screen):
    model = deltapatch.from_transformers(hf_model(variant))
    given = [deltapatch.PromptPair(*pair) for pair in pairs(true_model(variant), (5, 5))]
    options = SweepOptions(sites="mlp_post", screen=screen, progress=False)
    assert_operations(ask(model, given, options))


@pytest.mark.parametrize("effect", ["total", "both"])
@pytest.mark.parametrize("screen", ["attribution", "ig-inputs"])
def test_the_work_of_edges_is_what_is_done(screen, effect, model, monkeypatch):
    given = [deltapatch.PromptPair(*pair) for pair in pairs(true_model(VARIANT), (5, 3, 5, 4, 5))]
    asked = EdgeOptions(screen=screen, effect=effect, receivers="a1-2,m1,logits", progress=False)
    estimates = estimates_of(ask(model, given, asked))
    work, counted = work_of(estimates), Counted(monkeypatch)
    bases, sources = (counted.count(Unpatched, name) for name in ("_base_steps", "_source_steps"))
    back = counted.count(Backward, "_piece", lambda it, segment, *rest: segment.pairs * segment.length)
    reads = counted.count(Backward, "_logits", lambda it, x, ends: len(x))
    pieces = counted.count(Hearing, "_piece", lambda it, x, *rest: x[..., 0].numel())
    heads = counted.count(Hearing, "_heads", lambda *rest: 12)
    said = counted.count(Messages, "hear_embedding", lambda it, *rest: it.shapes.n_tokens * len(it.senders))
    estimates.run()
    calls = len(bases) * screens.BASE + len(sources) * screens.SOURCE + len(back) * screens.GRADIENT
    calls += len(pieces) * screens.HEARING + sum(heads) * screens.OF_HEAD
    assert work.calls == calls + len(reads) * screens.OF_LOGITS
    assert work.numbers == sum(said) * model.spec.d_model
    assert work.reads == 2 * sum(reads)
    forwards = 22 * (2 + (5 if screen == "ig-inputs" else 0)) * 3
    assert work.token_layers == forwards + 2 * sum(back) + 2 * sum(pieces)


@pytest.mark.parametrize("screen", ["attribution", "relp"])
@pytest.mark.parametrize("variant", ["llama-grouped", "gptj", "gpt2", "gemma2", "olmo2"])
def test_edges_are_of_about_as_many_operations_as_is_counted(variant, screen):
    model = deltapatch.from_transformers(hf_model(variant))
    given = [deltapatch.PromptPair(*pair) for pair in pairs(true_model(variant), (5, 5))]
    options = EdgeOptions(receivers="a<v>,m,logits", screen=screen, progress=False)
    assert_operations(ask(model, given, options))


@pytest.mark.parametrize("screen", SCREENS)
def test_every_screen_is_forecast(screen, model):
    found = forecast_screen(asked(model, sites="z", screen=screen, top=3, screen_sample=2).question)
    assert found.plan.rows == 5
    assert 0 < found.seconds["estimates"] < found.total


def test_small_products_are_measured_as_small_ones(model, monkeypatch):
    """Rates are of as many tokens as go through a layer, and through the unembedding, together."""
    seen, real = [], screens.measure

    def noted(*arguments, **sizes):
        seen.append(sizes)
        return real(*arguments, **sizes)

    monkeypatch.setattr(screens, "measure", noted)
    forecast_screen(asked(model, lengths=(5, 5, 5, 5)).question)
    assert seen == [{"in_a_block": 20, "read_at_once": 4}]


@pytest.mark.slow
@pytest.mark.parametrize("screen", ["attribution", "ig-inputs"])
def test_a_forecast_is_near_what_happens(screen):
    it = deltapatch.load_model("builtin:gpt-neox-arithmetic")
    draw = np.random.default_rng(0)
    given = [deltapatch.PromptPair(*draw.integers(0, 200, (2, 12)).tolist(), 3, 4) for _ in range(4)]
    question = ask(it, given, SweepOptions(sites="mlp_post", screen=screen, top=1, screen_sample=1))
    expected = forecast_screen(question).seconds["estimates"]
    took = []
    for _ in range(3):  # the machine is shared: the fastest counts
        began = time.perf_counter()
        estimates_of(question).run()
        took.append(time.perf_counter() - began)
    assert min(took) / 5 < expected < 5 * min(took)
