"""Screened features: estimates of all that change, and exact effects of some."""

import numpy as np
import pytest
import torch
from engine_saes import made, written
from engine_tiny import model_of, pairs, prompt_pairs, true_model, with_long_answers

import deltapatch as dp
from deltapatch import AnyOf, DeltapatchError
from deltapatch.results.estimated import ESTIMATES
from deltapatch.results.merge import merge

VARIANT = "llama-grouped"
SCREEN = {"screen": "attribution", "top": 15, "screen_sample": 20, "seed": 3}


def sae_at(folder, engine, site, layer=1, seed=0, rows=1.0):
    """A random one; its decoder's rows are multiplied with `rows`."""
    spec = engine.spec
    weights = made("standard", spec.n_heads * spec.d_head if site == "z" else spec.d_model, seed=seed)
    weights["W_dec"] *= rows
    more = {"reshape_activations": "hook_z"} if site == "z" else {}
    hook = "attn.hook_z" if site == "z" else f"hook_{site}"
    return dp.load_sae(written(folder / f"{site}{layer}", weights, hook=f"blocks.{layer}.{hook}", **more))


@pytest.fixture(scope="module")
def engine():
    return model_of(VARIANT, "fp64")


@pytest.fixture(scope="module")
def drawn():
    return prompt_pairs(pairs(true_model(VARIANT), (6, 4, 5)))


@pytest.fixture(scope="module")
def saes(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saes")
    return [sae_at(folder, engine, "resid_post"), sae_at(folder, engine, "z", layer=0, seed=1)]


@pytest.fixture(scope="module")
def whole(engine, drawn, saes):
    return dp.sweep_features(engine, drawn, saes, precision="fp64", progress=False)


@pytest.fixture(scope="module")
def found(engine, drawn, saes):
    return dp.sweep_features(engine, drawn, saes, precision="fp64", progress=False, **SCREEN)


# ---------------------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize(
    ("variant", "by", "source"),
    [
        ("llama-grouped", "logit_diff", "counterpart"),
        ("gptj", "dlogp_clean", "zero"),
        ("gpt2", "dlogp_corrupted", "counterpart"),
        ("gemma2", "logit_diff", "zero"),
        ("olmo2", "logit_diff", "counterpart"),
    ],
)
def test_of_small_rows_they_are_the_exact_effects(variant, by, source, tmp_path):
    """At every place that autoencoders read, with answers of several tokens or any of several."""
    engine, true = model_of(variant, "fp64"), true_model(variant)
    first, second, third = pairs(true, (5, 4, 5))
    given = prompt_pairs([first, with_long_answers(true, second, (2, 3), 1, seed=2), third])
    given[2] = dp.PromptPair(given[2].clean, given[2].corrupted, AnyOf([7, 9]), given[2].corrupted_answer)
    sites = ["resid_pre", "resid_post", "attn_out", "mlp_out", "z"]
    sites += [] if engine.spec.parallel else ["resid_mid"]
    at = [(site, 0) for site in ("resid_pre", "mlp_out")] + [(site, 1) for site in sites]
    saes = [sae_at(tmp_path, engine, *place, seed=seed, rows=1e-6) for seed, place in enumerate(at)]
    options = {"precision": "fp64", "progress": False, "noise_sample": 0, "source": source}
    found = dp.sweep_features(
        engine, given, saes, screen="attribution", screen_by=by, top=10**6, screen_sample=0, **options
    )
    exact, got = found.values(by), found.estimate(by)
    assert set(found.labels["sae"]) == set(range(len(at)))
    for number, place in enumerate(at):
        mine = found.labels["sae"] == number
        assert exact[mine].any()
        assert np.abs(got - exact)[mine].max() <= 1e-4 * np.abs(exact[mine]).max(), place


@pytest.mark.parametrize(("variant", "site"), [("llama-grouped", "resid_post"), ("gptj", "z")])
def test_estimates_are_slopes_of_the_oracle(variant, site, tmp_path):
    """A step of a thousandth of each feature's change times its row, up and down, added by hand."""
    engine, true = model_of(variant, "fp64"), true_model(variant)
    drawn = pairs(true, (5, 4), seed=4)
    sae = sae_at(tmp_path, engine, site)
    found = dp.sweep_features(
        engine, prompt_pairs(drawn), sae, screen="attribution", precision="fp64", progress=False
    )
    labels, rows = found.labels, sae.rows(torch.arange(sae.d_sae)).numpy()
    for number, pair in enumerate(drawn):
        mine = np.flatnonzero(labels["pair"] == number)
        add = (labels["after"] - labels["before"])[mine, None] * rows[labels["feature"][mine]]
        ends = []
        for step in (1e-3, -1e-3):

            def visit(name, layer, value, add=step * add, at=labels["position"][mine]):
                if (name, layer) == (site, 1):
                    value = value.copy()
                    value[np.arange(len(at)), at] += add.reshape(len(at), *value.shape[2:])
                return value

            logits = true.forward(pair.corrupted, len(mine), visit)[:, -1]
            ends.append(logits[:, pair.clean_answer] - logits[:, pair.corrupted_answer])
        want = (ends[0] - ends[1]) / 2e-3
        assert np.linalg.norm(found.estimate()[mine] - want) <= 1e-4 * np.linalg.norm(want)


@pytest.mark.parametrize("screen", ["attribution", "relp", "ig-inputs"])
def test_features_that_are_coordinates_have_their_estimates(engine, drawn, screen, tmp_path):
    """Features x and -x of each coordinate: both together move it as its swap does."""
    width = engine.spec.d_model
    one = torch.eye(width)
    weights = {"W_enc": torch.cat([one, -one], 1), "W_dec": torch.cat([one, -one])}
    weights |= {"b_dec": torch.zeros(width), "b_enc": torch.zeros(2 * width)}
    sae = dp.load_sae(written(tmp_path / "sae", weights, hook="blocks.0.hook_resid_post"))
    options = {"screen": screen, "precision": "fp64", "progress": False, "top": 1, "screen_sample": 1}
    found = dp.sweep_features(engine, drawn, sae, **options)
    want = dp.sweep(engine, drawn, sites="resid_post.dim", layers=[0], **options).estimate()
    summed = np.zeros_like(want)
    at = found.labels["pair"], 0, found.labels["position"], found.labels["feature"] % width
    np.add.at(summed, at, found.estimate())
    np.testing.assert_allclose(summed, np.nan_to_num(want), rtol=1e-9, atol=1e-12)


def test_chunks_and_pieces_give_the_same(engine, drawn, saes, found, monkeypatch):
    monkeypatch.setattr("deltapatch.engine.screening.added._NUMBERS", 100)
    monkeypatch.setattr(
        "deltapatch.engine.screening.estimates.Estimates.chunks", lambda it: ([n] for n in it.question.order)
    )
    other = dp.sweep_features(engine, drawn, saes, precision="fp64", progress=False, **SCREEN)
    np.testing.assert_allclose(other.estimate(), found.estimate(), rtol=1e-9)


def test_prompts_of_unequal_length(engine, tmp_path):
    """The gradient is of the base run, and what features are in both runs is known: that is enough."""
    unequal = dp.PromptPair([3, 9, 4, 8, 5], [3, 7, 8, 5], 1, 2, align=[[0, 0], [1, 1], [3, 2], [4, 3]])
    given = [unequal, *prompt_pairs(pairs(true_model(VARIANT), (5,)))]
    sae = sae_at(tmp_path, engine, "resid_post", layer=0, rows=1e-6)
    options = {"precision": "fp64", "progress": False, "top": 10**6, "screen_sample": 0}
    found = dp.sweep_features(engine, given, sae, screen="attribution", **options)
    assert (found.labels["pair"] == 0).any()
    exact = found.values("logit_diff")
    assert np.abs(found.estimate() - exact).max() <= 1e-4 * np.abs(exact).max()
    with pytest.raises(DeltapatchError, match="line up position by position"):
        dp.sweep_features(engine, given, sae, screen="ig-inputs", **options)


# ----------------------------------------------------------------------------------------------- results


def test_what_was_verified_is_exact_and_the_rest_is_nan(found, whole):
    assert isinstance(found, dp.ScreenedOutcome)
    told = whole.columns()
    for name, labels in found.labels.items():  # the same features, in the same order
        np.testing.assert_array_equal(labels, told[name])
    here = found.is_verified()
    assert len(found) == len(whole)
    assert 0 < here.sum() < len(found)
    for metric in ("logit_diff", "recovered", "kl"):
        want, got = whole.values(metric), found.values(metric)
        np.testing.assert_allclose(got[here], want[here], rtol=1e-9, atol=1e-12)
        assert np.isnan(got[~here]).all()
    size = np.abs(found.estimate())
    top = here & ~found.is_drawn()
    assert np.sort(size[top])[-15:].min() >= size[~top].max()
    columns = found.columns(["kl", "recovered"])
    assert {len(column) for column in columns.values()} == {here.sum()}
    np.testing.assert_array_equal(columns["kl"], found.values("kl")[here])
    np.testing.assert_array_equal(columns["feature"], found.labels["feature"][here])
    np.testing.assert_array_equal(columns["estimate"], found.estimate()[here])
    assert len(found.to_pandas()) == here.sum()
    assert f"exact: the top {top.sum()}, and {found.is_drawn().sum()} drawn" in repr(found)
    # A metric that follows has the estimates times what its pair says.
    factor = (found.values("recovered") / found.values("logit_diff"))[here]
    np.testing.assert_allclose((found.estimate("recovered") / found.estimate())[here], factor, rtol=1e-9)


def test_the_bound_holds_over_seeds(engine, drawn, saes, whole):
    truth, holds = np.abs(whole.values("logit_diff")), []
    for seed in range(6):
        asked = SCREEN | {"seed": seed, "noise_sample": 0}
        found = dp.sweep_features(engine, drawn, saes, precision="fp64", progress=False, **asked)
        missed = found.missed(confidence=0.9)
        assert missed.unseen == (~found.is_verified()).sum()
        holds.append((truth[~found.is_verified()] > missed.threshold).sum() <= missed.at_most)
    assert sum(holds) >= 4


def test_until_enough_was_found(engine, drawn, saes, whole, tmp_path):
    asked = {"screen": "relp", "top": 5, "threshold": 0.05, "until": dp.Recall(0.8), "precision": "fp64"}
    asked |= {"progress": False, "out": tmp_path / "run"}
    found = dp.sweep_features(engine, drawn, saes, **asked)
    assert found.reached
    truth = np.abs(whole.values("logit_diff")) > 0.05
    assert truth[found.is_verified()].sum() >= 0.8 * truth.sum()
    again = dp.sweep_features(engine, drawn, saes, resume=True, **asked)
    assert again.verdict == found.verdict


def test_a_run_folder_has_both(found, engine, drawn, saes, tmp_path):
    options = {**SCREEN, "precision": "fp64", "progress": False}
    kept = dp.sweep_features(engine, drawn, saes, out=tmp_path / "run", **options)
    found.save(tmp_path / "saved")
    resumed = dp.sweep_features(engine, drawn, saes, out=tmp_path / "run", resume=True, **options)
    read = [dp.load_screened(tmp_path / name) for name in ("run", "saved")]
    for part in (1, 2):
        dp.sweep_features(engine, drawn, saes, out=tmp_path / "parts", shard=(part, 2), **options)
    merge(tmp_path / "parts")
    with pytest.raises(DeltapatchError, match="completes"):
        dp.load_screened(tmp_path / "parts")
    dp.sweep_features(engine, drawn, saes, out=tmp_path / "parts", resume=True, **options)
    for again in (kept, resumed, *read, dp.load_screened(tmp_path / "parts")):
        assert repr(again) == repr(found)
        np.testing.assert_array_equal(again.values("kl"), found.values("kl"))
        np.testing.assert_array_equal(again.estimate("ie"), found.estimate("ie"))
        for name, labels in found.labels.items():
            np.testing.assert_array_equal(again.labels[name], labels)
        assert str(again.missed()) == str(found.missed())
    with pytest.raises(DeltapatchError, match="different top"):
        dp.sweep_features(engine, drawn, saes, out=tmp_path / "run", resume=True, **(options | {"top": 16}))
    plain = dp.load_outcome(tmp_path / "run")  # what was verified, with no more of the decoder than it needs
    features = plain.columns()
    each = {*zip(features["sae"].tolist(), features["feature"].tolist(), strict=True)}
    heads = engine.spec.n_heads
    assert len(plain.interventions.vectors.arrays) == sum(heads if sae else 1 for sae, _ in each)


def test_a_damaged_file_of_estimates_is_refused(found, tmp_path):
    found.save(tmp_path / "run")
    path = tmp_path / "run" / ESTIMATES
    whole = path.read_bytes()
    pair = found.labels["pair"]
    other = whole.replace(pair.tobytes(), (pair + 1).tobytes())
    for broken in (whole[:-8], b"", other, whole.replace(b"label/pair", b"label/pear")):
        assert broken != whole
        path.write_bytes(broken)
        with pytest.raises(DeltapatchError, match="damaged"):
            dp.load_screened(tmp_path / "run")


def test_features_behind_the_read_out(engine, saes):
    """They can do nothing, are estimated as that, and never verified."""
    given = [dp.PromptPair([1, 2, 3, 4, 5], [1, 6, 3, 4, 5], 8, 9)]
    options = {"precision": "fp64", "progress": False, "readout": 2, "top": 3, "screen_sample": 0}
    found = dp.sweep_features(engine, given, saes, screen="attribution", **options)
    behind = found.labels["position"] > 2
    assert behind.any()
    assert not found.estimate()[behind].any()
    assert not found.is_verified()[behind].any()
    with pytest.raises(DeltapatchError, match="can be anything but zero"):
        dp.sweep_features(engine, given, saes, screen="attribution", positions=[4], **options)


def test_what_is_refused(engine, drawn, saes):
    for options, said in (
        ({"top": 3}, "give screen as well"),
        ({"screen": "ig-activations"}, "no lines for features"),
        ({"screen": "ig-inputs", "source": "zero"}, "is no prompt"),
        ({"screen": "attribution", "metrics": "kl"}, "needs it"),
        ({"screen": "relp", "source": "mean"}, "features have the sources"),
    ):
        with pytest.raises(DeltapatchError, match=said):
            dp.sweep_features(engine, drawn, saes, progress=False, **options)
    with pytest.raises(TypeError, match="screen"):
        dp.sweep_directions(engine, drawn, {"resid_post": [1.0]}, screen="attribution")
