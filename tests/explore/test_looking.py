"""What results, pairs and models show of themselves in Python: figures, rankings, tables."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import pyplot as plt

import deltapatch as dp
from deltapatch.analysis.faithfulness import ranking
from deltapatch.engine import progress
from deltapatch.engine.progress import progress_bar
from deltapatch.errors import DeltapatchError
from deltapatch.markup import in_notebook

HOSTILE = "<script>alert(1)</script>"


def panels(figure):
    """Title -> what is drawn, [layer, column]."""
    return {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}


def test_plot_shows_all_whole_vectors_and_leaves_no_figure_open(make_effects):
    figure = make_effects().plot()
    assert len(panels(figure)) == 2
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert not plt.get_fignums()


def test_plot_of_heads_alone_shows_them(make_effects):
    effects = make_effects()
    effects.sites = {"z": effects.sites["z"]}
    (grid,) = panels(effects.plot("kl")).values()
    np.testing.assert_allclose(grid, effects.values("kl").mean(0)[:, 0])


def test_a_heatmap_is_of_the_mean_or_of_a_pair(make_effects):
    effects = make_effects()
    (mean,) = panels(effects.heatmap("mlp_out", "kl")).values()
    np.testing.assert_allclose(mean[:, -1], effects.values("kl", "mlp_out").mean(0)[:, -1])
    (one,) = panels(effects.heatmap("mlp_out", "recovered", pair=3)).values()
    np.testing.assert_allclose(one, effects.values("recovered", "mlp_out")[3])
    assert effects.heatmap("mlp_post", "kl", pair=1).axes
    for wrong in (5, -1, 1.5):
        with pytest.raises(DeltapatchError, match="pair"):
            effects.heatmap("mlp_out", pair=wrong)
    with pytest.raises(DeltapatchError, match="unknown metric"):
        effects.plot("best")


def test_top_is_the_strongest_of_sites_that_share_a_ranking(make_effects):
    effects = make_effects()
    with pytest.raises(DeltapatchError, match=r"name one site, such as top\(3, site='mlp_post'\)"):
        effects.top(3)
    table = effects.top(3, "kl", "mlp_post")
    mean = effects.values("kl", "mlp_post").mean(0).ravel()
    np.testing.assert_allclose(table.columns["kl"], np.sort(mean)[::-1][:3])
    assert repr(table).split()[:5] == ["site", "layer", "position", "index", "kl"]
    assert table.to_pandas().shape == (3, len(table.columns))


def test_notebooks_show_tables_whose_texts_are_text(make_effects, tmp_path):
    effects = make_effects()
    effects.meta["model"] = HOSTILE
    effects.pairs[0].clean_text[0] = HOSTILE
    effects.pairs[0].labels[HOSTILE] = 0
    pair = dp.PromptPair(HOSTILE, HOSTILE, HOSTILE, "b", {HOSTILE: 0})
    for shown in (effects, effects.pairs[0], pair, effects.top(2, "kl", "z")):
        html = shown._repr_html_()
        assert "<table>" in html
        assert "<script" not in html
    assert "mlp_post" in effects._repr_html_()


def test_the_explorer_is_shown_in_a_frame_or_saved(make_effects, tmp_path):
    pytest.importorskip("plotly")
    found = make_effects().explore("kl")
    html = found._repr_html_()
    assert html.startswith("<iframe srcdoc=")
    assert "<script" not in html
    assert found.save(tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert "notebook" in repr(found)


@pytest.fixture(scope="module")
def run_of_neurons():
    model = dp.load_model("builtin:gpt-neox-arithmetic")
    pairs = [
        dp.PromptPair(
            f"Q: What is 12 plus {a}? A:", f"Q: What is 12 plus {b}? A:", f" {12 + a}", f" {12 + b}"
        )
        for a, b in ((30, 41), (20, 77), (55, 3))
    ]
    effects = dp.sweep(model, pairs, sites="mlp_post", positions="last", progress=False)
    return model, pairs, effects


def test_a_faithfulness_curve_is_that_of_the_joint_patches(run_of_neurons):
    model, pairs, effects = run_of_neurons
    curve = dp.faithfulness_curve(model, pairs, effects, sizes=[1, 8], random_sets=1, progress=False)
    assert curve.columns["size"].tolist() == [1, 8]
    top = list(ranking(effects, "recovered", "mlp_post")[:8])
    joint = [dp.Intervention(i, top) for i in range(len(pairs))]
    change, gap = dp.run(model, pairs, joint, progress=False).terms("recovered")
    np.testing.assert_allclose(curve.columns["recovered"][1], change.mean() / gap.mean(), rtol=1e-5)
    assert curve.columns["random"][1] < curve.columns["recovered"][1]


def test_models_and_outcomes_show_tables(run_of_neurons):
    model, pairs, _ = run_of_neurons
    assert "gpt_neox" in model._repr_html_()
    one = dp.Intervention(0, [dp.Patch("mlp_out", 1, -1)])
    html = dp.run(model, pairs, [one] * 12, progress=False)._repr_html_()
    assert html.count("<tr>") == 11
    assert "and 2 more" in html


def test_pairs_are_loaded_by_the_face(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"clean": "a", "corrupted": "b", "clean_answer": "c", "corrupted_answer": "d"}\n')
    assert dp.load_pairs(path) == [dp.PromptPair("a", "b", "c", "d")]


def test_a_notebook_has_a_bar_that_goes(monkeypatch):
    shown = []
    place = SimpleNamespace(update=lambda html: shown.append(html))
    fake = SimpleNamespace(
        HTML=lambda text: text, display=lambda html, display_id: shown.append(html) or place
    )
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    with progress_bar("patching <x>", 10, True) as advance:
        advance(5)
    assert shown[0] == "patching &lt;x&gt;"
    assert 'value="5" max="10"' in shown[1]
    assert shown[-1] == ""
    shown.clear()
    with progress_bar("patching", 10, False) as advance:
        advance(5)
    assert not shown


def test_only_a_kernel_is_a_notebook(monkeypatch):
    getipython = pytest.importorskip("IPython.core.getipython")
    pytest.importorskip("ipykernel")
    assert not in_notebook()  # both are imported by who merely runs notebooks
    for shell, kernel in ((SimpleNamespace(), False), (SimpleNamespace(kernel=object()), True)):
        monkeypatch.setattr(getipython, "get_ipython", lambda shell=shell: shell)
        assert in_notebook() is kernel
