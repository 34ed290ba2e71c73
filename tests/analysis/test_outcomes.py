"""Tables of given interventions, and the page of the features that ship with the package."""

import json
from pathlib import Path

import numpy as np
import pytest

import deltapatch as dp
from deltapatch.analysis.outcomes import default_groups, outcome_averages, outcome_cells
from deltapatch.errors import DeltapatchError
from deltapatch.tasks.arithmetic import arithmetic_pairs

ROOT = Path(__file__).resolve().parent.parent.parent
SAE = "builtin:gpt-neox-arithmetic-features"


@pytest.fixture(scope="module")
def model():
    return dp.load_model("builtin:gpt-neox-arithmetic", device="cpu")


@pytest.fixture(scope="module")
def outcome(model):
    pairs, _ = arithmetic_pairs(model.tokenizer, per_template=1, shots=0, seed=3, operators=["+"])
    return dp.sweep_features(model, pairs, dp.load_sae(SAE), positions=["op1", "last"], precision="fp32")


def test_means_are_over_all_pairs_and_within_each_first(outcome):
    table = outcome_averages(outcome, ["recovered", "ie"], ["feature"])
    columns = outcome.columns(["logit_diff", "ie"])
    gaps = outcome.reference.logit[:, :, 0] - outcome.reference.logit[:, :, 1]
    gap = (gaps[:, 0] - gaps[:, 1]).mean()
    for row in range(0, len(table), 7):
        mine = columns["feature"] == table.columns["feature"][row]
        by_pair = [
            columns["logit_diff"][mine & (columns["pair"] == i)].mean()
            for i in np.unique(columns["pair"][mine])
        ]
        assert table.columns["pairs"][row] == len(by_pair)
        np.testing.assert_allclose(
            table.columns["recovered"][row], sum(by_pair) / len(outcome.pairs) / gap, rtol=1e-9
        )
    assert default_groups(outcome) == ["layer", "position", "feature"]
    assert len(outcome_averages(outcome, ["ie"], default_groups(outcome))) >= len(table)


def test_cells_are_the_interventions(outcome):
    table = outcome_cells(outcome, ["ie"])
    assert len(table) == len(outcome)
    np.testing.assert_array_equal(table.columns["ie"], outcome.values("ie"))


def test_runs_without_labels_have_no_groups(model):
    pair = dp.PromptPair("52 + 11 =", "75 + 11 =", " 63", " 86")
    plain = dp.run(model, pair, dp.Intervention(0, [dp.Patch("mlp_out", 1, -1)]))
    assert default_groups(plain) == []
    with pytest.raises(DeltapatchError, match="have no 'feature'"):
        outcome_averages(plain, ["ie"], ["feature"])


def test_the_autoencoder_of_the_package_reads_its_model(model, outcome):
    said = json.loads(
        (ROOT / "models" / "builtin" / "gpt-neox-arithmetic-features" / "metrics.json").read_text()
    )
    assert said["variance_explained"] > 0.99
    assert outcome.columns()["layer"].tolist() == [1] * len(outcome)
    with pytest.raises(DeltapatchError, match="There is no built-in autoencoder 'other'"):
        dp.load_sae("builtin:other")


def test_the_page_says_what_the_result_file_says():
    found = json.loads((ROOT / "bench" / "results" / "features_builtin.json").read_text())
    text = " ".join((ROOT / "docs" / "features.md").read_text().split())
    for row in found["last"]:
        shares = " | ".join(f"{value:.0%}" for value in row["explained"].values())
        assert f"| {row['feature']} | {row['logit_diff']:.2f} | {row['active']:.0%} | {shares} |" in text
    assert f"On {found['pairs']} pairs of additions" in text
    assert f"{found['interventions']:,} features change" in text
    largest = max(abs(found["positions"][name]["top"][0]["logit_diff"]) for name in ("op1", "op2"))
    assert f"logit difference is {largest:.2f})" in text
    means = {row["strength"]: row["logit_diff"] for row in found["steered"]["means"]}
    assert f"adding feature {found['steered']['feature']}," in text
    assert f"by {means[2]:.1f} in the mean" in text
    assert f"times -2 by {means[-2]:.1f}" in text
    assert f"({means[4]:.1f} and {means[-4]:.1f})" in text
    said = json.loads(
        (ROOT / "models" / "builtin" / "gpt-neox-arithmetic-features" / "metrics.json").read_text()
    )
    assert f"explains {said['variance_explained']:.1%} of the variance" in text
