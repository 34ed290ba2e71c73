"""The order of parts in the figure of interactions, and the page on them."""

import json
from pathlib import Path

import numpy as np
import pytest

from deltapatch.analysis.interaction_plots import cluster_order

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("seed", range(3))
def test_parts_that_interact_alike_come_together(seed):
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat([0, 1, 2], 4))
    between = np.array([[-3.0, 0.0, 1.0], [0.0, 2.0, 0.5], [1.0, 0.5, -1.0]])
    noise = 0.05 * rng.normal(size=(12, 12))
    matrix = between[group][:, group] + noise + noise.T
    np.fill_diagonal(matrix, np.nan)
    order = cluster_order(matrix)
    assert sorted(order.tolist()) == list(range(12))
    assert (np.diff(group[order]) != 0).sum() == 2  # each group lies together


def test_few_parts_and_parts_that_do_nothing():
    assert sorted(cluster_order(np.full((2, 2), np.nan)).tolist()) == [0, 1]
    assert sorted(cluster_order(np.zeros((5, 5))).tolist()) == list(range(5))


def test_the_page_says_what_the_result_file_says():
    found = json.loads((ROOT / "bench" / "results" / "interactions_builtin.json").read_text())
    text = " ".join((ROOT / "docs" / "interactions.md").read_text().split())

    def digits(value):
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(power)}"

    for row in found["precisions"]:
        told = " | ".join(digits(row[name]) for name in ("effects", "interactions", "told"))
        assert f"| {row['precision']} | {told} |" in text
    parts, neurons, sets = found["components"], found["neurons"], found["smallest_set"]
    for row in parts["strongest"][:4]:
        alone = f"{row['first_alone']:.2f}, {row['second_alone']:.2f}"
        ends = f"{row['recovered']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        assert f"| {alone} | {row['both']:.2f} | {ends} |" in text
    counts = "{pairs_of_parts} pairs of parts {negative} interact negatively and {positive} positively"
    assert counts.format(**parts) in text
    assert f"{parts['rows']:,} joint patches in {parts['seconds']:.0f} s" in text
    assert (
        f"sum to {parts['sum_alone']:.1f} times the whole; all at once recover {parts['together']:.2f}"
        in text
    )
    assert f"interactions of two sum to {parts['sum_of_interactions']:.1f}" in text
    assert f"positive ones is {parts['gates'][0][2]:.3f}" in text
    assert f"all pairs of them {neurons['pairs_of_parts']:,}, {neurons['negative']} are negative" in text
    assert f"and {neurons['positive']} positive" in text
    assert f"`mlp_out` 2 {found['shapley'][0]['recovered']:.2f}" in text
    search, top = sets["search"], sets["top"]
    assert f"needs {search['size']} to recover {search['recovered']:.2f}" in text
    assert f"needs {top['size']}; the top {search['size']} recover {sets['top_of_that_size']:.2f}" in text
    for row in sets["on_other_pairs"].values():
        assert f"{row['recovered']:.2f} (" in text
        assert f"{row['low']:.2f} to {row['high']:.2f})" in text
