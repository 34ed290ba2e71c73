"""A tiny checkpoint on disk, pairs for it, and a way to run commands as a user would."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from deltapatch.cli.main import cli
from deltapatch.models.builtin_models import builtin_model_path

TEXT_PAIR = {
    "clean": "Q: What is 3 plus 4? A:",
    "corrupted": "Q: What is 5 plus 4? A:",
    "clean_answer": "7",
    "corrupted_answer": "9",
    "labels": {"op1": 4},
}
SLOWLY = """
import time
from deltapatch.results.kept import KeptPasses
keep = KeptPasses.write
def write(*args):
    keep(*args)
    print("kept", flush=True)
    time.sleep(0.5)
KeptPasses.write = write
"""
IDS_PAIR = {"clean": [5, 6, 7, 8], "corrupted": [5, 9, 7, 8], "clean_answer": 3, "corrupted_answer": 4}


@pytest.fixture(scope="session")
def _tiny(tmp_path_factory) -> Path:
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = json.loads((builtin_model_path() / "config.json").read_text())["vocab_size"]
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(builtin_model_path() / name, folder)
    return folder


@pytest.fixture
def tiny(_tiny, tmp_path) -> Path:
    """A copy of a tiny GPT-NeoX folder, to be used or broken."""
    return Path(shutil.copytree(_tiny, tmp_path / "tiny"))


@pytest.fixture
def write_pairs(tmp_path) -> Callable[..., str]:
    """Writes pairs.jsonl from dictionaries, or from lines as they are."""

    def write(*pairs) -> str:
        lines = [pair if isinstance(pair, str) else json.dumps(pair) for pair in pairs]
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def command() -> Callable[..., SimpleNamespace]:
    """Runs `deltapatch ...` in this process: code, out (stdout) and err (stderr)."""

    def run(*args) -> SimpleNamespace:
        result = CliRunner().invoke(cli, [str(arg) for arg in args])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return SimpleNamespace(
            code=result.exit_code, out=result.stdout, err=result.stderr, data=result.stdout_bytes
        )

    return run


@pytest.fixture
def slowly() -> str:
    """Code for a process of its own, before the command: it says when a pass is kept, and waits a little."""
    return SLOWLY


@pytest.fixture
def text_pair() -> dict:
    return dict(TEXT_PAIR)


@pytest.fixture
def ids_pair() -> dict:
    return dict(IDS_PAIR)
