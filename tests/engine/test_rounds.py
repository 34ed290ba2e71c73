"""Screens that go on until they found enough: on made-up effects as often as they say, and on models."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from engine_tiny import hf_model, pairs, true_model

import deltapatch
from deltapatch import DeltapatchError, PromptPair, Recall
from deltapatch.engine import sweep as sweeps
from deltapatch.engine.options import SweepOptions
from deltapatch.engine.screening.rounds import verify_until
from deltapatch.engine.screening.screen import Screen
from deltapatch.interventions.given import Listed
from deltapatch.interventions.table import PatchTable
from deltapatch.results.merge import merge
from deltapatch.results.metrics import Reference
from deltapatch.results.outcome import Outcome
from deltapatch.results.screened import load_screened
from deltapatch.results.strata import chance, most_large

N, THRESHOLD = 1500, 1.0


def listed(effects):
    n = len(effects)
    columns = (np.zeros(n, np.int64) for _ in range(5))
    return Listed(PatchTable(n, np.zeros(n, np.int64), np.arange(n), *columns), labels={"effect": effects})


class MadeUp(Screen):
    """A screen of one site with given estimates."""

    def __init__(self, estimates, seed, **options):
        self.estimates, self.can, self.by = estimates, np.arange(len(estimates)), "logit_diff"
        self.asked = SimpleNamespace(sites=[SimpleNamespace(offset=0, shape=lambda n: (n, len(estimates)))])
        self.spec, self.pairs = None, []
        self.options = SweepOptions(
            screen="relp", threshold=THRESHOLD, seed=seed, progress=False, **({"top": 40} | options)
        )

    def listed(self, chosen, spec, pairs):
        return listed(chosen)

    def result(self, verified, choice):
        return verified, choice


def until_enough(truth, estimates, seed, **options):
    """Whether it says it is enough, the share of large effects that it found, and what it took."""

    def verify(effects, number):
        measured, meta = {"logit_diff": truth[effects]}, {"passes": 1, "rows": len(effects), "seconds": 0.0}
        return Outcome(measured, listed(effects), [], Reference.empty(1), "denoise", meta)

    verified, choice = verify_until(MadeUp(estimates, seed, **options), verify)
    effects = verified.interventions.labels["effect"]
    assert np.array_equal(effects, choice.effects)
    assert np.array_equal(verified.measured["logit_diff"], truth[effects])
    assert verified.meta["rows"] == len(effects)  # nothing was computed twice
    assert np.array_equal(np.bincount(choice.stratum[effects] + 1, minlength=2)[1:], choice.strata.drawn)
    large = np.abs(truth) > THRESHOLD
    return large[effects].sum() / max(1, large.sum()), len(effects), choice.looks


def populations():
    """name -> (truth, estimates): what estimates say well, badly, and not at all."""
    rng = np.random.default_rng(3)
    truth = rng.standard_normal(N) * np.where(np.arange(N) < 300, 2.0, 0.3)
    blind = np.where(np.arange(N) % 5 == 4, 0.0, truth)  # of a fifth they say nothing
    return {
        "good": (truth, truth * (1 + 0.1 * rng.standard_normal(N))),
        "a fifth unseen": (truth, blind),
        "none": (truth, rng.standard_normal(N)),
    }


@pytest.mark.parametrize("name", populations())
def test_it_stops_as_often_too_early_as_it_says_and_no_more(name):
    truth, estimates = populations()[name]
    found = [until_enough(truth, estimates, seed, until=Recall(0.7, 0.8)) for seed in range(150)]
    recall, took, looks = np.array(found).T
    assert (recall >= 0.7).mean() >= 0.8 - 3 * np.sqrt(0.2 * 0.8 / 150)
    if name == "good":  # it is of use
        assert took.max() <= 0.6 * N
    else:
        assert looks.max() > 1


def test_where_it_ends():
    truth, estimates = populations()["none"]
    for until in (0.9, 0.999):
        recall, took, _ = until_enough(truth, estimates, 0, until=Recall(until))
        assert recall >= until
    assert took == N  # nothing less is enough
    for limit in (60, 700):
        recall, took, _ = until_enough(truth, estimates, 0, until=Recall(0.99), screen_limit=limit)
        assert recall < 0.99
        assert took == limit
    nothing = np.zeros(N)
    assert until_enough(nothing, estimates, 0, until=Recall(0.9))[1] == N  # to know that it is nothing


def test_the_hypergeometric_bound_is_exact():
    for x, n, size in ((0, 10, 40), (3, 25, 60), (10, 10, 12), (0, 5, 5)):
        most = most_large(x, n, size, 0.1)
        assert chance(x, n, most, size) > 0.1
        assert most == size - n + x or chance(x, n, most + 1, size) <= 0.1
        rng = np.random.default_rng(1)
        drawn = rng.random((4000, size)).argsort(1)[:, :n]
        assert (drawn < most).sum(1).__le__(x).mean() == pytest.approx(chance(x, n, most, size), abs=0.03)
    recall = Recall(0.9)
    n = recall.draws(450, 10_000)  # 50 may be missed, so 51 would be seen
    assert chance(0, n, 51, 10_000) <= 0.025 < chance(0, n - 1, 51, 10_000)
    assert recall.draws(450, 50) == 0


# ---------------------------------------------------------------------------- on models

VARIANT = "llama-grouped"
OPTIONS = {"sites": ["mlp_out", "z", "mlp_post"], "progress": False, "noise_sample": 0}
UNTIL = {"screen": "attribution", "top": 20, "threshold": 0.05, "until": "recall:0.8", "seed": 3}


@pytest.fixture(scope="module")
def model():
    return deltapatch.from_transformers(hf_model(VARIANT))


@pytest.fixture(scope="module")
def prompts():
    return [PromptPair(*pair) for pair in pairs(true_model(VARIANT), (6, 4, 6, 1))]


def test_a_run_is_cut_off_and_goes_on(model, prompts, tmp_path, monkeypatch):
    asked = OPTIONS | UNTIL
    whole = deltapatch.sweep(model, prompts, out=tmp_path / "whole", **asked)
    assert whole.reached
    assert "enough after" in whole.verdict
    assert whole.missed().recall >= 0.8
    exact = deltapatch.sweep(model, prompts, precision="fp32", **OPTIONS)
    for site in OPTIONS["sites"]:
        there = whole.is_verified(site)
        got, want = whole.values("logit_diff", site=site), exact.values("logit_diff", site=site)
        assert np.allclose(got[there], want[there], rtol=1e-4, atol=1e-5)
    real, rounds = sweeps._answer, []

    def cut_off(*args):
        rounds.append(args[2].out)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sweeps, "_answer", cut_off)
    with pytest.raises(KeyboardInterrupt, match="rounds are kept"):
        deltapatch.sweep(model, prompts, out=tmp_path / "cut", **asked)
    monkeypatch.setattr(sweeps, "_answer", real)
    with pytest.raises(DeltapatchError, match="is taken: it is a run that is not finished"):
        deltapatch.sweep(model, prompts, out=tmp_path / "cut", **asked)
    with pytest.raises(DeltapatchError, match="no parts to merge"):
        merge(tmp_path / "cut")
    with pytest.raises(DeltapatchError, match="different threshold"):
        deltapatch.sweep(model, prompts, out=tmp_path / "cut", resume=True, **(asked | {"threshold": 0.5}))
    deltapatch.sweep(model, prompts, out=tmp_path / "cut", resume=True, **asked)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "cut").iterdir()}
    assert "unfinished" not in names
    for name in names - {"run.json"}:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    again = load_screened(tmp_path / "cut")
    assert again.verdict == whole.verdict
    assert str(again.missed()) == str(whole.missed())
    resumed = deltapatch.sweep(model, prompts, out=tmp_path / "cut", resume=True, **asked)
    assert resumed.looks == whole.looks
    with pytest.raises(DeltapatchError, match="different recall"):
        deltapatch.sweep(
            model, prompts, out=tmp_path / "cut", resume=True, **(asked | {"until": "recall:0.7"})
        )


def test_a_limit_that_ends_first_is_said(model, prompts):
    found = deltapatch.sweep(model, prompts, **(OPTIONS | UNTIL | {"screen_limit": 60}))
    assert not found.reached
    assert found.verdict.startswith("NOT enough: the limit of 60 exact effects")
    assert 60 <= len(found.verified) <= 60 + len(prompts)


def test_what_is_refused(model, prompts):
    for options, said in (
        ({"until": "recall:0.9"}, "give screen as well"),
        ({"screen": "relp", "until": "recall:0.9"}, "until needs threshold"),
        ({"screen": "relp", "threshold": 1, "until": "recall"}, "recall:0.9:0.99"),
        ({"screen": "relp", "threshold": 1, "until": 0.9}, "until must be"),
        ({"screen": "relp", "threshold": 1, "until": "recall:90"}, "below 1"),
        ({"screen": "relp", "threshold": 1, "until": "recall:0.9:0.2"}, "from 0.5"),
        ({"screen": "relp", "screen_limit": 5}, "give until as well"),
        ({"screen": "relp", "threshold": 1, "until": Recall(0.9), "screen_limit": 0}, "1 or more"),
        ({"screen": "relp", "threshold": 1, "until": Recall(0.9), "out": "x", "shard": (1, 2)}, "no parts"),
    ):
        with pytest.raises(DeltapatchError, match=said):
            deltapatch.sweep(model, prompts, progress=False, **options)
    assert SweepOptions(screen="relp", threshold=1, until=Recall(0.9, 0.99)).until == "recall:0.9:0.99"


@pytest.mark.slow
def test_on_a_built_in_model_it_holds_over_seeds():
    from deltapatch.tasks.arithmetic import arithmetic_pairs

    model = deltapatch.load_model("builtin:gpt-neox-arithmetic", device="cpu")
    prompts, _ = arithmetic_pairs(model.tokenizer, per_template=1, shots=0, seed=7, operators=["+"])
    options = {"sites": "mlp_post", "positions": "last", "progress": False, "noise_sample": 0}
    truth = np.abs(deltapatch.sweep(model, prompts[:3], **options).values("logit_diff"))
    threshold = float(np.quantile(truth, 0.98))
    held = []
    for seed in range(40):
        found = deltapatch.sweep(
            model,
            prompts[:3],
            **options,
            screen="ig-inputs",
            top=20,
            seed=seed,
            threshold=threshold,
            until=Recall(0.8, 0.8),
        )
        large = truth > threshold
        held.append(large[found.is_verified()].sum() >= 0.8 * large.sum())
        assert found.reached
        assert found.is_verified().mean() < 0.8
    assert np.mean(held) >= 0.8 - 3 * np.sqrt(0.2 * 0.8 / 40)
    assert json.dumps(found.meta["until"]) == '"recall:0.8:0.8"'
