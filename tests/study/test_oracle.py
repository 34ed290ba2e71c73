"""The check that a study makes of its own effects, held to the oracle; and that it sees what is wrong."""

import numpy as np
import pytest
from engine_oracle import Pair, TrueModel
from engine_oracle import Patch as TruePatch

import deltapatch as dp
from deltapatch.results.reading import load_effects
from deltapatch.study.oracle import CHECKED, check_run, plain_effects


@pytest.fixture(scope="module")
def true_model(model_folder) -> TrueModel:
    from transformers import AutoModelForCausalLM

    return TrueModel(AutoModelForCausalLM.from_pretrained(model_folder))


def as_pair(pair) -> Pair:
    return Pair(pair.clean, pair.corrupted, pair.clean_answer, pair.corrupted_answer, pair.labels)


def test_plain_effects_are_the_oracles(study, model, true_model) -> None:
    pair = load_effects(study.folder / "factual" / "components").pairs[0]
    last = len(pair.clean) - 1
    rows = [
        [dp.Patch("mlp_out", 0, 3)],
        [dp.Patch("mlp_post", 1, -1, 5), dp.Patch("attn_out", 0, "last"), dp.Patch("z", 1, "subject", 1)],
        [dp.Patch("resid_pre.dim", 0, "subject", 2)],
    ]
    places = {3: 3, -1: last, "last": last, "subject": pair.labels["subject"]}
    plain = [[TruePatch(p.site, p.layer, places[p.position], p.index) for p in row] for row in rows]
    for direction in ("denoise", "noise"):
        got = plain_effects(model, pair, rows, direction)
        want = true_model.effects(as_pair(pair), plain, direction)
        for name in CHECKED:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("run", ["components", "heads", "coordinates", "neurons"])
def test_runs_of_a_study_are_the_oracles(study, true_model, run) -> None:
    effects = load_effects(study.folder / "factual" / run)
    pairs = [as_pair(pair) for pair in effects.pairs[:2]]
    for site in effects.sites:
        positions = effects.positions(site)
        want = true_model.sweep(pairs, site, positions, effects.layers_of(site).tolist())
        for metric in ("ie", "logit_diff"):
            got = effects.values(metric, site)[:2][:, :, : want[metric].shape[2]]
            size = np.linalg.norm(np.nan_to_num(want[metric]))
            assert size > 0
            assert np.linalg.norm(np.nan_to_num(got - want[metric])) <= 1e-5 * size


def test_checks_are_small_and_see_errors(study, model) -> None:
    for found in study.done.values():
        assert all(check["error"] < 1e-4 for check in found.checks.values())
    effects = load_effects(study.folder / "factual" / "components")
    good = check_run(model, effects, 16, seed=0)
    assert good == check_run(model, effects, 16, seed=0)
    assert good["effects"] >= 16
    for site in effects.sites.values():
        site.measured["dlogp_clean"] = site.measured["dlogp_clean"] * 1.01
    bad = check_run(model, effects, 16, seed=0)
    assert bad["dlogp_clean"] == pytest.approx(0.01, rel=0.01)
    assert bad["logit_diff"] == good["logit_diff"]


def test_effects_that_are_missing_are_seen(study, model) -> None:
    effects = load_effects(study.folder / "factual" / "components")
    for site in effects.sites.values():
        for name in CHECKED:
            site.measured[name][:, :, -1] = 0.0
    assert check_run(model, effects, 400, seed=0)["error"] > 0.1
