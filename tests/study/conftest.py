"""A tiny model, another of its shape, and a small study that several tests look at."""

import importlib.util
import sys
from pathlib import Path

import pytest

from deltapatch.models.load import load_model
from deltapatch.models.model import Model
from deltapatch.study.reproduce import Study, reproduce


def _register(name: str, file: Path) -> None:
    # --import-mode=importlib puts no test folder on sys.path, so a plain import would not find them
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_HERE = Path(__file__).parent
_register("engine_oracle", _HERE.parent / "engine" / "oracle.py")
_register("tasks_tokenizers", _HERE.parent / "tasks" / "conftest.py")
_register("study_tiny", _HERE / "tiny.py")

from study_tiny import NAMES, SMALL, make_model  # noqa: E402


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def model(model_folder) -> Model:
    return load_model(model_folder, device="cpu")


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> Model:
    return load_model(make_model(tmp_path_factory.mktemp("models") / "other", seed=1), device="cpu")


@pytest.fixture(scope="session")
def study(model, tmp_path_factory) -> Study:
    return reproduce(model, tmp_path_factory.mktemp("study") / "study", SMALL, NAMES, progress=False)
