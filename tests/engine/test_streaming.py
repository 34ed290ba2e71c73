"""Streamed sweeps: the same bits as of a model in memory, in memory that does not grow with the layers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import deltapatch
from deltapatch.bench.true_shapes import CONFIGS, random_model, write_random_model
from deltapatch.engine.wavefront.pool import threads
from deltapatch.models.tensors import MadeTensors
from deltapatch.results.metrics import MEASURED

GPTJ = CONFIGS["gptj-6b"]
SMALL = {"n_embd": 64, "n_head": 4, "rotary_dim": 8, "vocab_size": 3000, "n_layer": 3}
WIDE = {"n_embd": 640, "n_head": 8, "rotary_dim": 16, "vocab_size": 4000}
LAYER = 12 * 640 * 640  # entries of a layer of these
SITES = ["mlp_out", "z", "mlp_post"]


def checkpoint(folder, dtype=torch.float16, **sizes):
    write_random_model(GPTJ | sizes, folder, dtype, shard_bytes=1 << 22)
    return folder


@pytest.fixture(params=[1, 2])
def _so_many_threads(request):
    with threads(request.param):
        yield


@pytest.mark.usefixtures("_so_many_threads")
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "fp32"), (torch.float16, "fp64"), (torch.bfloat16, "bf16"), (torch.float32, "fp32")],
)
def test_streamed_effects_are_those_of_a_model_in_memory(dtype, precision, tmp_path):
    folder = checkpoint(tmp_path / "model", dtype, **SMALL)
    draw = torch.Generator().manual_seed(0)
    pairs = [
        deltapatch.PromptPair(*torch.randint(3000, (2, n), generator=draw).tolist(), 5, 6) for n in (5, 7, 5)
    ]
    found, prints = [], set()
    for stream in (False, True):
        model = deltapatch.load_model(folder, device="cpu", stream=stream)
        options = {"precision": precision, "memory_budget": 1 << 28, "positions": [0, -1]}
        found.append(deltapatch.sweep(model, pairs, sites=SITES, progress=False, **options))
        prints.add(model.fingerprint())
    kept, streamed = found
    assert streamed.meta["stream"]
    assert not kept.meta["stream"]
    assert kept.meta["fingerprint"] == streamed.meta["fingerprint"]
    assert len(prints) == 1
    for site in SITES:
        for name in MEASURED:
            assert np.array_equal(kept.values(name, site), streamed.values(name, site), equal_nan=True)
            assert np.nan_to_num(kept.values(name, site)).any() or name in (
                "flip",
                "says_clean",
                "says_corrupted",
            )
    assert np.array_equal(kept.reference.logp, streamed.reference.logp)


def test_weights_that_are_made_are_made_once(monkeypatch, tmp_path):
    """A sweep that keeps nothing asks for no fingerprint, which would draw random weights again."""
    model, drawn, read = random_model(GPTJ | SMALL, "cpu", torch.float32), [], MadeTensors.read
    monkeypatch.setattr(MadeTensors, "read", lambda self, name: drawn.append(name) or read(self, name))
    pairs = [deltapatch.PromptPair([1, 2, 3], [1, 5, 3], 5, 6)]
    deltapatch.sweep(model, pairs, sites="z", progress=False, noise_sample=0)
    assert drawn == []
    deltapatch.sweep(model, pairs, sites="z", progress=False, noise_sample=0, out=tmp_path / "run")
    assert len(drawn) == len(set(drawn)) > 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_layers(tmp_path):
    folders = [checkpoint(tmp_path / f"{n}", n_layer=n, **WIDE) for n in (8, 24)]
    probe = Path(__file__).with_name("streaming_probe.py")
    done = subprocess.run([sys.executable, probe, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    few, many = (json.loads(line) for line in done.stdout.splitlines())
    # Of sixteen layers more not one, as it is computed with, whatever allocators keep.
    for memory in ("own", "mapped"):
        assert abs(many[memory] - few[memory]) < 4 * LAYER, (few, many)
    assert few["own"] > 2 * 4 * LAYER, "two layers are converted to float32: this measures nothing"
