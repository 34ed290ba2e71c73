"""Nothing compiles inside a timed sweep: each launch there has a specialisation that the warm-up had met.

A stand-in for a GPU's driver lets the host's code run on CPU tensors; Triton says what it would compile and
for which key, and compiles nothing. The kernels do nothing, so numbers mean nothing here.
"""

import pytest
import torch

import deltapatch
from deltapatch.bench.compile_kernels import recording_for
from deltapatch.bench.gpu_parts import COMPONENTS, NEURONS, warm_layers
from deltapatch.bench.true_shapes import CONFIGS, random_model
from deltapatch.engine import passes
from deltapatch.kernels import backend
from deltapatch.kernels.lang import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")

SMALL = {"n_layer": 6, "num_hidden_layers": 6, "n_embd": 32, "hidden_size": 32, "n_head": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32, "n_inner": 32,
         "vocab_size": 64, "rotary_dim": 8}  # fmt: skip


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch):
    # Blocks so small that layers are cut into uneven ones, as a GPU's are at the true shapes.
    monkeypatch.setattr(backend.TRITON, "block_tokens", 24)
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    monkeypatch.setattr("deltapatch.engine.wavefront.products.FEW", 0)  # of CPUs alone
    monkeypatch.setattr(passes, "check_finite", lambda *what: None)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)


@pytest.mark.parametrize("mode", ["fp16", "bf16", "fp8", "fp32"])
@pytest.mark.parametrize("what", [NEURONS, COMPONENTS], ids=["neurons", "components"])
@pytest.mark.parametrize("name", ["gptj-6b", "llama-7b", "pythia-2.8b"])
def test_the_warm_up_meets_all_that_the_sweep_launches(name, what, mode):
    config = {key: SMALL.get(key, value) for key, value in CONFIGS[name].items()}
    model = random_model(config, "cpu", torch.float16)
    sites, positions, _ = what
    pairs = [deltapatch.PromptPair([1, 2, 3, 4, 5], [1, 7, 3, 8, 9], 3, 4)] * 2
    options = {"positions": positions, "precision": mode, "backend": "triton", "progress": False}
    options |= {"noise_sample": 0, "metrics": "logit_diff,dlogp_clean"}
    with recording_for(90) as warm:
        deltapatch.sweep(model, pairs, sites=sites, layers=warm_layers(model.spec), **options)
    with recording_for(90) as timed:
        deltapatch.sweep(model, pairs, sites=sites, **options)
    assert timed
    new = sorted(set(timed) - set(warm))
    assert not new, f"{len(new)} of {len(timed)}: {new[:2]}"


def test_a_warm_up_of_the_last_layer_alone_would_miss_some():
    config = {key: SMALL.get(key, value) for key, value in CONFIGS["gptj-6b"].items()}
    model = random_model(config, "cpu", torch.float16)
    pairs = [deltapatch.PromptPair([1, 2, 3, 4, 5], [1, 7, 3, 8, 9], 3, 4)]
    options = {"sites": "mlp_post", "positions": "last", "precision": "fp16", "backend": "triton"}
    options |= {"noise_sample": 0, "progress": False}
    with recording_for(90) as warm:
        deltapatch.sweep(model, pairs, layers=[5], **options)
    with recording_for(90) as timed:
        deltapatch.sweep(model, pairs, **options)
    missed = {name for name, _ in set(timed) - set(warm)}
    assert missed >= {"_activation_kernel", "_add_norm_kernel"}
