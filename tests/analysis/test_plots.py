"""Figures: which ones a run gets, the same bytes each time, and the edge cases that break axes."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text

from deltapatch.analysis.curves import last_position, layer_curves, neuron_ranking
from deltapatch.analysis.heatmaps import colour_scale, head_heatmaps, position_heatmaps
from deltapatch.analysis.plots import plot_run
from deltapatch.analysis.style import figure_style
from deltapatch.analysis.tables import averages, component
from deltapatch.errors import DeltapatchError
from deltapatch.interventions import sites
from deltapatch.interventions.sites import HEAD, SITES, WHOLE, Index, Site
from deltapatch.results.effects import SiteEffects
from deltapatch.results.metrics import METRICS, Metric

STEMS = [f"{kind}_recovered" for kind in ("heatmap", "layers", "heads_z", "neurons_mlp_post")]


@pytest.fixture(autouse=True)
def _no_figure_stays_open():
    yield
    left = plt.get_fignums()
    plt.close("all")
    assert not left


def only(effects, *sites):
    effects.sites = {name: effects.sites[name] for name in sites}
    return effects


def test_every_figure_as_png_and_pdf_with_the_same_bytes(make_effects, tmp_path):
    paths = plot_run(make_effects(), tmp_path / "a")
    assert [p.name for p in paths] == [f"{stem}.{kind}" for stem in STEMS for kind in ("png", "pdf")]
    for path, again in zip(paths, plot_run(make_effects(), tmp_path / "b"), strict=True):
        assert path.read_bytes() == again.read_bytes()
    assert b"/Type /Font /Subtype /Type0" in (tmp_path / "a" / "layers_recovered.pdf").read_bytes() or (
        b"/FontFile2"
        in (tmp_path / "a" / "layers_recovered.pdf").read_bytes()  # TrueType, so text stays text
    )


@pytest.mark.parametrize("metric", [m for m in METRICS if m != "recovered"])
def test_every_metric_has_a_figure(make_effects, tmp_path, metric):
    assert plot_run(only(make_effects(), "mlp_out"), tmp_path, metric, dpi=50)


@pytest.mark.parametrize(
    ("lengths", "n_layers", "labels"),
    [((8,), 1, True), ((8, 9, 10), 2, False), ((8, 12), 40, True), ((60, 60), 2, False)],
)
def test_few_and_many_layers_positions_and_pairs(make_effects, tmp_path, lengths, n_layers, labels):
    assert len(plot_run(make_effects(lengths, n_layers, labels), tmp_path, dpi=50)) == 8


def test_missing_cells_and_odd_tokens(make_effects, tmp_path):
    effects = only(make_effects(lengths=(8,)), "mlp_out")
    effects.pairs[0].clean_text[:4] = ["$x_1$", "\n", "数", "%"]
    for array in effects.sites["mlp_out"].measured.values():
        array[:, 0, :3] = np.nan
    assert len(plot_run(effects, tmp_path)) == 4


def test_a_run_without_the_last_position_has_no_curve(make_effects, tmp_path):
    effects = only(make_effects(), "mlp_out")
    s = effects.sites["mlp_out"]
    effects.sites["mlp_out"] = SiteEffects(
        s.site, s.layers, [0, 1], {k: v[:, :, :2] for k, v in s.measured.items()}
    )
    assert [p.stem for p in plot_run(effects, tmp_path)] == ["heatmap_recovered"] * 2


def test_the_last_position_of_prompts_of_several_lengths(make_effects):
    effects = make_effects(lengths=(8, 10))
    values = last_position(effects, "ie", "mlp_out")
    every = effects.values("ie", "mlp_out")
    np.testing.assert_array_equal(values, np.stack([every[0, :, 7], every[1, :, 9]]))
    assert last_position(effects, "ie", "z").shape == (2, 3, 4)


def test_heatmaps_put_layer_0_at_the_bottom_and_share_one_scale(make_effects):
    effects = make_effects()
    figure = position_heatmaps(effects, "ie", ["mlp_out", "attn_out"])
    images = [axes.images[0] for axes in figure.axes if axes.images]
    scales = {image.get_clim() for image in images}
    assert len(scales) == 1
    low, high = scales.pop()
    assert low == -high
    assert all(image.origin == "lower" for image in images)
    plt.close(figure)
    figure = head_heatmaps(effects, "ie", "z")
    assert figure.axes[0].get_xlabel() == "head"
    plt.close(figure)


def texts(figure):
    """Everything that is written in a figure."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text().strip()]


def panels(figure):
    """Title -> what is drawn, [layer, column]."""
    return {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}


@pytest.fixture
def heads_everywhere(make_effects):
    """Heads at all 16 positions of unlabelled prompts; at one, which is not the last, keys do the work."""
    effects = make_effects(lengths=(16,) * 4, labels=False)
    z = effects.sites["z"]
    measured = {
        name: np.repeat(array, 16, axis=2) * np.linspace(1e-3, 1e-2, 16)[:, None]
        for name, array in z.measured.items()
    }
    measured["logit_diff"][:, 1, 4, 2] = 7.0
    effects.sites = {"z": SiteEffects("z", z.layers, list(range(16)), measured)}
    return effects


def test_heads_are_drawn_where_their_effects_are(heads_everywhere):
    """Of many positions the last alone used to be drawn, and what moved the answer vanished."""
    effects = heads_everywhere
    figure = head_heatmaps(effects, "recovered", "z")
    mean = (
        effects.values("logit_diff").mean(0) / effects.terms("recovered")[1].mean()
    )  # [layer, position, head]
    drawn = panels(figure)
    assert len(drawn) == 8
    places = [int(title.split(", ")[1].split()[0]) for title in drawn]
    assert places == sorted(places)
    assert 4 in places
    size = np.abs(mean).max(axis=(0, 2))
    left = [i for i in range(16) if i not in places]
    assert size[left].max() <= size[places].min()
    for place, grid in zip(places, drawn.values(), strict=True):
        np.testing.assert_allclose(grid, mean[:, place])
    said = " ".join(" ".join(texts(figure)).split())
    assert "8 of 16 positions, those with the largest effects" in said
    assert f"at the other 8 they are at most {size[left].max():.2g}" in said
    plt.close(figure)


def test_positions_of_heads_without_any_effect_are_not_drawn(heads_everywhere):
    measured = heads_everywhere.sites["z"].measured["logit_diff"]
    measured[:, :, np.arange(16) != 4] = 0
    figure = head_heatmaps(heads_everywhere, "recovered", "z")
    assert [title.split(", ")[1].split()[0] for title in panels(figure)] == ["4"]
    assert "at the other 15 they are exactly 0" in " ".join(" ".join(texts(figure)).split())
    plt.close(figure)
    measured[:] = 0
    figure = head_heatmaps(heads_everywhere, "recovered", "z")
    assert [title.split(", ")[1].split()[0] for title in panels(figure)] == ["15"]
    plt.close(figure)


def test_what_a_mean_over_a_class_of_positions_hides_is_said(make_effects):
    """One of 43 tokens before the operands moves the answer as much as anything, and their mean hides it."""
    effects = only(make_effects(lengths=(48,) * 3), "mlp_out")
    swept = effects.sites["mlp_out"].measured["logit_diff"]
    swept[:, :, :43] *= 1e-3
    plain = position_heatmaps(effects, "logit_diff", ["mlp_out"])
    assert not any("A class is" in text for text in texts(plain))
    plt.close(plain)
    swept[:, 1, 20] = 3.5
    figure = position_heatmaps(effects, "logit_diff", ["mlp_out"])
    said = " ".join(" ".join(texts(figure)).split())
    assert "a single one in early of mlp_out reaches 3.5" in said
    plt.close(figure)


def test_few_positions_of_heads_leave_nothing_out(make_effects):
    figure = head_heatmaps(make_effects(), "recovered", "z")
    assert not any("positions" in text for text in texts(figure))
    plt.close(figure)


@pytest.mark.parametrize("metric", METRICS)
def test_labels_say_what_the_table_of_metrics_says_and_lie_within_their_figure(make_effects, metric):
    effects = make_effects(n_layers=4)
    for swept in effects.sites.values():  # an asinh scale, whose name makes the longest label
        swept.measured["dlogp_clean"] += 5
    hidden = make_effects(lengths=(60,) * 2)
    for draw in (
        lambda: head_heatmaps(effects, metric, "z"),
        lambda: position_heatmaps(effects, metric, ["mlp_out", "attn_out"]),
        lambda: position_heatmaps(hidden, metric, ["mlp_out"]),  # with a line below
        lambda: layer_curves(effects, metric, ["mlp_out"]),
        lambda: neuron_ranking(effects, metric, "mlp_post", top=3),
    ):
        with figure_style():
            figure = draw()
            figure.draw_without_rendering()
        assert METRICS[metric].label in " ".join(" ".join(texts(figure)).split())
        for axes in figure.axes:
            for label in (axes.xaxis.label, axes.yaxis.label):
                box, whole = label.get_window_extent(), figure.bbox
                if label.get_text() and axes.get_visible():
                    assert box.x0 >= whole.x0, label
                    assert box.y0 >= whole.y0, label
                    assert box.x1 <= whole.x1, label
                    assert box.y1 <= whole.y1, label
        plt.close(figure)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_what_is_drawn_is_the_ratio_of_means(make_effects, direction):
    effects = make_effects()
    effects.direction = direction
    change, gap = effects.terms("recovered", "attn_out")
    want = change.mean(0) / gap.mean()
    figure = layer_curves(effects, "recovered", ["attn_out"])
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), want[:, -1])
    plt.close(figure)
    figure = position_heatmaps(effects, "recovered", ["attn_out"])
    np.testing.assert_allclose(panels(figure)["attn_out"][:, -1], want[:, -1])
    plt.close(figure)
    change, gap = effects.terms("recovered", "mlp_post")
    want = np.sort(np.abs(change.mean(0) / gap.mean()).ravel())[::-1]
    figure = neuron_ranking(effects, "recovered", "mlp_post")
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), want)
    plt.close(figure)


def test_a_site_of_one_layer_is_drawn_at_its_layer(make_effects):
    """Beside sites of several layers it used to be drawn at its place in the legend."""
    effects = only(make_effects(n_layers=5), "mlp_out", "attn_out")
    s = effects.sites["attn_out"]
    one = {name: array[:, 3:4] for name, array in s.measured.items()}
    effects.sites["attn_out"] = SiteEffects("attn_out", s.layers[3:4], s.positions, one)
    figure = layer_curves(effects, "kl", ["mlp_out", "attn_out"])
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["attn_out"].get_xdata().tolist() == [3]
    np.testing.assert_allclose(
        lines["attn_out"].get_ydata(), effects.values("kl", "attn_out")[:, 0, -1].mean()
    )
    plt.close(figure)


def test_a_site_that_was_not_swept_at_the_last_token_is_named(make_effects):
    effects = only(make_effects(), "mlp_out", "attn_out")
    s = effects.sites["attn_out"]
    early = {name: array[:, :, :2] for name, array in s.measured.items()}
    effects.sites["attn_out"] = SiteEffects("attn_out", s.layers, [0, 1], early)
    figure = layer_curves(effects, "kl", ["mlp_out", "attn_out"])
    assert "not swept there: attn_out" in figure.axes[0].get_title(loc="left")
    plt.close(figure)
    figure = layer_curves(effects, "kl", ["mlp_out"])
    assert "not swept" not in figure.axes[0].get_title(loc="left")
    plt.close(figure)


def test_colours_centre_on_zero_unless_nothing_is_negative():
    grids = [np.array([[1.0, -3.0]]), np.array([[np.nan, 2.0]])]
    assert (colour_scale(grids, "ie")[1].vmin, colour_scale(grids, "ie")[1].vmax) == (-3, 3)
    assert (colour_scale(grids, "kl")[1].vmin, colour_scale(grids, "kl")[1].vmax) == (0, 3)
    assert colour_scale([np.zeros((1, 1))], "ie")[1].vmax == 1
    assert colour_scale([np.full((1, 1), np.nan)], "ie")[1].vmax == 1


def test_no_effect_at_all_can_be_drawn(make_effects, tmp_path):
    effects = make_effects()
    for swept in effects.sites.values():
        for array in swept.measured.values():
            array[:] = 0
    assert len(plot_run(effects, tmp_path)) == 8


def test_bad_metric_and_bad_folder(make_effects, tmp_path):
    with pytest.raises(DeltapatchError, match="unknown metric"):
        plot_run(make_effects(), tmp_path, "best")
    (tmp_path / "file").write_text("")
    with pytest.raises(DeltapatchError, match="cannot write figures to"):
        plot_run(make_effects(), tmp_path / "file" / "plots")


def test_a_new_site_and_a_new_metric_have_their_figures_and_tables(make_effects, tmp_path, monkeypatch):
    """Nothing is said of either but in its own record."""
    metric = Metric(("kl",), lambda m, ref, direction: 2 * m["kl"], "twice", "2 KL", "0 and more", "+", "+")
    monkeypatch.setitem(METRICS, "twice", metric)
    for kind in (WHOLE, HEAD, Index("bird", "B", lambda spec: 4)):
        monkeypatch.setitem(SITES, "new", Site("new", "z", kind))
        effects = make_effects()
        like = effects.sites["z" if kind.counts else "mlp_out"]
        effects.sites = {"new": SiteEffects("new", like.layers, like.positions, like.measured)}
        assert plot_run(effects, tmp_path / kind.letter, "twice")
        by = ["layer", "index"] if kind.counts else ["layer"]
        rows = averages(effects, "twice", by, ["new"])
        assert np.isfinite(rows.columns["twice"]).any()
        assert component("new", 3, 2) == (f"L3.{kind.letter}2" if kind.counts else "L3")
    sites._find.cache_clear()


def test_heads_of_several_sites_share_a_grid_without_blank_panels(make_effects, tmp_path):
    effects = make_effects()
    z = effects.sites["z"]
    silent = {name: np.zeros_like(array) for name, array in z.measured.items()}
    effects.sites = {
        name: SiteEffects(name, z.layers, z.positions, silent if name == "k" else z.measured)
        for name in ("z", "q", "v", "k")
    }
    figure = head_heatmaps(effects, "kl", ["q", "k", "v", "z"])
    assert [title.split(",")[0] for title in panels(figure)] == ["q", "v", "z"]
    said = " ".join(texts(figure))
    assert "Not drawn, below 2% of the largest everywhere: k at" in said
    assert "Mean over 5 pairs" in said
    assert all(axes.get_visible() for axes in figure.axes)
    plt.close(figure)
    assert plot_run(effects, tmp_path, "kl")[0].name == "heads_q-k-v-z_kl.png"


def test_figures_of_a_pair_and_of_some_sites(make_effects, tmp_path):
    effects = make_effects()
    paths = plot_run(effects, tmp_path, "kl", sites=["mlp_out"], pair=2, dpi=50)
    assert [p.name for p in paths[::2]] == ["heatmap_kl_pair2.png", "layers_kl_pair2.png"]
    small = plt.imread(paths[0]).shape
    plot_run(effects, tmp_path, "kl", sites=["mlp_out"], pair=2, dpi=100)
    assert plt.imread(paths[0]).shape[0] == pytest.approx(2 * small[0], abs=2)
    with pytest.raises(DeltapatchError, match="no pair 5"):
        plot_run(effects, tmp_path, pair=5)
    with pytest.raises(DeltapatchError, match="was not swept"):
        plot_run(effects, tmp_path, sites=["resid_pre"])


def test_every_figure_says_of_how_many_pairs_it_is(make_effects):
    for n, said in ((5, "5 pairs"), (1, "1 pair")):
        effects = make_effects(lengths=(8,) * n)
        for figure in (
            head_heatmaps(effects, "kl", "z"),
            position_heatmaps(effects, "kl", ["mlp_out"]),
            layer_curves(effects, "kl", ["mlp_out"]),
            neuron_ranking(effects, "kl", "mlp_post"),
        ):
            assert said in " ".join(texts(figure))
            plt.close(figure)
