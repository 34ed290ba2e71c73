"""Makes the helper modules of this folder importable under names of their own."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _register(name: str, file: str) -> ModuleType:
    # --import-mode=importlib puts no test folder on sys.path, so a plain import would not find them
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_register("engine_oracle", "oracle.py")
_register("engine_tiny", "tiny.py")
_register("engine_edge_oracle", "edge_oracle.py")
_register("engine_saes", "saes.py")
survivor = _register("engine_survivor", "survivor.py")


@pytest.fixture(autouse=True)
def _narrow_few_tokens_too(monkeypatch):
    """Tiny sweeps would else be taken in float32, and say nothing about bfloat16."""
    monkeypatch.setattr("deltapatch.engine.wavefront.products.FEW", 0)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The run folder of a sweep that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    survivor.sweep(run)
    return run


@pytest.fixture(scope="session")
def begun(tmp_path_factory):
    """A run folder that is cut off after four of its passes."""
    run = tmp_path_factory.mktemp("begun") / "run"
    survivor.cut_off(run, 4)
    return run


@pytest.fixture
def cut(begun, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(begun, tmp_path / "cut"))


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """A run folder whose parts are all done."""
    run = tmp_path_factory.mktemp("parts") / "run"
    for i in (1, 2):
        survivor.sweep(run, shard=(i, 2))
    return run
