"""The Triton backend: which device gets it, and its kernels in Triton's interpreter (interpreted*.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltapatch.errors import DeltapatchError
from deltapatch.kernels import backend
from deltapatch.kernels.backend import REFERENCE, TRITON, choose_backend
from deltapatch.kernels.lang import HAS_TRITON

FILES = ("interpreted.py", "interpreted_attention.py")


def begin(file, which="not slow", **environment):
    """Test a file in a process of its own: the interpreter and the compiler cannot share one."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which),
            *("-W", "ignore:overflow encountered in exp:RuntimeWarning"),  # numpy's: 1 / inf is meant to be 0
            str(Path(__file__).with_name(file)),
        ],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    said, _ = process.communicate()
    assert process.returncode == 0, said[-12_000:]


@pytest.fixture(scope="module")
def interpreting():
    """All files at once: the interpreter is slow, and uses one core."""
    running = {file: begin(file, TRITON_INTERPRET="1", OMP_NUM_THREADS="1") for file in FILES}
    yield running
    for process in running.values():
        if process.poll() is None:  # its test was not asked for, or failed early
            process.kill()
            process.communicate()


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")
@pytest.mark.parametrize("file", FILES)
def test_every_kernel_in_the_interpreter(file, interpreting):
    finish(interpreting[file])


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")
def test_larger_sweeps_in_the_interpreter():
    finish(begin("interpreted.py", "slow", TRITON_INTERPRET="1", OMP_NUM_THREADS="1"))


def test_auto_is_triton_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    assert choose_backend("auto", "cuda:0") is TRITON
    assert choose_backend("auto", "cpu") is REFERENCE
    assert choose_backend("triton", "cuda") is TRITON
    assert choose_backend("reference", "cuda") is REFERENCE
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    assert choose_backend("auto", "cuda") is REFERENCE


def test_triton_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    with pytest.raises(DeltapatchError, match="needs a CUDA device, not cpu: use backend='auto'"):
        choose_backend("triton", "cpu")
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    with pytest.raises(DeltapatchError, match="which is not installed: use backend='auto'"):
        choose_backend("triton", "cuda")


def test_without_triton_the_package_works_as_before():
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "from deltapatch.kernels.backend import choose_backend\n"
        "print(choose_backend('auto', 'cpu').name)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "reference", run.stderr
