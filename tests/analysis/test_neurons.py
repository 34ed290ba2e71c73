"""Screens of all neurons against the plain statistics of the same effects; parts of a run."""

import numpy as np
import pytest

from deltapatch.analysis import magnitudes as magnitudes_module
from deltapatch.analysis import neurons, significance
from deltapatch.analysis.magnitudes import magnitudes
from deltapatch.analysis.neurons import group_means, screen, strongest_table
from deltapatch.analysis.render import as_markdown
from deltapatch.analysis.select import select
from deltapatch.analysis.significance import sign_flip_test
from deltapatch.analysis.tables import Table
from deltapatch.errors import DeltapatchError


@pytest.mark.parametrize("metric", ["logit_diff", "recovered"])
@pytest.mark.parametrize("pooled_from", [1, 1000])
def test_a_screen_is_what_magnitudes_say(make_effects, monkeypatch, pooled_from, metric) -> None:
    for module in (neurons, magnitudes_module):
        monkeypatch.setattr(module, "POOLED_FROM", pooled_from)
    effects = make_effects(lengths=(8,) * 9)
    tested = screen(effects, metric, "mlp_post", draws=100, seed=1)
    table = magnitudes(effects, metric, ["layer", "index"], ["mlp_post"], draws=100, seed=1)
    for name, found in (
        (metric, tested.mean),
        ("stderr", tested.stderr),
        ("p", tested.p),
        ("q", tested.q),
    ):
        np.testing.assert_allclose(found.ravel(), table.columns[name])
    assert tested.found(0.5) == (table.columns["q"] <= 0.5).sum()
    top = strongest_table(effects, tested, 5, (metric, "ie"), draws=100, seed=1)
    order = np.argsort(-np.abs(table.columns[metric]), kind="stable")[:5]
    for name, column in ((metric, metric), (f"{metric}_low", "low"), (f"{metric}_high", "high"),
                         ("layer", "layer"), ("index", "index"), ("p", "p"), ("q", "q")):  # fmt: skip
        np.testing.assert_allclose(top.columns[name], table.columns[column][order])
    assert top.columns["name"][0] == f"L{top.columns['layer'][0]}.N{top.columns['index'][0]}"
    cells = tested.cells().columns
    np.testing.assert_array_equal(cells["index"], table.columns["index"])


def test_group_means(make_effects) -> None:
    effects = make_effects(lengths=(8,) * 6)
    members = {"a": np.array([0, 1, 2]), "b": np.array([5, 1])}
    values = effects.values("ie", "mlp_post")[:, :, 0]
    for name, mean in group_means(effects, "ie", "mlp_post", members).items():
        np.testing.assert_allclose(mean, values[members[name]].mean(axis=0))
    change, gap = effects.terms("recovered", "mlp_post")
    for name, mean in group_means(effects, "recovered", "mlp_post", members).items():
        some = members[name]
        np.testing.assert_allclose(mean, change[some, :, 0].mean(axis=0) / gap[some].mean())


def test_what_a_screen_is_not_about(make_effects) -> None:
    with pytest.raises(DeltapatchError, match="mlp_out is not a site with an index"):
        screen(make_effects(), "ie", "mlp_out")
    with pytest.raises(DeltapatchError, match="one pair only"):
        screen(make_effects(lengths=(8,)), "ie", "mlp_post")


def test_parts_of_a_run(make_effects) -> None:
    effects = make_effects(lengths=(8, 10, 9, 8))
    for pairs in (np.array([1, 2]), np.array([3, 0])):
        part = select(effects, pairs=pairs, layers=np.array([1]), sites=["mlp_out"])
        assert list(part.sites) == ["mlp_out"]
        assert part.pairs == [effects.pairs[i] for i in pairs]
        assert part.layers.tolist() == [1]
        for metric in ("ie", "recovered"):
            whole = effects.values(metric, "mlp_out")
            np.testing.assert_array_equal(part.values(metric), whole[pairs][:, [1]])
    together = select(effects, pairs=np.array([1, 2])).sites["z"].measured["kl"]
    assert np.shares_memory(together, effects.sites["z"].measured["kl"])


def test_a_pooled_null_of_some_cells_is_that_of_all(monkeypatch) -> None:
    values = np.random.default_rng(0).normal(size=(20, 2000))
    whole = sign_flip_test(values, draws=200, pooled=True)
    monkeypatch.setattr(significance, "POOL", 300)
    some = sign_flip_test(values, draws=200, pooled=True)
    np.testing.assert_allclose(some, whole, atol=0.01)
    assert not np.array_equal(some, whole)


def test_tables_for_markdown() -> None:
    columns = {"name": np.array(["a|b", "c"], dtype=object), "value": np.array([1 / 3, np.nan])}
    assert as_markdown(Table(columns, "value")) == (
        "| name | value |\n| --- | --: |\n| a\\|b | 0.333 |\n| c |  |\n"
    )
