"""Averages against numpy, the top K, and the formats that leave the program."""

import csv
import io
import json
import sys

import numpy as np
import pytest

from deltapatch.analysis.render import render
from deltapatch.analysis.tables import Table, averages, cells, component
from deltapatch.errors import DeltapatchError


def test_by_layer_and_position(make_effects):
    effects = make_effects()
    table = averages(effects, "ie", ["layer", "position"], ["mlp_out"])
    values = effects.values("ie", "mlp_out")
    assert len(table) == 3 * 8
    np.testing.assert_allclose(table.columns["ie"], values.mean(0).ravel())
    np.testing.assert_allclose(table.columns["stderr"], values.std(0, ddof=1).ravel() / np.sqrt(5))
    assert table.columns["layer"].tolist()[:9] == [0] * 8 + [1]


def test_each_pair_weighs_the_same(make_effects):
    effects = make_effects(lengths=(8, 20))
    table = averages(effects, "kl", ["layer"], ["mlp_out"])
    values = effects.values("kl", "mlp_out")
    expected = (values[0, :, :8].mean(1) + values[1].mean(1)) / 2
    np.testing.assert_allclose(table.columns["kl"], expected)
    assert table.columns["pairs"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("by", [[], ["pair"], ["class"], ["layer", "class"], ["layer", "pair"]])
def test_groups_of_all_sites(make_effects, by):
    table = averages(make_effects(), "ie", by)
    assert list(table.columns)[: len(by) + 1] == ["site", *by]
    assert ("stderr" in table.columns) == ("pair" not in by)
    assert not np.isnan(table.columns["ie"]).any()


def test_columns_come_in_the_order_asked(make_effects):
    table = averages(make_effects(), "ie", ["index", "layer"], ["mlp_post"])
    assert list(table.columns) == ["site", "index", "layer", "ie", "median", "stderr", "pairs"]
    assert set(table.columns["index"]) == set(range(16))
    assert len(table) == 3 * 16


@pytest.mark.parametrize(
    ("by", "site", "sentence"),
    [
        (["token"], "z", "cannot group by 'token': choose from pair, layer, position, class, index"),
        (["index"], "mlp_out", "site mlp_out has no index"),
        (["position", "class"], "z", "not by both"),
    ],
)
def test_groups_that_do_not_exist(make_effects, by, site, sentence):
    with pytest.raises(DeltapatchError, match=sentence):
        averages(make_effects(), "ie", by, [site])


def test_top_is_by_magnitude(make_effects):
    table = averages(make_effects(), "ie", ["layer", "index"], ["mlp_post"])
    best = table.top(5)
    expected = np.sort(np.abs(table.columns["ie"]))[::-1][:5]
    np.testing.assert_array_equal(np.abs(best.columns["ie"]), expected)
    assert len(table.top(1000)) == len(table)
    with pytest.raises(DeltapatchError, match="at least one row"):
        table.top(0)


def test_names_of_components():
    assert component("mlp_post", 3, 17) == "L3.N17"
    assert component("z", 0, 2) == "L0.H2"
    assert component("k", 0, 2) == "L0.H2"
    assert component("mlp_out.dim", 5, 1) == "L5.D1"
    assert component("mlp_out", 5, 0) == "L5"


def test_csv_has_the_columns_of_the_contract(make_effects):
    effects = make_effects()
    rows = list(csv.reader(io.StringIO(render(cells(effects, "ie", ["mlp_out", "z"]), "csv").decode())))
    assert rows[0] == ["pair", "site", "layer", "position", "index", "ie"]
    assert rows[1][:5] == ["0", "mlp_out", "0", "0", ""]
    assert float(rows[1][5]) == effects.values("ie", "mlp_out")[0, 0, 0]
    assert rows[-1][:5] == ["4", "z", "2", "-1", "3"]
    assert len(rows) == 1 + 5 * 3 * 8 + 5 * 3 * 4


def test_json_is_one_object_without_nan(make_effects):
    effects = make_effects()
    effects.reference.logit[0] = 1.0  # no difference between clean and corrupted: recovered is undefined
    with pytest.warns(UserWarning, match="recovered is undefined"):
        table = cells(effects, "recovered", ["mlp_out"])
    found = json.loads(render(table, "json"))
    assert found["metric"] == "recovered"
    assert found["rows"][0] == {
        "pair": 0,
        "site": "mlp_out",
        "layer": 0,
        "position": 0,
        "index": None,
        "recovered": None,
    }


def test_json_has_no_infinity(make_effects):
    """A ratio of probabilities can be larger than any number, and strict readers know no Infinity."""
    effects = make_effects()
    effects.sites["z"].measured["kl"][0, 0, 0, 0] = np.inf

    def refuse(name):
        raise AssertionError(name)

    (first, *_) = json.loads(render(cells(effects, "kl", ["z"]), "json"), parse_constant=refuse)["rows"]
    assert first["kl"] == "inf"


def test_parquet_round_trip(make_effects):
    import pandas

    effects = make_effects()
    frame = pandas.read_parquet(io.BytesIO(render(cells(effects, "ie", ["mlp_out", "z"]), "parquet")))
    expected = effects.to_pandas("ie", ["mlp_out", "z"])
    np.testing.assert_array_equal(frame["ie"], expected["ie"])
    assert frame["index"].isna().sum() == 5 * 3 * 8


def test_parquet_takes_labels_and_numbers_in_one_column(make_effects):
    import pandas

    effects = make_effects()
    z = effects.sites["z"]
    effects.sites["z"] = type(z)("z", z.layers, ["op2"], z.measured)
    frame = pandas.read_parquet(io.BytesIO(render(cells(effects, "ie", ["mlp_out", "z"]), "parquet")))
    assert set(frame["position"]) == {"op2", *map(str, range(8))}


def test_parquet_without_pyarrow_is_one_sentence(make_effects, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DeltapatchError, match=r"pip install 'deltapatch\[parquet\]'"):
        render(cells(make_effects(), "ie"), "parquet")


def test_text_shows_brackets_and_leaves_out_empty_columns(make_effects):
    table = averages(make_effects(lengths=(8,)), "ie", ["layer", "position"], ["mlp_out"])
    table.columns["site"][:] = "[bold]site"
    text = render(table.top(3), "table").decode()
    assert "[bold]site" in text
    assert "stderr" not in text  # one pair has none
    assert len(text.splitlines()) == 5


def test_unknown_format(make_effects):
    with pytest.raises(DeltapatchError, match="choose from table, csv, json, parquet"):
        render(cells(make_effects(), "ie"), "xml")


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_mean_of_recovered_is_a_ratio_of_means(make_effects, direction):
    effects = make_effects(lengths=(8, 8, 10))
    effects.direction = direction
    effects.reference.logit[1] *= 0.01  # a small denominator makes most of a mean of ratios
    table = averages(effects, "recovered", ["layer", "position"], ["mlp_out"], mean_of_ratios=True).columns
    change, ratios = effects.values("logit_diff", "mlp_out"), effects.values("recovered", "mlp_out")
    logit = effects.reference.logit
    gap = (logit[:, 0, 0] - logit[:, 0, 1] - logit[:, 1, 0] + logit[:, 1, 1]) * (
        1 if direction == "denoise" else -1
    )
    assert list(table) == ["site", "layer", "position", "recovered", "mean_of_ratios", "stderr", "pairs"]
    for layer, position, mean, of_ratios in zip(
        *(table[name] for name in ("layer", "position", "recovered", "mean_of_ratios")), strict=True
    ):
        some = slice(None) if position < 8 else slice(2, 3)  # two pairs have 8 tokens
        want = change[some, layer, position].mean() / gap[some].mean()
        assert mean == pytest.approx(want)
        assert of_ratios == pytest.approx(ratios[some, layer, position].mean())
    assert not np.allclose(table["recovered"], table["mean_of_ratios"], rtol=0.5)
    with pytest.raises(DeltapatchError, match="a mean of ratios is of recovered only"):
        averages(effects, "ie", ["layer"], mean_of_ratios=True)


def test_within_a_pair_recovered_is_its_own_ratio(make_effects):
    effects = make_effects()
    table = averages(effects, "recovered", ["pair", "layer", "position"], ["mlp_out"])
    np.testing.assert_allclose(table.columns["recovered"], effects.values("recovered", "mlp_out").ravel())


def test_the_median_of_ie_stands_beside_its_mean(make_effects):
    effects = make_effects()
    table = averages(effects, ["recovered", "ie"], ["layer"], ["mlp_out"]).columns
    assert list(table) == [
        *("site", "layer", "recovered", "recovered_stderr", "ie", "ie_median", "ie_stderr", "pairs")
    ]
    by_pair = effects.values("ie", "mlp_out").mean(axis=2)
    np.testing.assert_allclose(table["ie"], by_pair.mean(axis=0))
    np.testing.assert_allclose(table["ie_median"], np.median(by_pair, axis=0))


def test_a_cell_that_is_undefined_stays_in_its_table(make_effects):
    effects = make_effects(lengths=(8,))
    effects.reference.logit[:] = 1.0
    with pytest.warns(UserWarning, match="recovered is undefined"):
        table = averages(effects, ["recovered", "kl"], ["layer"], ["mlp_out"])
    assert np.isnan(table.columns["recovered"]).all()
    assert len(table) == 3


@pytest.mark.parametrize(
    ("by", "site", "columns", "rows"),
    [
        (["head"], "z", ["layer", "head"], 3 * 4),
        (["neuron"], "mlp_post", ["layer", "neuron"], 3 * 16),
        (["position", "head"], "z", ["position", "layer", "head"], 3 * 4),
        (["head", "layer"], "z", ["head", "layer"], 3 * 4),
        (["class", "head"], "z", ["class", "layer", "head"], 3 * 4),
        (["pair", "neuron"], "mlp_post", ["pair", "layer", "neuron"], 5 * 3 * 16),
    ],
)
def test_by_head_and_by_neuron(make_effects, by, site, columns, rows):
    effects = make_effects()
    table = averages(effects, "kl", by, [site])
    assert list(table.columns)[1 : 1 + len(columns)] == columns
    assert len(table) == rows
    name = "head" if site == "z" else "neuron"
    want = effects.values("kl", site)[:, :, 0]
    want = want if "pair" in by else want.mean(axis=0)[None]
    for i in range(0, rows, 7):
        c = {key: column[i] for key, column in table.columns.items()}
        assert c["kl"] == pytest.approx(want[c.get("pair", 0), c["layer"], c[name]])


@pytest.mark.parametrize(
    ("by", "site", "sentence"),
    [
        (["neuron"], "z", "site z has no neurons: its index counts heads: group by head"),
        (["head"], "mlp_post", "site mlp_post has no heads: its index counts neurons: group by neuron"),
        (["head"], "mlp_out", "site mlp_out has no heads: group by layer and position"),
        (["head", "index"], "z", "group by head or by index, not by both"),
    ],
)
def test_heads_that_a_site_does_not_have(make_effects, by, site, sentence):
    with pytest.raises(DeltapatchError, match=sentence):
        averages(make_effects(), "ie", by, [site])


def test_numbers_are_not_cut_off_where_no_folding_helps():
    columns = {f"column_{i}": np.array([1234.5, -0.001234 * i]) for i in range(12)}
    table = Table(columns, "column_11")
    words = render(table, "table", 40).decode().split()
    assert {*columns} | {f"{v:.4g}" for column in columns.values() for v in column.tolist()} <= {*words}


def test_wide_tables_fold_at_80_columns(make_effects):
    effects = make_effects()
    for width in (80, 60, 200):
        table = averages(effects, ["recovered", "ie", "logit_diff", "kl"], ["layer", "position"], ["mlp_out"])
        lines = render(table.top(3), "table", width).decode().splitlines()
        assert max(map(len, lines)) <= width
        words = " ".join(lines).split()
        assert {name for name in table.columns if name != "stderr"} <= set(words)
        for name in ("recovered", "ie_median", "kl_stderr"):
            assert all(f"{value:.4g}" in words for value in table.top(3).columns[name])
        assert words.count("mlp_out") % 3 == 0
    assert words.count("mlp_out") == 3  # wide enough for all: one part
    heads = [line.split() for line in render(table.top(1), "table").decode().splitlines() if "site" in line]
    assert [head[3] for head in heads] == ["recovered", "ie", "logit_diff", "kl"][: len(heads)]


def test_long_labels_fold_within_their_column(make_effects):
    effects = make_effects()
    z = effects.sites["z"]
    label = "the_name_of_a_position_that_somebody_gave_" * 3
    effects.sites["z"] = type(z)("z", z.layers, [label], z.measured)
    text = render(averages(effects, "kl", ["layer", "position", "index"], ["z"]).top(1), "table").decode()
    assert max(map(len, text.splitlines())) <= 80
    assert "".join(word for word in text.split() if "_" in word) == label
