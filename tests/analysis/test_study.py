"""Magnitudes, overlaps, predictions and faithfulness plans against brute force; their figures are drawn."""

import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt

import deltapatch as dp
from deltapatch.analysis import study_plots
from deltapatch.analysis.faithfulness import needed, plan, ranking, sizes_up_to
from deltapatch.analysis.heatmaps import group_heatmaps
from deltapatch.analysis.importance import relative_importance
from deltapatch.analysis.magnitudes import discoveries, magnitudes
from deltapatch.analysis.overlap import chance_p, overlaps, top_k
from deltapatch.analysis.predictions import prediction_changes
from deltapatch.analysis.render import render
from deltapatch.analysis.style import figure_style, save
from deltapatch.analysis.tables import Table
from deltapatch.errors import DeltapatchError
from deltapatch.results.metrics import METRICS


def test_magnitudes(make_effects) -> None:
    effects = make_effects(lengths=(8,) * 9)
    swept = effects.sites["mlp_post"].measured["logit_diff"]
    swept[:, 1, 0, 3] += 9
    table = magnitudes(effects, "logit_diff", ["layer", "index"], ["mlp_post"])
    c = table.columns
    assert list(c) == ["site", "layer", "index", "logit_diff", "stderr", "low", "high", "p", "q", "pairs"]
    np.testing.assert_allclose(c["logit_diff"], swept.mean(0).ravel(), rtol=1e-5)
    assert (c["low"] <= c["logit_diff"]).all()
    assert (c["logit_diff"] <= c["high"]).all()
    assert (c["q"] >= c["p"]).all()
    best = discoveries(table, 0.2).columns
    assert (best["layer"][0], best["index"][0]) == (1, 3)
    assert 1 <= len(best["q"]) < 10
    for form in ("table", "csv", "json"):
        assert render(table.top(3), form)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": ["pair"]}, "do not group by pair"),
        ({"level": 1.0}, "between 0 and 1"),
        ({"draws": 0}, "at least one draw"),
        ({"lengths": (8,)}, "this run has one pair only"),
    ],
)
def test_magnitudes_that_make_no_sense(make_effects, options, message) -> None:
    effects = make_effects(lengths=options.pop("lengths", (8, 8)))
    with pytest.raises(DeltapatchError, match=message):
        magnitudes(effects, "ie", **({"by": ["layer"]} | options))
    with pytest.raises(DeltapatchError, match="rate lies between"):
        discoveries(Table({"q": np.ones(1)}, "ie"), 0)


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n), st.integers(1, n))))
def test_chance_is_hypergeometric(sizes: tuple[int, int, int]) -> None:
    cells, k, m = sizes
    for shared in range(-1, 1 + min(k, m)):
        ways = sum(comb(m, i) * comb(cells - m, k - i) for i in range(max(shared, 0), min(k, m) + 1))
        assert chance_p(shared, k, m, cells) == pytest.approx(ways / comb(cells, k))
    assert chance_p(min(k, m) + 1, k, m, cells) == 0


def test_chance_is_what_random_sets_share() -> None:
    rng = np.random.default_rng(0)
    first = set(range(5))
    shared = np.array([len(first & set(rng.permutation(20)[:8].tolist())) for _ in range(4000)])
    for least in range(1, 5):
        assert (shared >= least).mean() == pytest.approx(chance_p(least, 8, 5, 20), abs=0.03)
    assert 0 < chance_p(300, 400, 400, 4096) < 1e-150


def test_overlaps() -> None:
    a = np.array([[9.0, 8, 1], [0, 7, np.nan]])
    means = {"a": a, "b": a[:, ::-1], "c": -a}
    table = overlaps(means, 2)
    assert table.columns["overlap"].tolist() == [0.5, 0.0, 0.5]
    assert table.columns["chance"].tolist() == [2 / 6] * 3
    assert top_k(a, 3).tolist() == [0, 1, 4]
    assert top_k(-a, 2, magnitude=True).tolist() == [0, 1]
    for bad, k, message in (
        ({"a": a}, 1, "two or more"),
        ({"a": a, "b": a[0]}, 1, "shapes differ"),
        (means, 6, "ask for 1 to 5"),
    ):
        with pytest.raises(DeltapatchError, match=message):
            overlaps(bad, k)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_prediction_changes(make_effects, direction) -> None:
    """Against what is said before and after, told as words."""
    rng = np.random.default_rng(0)
    effects = make_effects(lengths=(8,) * 40)
    effects.direction = direction
    site = effects.sites["mlp_out"]
    answers = np.array(["clean", "corrupted", "else"])
    src, own = ("clean", "corrupted") if direction == "denoise" else ("corrupted", "clean")
    before, after = rng.choice(answers, 40), rng.choice(answers, site.shape)
    run = 1 if direction == "denoise" else 0
    for i, answer in enumerate(("clean", "corrupted")):
        effects.reference.says[:, run, i] = before == answer
        effects.reference.says[:, 1 - run, i] = rng.random(40) < 0.5  # of no interest
        site.measured[f"says_{answer}"] = (after == answer).astype(np.float32)
    found = prediction_changes(effects, "mlp_out")
    was = np.broadcast_to(before[:, None, None], after.shape)
    np.testing.assert_array_equal(found.desired, (after == src) & (was != src))
    np.testing.assert_array_equal(found.undesired, (was == own) & (after != own))
    assert 0 < found.desired.mean() < 1
    assert 0 < found.undesired.mean() < 1


def test_prediction_changes_of_positions_that_a_pair_lacks(make_effects) -> None:
    effects = make_effects(lengths=(8, 10))
    found = prediction_changes(effects, "mlp_out")
    assert np.isnan(found.desired[0, :, 8:]).all()
    assert not np.isnan(found.desired[1]).any()
    del effects.sites["mlp_out"].measured["says_clean"]
    with pytest.raises(DeltapatchError, match="did not measure what metric 'says_clean' needs"):
        prediction_changes(effects, "mlp_out")


def test_ranking(make_effects) -> None:
    effects = make_effects()
    mean = effects.values("ie", "mlp_post").mean(0)[:, 0]
    ranked = ranking(effects, "ie", "mlp_post")
    assert len(ranked) == mean.size
    assert [mean[p.layer, p.index] for p in ranked] == sorted(mean.ravel(), reverse=True)
    by_size = ranking(effects, "ie", "mlp_post", magnitude=True)
    assert abs(mean[by_size[0].layer, by_size[0].index]) == np.abs(mean).max()
    assert {p.index for p in ranking(effects, "ie", "mlp_out", 2)} == {None}
    with pytest.raises(DeltapatchError, match="position 'op9' of z was not swept"):
        ranking(effects, "ie", "z", "op9")


@given(n=st.integers(1, 40), pairs=st.integers(1, 3), sets=st.integers(0, 2))
def test_plans_join_the_top_and_random_sets(n: int, pairs: int, sets: int) -> None:
    ranked = [dp.Patch("mlp_post", 0, -1, i) for i in range(n)]
    found = plan(ranked, pairs, random_sets=sets, seed=4)
    assert found.sizes[0] == 1
    assert found.sizes[-1] == n
    assert len(found.interventions) == pairs * len(found.sizes) * (1 + sets)
    for i, (pair, size, group) in enumerate(zip(found.pair, found.size, found.group, strict=True)):
        own = found.interventions[i]
        assert own.pair == pair
        assert len(own.patches) == len(set(own.patches)) == size
        if group == -1:
            assert list(own.patches) == ranked[:size]
    values = found.size * 10.0 + found.pair
    np.testing.assert_array_equal(
        found.by_pair(values), [[10 * s + p for s in found.sizes] for p in range(pairs)]
    )
    table = found.curve(values, "recovered")
    np.testing.assert_allclose(table.columns["recovered"], np.array(found.sizes) * 10 + (pairs - 1) / 2)
    assert np.isnan(table.columns["random"]).all() == (sets == 0)


def test_sizes() -> None:
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(20) == [1, 2, 4, 8, 16, 20]
    ranked = [dp.Patch("z", 0, -1, i) for i in range(4)]
    for sizes in ([0], [5], []):
        with pytest.raises(DeltapatchError, match="sizes go from 1 to 4"):
            plan(ranked, 1, sizes)
    with pytest.raises(DeltapatchError, match="ranked patches and at least one pair"):
        plan([], 1)


def test_how_many_are_needed() -> None:
    def table(values):
        return Table({"size": np.array([1, 2, 4]), "recovered": np.array(values)}, "recovered")

    assert needed(table([0.1, 0.85, 1.0])) == 2
    assert needed(table([-0.1, -0.2, -1.0])) == 4
    assert needed(table([0.0, 0.0, 0.0])) is None


def test_a_curve_of_a_real_run() -> None:
    model = dp.load_model("builtin:gpt-neox-arithmetic", device="cpu")
    pairs = [
        dp.PromptPair("12 + 30 =", "12 + 41 =", " 42", " 53"),
        dp.PromptPair("7 + 5 =", "8 + 9 =", " 12", " 17"),
    ]
    effects = dp.sweep(model, pairs, sites="mlp_out", positions="last", progress=False)
    ranked = ranking(effects, "recovered", "mlp_out")
    found = plan(ranked, len(pairs), random_sets=1)
    for direction in ("denoise", "noise"):
        outcome = dp.run(model, pairs, found.interventions, direction=direction, progress=False)
        values, over = outcome.terms("recovered")
        table = found.curve(values, "recovered", over=over)
        # All together are the same set, whatever the order.
        assert table.columns["recovered"][-1] == pytest.approx(table.columns["random"][-1])
        assert table.columns["recovered"][-1] > 0.5  # towards the source run, in both directions
        if direction == "denoise":
            change, gap = effects.terms("recovered")
            first = change[:, ranked[0].layer, 0].mean() / gap.mean()
            assert table.columns["recovered"][0] == pytest.approx(first, rel=1e-4)


def test_figures(make_effects, tmp_path) -> None:
    effects = make_effects(lengths=(8,) * 6)
    one = relative_importance(effects)
    table = magnitudes(effects, "ie", ["layer", "index"], ["mlp_post"])
    mean = effects.values("ie", "mlp_post").mean(0)
    pairs = {f"task {i}": np.roll(mean, i) for i in range(4)}
    ranked = ranking(effects, "ie", "mlp_post")
    joint = plan(ranked, 3)
    curve = joint.curve(np.log2(joint.size) * (1.0 - (joint.group >= 0) * 0.5) + joint.pair, "recovered")
    changes = prediction_changes(effects, "mlp_out")
    draw = {
        "importance": lambda: study_plots.importance_bars({"numerals $x_1$": one, "words": one}),
        "overlap": lambda: study_plots.overlap_matrix(overlaps(pairs, 10)),
        "curves": lambda: study_plots.faithfulness_curves({"denoise": curve, "noise": curve}),
        "predictions": lambda: study_plots.prediction_curves(
            effects.layers_of("mlp_out"),
            {"mlp_out": (changes.desired[:, :, -1], changes.undesired[:, :, -1])},
        ),
        "groups": lambda: study_plots.group_curves(
            effects.layers_of("mlp_out"),
            {"+": effects.values("ie", "mlp_out")[:, :, -1], "-": effects.values("kl", "mlp_out")[:, :, 2]},
            "ie",
            "last token",
        ),
        "group heatmaps": lambda: group_heatmaps({"+": effects, "-": effects}, "ie", "mlp_out"),
        "discoveries": lambda: study_plots.discovery_plot(table, 0.5),
    }
    written = {}
    for again, (name, figure) in itertools.product(("a", "b"), draw.items()):
        (tmp_path / again).mkdir(exist_ok=True)
        with figure_style():
            paths = save(figure(), tmp_path / again / name)
        for path in paths:
            assert written.setdefault(path.name, path.read_bytes()) == path.read_bytes()
    assert not plt.get_fignums()
    found = study_plots.importance_table({"numerals": one}).columns
    assert found["importance"][0] == one.value
    assert found["null"][0] == one.null


def test_what_the_figures_of_a_study_draw(make_effects) -> None:
    """Their axes' data are the numbers that they are given, and their labels those of the metrics."""
    effects = make_effects(lengths=(8,) * 6)
    joint = plan(ranking(effects, "recovered", "mlp_post"), 3)
    curve = joint.curve(np.log2(joint.size) + joint.pair, "recovered")
    (panel, *_) = study_plots.faithfulness_curves({"denoise": curve}).axes
    assert " ".join(panel.get_ylabel().split()) == METRICS["recovered"].label
    for line, name in zip(panel.lines, ("recovered", "random"), strict=False):
        np.testing.assert_array_equal(line.get_xdata(), curve.columns["size"])
        np.testing.assert_array_equal(line.get_ydata(), curve.columns[name])

    one = relative_importance(effects)
    (panel,) = study_plots.importance_bars({"numerals": one}).axes
    assert [bar.get_width() for bar in panel.patches] == [one.value]

    table = magnitudes(effects, "recovered", ["layer", "index"], ["mlp_post"], draws=50)
    (panel,) = study_plots.discovery_plot(table, 0.5).axes
    assert METRICS["recovered"].label in " ".join(panel.get_xlabel().split())
    drawn = np.concatenate([points.get_offsets()[:, 0] for points in panel.collections])
    np.testing.assert_allclose(np.sort(drawn), np.sort(table.columns["recovered"]))

    values = {"+": effects.values("ie", "mlp_out")[:, :, -1], "-": effects.values("ie", "mlp_out")[:, :, 2]}
    (panel,) = study_plots.group_curves(effects.layers_of("mlp_out"), values, "ie", "last token").axes
    for line in panel.lines[:2]:
        np.testing.assert_allclose(line.get_ydata(), values[line.get_label()].mean(axis=0))

    shared = overlaps({name: v.mean(axis=0) for name, v in values.items()}, 2)
    (panel,) = study_plots.overlap_matrix(shared).axes
    assert [text.get_text() for text in panel.texts] == [f"{shared.columns['overlap'][0]:.0%}"]

    changes = prediction_changes(effects, "mlp_out")
    both = changes.desired[:, :, -1], changes.undesired[:, :, -1]
    (panel,) = study_plots.prediction_curves(effects.layers_of("mlp_out"), {"mlp_out": both}).axes
    for line, want in zip(panel.lines, both, strict=True):
        np.testing.assert_allclose(line.get_ydata(), want.mean(axis=0))
    plt.close("all")
    with pytest.raises(DeltapatchError, match="recovered is a ratio of means"):
        study_plots.group_curves(effects.layers_of("mlp_out"), values, "recovered", "last token")
