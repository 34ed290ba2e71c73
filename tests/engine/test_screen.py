"""Screened sweeps: what is exact is exact, what is not is NaN, and both are kept."""

import numpy as np
import pytest
import torch
from engine_tiny import hf_model, pairs, true_model

import deltapatch
from deltapatch import DeltapatchError, PromptPair
from deltapatch.engine.cluster.sweep import ray_sweep
from deltapatch.results.estimated import ESTIMATES
from deltapatch.results.merge import merge
from deltapatch.results.screened import Screened, load_screened

VARIANT = "llama-grouped"
SITES = ["mlp_out", "z", "mlp_post", "resid_pre.dim"]
OPTIONS = {"sites": SITES, "positions": ["subject", -1, 0], "progress": False}
SCREEN = {"screen": "attribution", "top": 40, "screen_sample": 60, "seed": 3}


@pytest.fixture(scope="module")
def model():
    return deltapatch.from_transformers(hf_model(VARIANT))


@pytest.fixture(scope="module")
def prompts():
    return [PromptPair(*pair) for pair in pairs(true_model(VARIANT), (6, 4, 6, 1))]


@pytest.fixture(scope="module")
def exact(model, prompts):
    return deltapatch.sweep(model, prompts, precision="fp32", **OPTIONS)


@pytest.fixture(scope="module")
def found(model, prompts):
    return deltapatch.sweep(model, prompts, **OPTIONS, **SCREEN)


def flat(effects, metric="logit_diff"):
    return np.concatenate([effects.values(metric, site=site).ravel() for site in SITES])


def of_all(found, what, *args):
    return np.concatenate([getattr(found, what)(*args, site=site).ravel() for site in SITES])


def test_what_was_verified_is_exact_and_the_rest_is_nan(found, exact):
    assert isinstance(found, Screened)
    verified = of_all(found, "is_verified")
    for metric in ("logit_diff", "kl", "flip", "recovered"):
        want, got = flat(exact, metric), flat(found, metric)
        assert np.array_equal(~np.isnan(got), verified)
        assert np.allclose(got[verified], want[verified], rtol=1e-4, atol=1e-5)
    estimates = of_all(found, "estimate", "logit_diff")
    assert np.array_equal(np.isnan(estimates), np.isnan(flat(exact)))
    assert found.meta["precision"] == "fp32"
    for site in SITES:
        assert found.values("ie", site=site).shape == exact.values("ie", site=site).shape
    layer = found.values("ie", site="blocks.1.attn.hook_z")
    assert np.array_equal(layer, found.values("ie", site="z")[:, 1:2], equal_nan=True)


def test_the_top_has_the_largest_estimates_and_the_sample_is_of_all_others(found, exact):
    size, verified, drawn = (
        np.abs(of_all(found, "estimate")),
        of_all(found, "is_verified"),
        of_all(found, "is_drawn"),
    )
    top = verified & ~drawn
    assert 40 <= top.sum() <= 44
    assert np.sort(size[top])[-40:].min() >= np.nanmax(size[~top])
    assert 60 <= drawn.sum() <= 60 + 20
    assert found.weights().sum() == pytest.approx((flat(exact) != 0).sum(), rel=0.2)
    missed = found.missed()
    assert missed.threshold == pytest.approx(np.median(np.abs(flat(exact)[top])), rel=1e-3)
    assert missed.found == (np.abs(flat(found)[verified]) > missed.threshold).sum()
    assert missed.at_most <= missed.unseen
    assert missed.recall == missed.found / (missed.found + missed.at_most)
    assert "with 95% confidence at most" in str(missed)
    assert "certif" not in str(missed)
    assert found.missed(0.0, metric="kl").threshold == 0
    found.verified.meta["threshold"] = 0.125  # as if it had been asked for
    assert found.missed().threshold == 0.125
    assert found.missed(metric="kl").threshold == pytest.approx(np.median(flat(exact, "kl")[top]), rel=1e-3)
    found.verified.meta["threshold"] = None


def test_the_bound_holds_over_seeds(model, prompts, exact):
    truth = np.abs(np.nan_to_num(flat(exact)))
    holds = []
    for seed in range(6):
        found = deltapatch.sweep(model, prompts, **OPTIONS, **(SCREEN | {"seed": seed}), noise_sample=0)
        missed = found.missed(confidence=0.9)
        holds.append((truth[~of_all(found, "is_verified")] > missed.threshold).sum() <= missed.at_most)
    assert sum(holds) >= 4


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_metrics_that_follow_to_first_order(direction, found, model, prompts):
    """Where all that is measured is small, a metric is as large as what it follows from says."""
    for by in ("logit_diff", "dlogp_clean", "dlogp_corrupted"):
        options = {**OPTIONS, **SCREEN, "screen_by": by, "direction": direction, "noise_sample": 0}
        screened = deltapatch.sweep(model, prompts, **options)
        own = screened.estimates_of_verified()
        size = 1e-5 / np.abs(own).max()
        clean, corrupted = (0.3, -0.7) if by == "logit_diff" else (1, 1)  # any that make the estimate
        moved = {"logit_diff": 1, "dlogp_clean": clean, "dlogp_corrupted": corrupted}
        screened.verified.measured |= {name: share * size * own for name, share in moved.items()}
        for metric in set(screened.estimated):
            assert np.allclose(
                size * screened.estimates_of_verified(metric), screened.verified.values(metric), rtol=1e-4
            )
    for wrong in ("kl", "dp_clean", "prob_diff"):
        with pytest.raises(DeltapatchError, match="does not follow"):
            found.estimate(wrong, site="z")


def test_a_run_folder_has_both(found, model, prompts, tmp_path):
    options = {**OPTIONS, **SCREEN}
    kept = deltapatch.sweep(model, prompts, out=tmp_path / "run", **options)
    found.save(tmp_path / "saved")
    for again in (load_screened(tmp_path / "run"), load_screened(tmp_path / "saved"), kept):
        assert repr(again) == repr(found)
        assert np.array_equal(flat(again), flat(found), equal_nan=True)
        assert np.array_equal(of_all(again, "estimate"), of_all(found, "estimate"), equal_nan=True)
        assert str(again.missed()) == str(found.missed())
    resumed = deltapatch.sweep(model, prompts, out=tmp_path / "run", resume=True, **options)
    assert np.array_equal(flat(resumed), flat(found), equal_nan=True)
    with pytest.raises(DeltapatchError, match="different top"):
        deltapatch.sweep(model, prompts, out=tmp_path / "run", resume=True, **(options | {"top": 41}))
    with pytest.raises(DeltapatchError, match="is taken"):
        deltapatch.sweep(model, prompts, out=tmp_path / "run", **options)
    for part in (1, 2):
        deltapatch.sweep(model, prompts, out=tmp_path / "parts", shard=(part, 2), **options)
    assert merge(tmp_path / "parts")
    with pytest.raises(DeltapatchError, match="completes"):
        load_screened(tmp_path / "parts")
    deltapatch.sweep(model, prompts, out=tmp_path / "parts", resume=True, **options)
    assert np.array_equal(flat(load_screened(tmp_path / "parts")), flat(found), equal_nan=True)


def test_a_damaged_file_of_estimates_is_refused(found, tmp_path):
    found.save(tmp_path / "run")
    path = tmp_path / "run" / ESTIMATES
    whole = path.read_bytes()
    wrong = (whole.replace(b"mlp_post", b"mlp_past"), whole.replace(b"logit_diff", b"logit_daff"))
    for broken in (whole[:-8], b"", *wrong):
        path.write_bytes(broken)
        with pytest.raises(DeltapatchError, match="damaged"):
            load_screened(tmp_path / "run")


def test_all_is_exact_where_there_is_little(model, prompts):
    options = {"sites": "mlp_out", "positions": "last", "progress": False, "screen": "relp"}
    found = deltapatch.sweep(model, prompts, **options)
    assert found.is_verified().all()
    assert found.missed(0.0).at_most == found.missed(0.0).unseen == 0
    few = deltapatch.sweep(model, prompts, top=0, screen_sample=0, **options)
    assert few.is_verified().sum((1, 2)).tolist() == [1, 1, 1, 1]  # every pair is run
    assert few.accuracy() == found.accuracy()
    assert few.missed().at_most == few.missed().unseen > 0  # nothing is known of the others
    with pytest.raises(DeltapatchError, match="can be anything but zero"):
        deltapatch.sweep(model, prompts[:3], **(options | {"positions": 0}))


def test_a_model_in_float64_is_verified_in_float64(prompts):
    model = deltapatch.from_transformers(hf_model(VARIANT, torch.float64))
    found = deltapatch.sweep(model, prompts, **OPTIONS, **(SCREEN | {"screen": "ig-inputs"}))
    assert found.meta["precision"] == "fp64"


def test_what_is_refused(model, prompts, tmp_path):
    for options, said in (
        ({"top": 3}, "give screen as well"),
        ({"screen": "magic"}, "unknown screen"),
        ({"screen": "attribution", "screen_by": "kl"}, "unknown screen_by"),
        ({"screen": "attribution", "screen_steps": 3}, "are of ig-inputs"),
        ({"screen": "ig-inputs", "screen_steps": 0}, "1 or more"),
        ({"screen": "attribution", "metrics": "kl"}, "needs it"),
        ({"screen": "attribution", "top": -1}, "0 or more"),
        ({"screen": "attribution", "threshold": -1}, "threshold"),
    ):
        with pytest.raises(DeltapatchError, match=said):
            deltapatch.sweep(model, prompts, progress=False, **options)
    along = {"sites": "resid_post.along", "directions": {"resid_post": [1.0]}}
    for options in ({}, {"until": "recall:0.9", "threshold": 1.0}, along):  # before anything is loaded
        with pytest.raises(DeltapatchError, match="not spread over a cluster: leave out screen"):
            ray_sweep("nowhere", "nowhere", out=tmp_path / "run", screen="attribution", **options)
        assert not (tmp_path / "run").exists()
    found = deltapatch.sweep(model, prompts, sites=["z", "q"], progress=False, screen="attribution", top=5)
    with pytest.raises(DeltapatchError, match="name one: z, q"):
        found.values("ie")
    with pytest.raises(DeltapatchError, match="'k' was not screened"):
        found.values("ie", site="k")
