"""Peers of edges: by definition the same effects, in a process that prints JSON lines, judged by float64."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from deltapatch.bench import edge_compare, markdown
from deltapatch.bench.edge_compare import MODELS, WORK, config_of, judged, make_job, make_model, together
from deltapatch.bench.edge_peers.base import EdgePeer, Job, grouped, place
from deltapatch.bench.edge_peers.work import PEERS, carry_out, make_peer
from deltapatch.bench.sides import isolate
from deltapatch.bench.sides.process import lines_of
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.nodes import Nodes

# transformers turns queries and keys by sines of float32, and has LLaMA's norms in float32 always
FLOAT64 = {"gpt2": 1e-12, "gpt_neox": 1e-7, "llama": 2e-6}
NEEDS = {"tlens": "transformer_lens", "auto-circuit": "auto_circuit"}


@pytest.fixture(scope="module")
def job_of(tmp_path_factory):
    """A job on a tiny model of an architecture, and the true effects."""
    made = {}

    def job(architecture):
        if architecture not in made:
            config = config_of(architecture, layers=2, heads=4, d_model=32, vocab=61)
            folder = make_model(config, tmp_path_factory.mktemp("edges") / "model")
            made[architecture] = make_job(folder, pairs=3, length=6, first=2)
        return made[architecture]

    return job


def apart(found, true):
    return np.abs(found - true).max() / np.abs(true).max()


@pytest.mark.parametrize("architecture", MODELS)
def test_the_definition_in_float64_gives_our_effects(job_of, architecture):
    job, true = job_of(architecture)
    peer = make_peer("eap-ig")
    peer.dtype = torch.float64
    peer.prepare(job)
    found = peer.effects(job.edges["query"], 2)  # batches of two pairs, and of one
    assert apart(found, true["query"]) < FLOAT64[architecture]


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("name", PEERS)
def test_every_peer_gives_our_effects(job_of, name, architecture):
    package = NEEDS.get(name)
    if package is not None and find_spec(package) is None:
        pytest.skip(f"{package} is not installed here: the comparison gives it an environment of its own")
    job, true = job_of(architecture)
    peer = make_peer(name)
    peer.prepare(job)
    some = slice(None, None, 3) if peer.batches else slice(None)  # which has no such choice does all edges
    edges = job.edges[peer.keys][some]
    for batch in peer.batches[1:2] or (None,):
        found = peer.effects(edges, batch)
        assert found.shape == (3, len(edges))
        assert apart(found, true[peer.keys][:, some]) < (0.2 if name.endswith("bf16") else 1e-5)


def test_grouped_queries_have_fewer_edges_by_key_value_heads(job_of):
    job, true = job_of("llama")
    assert len(job.edges["kv"]) < len(job.edges["query"])
    assert job.nodes("kv").n_edges == true["kv"].shape[1]
    assert job.first_difference == 2


def test_a_job_is_read_as_it_was_written(job_of, tmp_path):
    job, _ = job_of("gpt2")
    job.save(tmp_path / "job.json")
    assert Job.load(tmp_path / "job.json") == job


def test_places_and_groups():
    assert [place(s) for s in ("input", "m3", "a10.h2")] == [(-1, None), (3, None), (10, 2)]
    nodes = Nodes(2, 2, 2, False)
    edges = [("m0", "logits"), ("input", "a0.h1<k>"), ("input", "m1")]
    found = [[i for i, *_ in some] for some in grouped(edges, nodes, 2)]
    assert found == [[1, 2], [0]]  # by layer and what is read


class Fake(EdgePeer):
    """Zeros, slow at the first batch size."""

    packages = ("numpy",)
    batches = (1, 2)

    def prepare(self, job):
        self.job = job

    def effects(self, edges, batch):
        if batch == 1:
            torch.linspace(0, 1, 3_000_000).sin().sum()
        return np.zeros((len(self.job.clean), len(edges)))


def test_a_process_tries_batch_sizes_and_tells_what_it_took(job_of, tmp_path):
    job, true = job_of("gpt2")
    said = together(carry_out(Fake(), job, tmp_path / "effects.npy"))
    assert set(said["trials"]) == {"1", "2"}
    assert said["best"] == 2
    assert len(said["seconds"]) == job.repeats
    assert said["versions"]["numpy"] == np.__version__
    wrong = judged(said, tmp_path / "effects.npy", true["query"])
    assert wrong["status"] == "disagrees"
    assert wrong["seconds"] == []
    np.save(tmp_path / "effects.npy", true["query"])
    assert judged(said, tmp_path / "effects.npy", true["query"])["status"] == "measured"


def test_a_process_that_fails_says_why(tmp_path):
    (tmp_path / "job.json").write_text("{}")
    told = "eap-ig", str(tmp_path / "job.json"), str(tmp_path / "effects.npy")
    said = together(lines_of(sys.executable, 1, WORK, *told, log=tmp_path / "log"))
    assert "KeyError" in said["error"]
    assert judged(said, tmp_path / "effects.npy", np.ones(1))["status"] == "failed"
    if Path("/bin/false").exists():
        said = together(lines_of("/bin/false", 1, WORK, *told, log=tmp_path / "log"))
        assert said["error"] == "its process ended (exit code 1)"


def test_a_comparison_in_processes_and_its_table(tmp_path, monkeypatch):
    def none(*args):
        raise DeltapatchError("the environment for tlens cannot be made")

    monkeypatch.setattr(edge_compare, "isolated_python", none)
    sizes = {"layers": 1, "heads": 2, "d_model": 8, "vocab": 31}
    found = edge_compare.compare(
        ["gpt2"], ["deltapatch-fp32", "tlens"], tmp_path, lambda text: None, sizes=sizes,
        options={"pairs": 1, "length": 4, "first": 1},
    )  # fmt: skip
    ours, tlens = found["gpt2"]["peers"].values()
    assert ours["status"] == "measured"
    assert ours["difference"] < 1e-5
    assert "cannot be made" in tlens["error"]
    rows = markdown.table({"kind": "edge-peers", "models": found}).splitlines()
    assert len(rows) == 2 + 1 + 2
    assert rows[-1].endswith("| failed |")


def test_an_environment_with_these_packages_alone(tmp_path, monkeypatch):
    calls = []

    def run(command, name):
        calls.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        return str(tmp_path)

    monkeypatch.setattr(isolate, "_run", run)
    python = isolate.python_of("auto-circuit", ["auto-circuit==1.0.1"], tmp_path, lambda text: None)
    assert python.endswith(os.path.join("bin", "python"))
    (install,) = (c for c in calls if "install" in c)
    assert install[-1] == "auto-circuit==1.0.1"
    assert install[-2].startswith("torch==")


@pytest.mark.slow
def test_the_module_s_help():
    command = [sys.executable, "-m", "deltapatch.bench.edge_compare", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--peers" in done.stdout
