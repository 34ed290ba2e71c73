"""Tiny models on disk, workloads for them, the independent oracle, and a way to run commands."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from deltapatch.bench.peers.registry import make_peer
from deltapatch.bench.random_models import Shape, make_model, make_pairs
from deltapatch.bench.sides.workload import Workload, one_length
from deltapatch.cli.main import cli
from deltapatch.models.load import load_model

LENGTH, PAIRS = 6, 2


@pytest.fixture(scope="session")
def true_oracle():
    """tests/engine/oracle.py, which shares no code with deltapatch."""
    path = Path(__file__).parent.parent / "engine" / "oracle.py"
    spec = importlib.util.spec_from_file_location("bench_true_oracle", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """The folder of a tiny random model of an architecture."""
    made = {}

    def folder(architecture):
        if architecture not in made:
            shape = Shape(architecture, layers=3, d_model=16, d_mlp=20, heads=2, vocab=61, context=64)
            made[architecture] = make_model(shape, tmp_path_factory.mktemp("models") / architecture)
        return made[architecture]

    return folder


@pytest.fixture(scope="session")
def work_of(folder_of):
    """A workload on it."""

    def work(architecture="gpt_neox", metric="ie", batches=(5,)):
        folder = folder_of(architecture)
        ids = one_length(make_pairs(load_model(folder), PAIRS, LENGTH))
        return Workload(str(folder), *ids, metric=metric, batches=batches)

    return work


@pytest.fixture
def peer_of():
    """A peer that can run here; the test is skipped where it cannot."""

    def peer(name):
        found = make_peer(name)
        if missing := found.missing():
            pytest.skip(missing)
        return found

    return peer


@pytest.fixture
def command():
    """Runs `deltapatch ...` in this process: code, out (stdout) and err (stderr)."""

    def run(*args):
        result = CliRunner().invoke(cli, [str(arg) for arg in args])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)

    return run
