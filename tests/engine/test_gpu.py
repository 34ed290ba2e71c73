"""Whole sweeps on a GPU: run with -m gpu (python -m deltapatch.bench.gpu does)."""

import copy

import numpy as np
import pytest
import torch
from engine_tiny import VARIANTS, hf_model, pairs, true_model

import deltapatch
from deltapatch.engine.question import default_budget
from deltapatch.engine.wavefront.loop import Wavefront
from deltapatch.engine.wavefront.readout import ReadOut
from deltapatch.models.memory import available

pytestmark = pytest.mark.gpu

SITES = ["mlp_out", "attn_out", "z", "k", "mlp_post", "mlp_out.dim"]
TOLERANCE = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 3e-2, "fp8": 0.3}


def given(variant):
    return [deltapatch.PromptPair(*pair) for pair in pairs(true_model(variant), [6, 4, 6])]


def on_gpu(variant):
    # A module moves in place, and this one is shared by all tests.
    return deltapatch.from_transformers(copy.deepcopy(hf_model(variant, torch.float32)).to("cuda"))


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_finds_what_float64_finds(variant, precision):
    options = {"sites": SITES, "progress": False}
    exact = deltapatch.from_transformers(hf_model(variant, torch.float64))
    want = deltapatch.sweep(exact, given(variant), **options)
    got = deltapatch.sweep(on_gpu(variant), given(variant), precision=precision, **options)
    assert got.meta["backend"] == "triton"
    for site in SITES:
        a, b = (np.nan_to_num(e.values("logit_diff", site)) for e in (got, want))
        assert np.linalg.norm(a - b) <= TOLERANCE[precision] * np.linalg.norm(b), site


def test_a_second_sweep_and_a_second_model_have_the_memory_of_the_first(monkeypatch):
    # Tests beside this one take and give memory of the same device, so what is free is counted here.
    total = torch.cuda.get_device_properties(0).total_memory

    def free(device=None):
        return total - torch.cuda.memory_reserved(), total

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    model = on_gpu("llama-grouped")
    before = default_budget(model.device)
    deltapatch.sweep(model, given("llama-grouped"), sites=SITES, progress=False)
    assert default_budget(model.device) >= 0.99 * before
    held = torch.empty(int(0.6 * available(model.device)), dtype=torch.uint8, device="cuda")
    del held  # PyTorch keeps it, and still it can be had
    assert default_budget(model.device) >= 0.99 * before


def test_two_runs_give_the_same_bits():
    effects = [
        deltapatch.sweep(on_gpu("gptj"), given("gptj"), sites=SITES, precision="fp16", progress=False)
        for _ in range(2)
    ]
    for site in SITES:
        assert np.array_equal(*(e.values("ie", site) for e in effects), equal_nan=True)


def test_the_host_never_waits_inside_a_pass(monkeypatch):
    model = on_gpu("llama-grouped")
    options = {"sites": SITES, "precision": "fp16", "noise_sample": 0, "progress": False}
    deltapatch.sweep(model, given("llama-grouped"), **options)  # compiles
    run, read = Wavefront.run, ReadOut.read

    def strict(self):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def at_the_end(self, *arguments):
        torch.cuda.set_sync_debug_mode("default")
        return read(self, *arguments)

    monkeypatch.setattr(Wavefront, "run", strict)
    monkeypatch.setattr(ReadOut, "read", at_the_end)
    deltapatch.sweep(model, given("llama-grouped"), **options)


def test_unpatched_runs_are_float32_even_where_tf32_is_on():
    model, pair = on_gpu("neox-parallel"), given("neox-parallel")
    options = {"sites": "mlp_out", "precision": "fp32", "progress": False}
    plain = deltapatch.sweep(model, pair, **options)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        allowed = deltapatch.sweep(model, pair, **options)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert np.array_equal(plain.reference.logit, allowed.reference.logit)
    assert np.array_equal(plain.values("ie"), allowed.values("ie"), equal_nan=True)
