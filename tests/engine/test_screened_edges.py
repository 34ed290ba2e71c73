"""Screened sweeps of edges: what is exact is exact, what is not is NaN, and both are kept."""

import numpy as np
import pytest
from engine_tiny import model_of, pairs, prompt_pairs, true_model

import deltapatch as dp
from deltapatch import DeltapatchError
from deltapatch.analysis.calibration import calibration
from deltapatch.engine.cluster.sweep import ray_sweep_edges
from deltapatch.engine.options import EdgeOptions
from deltapatch.engine.question import ask
from deltapatch.engine.screening.screen import listed_effects
from deltapatch.interventions.given import Listed
from deltapatch.interventions.nodes import Nodes
from deltapatch.results.estimated import ESTIMATES
from deltapatch.results.folder import INTERVENTIONS
from deltapatch.results.merge import merge

VARIANT = "llama-grouped"
SCREEN = {"screen": "attribution", "top": 40, "screen_sample": 60, "seed": 3}
OPTIONS = {"effect": "both", "progress": False, "precision": "fp32"}


@pytest.fixture(scope="module")
def model():
    return model_of(VARIANT)


@pytest.fixture(scope="module")
def prompts():
    return prompt_pairs(pairs(true_model(VARIANT), (6, 4, 6, 1)))


@pytest.fixture(scope="module")
def exact(model, prompts):
    return dp.sweep_edges(model, prompts, **OPTIONS)


@pytest.fixture(scope="module")
def found(model, prompts):
    return dp.sweep_edges(model, prompts, **OPTIONS, **SCREEN)


def test_what_was_verified_is_exact_and_the_rest_is_nan(found, exact):
    assert isinstance(found, dp.ScreenedEdges)
    assert (found.edges, found.senders, found.receivers) == (exact.edges, exact.senders, exact.receivers)
    n = 0
    for effect in ("total", "direct"):
        here = found.is_verified(effect)
        n += here.sum()
        for metric in ("logit_diff", "recovered", "kl"):
            want, got = exact.values(metric, effect), found.values(metric, effect)
            assert got.shape == want.shape
            scale = np.abs(want[here]).max()
            np.testing.assert_allclose(got[here], want[here], rtol=1e-5, atol=1e-6 * scale)
            assert np.isnan(got[~here]).all()
        estimate = found.estimate(effect=effect)
        assert np.array_equal(np.isnan(estimate), np.isnan(exact.values("logit_diff", effect)))
        assert not (found.is_drawn(effect) & ~here).any()
    assert n == len(found.verified)
    size, drawn, here = (
        np.stack([of(effect=effect) for effect in ("total", "direct")])
        for of in (found.estimate, found.is_drawn, found.is_verified)
    )
    top = here & ~drawn
    assert np.sort(np.abs(size[top]))[-40:].min() >= np.nanmax(np.abs(size[~top]))


def test_columns(found):
    columns = found.columns(["kl", "recovered"])
    assert [*columns] == ["pair", "sender", "receiver", "effect", "estimate", "drawn", "kl", "recovered"]
    assert {len(column) for column in columns.values()} == {len(found.verified)}
    row = {name: i for i, name in enumerate(found.senders)}
    column = {name: i for i, name in enumerate(found.receivers)}
    of = {e: (found.values("kl", e), found.estimate(None, e)) for e in ("total", "direct")}
    rows = zip(*(columns[name] for name in ("pair", "sender", "receiver", "effect")), strict=True)
    for i, (pair, sender, receiver, effect) in enumerate(rows):
        values, estimate = of[effect]
        assert values[pair, row[sender], column[receiver]] == columns["kl"][i]
        assert estimate[pair, row[sender], column[receiver]] == columns["estimate"][i]
    assert len(found.to_pandas()) == len(found.verified)
    assert "total and direct effects of" in repr(found)
    # A metric that follows has the estimates times what its pair says.
    here, metrics = found.is_verified(), ("recovered", "logit_diff")
    (a, b), (c, d) = ([of(m)[here] for m in metrics] for of in (found.values, found.estimate))
    np.testing.assert_allclose(a * d, b * c, rtol=1e-5)
    with pytest.raises(DeltapatchError, match="does not follow"):
        found.estimate("kl")


@pytest.mark.parametrize("positions", ["all", ["subject", -1]])
def test_each_position_by_itself(positions, model, prompts):
    options = {"positions": positions, "progress": False, "precision": "fp32", "keys": "kv"}
    exact = dp.sweep_edges(model, prompts, **options)
    found = dp.sweep_edges(model, prompts, **options, **SCREEN)
    here, want = found.is_verified(), exact.values("logit_diff")
    assert here.shape == want.shape
    assert here.any((0, 1, 2)).all()
    np.testing.assert_allclose(found.values("logit_diff")[here], want[here], rtol=1e-4, atol=1e-6)
    assert [*found.columns("kl")] == ["pair", "sender", "receiver", "position", "estimate", "drawn", "kl"]
    with pytest.raises(DeltapatchError, match="effect 'direct' was not measured"):
        found.values("kl", "direct")


def test_the_bound_holds_over_seeds(model, prompts, exact):
    truth, holds = [np.abs(exact.values("logit_diff", effect)) for effect in ("total", "direct")], []
    for seed in range(6):
        found = dp.sweep_edges(model, prompts, **OPTIONS, **(SCREEN | {"seed": seed, "noise_sample": 0}))
        missed = found.missed(confidence=0.9)
        large = [
            (true > missed.threshold) & ~found.is_verified(effect)
            for true, effect in zip(truth, ("total", "direct"), strict=True)
        ]
        holds.append(sum(some.sum() for some in large) <= missed.at_most)
    assert sum(holds) >= 4


def test_how_far_estimates_agree(found, model, prompts):
    table = calibration(found).columns
    reads = ("q", "k", "v", "mlp", "logits")
    assert set(table["reads"]) == {f"{effect} {what}" for effect in ("total", "direct") for what in reads}
    assert table["verified"].sum() == len(found.verified)
    by_layer = calibration(found, by_layer=True).columns
    assert set(by_layer["layer"]) == {0, 1, 2}
    alone = dp.sweep_edges(model, prompts, progress=False, **SCREEN)
    assert set(calibration(alone).columns["reads"]) == set(reads)


def test_until_enough_was_found(model, prompts, exact, tmp_path):
    asked = {"screen": "relp", "receivers": "a<v>,m,logits", "top": 5, "threshold": 0.05}
    asked |= {"until": dp.Recall(0.8), "progress": False, "precision": "fp32", "out": tmp_path / "run"}
    found = dp.sweep_edges(model, prompts, **asked)
    assert found.reached
    some = [exact.receivers.index(name) for name in found.receivers]
    truth = np.abs(exact.values("logit_diff", "total"))[:, :, some]
    assert (truth > 0.05)[found.is_verified()].sum() >= 0.8 * np.nansum(truth > 0.05)
    again = dp.sweep_edges(model, prompts, resume=True, **asked)
    assert again.verdict == found.verdict


def test_a_run_folder_has_both(found, model, prompts, tmp_path):
    options = {**OPTIONS, **SCREEN}
    kept = dp.sweep_edges(model, prompts, out=tmp_path / "run", **options)
    found.save(tmp_path / "saved")
    resumed = dp.sweep_edges(model, prompts, out=tmp_path / "run", resume=True, **options)
    read = [dp.load_screened(tmp_path / name) for name in ("run", "saved")]
    small = options | {"memory_budget": "64MiB"}
    for part in (1, 2):
        dp.sweep_edges(model, prompts, out=tmp_path / "parts", shard=(part, 2), **small)
    merge(tmp_path / "parts")
    with pytest.raises(DeltapatchError, match="completes"):
        dp.load_screened(tmp_path / "parts")
    dp.sweep_edges(model, prompts, out=tmp_path / "parts", resume=True, **small)
    for again in (kept, resumed, *read, dp.load_screened(tmp_path / "parts")):
        assert isinstance(again, dp.ScreenedEdges)
        assert repr(again) == repr(found)
        for effect in ("total", "direct"):
            np.testing.assert_array_equal(again.values("kl", effect), found.values("kl", effect))
            np.testing.assert_array_equal(again.estimate("ie", effect), found.estimate("ie", effect))
        assert str(again.missed()) == str(found.missed())
    for other, said in (({"top": 41}, "different top"), ({"keys": "kv"}, "different list of interventions")):
        with pytest.raises(DeltapatchError, match=said):
            dp.sweep_edges(model, prompts, out=tmp_path / "run", resume=True, **(options | other))
    plain = dp.load_outcome(tmp_path / "run")  # what was verified
    assert plain.interventions.nodes == Nodes.of(model.spec)
    assert len(plain) == len(found.verified)


def test_a_damaged_file_is_refused(found, tmp_path):
    found.save(tmp_path / "run")
    path = tmp_path / "run" / ESTIMATES
    whole = path.read_bytes()
    for old, new in ((whole[-8:], b""), (whole, b""), (b"a1.h0<q>", b"a9.h0<q>"), (b"both", b"bath")):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(DeltapatchError, match="damaged"):
            dp.load_screened(tmp_path / "run")
    path.write_bytes(whole)
    file = tmp_path / "run" / INTERVENTIONS
    file.write_bytes(file.read_bytes().replace(b'"nodes"', b'"modes"'))
    with pytest.raises(DeltapatchError, match="damaged"):
        dp.load_screened(tmp_path / "run")


def test_listed_edges_take_what_their_grid_takes(model, prompts):
    options = EdgeOptions(progress=False, receivers="a<q>,m", precision="fp32")
    question = ask(model, prompts, options)
    grid = question.interventions
    listed = ask(
        model, prompts, options, lambda spec, own: listed_effects(grid, np.arange(grid.n_effects), own)
    )
    assert isinstance(listed.interventions, Listed)
    assert (listed.n_rows, listed.flops) == (question.n_rows, question.flops)
    assert (listed.entering == question.entering).all()


def test_what_is_refused(model, prompts):
    for options, said in (
        ({"top": 3}, "give screen as well"),
        ({"screen": "ig-activations"}, "no lines for edges"),
        ({"screen": "ig-inputs", "source": "zero"}, "is no prompt"),
        ({"screen": "relp"}, "nothing of edges into <q> and <k>: leave these receivers out"),
        ({"screen": "attribution", "metrics": "kl"}, "needs it"),
    ):
        with pytest.raises(DeltapatchError, match=said):
            dp.sweep_edges(model, prompts, progress=False, **options)
    unequal = [dp.PromptPair([3, 9, 4, 8, 5], [3, 7, 8, 5], 1, 2, align=[[0, 0], [1, 1], [3, 2], [4, 3]])]
    with pytest.raises(DeltapatchError, match="line up position by position"):
        dp.sweep_edges(model, unequal, positions="all", screen="attribution", progress=False)
    screened = dp.sweep_edges(model, prompts, progress=False, **SCREEN)
    with pytest.raises(DeltapatchError, match="of a screened sweep few are known"):
        dp.Circuit.top(screened, 5)
    with pytest.raises(DeltapatchError, match="use sweep_edges"):
        ray_sweep_edges("nowhere", prompts, screen="attribution")
