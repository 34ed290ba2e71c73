"""Sweeps that are resumed, shared and merged, by command: what is said, and the exit code."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from deltapatch.results.kept import KeptPasses

ONE_PAIR_A_PASS = """
from deltapatch.engine.planning.memory import Costs
Costs.of = classmethod(lambda cls, *rest, **named: Costs(0, 10**6, 0, 0, 0))
"""


@pytest.fixture
def args(tiny, write_pairs, ids_pair):
    pairs = write_pairs(
        *(ids_pair | {"clean": [5, 6, 7, 8 + i], "corrupted": [5, 9, 7, 8 + i]} for i in range(4))
    )
    return ("sweep", "--model", tiny, "--pairs", pairs, "--device", "cpu", "--memory-budget", "1500000")


@pytest.fixture
def one_pair_a_pass(monkeypatch):
    from deltapatch.engine.planning.memory import Costs

    monkeypatch.setattr(Costs, "of", classmethod(lambda cls, *rest, **named: Costs(0, 10**6, 0, 0, 0)))


def effects(run):
    assert sorted(os.listdir(run)) == ["effects.safetensors", "pairs.jsonl", "run.json"]
    return (run / "effects.safetensors").read_bytes()


def interrupted(args, run, slowly):
    """A real process that gets Ctrl-C once its first pass is kept."""
    code = f"{ONE_PAIR_A_PASS}{slowly}\nfrom deltapatch.cli.main import main\nmain()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args), "--out", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "kept\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_ctrl_c_and_resume(command, args, slowly, tmp_path, one_pair_a_pass):
    whole, run = tmp_path / "whole", tmp_path / "run"
    code, err = interrupted(args, run, slowly)
    assert code == 130
    assert "Traceback" not in err
    said = err.strip().splitlines()[-1]
    assert said == (
        f"Interrupted; 1 of 4 passes are kept in {run}, and the same sweep with --resume "
        "(in Python resume=True) goes on from there"
    )
    refused = command(*args, "--out", run)
    assert refused.code == 2
    assert "--resume" in refused.err
    other = command(*args, "--out", run, "--resume", "--direction", "noise")
    assert other.code == 2
    assert "different direction: denoise there, noise here" in other.err
    resumed = command(*args, "--out", run, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert json.loads(resumed.out)["run"]["passes"] == 4
    assert command(*args, "--out", whole, "--resume").code == 0
    assert effects(run) == effects(whole)
    again = command(*args, "--out", run, "--resume")
    assert (again.code, again.out) == (0, f"{run}\n")
    assert again.err == f"{run} is finished already: nothing to do\n"


@pytest.fixture
def done(command, args, tmp_path, one_pair_a_pass):
    """The command of a run that is finished, and its folder."""
    args = (*args, "--sites", "mlp_out,z", "--metrics", "logit_diff", "--precision", "fp32")
    assert command(*args, "--out", tmp_path / "done").code == 0
    return args, tmp_path / "done"


OTHER_QUESTIONS = [
    (("--sites", "z"), "sites or layers: mlp_out of layers 0-1; z of layers 0-1 there, z of layers 0-1"),
    (("--layers", "1"), "sites or layers: .* there, mlp_out of layers 1; z of layers 1 here"),
    (("--positions", "last"), r"positions: \[0, 1, 2, 3\] there, \[-1\] here"),
    (("--direction", "noise"), "direction: denoise there, noise here"),
    (("--source", "zero"), "source: counterpart there, zero here"),
    (("--metrics", "all"), r"metrics: \['.*'\] there, \['.*'\] here"),
    (("--precision", "fp64"), "precision: fp32 there, fp64 here"),
    (("--dtype", "bfloat16"), "dtype: float32 there, bfloat16 here"),
    (("--memory-budget", "2MB"), "memory budget: 1500000 there, 2000000 here"),
    (("--seed", "7", "--direction", "noise"), "direction: .*; a different seed: 0 there, 7 here"),
]


def test_a_finished_run_answers_no_other_question(command, done):
    args, run = done
    before = effects(run)
    for i, (changes, what) in enumerate(OTHER_QUESTIONS):
        refused = command(*args, "--out", run, *(("--resume",), ("--shard", "1/2"))[i % 2], *changes)
        assert (refused.code, refused.out) == (2, "")
        assert re.fullmatch(f"Error: run {run} is finished, with a different {what}.*\n", refused.err)
    assert effects(run) == before


def test_a_finished_run_is_of_its_model_and_pairs(command, done, tiny, write_pairs, ids_pair):
    args, run = done
    same = command(*args, "--out", run, "--shard", "1/2", "--json", "--stream")
    assert json.loads(same.out)["sites"]["z"] == {"pair": 4, "layer": 2, "position": 4, "index": 2}
    wrong = list(args)
    wrong[wrong.index("--model") + 1] = "nowhere/at/all"
    assert "nowhere/at/all does not exist" in command(*wrong, "--out", run, "--resume").err
    write_pairs(*(ids_pair | {"clean": [5, 6, 7, 8 + i]} for i in range(4)))
    refused = command(*args, "--out", run, "--resume")
    assert refused.code == 2
    assert re.search(r"with a different pairs: sha256 \w{12} there, sha256 \w{12} here", refused.err)
    content = bytearray((tiny / "model.safetensors").read_bytes())
    content[-2] ^= 1  # of one value
    (tiny / "model.safetensors").write_bytes(content)
    refused = command(*args, "--out", run, "--resume")
    assert refused.code == 2
    assert re.search(r"different model \(fingerprint\): \w{32} there, \w{32} here", refused.err)


@pytest.fixture
def hub(monkeypatch, tiny):
    """A model of the hub, whose training step 1000 has one value of another kind; what was asked for."""
    import huggingface_hub

    early = shutil.copytree(tiny, tiny.parent / "early")
    content = bytearray((early / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (early / "model.safetensors").write_bytes(content)
    asked = []

    def download(name, allow_patterns, revision="main"):
        asked.append((name, revision))
        return str({"main": tiny, "step1000": early}[revision])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_revision_of_the_hub(command, done, hub, tmp_path):
    args, run = list(done[0]), tmp_path / "revision"
    args[args.index("--model") + 1] = "some/model"
    early = ("--revision", "step1000")
    assert command(*args, *early, "--out", run).code == 0
    about = json.loads((run / "run.json").read_text())
    assert (about["model"], about["revision"]) == ("some/model", "step1000")
    assert command(*args, *early, "--out", run, "--resume").code == 0
    refused = command(*args, "--out", run, "--resume")
    assert refused.code == 2
    assert "is finished, with a different model (fingerprint)" in refused.err
    refused = command(*done[0], *early, "--out", run, "--resume")
    assert (refused.code, "has no revision 'step1000'" in refused.err) == (2, True)


def test_every_command_that_loads_a_model_takes_a_revision(command, hub, tmp_path):
    early, out = ("--revision", "step1000"), ("--out", tmp_path / "out")
    bench = ("--model", "some/model", "--pairs", "nowhere", *early)
    for words in (
        ("info", "some/model", "--untimed", *early),
        ("pairs", "--model", "some/model", "--per-template", "1", "--shots", "0", *early, *out),
        ("convert", "some/model", *early, *out),
        ("reproduce", "--model", "some/model", "--experiment", "shots-0", "--quick", "--dry-run", *early),
        ("bench", "compare", "--peers", "deltapatch-fp32", *bench),
        ("bench", "precision", *bench),
    ):
        hub.clear()
        found = command(*words)
        assert hub, found.err
        assert set(hub) == {("some/model", "step1000")}
        if words[0] in ("info", "reproduce"):
            assert (found.code, "step1000" in found.out) == (0, True), found.err
    hub.clear()
    compared = ("--compare", "some/model", "--compare-revision", "step1000", "--dry-run", "--quick")
    assert command("reproduce", "--model", "some/model", "--experiment", "shots-0", *compared).code == 0
    assert [revision for _, revision in hub] == ["main", "step1000"]
    alone = command("reproduce", "--model", "some/model", "--compare-revision", "step1000", "--dry-run")
    assert (alone.code, "--compare names: give both" in alone.err) == (2, True)
    assert command("bench", "compare", *early, "--layers", "1").code == 2


@pytest.mark.parametrize("file", ["effects.safetensors", "pairs.jsonl", "run.json"])
def test_a_finished_run_that_is_damaged_is_told(command, done, file):
    args, run = done
    content = (run / file).read_bytes()
    (run / file).write_bytes(content[:-9])
    for again in ((*args, "--out", run, "--resume"), (*args, "--out", run, "--shard", "2/2"), ("merge", run)):
        told = command(*again)
        assert (told.code, told.out) == (2, "")
        assert f"run folder {run} is damaged" in told.err
        assert "remove it and run the sweep again" in told.err
    (run / file).write_bytes(content)
    assert command(*args, "--out", run, "--resume").code == 0


@pytest.mark.parametrize("again", [("--resume",), ("--shard", "1/2"), "merge"])
def test_what_a_kill_left_beside_a_finished_run_goes(
    command, args, tmp_path, again, monkeypatch, one_pair_a_pass
):
    from deltapatch.results import checkpoint as unfinished

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "clean", lambda path: None)
        assert command(*args, "--out", run).code == 0
    assert (run / "unfinished" / "manifest.json").exists()
    told = command("merge", run) if again == "merge" else command(*args, "--out", run, *again)
    assert (told.code, told.err) == (0, f"{run} is finished already: nothing to do\n")
    effects(run)


def test_a_damaged_shard_is_a_warning(command, args, tmp_path, one_pair_a_pass, monkeypatch):
    assert command(*args, "--out", tmp_path / "whole", "-q").code == 0
    run = tmp_path / "run"
    for part in ("1/2", "2/2"):
        assert command(*args, "--out", run, "--shard", part, "-q").code == 0
    shard = KeptPasses(run / "unfinished", "").path(2)
    shard.write_bytes(shard.read_bytes()[:-1])
    refused = command("merge", run)
    assert (refused.code, refused.out) == (2, "")
    assert "of 4 passes, 0 missing and 1 damaged (part 1/2)" in refused.err
    mended = command(*args, "--out", run, "--shard", "1/2", "-q")
    assert mended.err == f"Warning: {shard} is damaged: its pass is computed again\n"
    assert command("merge", run).code == 0
    assert effects(run) == effects(tmp_path / "whole")


def test_parts_and_merge(command, args, tmp_path, one_pair_a_pass):
    assert command(*args, "--out", tmp_path / "whole").code == 0
    run = tmp_path / "run"
    for part in ("3/3", "1/3", "2/3"):
        done = command(*args, "--out", run, "--shard", part)
        assert (done.code, done.out) == (0, f"{run}\n")
        assert f"part {part} is done; when all are: deltapatch merge {run}" in done.err
    merged = command("merge", run)
    assert (merged.code, merged.out, merged.err) == (0, f"{run}\n", "")
    assert effects(run) == effects(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    assert "nothing to do" in command("merge", run).err
    assert command("merge", tmp_path / "nothing").code == 2


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_parts_that_mean_nothing(command, args, tmp_path, part):
    result = command(*args, "--out", tmp_path / "run", "--shard", part)
    assert result.code == 2
    assert "is not a part such as 2/8" in result.err
