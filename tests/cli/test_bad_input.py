"""Bad input: one sentence on stderr that names what is wrong, exit code 2, and nothing on stdout."""

import errno
import json
import os

import pytest
from safetensors.torch import load_file, save_file

from deltapatch.results import folder as runfolder
from deltapatch.results import kept as shards


def refuses(result, *pieces):
    """The command failed as it should, and its sentence has these pieces."""
    assert result.code == 2, result.err
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert result.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.err
    for piece in pieces:
        assert str(piece) in lines[0]


def swept(command, model, pairs, *more, out="run"):
    return command("sweep", "--model", model, "--pairs", pairs, "--out", out, "--quiet", *more)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert not (tmp_path / "here" / "run" / "run.json").exists()  # no failure leaves a run


def _weights(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-200])


def _config(**changes):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


NORM = "gpt_neox.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("spoil", "pieces"),
    [
        (_truncate, ["model.safetensors"]),
        (_weights(lambda t: t.pop(NORM)), [NORM]),
        (_weights(lambda t: t.update({NORM: t[NORM][:-1].clone()})), [NORM, "15"]),
        (_weights(lambda t: t[NORM].fill_(float("nan"))), [NORM, "NaN"]),
        (_config(model_type="mamba"), ["mamba", "gpt_neox"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json"]),
        (lambda f: (f / "config.json").unlink(), ["config.json"]),
        (lambda f: (f / "model.safetensors").unlink(), ["safetensors"]),
    ],
    ids=["truncated", "missing", "shape", "nan", "architecture", "json", "no-config", "no-weights"],
)
def test_broken_models(command, tiny, write_pairs, ids_pair, spoil, pieces):
    spoil(tiny)
    refuses(swept(command, tiny, write_pairs(ids_pair)), *pieces)


def test_a_model_that_is_not_there(command, tmp_path, write_pairs, ids_pair):
    refuses(swept(command, tmp_path / "nowhere", write_pairs(ids_pair)), tmp_path / "nowhere")
    refuses(swept(command, "builtin:gpt-5", write_pairs(ids_pair)), "gpt-5", "gpt-neox-arithmetic")
    refuses(command("info", tmp_path / "nowhere"), tmp_path / "nowhere")
    refuses(command("pairs", "--model", tmp_path / "nowhere", "--out", "pairs.jsonl"), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "pieces"),
    [
        ('{"clean": ', ["line 2", "JSON"]),
        ({"clean_answer": None}, ["line 2", "clean_answer"]),
        ({"corrupted": [5, 6, 7]}, ["line 2", "4", "3"]),
        ({"clean": [], "corrupted": []}, ["line 2", "empty"]),
        ({"clean": [5, 6, 7, 100_000]}, ["line 2", "100000"]),
        ({"corrupted_answer": -1}, ["line 2", "-1"]),
        ({"labels": {"op1": 9}}, ["line 2", "op1"]),
        ({"claen": "typo"}, ["line 2", "claen"]),
    ],
    ids=["json", "type", "lengths", "empty", "token", "answer", "label", "field"],
)
def test_broken_pairs_name_their_line(command, tiny, write_pairs, ids_pair, change, pieces):
    second = change if isinstance(change, str) else ids_pair | change
    path = write_pairs(ids_pair, second)
    refuses(swept(command, tiny, path), path, *pieces)


def test_a_missing_field(command, tiny, write_pairs, ids_pair):
    del ids_pair["corrupted_answer"]
    refuses(swept(command, tiny, write_pairs(ids_pair)), "line 1", "corrupted_answer")


def test_text_that_cannot_be_used(command, tiny, write_pairs, text_pair):
    spaced = {"clean": f"{text_pair['clean']} ", "corrupted": f"{text_pair['corrupted']} "}
    refuses(swept(command, tiny, write_pairs(text_pair | spaced)), "line 1", "'7' changes", "drop the space")
    refuses(
        swept(command, tiny, write_pairs(text_pair | {"clean_answer": []})), "line 1", "clean_answer is empty"
    )
    longer = text_pair | {"corrupted": "Q: What is 5 plus 4 and 4? A:"}
    refuses(swept(command, tiny, write_pairs(longer)), "line 1", "same number of tokens")
    (tiny / "tokenizer.json").unlink()
    (tiny / "tokenizer_config.json").unlink()
    refuses(swept(command, tiny, write_pairs(text_pair)), "line 1", "tokenizer")
    refuses(command("pairs", "--model", tiny, "--out", "new.jsonl"), "tokenizer")


def test_pairs_whose_meta_is_bottomless(command, tiny, write_pairs, ids_pair):
    def nested(depth):
        line = json.dumps(ids_pair | {"meta": {"a": None}})
        return line.replace("null", '{"b":[' * (depth // 2) + "1" + "]}" * (depth // 2))

    path = write_pairs(ids_pair, nested(900))
    refuses(swept(command, tiny, path), path, "line 2", "meta is nested more than 100 deep")
    refuses(swept(command, tiny, write_pairs(nested(100_000))), "line 1", "nested too deeply")
    assert swept(command, tiny, write_pairs(nested(90)), out="deep").code == 0


def test_files_that_are_none(command, tiny, write_pairs, ids_pair, tmp_path):
    pipe, device = tmp_path / "pipe", "/dev/zero"
    os.mkfifo(pipe)
    refuses(swept(command, tiny, pipe), pipe, "is a FIFO (a pipe), not a regular file")
    refuses(swept(command, tiny, device), device, "is a device, not a regular file")
    problems = ("--task", "word-problems", "--model", tiny, "--out", "new.jsonl")
    refuses(command("pairs", *problems, "--data", pipe), pipe, "is a FIFO")
    refuses(command("bench", "figures", pipe, "--out", "figures"), pipe, "is a FIFO")
    assert swept(command, tiny, write_pairs(ids_pair), out="whole").code == 0
    for name in ("run.json", "pairs.jsonl", "effects.safetensors"):
        os.rename(f"whole/{name}", "aside")
        os.mkfifo(f"whole/{name}")
        refuses(
            command("effects", "whole"), f"whole/{name}", "FIFO" if name == "run.json" else "no regular file"
        )
        os.replace("aside", f"whole/{name}")
    assert command("effects", "whole").code == 0


def test_pairs_files_that_are_missing_or_empty(command, tiny, write_pairs, tmp_path):
    refuses(swept(command, tiny, tmp_path / "no.jsonl"), tmp_path / "no.jsonl")
    refuses(swept(command, tiny, write_pairs()), "pairs.jsonl", "empty")
    refuses(swept(command, tiny, tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "pieces"),
    [
        ("--sites", "mlp", ["'mlp'", "mlp_out"]),
        ("--sites", ",", ["sites"]),
        ("--sites", "resid_mid", ["resid_mid"]),
        ("--layers", "0-2", ["layer 2", "0 to 1"]),
        ("--layers", "1-0", ["--layers", "0-5,9"]),
        ("--layers", "two", ["--layers", "two"]),
        ("--positions", "4", ["position 4"]),
        ("--positions", "-5", ["position -5"]),
        ("--positions", "op3", ["'op3'", "op1"]),
        ("--positions", "1,,2", ["--positions"]),
        ("--metrics", "ie,best", ["'best'", "logit_diff"]),
        ("--direction", "up", ["'up'", "denoise"]),
        ("--source", "elsewhere", ["'elsewhere'", "counterpart"]),
        ("--precision", "fp4", ["'fp4'", "fp32"]),
        ("--backend", "abacus", ["'abacus'"]),
        ("--memory-budget", "lots", ["lots", "2GB"]),
        ("--memory-budget", "1kB", ["budget"]),
        ("--device", "toaster", ["'toaster'", "cpu"]),
        ("--dtype", "int3", ["'int3'", "float32"]),
        ("--adapter", "no-adapter-here", ["no-adapter-here"]),
        ("--seed", "x", ["--seed", "integer"]),
        ("--seed", "-1", ["--seed", "-1"]),
        ("--layers", "0-99999999999", ["--layers", "0-5,9"]),
        ("--positions", "all,1", ["'all' stands alone"]),
        ("--positions", "0.5", ["'0.5'"]),
        ("--metrics", ",", ["no metrics"]),
        ("--memory-budget", "0.3", ["--memory-budget '0.3'", "2GB"]),
        ("--memory-budget", "300kB", ["300 kB is too small"]),
        ("--device", "mps", ["'mps'", "cpu"]),
        ("--device", "meta", ["'meta'", "cpu"]),
        ("--device", "cuda:256", ["'cuda:256'"]),
        ("--colour", "red", ["--colour"]),
    ],
)
def test_options_that_mean_nothing(command, tiny, write_pairs, ids_pair, option, value, pieces):
    pairs = write_pairs(ids_pair | {"labels": {"op1": 1}})
    refuses(swept(command, tiny, pairs, option, value), *pieces)


def test_missing_options_and_unknown_commands(command):
    refuses(command("sweep", "--pairs", "x"), "--model")
    refuses(command("sweep", "--model", "x", "--pairs", "y"), "--out")
    refuses(command("pairs", "--model", "x"), "--out", "--show")
    refuses(command("pairs", "--model", "x", "--show", "y", "--out", "z"), "--show", "--out")
    refuses(command("pairs", "--model", "x", "--show", "y", "--per-template", 3), "--show", "--per-template")
    refuses(command("pairs", "--model", "x", "--show", "no.jsonl"), "no.jsonl")
    refuses(command("dance"), "dance")
    refuses(command("pairs", "--model", "x", "--task", "poetry", "--out", "y"), "poetry", "arithmetic")
    refuses(command("info", "builtin:gpt-neox-arithmetic", "--length", "0"), "--length")
    refuses(command("info", "builtin:gpt-neox-arithmetic", "--n-pairs", "0"), "--n-pairs")
    refuses(command("info", "builtin:gpt-neox-arithmetic", "--memory-budget", "1kB"), "memory budget")


@pytest.mark.parametrize(
    "words",
    [
        ("pairs", "--model", "x", "--out", "y"),
        ("effects", "x"),
        ("demo",),
        ("reproduce", "--model", "x", "--out", "y"),
        ("bench", "compare"),
    ],
    ids=" ".join,
)
def test_negative_seeds(command, words):
    refuses(command(*words, "--seed", "-1"), "--seed", "-1")


def test_labels_that_overrule_words(command, tiny, write_pairs, ids_pair):
    pairs = write_pairs(ids_pair, ids_pair | {"labels": {"last": 1}})
    refuses(swept(command, tiny, pairs), "pairs.jsonl, line 2", "'last' is at position 1", "another name")
    refuses(command("pairs", "--show", pairs, "--model", tiny), "line 2", "'last'")


def test_output_paths_that_are_taken(command, tiny, write_pairs, ids_pair, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    pairs = write_pairs(ids_pair)
    refuses(swept(command, tiny, pairs, out=taken), taken, "taken")
    refuses(command("pairs", "--model", tiny, "--out", pairs), pairs, "taken")
    refuses(command("demo", "--out", taken), taken, "taken")
    refuses(command("convert", tiny, "--out", taken), taken)
    assert (taken / "mine").read_text() == "mine"


def test_results_that_are_not_there(command, make_effects, tmp_path):
    make_effects().save(tmp_path / "run")
    refuses(command("effects", tmp_path / "nothing"), tmp_path / "nothing")
    refuses(command("effects", tmp_path), tmp_path, "not a run folder")
    refuses(command("plot", tmp_path), tmp_path, "not a run folder")
    run = tmp_path / "run"
    refuses(command("effects", run, "--site", "q"), "'q'", "mlp_out")
    refuses(command("effects", run, "--site", "mlp_out", "--metric", "best"), "'best'", "logit_diff")
    refuses(command("plot", run, "--metric", "best"), "'best'", "logit_diff")
    refuses(command("effects", run, "--site", "mlp_out", "--by", "mood"), "'mood'", "layer")
    refuses(command("effects", run, "--site", "mlp_out", "--top", "0"), "at least one")
    refuses(command("effects", run), "name one site")
    refuses(command("effects", run, "--site", "z", "--format", "csv", "--out", run / "run.json"), "taken")
    (run / "effects.safetensors").write_bytes(b"")
    refuses(command("effects", run), run, "damaged")


def test_no_space_left(command, tiny, write_pairs, ids_pair, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runfolder, "save_file", full)
    refuses(swept(command, tiny, write_pairs(ids_pair)), "no space left", "run", "1 of 1 passes", "--resume")
    refuses(command("effects", "run"), "not finished", "--resume")
    monkeypatch.setattr(shards, "save_file", full)
    refuses(swept(command, tiny, write_pairs(ids_pair), out="other"), "no space left", "nothing was kept")
    assert os.listdir() == ["run"]
