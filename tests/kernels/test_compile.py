"""What the kernels compile to for GPUs that are not here, at the shapes of real models."""

import subprocess
import sys

import pytest

from deltapatch.bench.compile_kernels import MODELS, SHARED_LIMIT, Compiled
from deltapatch.kernels.lang import HAS_TRITON

KERNELS = (
    "_add_norm_kernel",
    "_activation_kernel",
    "_attention_kernel",
    "_gather_kernel",
    "_narrow_kernel",
    "_dots_kernel",
    "_take_in_kernel",
)


def compiled(*arguments):
    """The table, checked. A process of its own, where no test has touched memory or Triton."""
    run = subprocess.run(
        [sys.executable, "-m", "deltapatch.bench.compile_kernels", *arguments], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def missing(table, models, archs):
    """Kernels that the table lacks."""
    seen = {(line.split()[0], line.split()[1], line.split()[3]) for line in table.splitlines()}
    return sorted({(m, a, k) for m in models for a in archs for k in KERNELS} - seen)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")
def test_kernels_fit_a_gpu():
    table = compiled("--model", "gptj-6b", "--arch", "90")
    assert missing(table, ["gptj-6b"], ["90"]) == []


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")
def test_kernels_fit_every_gpu():
    table = compiled()
    assert missing(table, MODELS, [str(arch) for arch in SHARED_LIMIT]) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spilled": 4}, "spills 4 bytes"),
        ({"shared": 227 * 1024 + 1}, "of 232448"),
        ({"serialised": True}, "waits after each wgmma"),
        ({"tensor": 0}, "without tensor cores"),
    ],
    ids=["spill", "shared", "wgmma", "tensor"],
)
def test_what_must_not_be(change, problem):
    good = Compiled("m", 90, "fp16", "_attention_kernel", "", 128, 0, 1024, 100, 8, False)
    assert good.problems() == []
    assert [problem in said for said in good._replace(**change).problems()] == [True]


def test_kernels_without_products_need_no_tensor_cores():
    assert Compiled("m", 80, "fp16", "_add_norm_kernel", "", 128, 0, 1024, 100, 0, False).problems() == []
