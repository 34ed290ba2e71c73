"""Effects by name, their long form, and the run folder: round trips, and what is said of broken ones."""

import json
import sys

import numpy as np
import pytest

import deltapatch
from deltapatch.errors import DeltapatchError
from deltapatch.results.reading import load_effects


def test_values_follow_from_what_was_measured(make_effects):
    effects = make_effects()
    m = effects.sites["mlp_out"].measured
    ie = 0.5 * (np.expm1(m["dlogp_clean"].astype(float)) + np.expm1(-m["dlogp_corrupted"].astype(float)))
    np.testing.assert_allclose(effects.values("ie", "mlp_out"), ie)
    assert effects.values("ie", site="mlp_post").shape == (5, 3, 1, 16)
    assert effects.values("kl", site="z").dtype == np.float64


def test_hook_names_ask_for_their_layer(make_effects):
    effects = make_effects()
    one = effects.values("kl", "blocks.2.mlp.hook_post")
    np.testing.assert_array_equal(one, effects.values("kl", "mlp_post")[:, 2:3])
    np.testing.assert_array_equal(effects.values("kl", "hook_attn_out"), effects.values("kl", "attn_out"))
    assert effects.layers_of("blocks.2.mlp.hook_post").tolist() == [2]
    assert set(effects.columns("kl", "blocks.2.hook_mlp_out")["layer"]) == {2}


def test_the_site_may_be_left_out_when_there_is_one(make_effects):
    effects = make_effects()
    with pytest.raises(DeltapatchError, match="name one of them: mlp_out, attn_out, mlp_post, z"):
        effects.values("ie")
    effects.sites = {"z": effects.sites["z"]}
    assert effects.values("ie").shape == (5, 3, 1, 4)
    assert effects.positions() == [-1]


@pytest.mark.parametrize(
    ("metric", "site", "sentence"),
    [
        ("iee", "mlp_out", "unknown metric 'iee': choose from ie, "),
        ("ie", "q", "site 'q' was not swept: this run has mlp_out, attn_out, mlp_post, z"),
        ("ie", "mlp", "unknown site 'mlp': this run has mlp_out"),
        ("ie", "blocks.7.hook_mlp_out", "layer 7 of mlp_out was not swept: there are 0, 1, 2"),
    ],
)
def test_unknown_names_list_what_there_is(make_effects, metric, site, sentence):
    with pytest.raises(DeltapatchError, match=sentence):
        make_effects().values(metric, site)


def test_a_metric_that_was_not_measured(make_effects):
    effects = make_effects()
    for swept in effects.sites.values():
        del swept.measured["kl"]
    assert "kl" not in effects.metrics
    assert "ie" in effects.metrics
    with pytest.raises(DeltapatchError, match="did not measure"):
        effects.values("kl", "z")


def test_layers_of_all_sites_or_of_one(make_effects):
    effects = make_effects()
    assert effects.layers.tolist() == [0, 1, 2]
    z = effects.sites["z"]
    effects.sites["z"] = type(z)("z", z.layers[:1], z.positions, {k: v[:, :1] for k, v in z.measured.items()})
    assert effects.layers_of("z").tolist() == [0]
    with pytest.raises(DeltapatchError, match="layers_of"):
        _ = effects.layers


def test_the_long_form_has_the_cells_that_exist(make_effects):
    effects = make_effects(lengths=(8, 9, 10))
    frame = effects.to_pandas(["ie", "kl"], sites=["mlp_out", "mlp_post"])
    assert list(frame) == ["pair", "site", "layer", "position", "index", "ie", "kl"]
    assert len(frame) == 3 * (8 + 9 + 10) + 3 * 3 * 16
    assert frame["ie"].notna().all()
    row = frame[(frame.site == "mlp_post") & (frame.pair == 1) & (frame.layer == 2) & (frame["index"] == 5)]
    assert row["ie"].item() == effects.values("ie", "mlp_post")[1, 2, 0, 5]
    assert frame[frame.site == "mlp_out"]["index"].isna().all()


def test_pandas_missing_is_one_sentence(make_effects, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DeltapatchError, match=r"pip install 'deltapatch\[pandas\]'"):
        make_effects().to_pandas()


def test_repr_says_sites_shapes_and_precision(make_effects):
    text = repr(make_effects())
    assert "fp32" in text
    assert "mlp_post       [pair 5, layer 3, position 1, index 16]" in text


def test_accuracy_counts_both_runs(make_effects):
    effects = make_effects()
    assert effects.accuracy() == 1
    effects.reference.says[0, 1, 1] = False
    assert effects.accuracy() == pytest.approx(0.9)


def test_a_run_folder_gives_the_effects_back(make_effects, tmp_path):
    effects = make_effects(lengths=(8, 9))
    effects.pairs[0].meta["note"] = "é\ud83d"  # half of an emoji, as some tokenizers give
    effects.meta |= {"seconds": np.float64(1.5), "fingerprint": "00ff"}
    effects.save(tmp_path / "deep" / "run")
    found = deltapatch.load_effects(tmp_path / "deep" / "run")
    for site, swept in effects.sites.items():
        assert found.positions(site) == swept.positions
        for name, array in swept.measured.items():
            np.testing.assert_array_equal(found.sites[site].measured[name], array)
            assert found.sites[site].measured[name].dtype == array.dtype
    assert found.pairs == effects.pairs
    assert found.direction == effects.direction
    np.testing.assert_array_equal(found.reference.logit, effects.reference.logit)
    assert found.meta["seconds"] == 1.5
    assert set(found.meta["versions"]) == {"deltapatch", "torch", "triton", "transformers", "numpy", "python"}
    found.meta["date"] = "then"  # a copy keeps when and where the run was made
    found.save(tmp_path / "copy")
    assert load_effects(tmp_path / "copy").meta["date"] == "then"


def test_the_run_folder_says_its_axes(make_effects, tmp_path):
    from safetensors import safe_open

    make_effects().save(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "effects.safetensors",
        "pairs.jsonl",
        "run.json",
    ]
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["axes"]["mlp_post/kl"] == "pair,layer,position,index"
    with safe_open(tmp_path / "run" / "effects.safetensors", framework="numpy") as file:
        assert file.metadata()["mlp_out/dlogp_clean"] == "pair,layer,position"


def test_a_run_folder_of_an_older_format_says_what_to_do(make_effects, tmp_path):
    make_effects().save(tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text()) | {"format_version": 1}
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    with pytest.raises(
        DeltapatchError, match=r"format 1, older than this deltapatch reads \(2\): run the sweep again"
    ):
        load_effects(tmp_path / "run")


def test_xarray_has_the_axes_by_name(make_effects):
    effects = make_effects()
    found = effects.to_xarray(["ie", "kl"], site="z")
    assert found["ie"].dims == ("pair", "layer", "position", "head")
    np.testing.assert_array_equal(found["kl"].values, effects.values("kl", site="z"))
    assert found["layer"].values.tolist() == effects.layers_of("z").tolist()
    assert list(effects.to_xarray(site="mlp_out").data_vars) == ["recovered"]
    layer = int(effects.layers_of("z")[0])
    one = effects.to_xarray("ie", site=f"blocks.{layer}.attn.hook_z")
    assert one.sizes["layer"] == 1
    assert float(found["ie"].sel(layer=layer).isel(pair=0, position=0, head=0)) == pytest.approx(
        effects.values("ie", site="z")[0, 0, 0, 0], nan_ok=True
    )
    with pytest.raises(DeltapatchError, match="several sites were swept"):
        effects.to_xarray()


def test_without_xarray_there_is_a_sentence(make_effects, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(
        DeltapatchError, match=r"to_xarray needs xarray, .*: pip install 'deltapatch\[xarray\]'"
    ):
        make_effects().to_xarray(site="z")
