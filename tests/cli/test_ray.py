"""`deltapatch sweep --ray` with a cluster of its own: Ctrl-C, kill -9 of the driver, wrong options."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MAIN = "from deltapatch.cli.main import main\nmain()"


@pytest.fixture
def args(tiny, write_pairs, ids_pair):
    """A sweep of one pass a pair."""
    import deltapatch
    from deltapatch.engine.planning.memory import Costs
    from deltapatch.kernels.backend import choose_backend
    from deltapatch.kernels.product import PRECISIONS

    pairs = write_pairs(*(ids_pair | {"clean": [5, 6, 7, 8 + i]} for i in range(6)))
    model = deltapatch.load_model(tiny, device="cpu")
    block, places = choose_backend("auto", model.device).block_tokens, {"mlp_out", "attn_out"}
    shape = {"n_sources": 1, "length": 4, "threads": 1, "places": places}
    costs = Costs.of(model, PRECISIONS["fp32"], block, **shape, against_base=False, stream=model.stream)
    budget = costs.total(1, 4, 2 * 2 * 10, 2 * 2 * 4)
    return "sweep", "--model", tiny, "--pairs", pairs, "--memory-budget", budget, "--precision", "fp32"


def begun(args, run, slowly):
    """A real process whose first pass is kept."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            slowly + MAIN,
            *map(str, args),
            "--out",
            str(run),
            "--ray",
            "local",
            "--ray-cpus",
            "1",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "kept\n", process.stderr.read()
    return process


def workers(session):
    """The workers of a session of the system that are still there; agents of Ray's stay for a while."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
            title = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[3]) == session and title.startswith((b"ray::Worker", b"ray::IDLE")):
            found.append(title)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_and_kill_9_of_the_driver(command, args, slowly, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, run = tmp_path / "whole", tmp_path / "run"
    alone = subprocess.run([sys.executable, "-m", "deltapatch", *map(str, args), "--out", whole, "-q"])
    assert alone.returncode == 0
    process = begun(args, run, slowly)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "of 6 passes are kept in" in err.strip().splitlines()[-1]
    process = begun((*args, "--resume"), run, slowly)
    assert workers(process.pid)
    process.kill()
    process.communicate(timeout=60)
    for _ in range(60):
        if not workers(process.pid):
            break
        time.sleep(1)
    assert not workers(process.pid)
    done = command(*args, "--out", run, "--resume", "--ray", "local", "--ray-cpus", "1", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["run"]["passes"], found["rows"], found["run"]["precision"]) == (6, 96, "fp32")
    assert sorted(os.listdir(run)) == ["effects.safetensors", "pairs.jsonl", "run.json"]
    for name in ("effects.safetensors", "pairs.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--ray", "127.0.0.1:9"), "there is no Ray cluster at 127.0.0.1:9 (Connection refused)"),
        (("--ray", "here"), "Ray address 'here' means nothing: give host:port, auto or local"),
        (("--ray", "--shard", "1/2"), "--ray and --shard do not go together"),
        (("--ray", "--dry-run"), "--ray and --dry-run do not go together"),
        (("--ray-cpus", "2"), "give --ray as well"),
        (("--ray", "--ray-cpus", "0"), "--ray-cpus"),
        (("--ray", "--device", "cpu"), "give --ray-cpus N"),
        (("--ray", "--ray-cpus", "1", "--device", "cuda:1"), "leave out --ray-cpus"),
    ],
)
def test_options_that_do_not_go(command, args, tmp_path, options, said):
    result = command(*args, "--out", tmp_path / "run", *options)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert not (tmp_path / "run").exists()
