"""Whatever a file holds: a right result or one sentence. Never another error, a hang, a crash or much memory.

The tests here are quick; `-m slow` looks longer.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from fuzz_hunter import Hunter, broken_bytes, broken_safetensors, broken_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltapatch.results.folder import checksum

QUICK, LONG = 15, 600  # examples
LOOSE = settings(deadline=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)


def fuzz(test: Callable[..., None]) -> Callable[..., None]:
    """A test of drawn data with few examples, and in the slow suite with many."""

    def run(examples: int, hunter: Hunter, seeds: Callable[[str], Path], *more: object) -> None:
        @settings(LOOSE, max_examples=examples)
        @given(data=st.data())
        def examine(data: st.DataObject) -> None:
            test(data, hunter, seeds, *more)

        examine()

    return run


@fuzz
def model_config(data, hunter, seeds, kind):
    seed = seeds(kind)
    config = json.loads((seed / "config.json").read_text())
    target = data.draw(st.sampled_from(["model", "streamed"]))
    hunter.check(target, seed, {"config.json": data.draw(broken_text(config))})


@fuzz
def weights(data, hunter, seeds, kind):
    seed = seeds(kind)
    file = data.draw(st.sampled_from(sorted(p.name for p in seed.glob("*.safetensors"))))
    target = data.draw(st.sampled_from(["model", "streamed"]))
    hunter.check(target, seed, {file: data.draw(broken_safetensors((seed / file).read_bytes()))})


@fuzz
def index(data, hunter, seeds):
    seed, name = seeds("sharded"), "model.safetensors.index.json"
    hunter.check("model", seed, {name: data.draw(broken_text(json.loads((seed / name).read_text())))})


@fuzz
def adapter(data, hunter, seeds):
    seed = seeds("adapter")
    if data.draw(st.booleans()):
        name = "adapter/adapter_config.json"
        broken = data.draw(broken_text(json.loads((seed / name).read_text())))
    else:
        name = "adapter/adapter_model.safetensors"
        broken = data.draw(broken_safetensors((seed / name).read_bytes()))
    hunter.check("adapter", seed, {name: broken})


@fuzz
def tokenizer(data, hunter, seeds):
    seed = seeds("with_tokenizer")
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    hunter.check("tokenizer", seed, {name: data.draw(broken_text(json.loads((seed / name).read_text())))})


def lines(data, path):
    """A JSONL file with one line broken, or its bytes."""
    content = path.read_bytes()
    if data.draw(st.integers(0, 3)) == 0:
        return data.draw(broken_bytes(content))
    rows = content.splitlines()
    at = data.draw(st.integers(0, len(rows) - 1))
    rows[at] = data.draw(broken_text(json.loads(rows[at])))
    return b"\n".join(rows)


@fuzz
def pairs(data, hunter, seeds):
    seed = seeds("pairs")
    hunter.check("pairs", seed, {"pairs.jsonl": lines(data, seed / "pairs.jsonl")})


@fuzz
def task_files(data, hunter, seeds):
    name = data.draw(st.sampled_from(["facts", "problems"]))
    hunter.check(name, seeds("tasks"), {f"{name}.jsonl": lines(data, seeds("tasks") / f"{name}.jsonl")})


def broken_run(data, seed):
    """A file of a run folder, broken: its name and bytes."""
    name = data.draw(st.sampled_from(sorted(path.name for path in seed.iterdir())))
    if name == "run.json":
        return name, data.draw(broken_text(json.loads((seed / name).read_text())))
    if name == "pairs.jsonl":
        return name, lines(data, seed / name)
    return name, data.draw(broken_safetensors((seed / name).read_bytes()))


@fuzz
def run_folder(data, hunter, seeds):
    what = data.draw(st.sampled_from(["run", "outcome", "listed", "edges"]))
    name, broken = broken_run(data, seeds(what))
    hunter.check(what, seeds(what), {name: broken}, right=hunter.ask(what, seeds(what))["text"])


@fuzz
def signed_run_folder(data, hunter, seeds):
    """Broken by somebody who knows how to make a checksum."""
    seed = hunter.folder / "signed"
    shutil.rmtree(seed, ignore_errors=True)
    what = data.draw(st.sampled_from(["run", "outcome", "listed", "edges"]))
    shutil.copytree(seeds(what), seed)
    name, broken = broken_run(data, seed)
    (seed / name).write_bytes(broken)
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        about = json.loads((seed / "run.json").read_bytes())
        about["sha256"] = checksum(about, seed)
        (seed / "run.json").write_text(json.dumps(about))
    hunter.check(what, seed, {})


@fuzz
def unfinished_run(data, hunter, seeds):
    seed = seeds("begun")
    names = sorted(p.name for p in (seed / "unfinished").iterdir() if p.suffix != ".lock")
    name = data.draw(st.sampled_from(names))
    content = (seed / "unfinished" / name).read_bytes()
    if name == "manifest.json":
        broken = data.draw(broken_text(json.loads(content)))
    elif name == "pairs.jsonl":
        broken = lines(data, seed / "unfinished" / name)
    else:
        broken = data.draw(broken_safetensors(content))
    hunter.check("merge", seed, {f"unfinished/{name}": broken}, right=merged(hunter, seeds))


def merged(hunter, seeds):
    whole = hunter.folder / "whole"
    if not whole.exists():
        shutil.copytree(seeds("begun"), whole)
    return hunter.ask("merge", whole)["text"]


@fuzz
def bin_file(data, hunter, seeds):
    seed, name = seeds("bin"), "pytorch_model.bin"
    hunter.check("convert", seed, {name: data.draw(broken_bytes((seed / name).read_bytes()))})


@fuzz
def autoencoder(data, hunter, seeds):
    if data.draw(st.booleans()):
        seed, name = seeds("gemma"), "params.npz"
        broken = data.draw(broken_bytes((seed / name).read_bytes()))
    else:
        seed = seeds("autoencoder")
        name = data.draw(st.sampled_from(["cfg.json", "sae_weights.safetensors"]))
        content = (seed / name).read_bytes()
        config = name == "cfg.json"
        broken = data.draw(broken_text(json.loads(content)) if config else broken_safetensors(content))
    hunter.check("autoencoder", seed, {name: broken})


CASES = {
    "config of gpt_neox": (model_config, "gpt_neox"),
    "config of gptj": (model_config, "gptj"),
    "config of llama": (model_config, "llama"),
    "weights": (weights, "gpt_neox"),
    "shards": (weights, "sharded"),
    "index": (index,),
    "adapter": (adapter,),
    "tokenizer": (tokenizer,),
    "autoencoder": (autoencoder,),
    "pairs": (pairs,),
    "files of tasks": (task_files,),
    "run": (run_folder,),
    "signed run": (signed_run_folder,),
    "unfinished run": (unfinished_run,),
    "bin": (bin_file,),
}


@pytest.mark.parametrize("case", CASES)
def test_broken_files(case, hunter, seeds):
    hunt, *more = CASES[case]
    hunt(QUICK, hunter, seeds, *more)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_broken_files_for_longer(case, hunter, seeds):
    hunt, *more = CASES[case]
    hunt(LONG, hunter, seeds, *more)
