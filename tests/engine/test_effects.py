"""Effects by name, their long form, and the run folder: round trips, and what is said of broken ones."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import deltapatch
from deltapatch.errors import DeltapatchError
from deltapatch.results import folder as runfolder
from deltapatch.results.effects import load_effects


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


def test_a_run_folder_of_the_first_format(make_effects, tmp_path):
    """Answers were single tokens, and what the runs say was not written down."""
    from safetensors.numpy import load_file, save_file

    effects = make_effects()
    effects.reference.prediction[0, 1] = 0
    effects.save(tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "effects.safetensors")
    save_file({n: a for n, a in tensors.items() if "says" not in n}, tmp_path / "run" / "effects.safetensors")
    about = json.loads((tmp_path / "run" / "run.json").read_text()) | {"format_version": 1}
    del about["sha256"]
    for site in about["sites"].values():
        site["measured"] = [name for name in site["measured"] if not name.startswith("says")]
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    lines = [json.loads(line) for line in (tmp_path / "run" / "pairs.jsonl").read_text().splitlines()]
    for line in lines:
        line["clean_answer"], line["corrupted_answer"] = line["clean_answer"][0], line["corrupted_answer"][0]
    (tmp_path / "run" / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = load_effects(tmp_path / "run")
    assert found.pairs == effects.pairs
    assert found.accuracy() == pytest.approx(0.9)
    np.testing.assert_array_equal(found.values("ie", "z"), effects.values("ie", "z"))
    with pytest.raises(DeltapatchError, match="did not measure"):
        found.values("says_clean", "z")
    found.save(tmp_path / "new")
    assert load_effects(tmp_path / "new").accuracy() == pytest.approx(0.9)


def test_labels_as_positions_survive(make_effects, tmp_path):
    effects = make_effects()
    z = effects.sites["z"]
    effects.sites["z"] = type(z)("z", z.layers, ["op2"], z.measured)
    effects.save(tmp_path / "run")
    found = load_effects(tmp_path / "run")
    assert found.positions("z") == ["op2"]
    assert set(found.columns("ie", "z")["position"]) == {"op2"}
    assert set(found.columns("ie", ["z", "mlp_out"])["position"]) == {"op2", *map(str, range(8))}


def test_a_taken_path_is_refused_and_an_empty_folder_is_not(make_effects, tmp_path):
    effects = make_effects()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("file", "full"):
        with pytest.raises(DeltapatchError, match=r"is taken: it is a .*; choose another or remove it"):
            effects.save(tmp_path / name)
    effects.save(tmp_path / "empty")
    assert load_effects(tmp_path / "empty").pairs == effects.pairs
    assert {p.name for p in tmp_path.iterdir()} == {"file", "full", "empty"}


@pytest.mark.parametrize("step", ["save_file", "_flush"])
def test_a_full_disk_leaves_nothing_behind(make_effects, tmp_path, monkeypatch, step):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runfolder, step, full)
    with pytest.raises(DeltapatchError, match="no space left on the disk to write"):
        make_effects().save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs to mount a small disk")
def test_a_truly_full_disk(make_effects, tmp_path):
    small = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(tmp_path)]
    if subprocess.run(small, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        with pytest.raises(DeltapatchError, match="no space left on the disk"):
            make_effects().save(tmp_path / "run")
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def _break(name, change):
    def spoil(run):
        path = run / name
        path.write_bytes(change(path.read_bytes()))

    return spoil


def _edit(**changes):
    def spoil(run):
        about = json.loads((run / "run.json").read_text()) | changes
        (run / "run.json").write_text(json.dumps(about))

    return spoil


def _lose(*, version):
    """A number and the checksum are gone from run.json."""

    def spoil(run):
        about = json.loads((run / "run.json").read_text()) | {"format_version": version}
        del about["sha256"]
        del about["sites"]["z"]["measured"][0]
        (run / "run.json").write_text(json.dumps(about))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_lose(version=2), "is damaged .its files are not those that were written"),
        (_lose(version=1), "is damaged .effects.safetensors holds other numbers than run.json tells"),
        (lambda run: (run / "run.json").unlink(), "is not a run folder: it has no run.json"),
        (_break("run.json", lambda b: b[: len(b) // 2]), "is damaged: run.json cannot be read"),
        (_break("run.json", lambda b: b"[]"), "is damaged: run.json cannot be read"),
        (_break("run.json", lambda b: b"{}"), "its run.json is not one of deltapatch"),
        (_edit(format_version=99), "newer than this deltapatch reads"),
        (_edit(sites={"mlp_out": {}}), "is damaged"),
        (_break("effects.safetensors", lambda b: b[:-100]), "is damaged"),
        (_break("pairs.jsonl", lambda b: b[: len(b) // 2]), "is damaged"),
        (
            _break("pairs.jsonl", lambda b: b[: b.index(b"\n") + 1]),
            "is damaged .its files are not those that were written",
        ),
        (lambda run: (run / "effects.safetensors").unlink(), "is damaged"),
    ],
)
def test_broken_run_folders_are_one_sentence(make_effects, tmp_path, spoil, sentence):
    make_effects().save(tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises(DeltapatchError, match=sentence) as error:
        load_effects(tmp_path / "run")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "run") in str(error.value)


def test_a_missing_run_folder(tmp_path):
    with pytest.raises(DeltapatchError, match="does not exist"):
        load_effects(tmp_path / "nothing")


def test_columns_have_one_type_and_are_those_of_the_shell(make_effects, tmp_path):
    """Labels and numbers in one column could be neither sorted nor written as parquet."""
    import pandas

    from deltapatch.analysis.render import render
    from deltapatch.analysis.tables import cells

    effects = make_effects()
    z = effects.sites["z"]
    effects.sites["z"] = type(z)("z", z.layers, ["op2"], z.measured)
    for sites in (["mlp_out"], ["mlp_out", "z"], None):
        frame = effects.to_pandas(["recovered", "ie"], sites)
        frame.to_parquet(tmp_path / "effects.parquet")
        pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "effects.parquet"), frame)
        assert len(frame.sort_values(["position", "index"])) == len(frame)
        shell = render(cells(effects, ["recovered", "ie"], sites), "csv").decode()
        assert frame.to_csv(index=False, lineterminator="\n") == shell
        assert frame["position"].dtype == ("int64" if sites == ["mlp_out"] else "str")


def test_a_model_that_answers_nothing_right_is_said(make_effects):
    effects = make_effects()
    assert effects.caveat() is None
    effects.reference.says[:] = False
    assert "answers none of these 10 prompts right" in effects.caveat()
    assert "answers none of these 10 prompts right" in repr(effects)
