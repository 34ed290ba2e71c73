"""`deltapatch bench`: what users type, their mistakes, workers and environments."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from deltapatch.bench.setup import side_maker
from deltapatch.bench.sides import isolate, process
from deltapatch.bench.sides.job import Job, Options
from deltapatch.bench.sides.process import lines_of
from deltapatch.errors import DeltapatchError

TINY = ("--layers", 2, "--d-model", 8, "--d-mlp", 12, "--heads", 2, "--vocab", 30, "--length", 4)


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        (("--peers", "magic"), "unknown peer 'magic'"),
        (("--peers", ","), "no peers were given"),
        (("--sweeps", "everything"), "unknown sweep 'everything'"),
        (("--rounds", 0), "rounds, check, limit and sample"),
        (("--metric", "kl"), "unknown metric 'kl'"),
        (("--architecture", "mamba"), "unknown architecture 'mamba'"),
        (("--kv-heads", 2), "only llama has --kv-heads"),
        (("--model", "random:gpt-9"), "unknown shape 'gpt-9': choose from gpt-neox-small, smollm2-135m"),
        (("--batch", "16,a"), "--batch '16,a' is not a list of sizes"),
        (("--runs", 0), "and so must runs"),
        (("--heads", 3), "does not divide into 3 heads"),
        (("--layers", 0), "every size must be at least 1"),
        (("--length", 1), "at least 1 pair and 2 tokens"),
        (("--n-pairs", 0), "both must be at least 1"),
        (("--model", "no/such/folder/here"), "no/such/folder/here"),
        (("--pairs", "no-such-file"), "There is no pairs file no-such-file"),
        (("--out", "no/folder/r.json"), "the folder of no/folder/r.json does not exist"),
        (("--out", "."), "is a folder"),
    ],
)
def test_a_mistake_is_one_sentence(command, tmp_path, monkeypatch, options, piece):
    monkeypatch.chdir(tmp_path)
    done = command("bench", "compare", *TINY, "--quiet", "--peers", "hooks", *options)
    assert done.code == 2
    assert done.out == ""
    assert piece in done.err
    assert len(done.err.splitlines()) == 1


def test_pairs_of_several_lengths_are_refused(command, tmp_path):
    path = tmp_path / "pairs.jsonl"
    pair = {"clean_answer": 3, "corrupted_answer": 4}
    rows = [
        {"clean": [1, 2], "corrupted": [1, 3], **pair},
        {"clean": [1, 2, 5], "corrupted": [1, 3, 5], **pair},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    done = command("bench", "compare", *TINY, "--quiet", "--pairs", path)
    assert done.code == 2
    assert "2, 3 tokens" in done.err


def test_answers_of_several_tokens_are_refused(command, tmp_path):
    path = tmp_path / "pairs.jsonl"
    pair = {"clean": [1, 2], "corrupted": [1, 3], "clean_answer": [3, 5], "corrupted_answer": 4}
    path.write_text(json.dumps(pair))
    done = command("bench", "compare", *TINY, "--quiet", "--pairs", path)
    assert done.code == 2
    assert "pair 0 has one of 2" in done.err


def test_a_size_makes_one_model_of_it_and_none_makes_the_usual_two(command, monkeypatch):
    made = []

    def workload(model, chosen, folder):
        made.append(model)
        raise DeltapatchError("that is enough")

    monkeypatch.setattr("deltapatch.cli.bench._workload", workload)
    for given in ((), ("--d-mlp", 12), ("--d-mlp", 2048), ("--model", "random:smollm2-135m", "--layers", 2)):
        made.append(given)
        command("bench", "compare", "--quiet", *given)
    assert made[1::2] == ["random:gpt-neox-small", "random", "random", "random:smollm2-135m"]


@pytest.mark.parametrize("values", ["a", "8,", "0"])
def test_growth_wants_sizes(command, values):
    done = command("bench", "growth", *TINY, "--quiet", "--values", values if values != "8," else "8,x")
    assert done.code == 2
    assert "is not a list of sizes" in done.err


def test_help_shows_examples(command):
    for name in ((), ("compare",), ("growth",), ("precision",), ("figures",), ("peers",)):
        done = command("bench", *name, "--help")
        assert done.code == 0
        assert "Usage" in done.out
    assert "deltapatch bench compare" in command("bench", "--help").out


def test_a_worker_that_ends_is_reported(tmp_path):
    side = lines_of("/bin/false", 1, "deltapatch.bench.sides.side", log=tmp_path / "log")
    assert list(side) == [{"error": "its process ended (exit code 1)"}]


def test_a_process_goes_on_when_it_is_asked(tmp_path):
    steps = tmp_path / "steps.py"
    steps.write_text(
        "import os, pathlib, sys\n"
        "def lines(folder):\n"
        "    for i in range(2):\n"
        "        pathlib.Path(folder, str(i)).touch()\n"
        "        print('a library says something')\n"
        "        yield {'cpus': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1}\n"
        "    raise ValueError('too\\nmuch')\n"
    )
    log = tmp_path / "log"
    side = lines_of(sys.executable, 1, "steps", str(tmp_path), log=log)
    assert next(side) == {"cpus": 1}
    time.sleep(0.2)
    assert not (tmp_path / "1").exists()
    assert list(side) == [{"cpus": 1}, {"error": "ValueError: too much"}]
    assert "a library says something" in log.read_text()
    side = lines_of(sys.executable, 1, "steps", str(tmp_path), log=log)
    next(side)
    side.close()  # ends the process


def test_cpus_are_of_different_cores_first(tmp_path, monkeypatch):
    for cpu, core in {0: "0-1", 1: "0-1", 2: "2,5", 5: "2,5"}.items():
        (tmp_path / str(cpu)).write_text(f"{core}\n")
    monkeypatch.setattr(process, "_CORE", f"{tmp_path}/{{}}")
    cpus = [0, 1, 2, 5, 7]  # of 7 the system says nothing
    assert process.of_cores(cpus, 3) == [0, 2, 7]
    assert process.of_cores(cpus, 4) == [0, 2, 7, 1]
    assert process.of_cores([1, 5], 9) == [1, 5]


def test_an_environment_that_cannot_be_made_costs_one_peer(work_of, tmp_path, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution\n", stdout="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: failed)
    with pytest.raises(DeltapatchError, match="environment for nnsight cannot be made: ERROR: No matching"):
        isolate.isolated_python("nnsight", tmp_path, print)
    side = side_maker(True, tmp_path, print)("nnsight", Job(str(tmp_path), work_of(), Options()))
    assert "cannot be made" in next(side)["missing"]


def test_an_environment_is_made_once(tmp_path, monkeypatch):
    calls = []

    def run(command, **more):
        calls.append(command)
        if "venv" in command:
            site = tmp_path / "site"
            site.mkdir(exist_ok=True)
            (tmp_path / "made").mkdir(exist_ok=True)
            isolate.Path(command[-1]).mkdir(parents=True)
        return SimpleNamespace(returncode=0, stderr="", stdout=str(tmp_path / "site"))

    monkeypatch.setattr(subprocess, "run", run)
    first = isolate.isolated_python("pyvene", tmp_path, print)
    made = len(calls)
    assert isolate.isolated_python("pyvene", tmp_path, print) == first
    assert len(calls) == made
    (install,) = (c for c in calls if "install" in c)
    assert any(part.startswith("torch==") and "+" not in part for part in install)
    assert any("pyvene" in part for part in install)
    assert (tmp_path / "site" / "deltapatch" / "bench").is_dir()


def test_an_environment_that_is_this_one_but_for_a_package(tmp_path, monkeypatch):
    calls = []

    def run(command, **more):
        calls.append(command)
        if "venv" in command:
            isolate.Path(command[-1]).mkdir(parents=True)
            (tmp_path / "site").mkdir()
        return SimpleNamespace(returncode=0, stderr="", stdout=str(tmp_path / "site"))

    monkeypatch.setattr(subprocess, "run", run)
    python = isolate.python_with("triton==3.6.0", tmp_path, print)
    assert isolate.Path(python).is_relative_to(tmp_path)
    (install,) = (c for c in calls if "install" in c)
    assert install[-2:] == ["triton==3.6.0", "--no-deps"]
    assert (tmp_path / "site" / "above.pth").read_text() == isolate.site_packages() + "\n"
    assert (tmp_path / "site" / "deltapatch" / "bench").is_dir()


def test_requirements_fall_back_to_the_package():
    assert isolate.requirements("no-such-extra")[-1] == "no-such-extra"


@pytest.mark.slow
def test_a_comparison_in_processes(command, tmp_path):
    out = tmp_path / "r.json"
    done = command(
        "bench", "compare", *TINY, "--sweeps", "mlp_out,joint",
        "--peers", "hooks-batched,paper,deltapatch-fp32",
        "--rounds", 1, "--check", 8, "--threads", 1, "--quiet", "--json", "--out", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads(done.out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    mlp, joint = result["sweeps"]
    assert mlp["columns"]["deltapatch-fp32"]["status"] == "measured"
    assert mlp["columns"]["paper"]["status"] == "measured"
    assert joint["columns"]["paper"] == {"status": "lacks", "reason": "no joint patches"}
    assert result["sides"]["hooks-batched"]["import_seconds"] > 0


@pytest.mark.slow
def test_peers_are_listed():
    done = subprocess.run(
        [sys.executable, "-m", "deltapatch", "bench", "peers"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "hooks-prefix" in done.stdout
    assert "nnsight" in done.stdout
