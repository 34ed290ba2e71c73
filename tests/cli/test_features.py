"""`deltapatch features`, and what `deltapatch effects` says of its runs."""

import csv
import io
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import deltapatch as dp
from deltapatch.interventions.pairs_file import write_pairs
from deltapatch.tasks.arithmetic import arithmetic_pairs

MODEL, SAE = "builtin:gpt-neox-arithmetic", "builtin:gpt-neox-arithmetic-features"


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    tokenizer = dp.load_model(MODEL).tokenizer
    write_pairs(path, arithmetic_pairs(tokenizer, per_template=1, shots=0, operators=["+"])[0])
    return path


def features(command, pairs_file, *more):
    return command("features", "--model", MODEL, "--pairs", str(pairs_file), "--sae", SAE, *more)


def test_a_run_and_its_tables(command, pairs_file, tmp_path):
    run = str(tmp_path / "run")
    result = features(command, pairs_file, "--positions", "last", "--precision", "fp32", "--out", run)
    assert result.code == 0
    assert result.out == f"{run}\n"
    assert "512 features (topk)" in result.err
    table = command("effects", run, "--by", "feature", "--top", "3")
    assert table.out.split()[:3] == ["feature", "recovered", "pairs"]
    assert len(table.out.strip().splitlines()) in (4, 5)
    each = list(csv.DictReader(io.StringIO(command("effects", run, "--format", "csv").out)))
    outcome = dp.load_outcome(run)
    assert {row["position"] for row in each} == {"-1"}  # whatever the prompts' lengths: one place
    assert [int(row["feature"]) for row in each] == outcome.columns()["feature"].tolist()
    np.testing.assert_allclose([float(row["recovered"]) for row in each], outcome.values("recovered"), 1e-6)
    for option in (["--site", "z"], ["--interval"], ["--mean-of-ratios"], ["--effect", "total"]):
        refused = command("effects", run, *option)
        assert refused.code == 2
        assert f"leave out {option[0]}" in refused.err
    refused = command("effects", run, "--by", "head")
    assert "their labels are layer, position, feature" in refused.err


def test_parts_and_resuming(command, pairs_file, tmp_path):
    run = str(tmp_path / "run")
    options = ("--positions", "last", "--precision", "fp32", "--least", "0.5", "--out", run)
    for part in ("1/2", "2/2"):
        assert features(command, pairs_file, *options, "--shard", part).code == 0
    assert command("merge", run).code == 0
    again = features(command, pairs_file, *options, "--resume", "--json")
    assert again.code == 0
    told = json.loads(again.out)
    columns = dp.load_outcome(run).columns()
    assert told["features"] == len(columns["feature"])
    assert (np.abs(columns["after"] - columns["before"]) > 0.5).all()


def test_a_transcoder_of_an_archive(command, pairs_file, tmp_path):
    draw = np.random.default_rng(0)
    width = dp.load_model(MODEL).spec.d_model
    weights = {"W_enc": (width, 40), "W_dec": (40, width), "b_enc": (40,), "b_dec": (width,)}
    arrays = {name: draw.normal(size=shape).astype(np.float32) for name, shape in weights.items()}
    np.savez(tmp_path / "params.npz", threshold=np.full(40, 0.1, np.float32), **arrays)
    run, at = str(tmp_path / "run"), "mlp_in:mlp_out.2"
    args = ("--model", MODEL, "--pairs", str(pairs_file), "--sae", str(tmp_path / "params.npz"))
    result = command("features", *args, "--at", at, "--positions", "last", "--out", run)
    assert result.code == 0, result.err
    assert "40 features (jumprelu) from mlp_in to mlp_out of layer 2" in result.err
    columns = dp.load_outcome(run).columns()
    assert set(columns["layer"]) == {2}
    assert np.abs(dp.load_outcome(run).values("logit_diff")).max() > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--at", "resid_post.1", "--at", "resid_post.2"), "2 --at and 1 --sae"),
        (("--at", "resid_post"), "no place such as resid_post.20"),
        (("--at", "resid_post.9"), "is of layer 9"),
        (("--at", "nowhere.1"), "unknown site 'nowhere'"),
        (("--at", "mlp_in:mlp_out.1"), "is no transcoder"),
        (("--sae", "nothing"), "is no sparse autoencoder"),
        (("--source", "mean"), "features have the sources"),
        (("--least", "-1"), "least must be"),
    ],
)
def test_mistakes(command, pairs_file, tmp_path, more, message):
    result = features(command, pairs_file, *more, "--out", str(tmp_path / "run"))
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "run").exists()


def test_a_screen(command, pairs_file, tmp_path):
    run = str(tmp_path / "run")
    asked = ("--positions", "last", "--screen", "attribution", "--top", "6", "--screen-sample", "8")
    result = features(command, pairs_file, *asked, "--precision", "fp32", "--out", run)
    assert result.code == 0, result.err
    found = dp.load_screened(run)
    assert f"{len(found.verified):,} of {len(found):,} features patched" in result.err
    assert "with 95% confidence at most" in result.err
    assert "pearson" in result.err
    model, sae = dp.load_model(MODEL), dp.load_sae(SAE)
    options = {"positions": "last", "precision": "fp32", "progress": False}
    want = dp.sweep_features(model, pairs_file, sae, **options).values("logit_diff")
    here = found.is_verified()
    np.testing.assert_allclose(found.values("logit_diff")[here], want[here], rtol=1e-3, atol=1e-5)
    said = json.loads(
        features(command, pairs_file, *asked, "--precision", "fp32", "--out", run, "--resume", "--json").out
    )
    assert (said["features"], said["verified"]) == (len(found), len(found.verified))
    assert said["missed"]["at_most"] == found.missed().at_most
    assert said["calibration"]["sae"] == [0]
    rows = list(csv.DictReader(io.StringIO(command("effects", run, "--format", "csv").out)))
    assert [int(row["feature"]) for row in rows] == found.columns()["feature"].tolist()
    assert command("effects", run, "--by", "feature").code == 2
    for more, message in (
        (("--top", "3"), "give screen as well"),
        (("--screen", "ig-activations"), "no lines for features"),
    ):
        result = features(command, pairs_file, *more, "--out", str(tmp_path / "no"))
        assert result.code == 2
        assert message in result.err
        assert not (tmp_path / "no").exists()


def test_directions_from_a_file(command, pairs_file, tmp_path):
    model = dp.load_model(MODEL)
    rows = np.random.default_rng(0).normal(size=(2, model.spec.d_model)).astype(np.float32)
    save_file({"resid_post": rows, "mlp_out.1": rows[0]}, tmp_path / "d.safetensors")
    whole = ("directions", "--model", MODEL, "--pairs", str(pairs_file), "--positions", "last")
    options = ("--layers", "1-2", "--precision", "fp32", "--directions", str(tmp_path / "d.safetensors"))
    for more in ((), ("--strengths=-2,2",)):
        run = str(tmp_path / f"run{len(more)}")
        result = command(*whole, *options, *more, "--out", run)
        assert result.code == 0, result.err
        strengths = [-2.0, 2.0] if more else None
        want = dp.sweep_directions(
            model,
            dp.load_pairs(pairs_file),
            {"mlp_out": {1: rows[0]}, "resid_post": rows},
            positions="last",
            layers=[1, 2],
            strengths=strengths,
            precision="fp32",
        )
        np.testing.assert_array_equal(dp.load_outcome(run).values("ie"), want.values("ie"))
        groups = "direction,strength" if more else "direction"
        table = command("effects", run, "--by", groups).out.splitlines()
        assert len(table) == (6 if more else 4)
    for name, message in (("nowhere", "unknown site"), ("resid_post", "are for all layers and for layer 1")):
        save_file({name: rows, "resid_post.1": rows}, tmp_path / "wrong.safetensors")
        result = command(
            *whole, "--directions", str(tmp_path / "wrong.safetensors"), "--out", str(tmp_path / "no")
        )
        assert result.code == 2
        assert message in result.err
    for extra, message in (
        (("--strengths", "a lot"), "must be numbers with commas"),
        (("--directions", "nothing"), "nothing"),
    ):
        result = command(*whole, *options, *extra, "--out", str(tmp_path / "no"))
        assert result.code == 2
        assert message in result.err


def test_a_sweep_along_directions_from_a_file(command, pairs_file, tmp_path):
    model = dp.load_model(MODEL)
    rows = np.random.default_rng(1).normal(size=(3, model.spec.d_model)).astype(np.float32)
    save_file({"resid_post": rows}, tmp_path / "d.safetensors")
    asked = (
        "sweep",
        "--model",
        MODEL,
        "--pairs",
        str(pairs_file),
        "--positions",
        "last",
        "--precision",
        "fp32",
    )
    run = str(tmp_path / "run")
    given = ("--sites", "resid_post.along", "--directions", str(tmp_path / "d.safetensors"))
    result = command(*asked, *given, "--out", run)
    assert result.code == 0, result.err
    want = dp.sweep(
        model,
        dp.load_pairs(pairs_file),
        sites="resid_post.along",
        directions={"resid_post": rows},
        positions="last",
        precision="fp32",
    )
    np.testing.assert_array_equal(dp.load_effects(run).values("ie"), want.values("ie"))
    table = command("effects", run, "--by", "layer,direction", "--top", "4").out.splitlines()
    assert table[0].split()[:3] == ["site", "layer", "direction"]
    assert command("plot", run).code == 0
    result = command(*asked, "--sites", "resid_post.along", "--out", str(tmp_path / "no"))
    assert result.code == 2
    assert "is swapped along directions" in result.err
