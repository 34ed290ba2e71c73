"""Makes the helper modules of this folder importable under names of their own."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


def _register(name: str, file: str) -> None:
    # --import-mode=importlib puts no test folder on sys.path, so a plain import would not find them
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_register("engine_oracle", "oracle.py")
_register("engine_tiny", "tiny.py")
_register("engine_survivor", "survivor.py")


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny products are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _narrow_few_tokens_too(monkeypatch):
    """Tiny sweeps would else be taken in float32, and say nothing about bfloat16."""
    monkeypatch.setattr("deltapatch.engine.products.FEW", 0)
