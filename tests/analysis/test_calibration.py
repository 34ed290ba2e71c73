"""The table of calibration: weighted, it says of a sample what is true of all."""

import numpy as np
import pytest

import deltapatch as dp
from deltapatch.analysis.calibration import calibration
from deltapatch.tasks.arithmetic import arithmetic_pairs


@pytest.fixture(scope="module")
def both():
    model = dp.load_model("builtin:gpt-neox-arithmetic", device="cpu")
    pairs, _ = arithmetic_pairs(model.tokenizer, per_template=1, shots=0, seed=7, operators=["+"])
    options = {"sites": ["z", "mlp_out"], "positions": "all", "progress": False, "noise_sample": 0}
    many = dp.sweep(model, pairs[:8], screen="attribution", top=20, screen_sample=300, **options)
    return many, dp.sweep(model, pairs[:8], screen="attribution", top=10**6, **options)


def ranks(x):
    """Of each, how many are smaller and half of those that are equal."""
    return (x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2


def test_of_all_they_are_the_plain_numbers(both):
    _, all_ = both
    table, by_layer = calibration(all_).columns, calibration(all_, by_layer=True).columns
    assert table["site"].tolist() == ["z", "mlp_out"]
    assert by_layer["site"].tolist() == ["z"] * 4 + ["mlp_out"] * 4
    assert by_layer["layer"].tolist() == [*range(4)] * 2
    for i, site in enumerate(table["site"]):
        there = all_.is_verified(site)
        x, y = all_.values("logit_diff", site=site)[there], all_.estimate(site=site)[there]
        assert table["verified"][i] == len(x)
        assert table["pearson"][i] == pytest.approx(np.corrcoef(x, y)[0, 1])
        assert table["spearman"][i] == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1])
        assert table["slope"][i] == pytest.approx((x @ y) / (x @ x))


def test_of_a_sample_they_are_close_to_those_of_all(both):
    some, all_ = (calibration(found).columns for found in both)
    assert (some["verified"] < all_["verified"]).all()
    for name in ("pearson", "spearman", "slope"):
        assert np.abs(some[name] - all_[name]).max() < 0.2
    ie = calibration(both[0], "ie").columns
    assert ie["spearman"] != pytest.approx(some["spearman"])
    with pytest.raises(dp.DeltapatchError, match="does not follow"):
        calibration(both[0], "kl")
