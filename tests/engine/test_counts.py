"""A guard of speed that does not depend on the machine: FLOPs, calls, allocations and bytes of three sweeps.

They are counted by PyTorch's profiler, on one thread. Who makes them fewer writes the smaller numbers here.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Of each sweep of counts_probe.py: FLOP of products, calls of operations, allocations, bytes allocated.
MOST = (
    (1_728_176, 15_509, 874, 1_392_615),
    (2_180_474, 11_519, 633, 1_719_487),
    (7_433_903, 22_308, 1_222, 5_974_372),
)


@pytest.mark.slow
def test_sweeps_do_no_more_than_they_did():
    probe = Path(__file__).with_name("counts_probe.py")
    done = subprocess.run([sys.executable, str(probe)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads([line for line in done.stdout.splitlines() if line.startswith("[{")][-1])
    for counts, (flops, calls, allocations, n_bytes) in zip(found, MOST, strict=True):
        assert counts["flops"] == flops
        if torch.__version__.startswith("2.13"):  # how many operations one is made of is each version's own
            assert counts["calls"] <= calls
            assert counts["allocations"] <= allocations
            assert counts["bytes"] <= n_bytes
