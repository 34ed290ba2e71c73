"""Compilations are counted: each specialisation once a process, whatever else listens."""

import pytest
import torch

from deltapatch.bench.compile_kernels import compiling_for
from deltapatch.kernels import compilations
from deltapatch.kernels.compilations import count_compilations
from deltapatch.kernels.lang import HAS_TRITON
from deltapatch.kernels.narrow_triton import narrow_rows


@pytest.fixture
def narrowed():
    """Narrows rows to below this power of two, a compile-time argument, on a GPU that is not there."""
    triton = pytest.importorskip("triton")
    kernel = narrow_rows.__globals__["_narrow_kernel"]
    with compiling_for(90):
        yield lambda top: narrow_rows(torch.zeros(2, 32), torch.float16, top)
    kernel.device_caches.clear()
    assert triton.knobs.runtime.jit_post_compile_hook is None


def test_a_specialisation_is_counted_once(narrowed):
    with count_compilations() as n:
        narrowed(11)
        assert (n.count, n.names) == (1, ["_narrow_kernel"])
        narrowed(11)
        assert n.count == 1
        narrowed(12)
        assert n.names == ["_narrow_kernel"] * 2
    narrowed(13)
    assert n.count == 2


def test_one_within_another(narrowed):
    with count_compilations() as outer:
        with count_compilations() as inner:
            narrowed(11)
        narrowed(12)
    assert (outer.count, inner.count) == (2, 1)


def test_without_triton_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(compilations, "HAS_TRITON", False)
    with count_compilations() as n:
        pass
    assert (n.count, n.names) == (0, [])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")
def test_on_a_gpu():
    with count_compilations() as n:
        for top in (10, 11, 10):  # no other test takes these
            narrow_rows(torch.zeros(2, 64, device="cuda"), torch.float16, top)
    assert n.names == ["_narrow_kernel"] * 2
