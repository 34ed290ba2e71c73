"""A guard of speed that does not depend on the machine: FLOPs, calls, allocations and bytes of three sweeps.

They are counted by PyTorch's profiler, on one thread. Who makes them fewer writes the smaller numbers here.
"""

import pytest
import torch
from engine_tiny import hf_model, pairs, true_model
from torch.profiler import ProfilerActivity, profile

import deltapatch

pytestmark = pytest.mark.slow

VARIANT = "llama-grouped"
# (what is swept, FLOP of products, calls of operations, allocations, bytes allocated)
SWEEPS = [
    ({"sites": ["mlp_out", "attn_out"]}, 2_185_561, 26_220, 1_537, 1_640_293),
    ({"sites": ["mlp_post"], "positions": "last"}, 2_180_232, 12_178, 650, 1_627_225),
    ({"sites": ["z", "k"], "source": "mean"}, 7_436_600, 48_383, 2_731, 5_504_416),
]


@pytest.fixture
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize(("swept", "flops", "calls", "allocations", "n_bytes"), SWEEPS)
def test_a_sweep_does_no_more_than_it_did(swept, flops, calls, allocations, n_bytes):
    model = deltapatch.from_transformers(hf_model(VARIANT))
    prompts = [deltapatch.PromptPair(*pair) for pair in pairs(true_model(VARIANT), (6, 4, 6))]
    options = {"precision": "fp32", "progress": False, "noise_sample": 0, "memory_budget": 1 << 28}
    deltapatch.sweep(model, prompts, **options, **swept)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, profile_memory=True) as found:
        deltapatch.sweep(model, prompts, **options, **swept)
    each = [event for event in found.key_averages() if event.key.startswith("aten::")]
    assert sum(event.flops for event in each) == flops
    if not torch.__version__.startswith("2.13"):
        return  # how many operations one is made of is each version's own
    assert sum(event.count for event in each) <= calls
    empty = [event.count for event in each if event.key in ("aten::empty", "aten::empty_strided")]
    assert sum(empty) <= allocations
    memory = (event.self_cpu_memory_usage for event in found.events())
    assert sum(size for size in memory if size > 0) <= n_bytes
