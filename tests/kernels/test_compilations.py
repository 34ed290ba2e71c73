"""Compilations are counted: each specialisation once a process, whatever else listens."""

from functools import partial

import numpy as np
import pytest
import torch

import deltapatch
from deltapatch.bench.compile_kernels import compiling_for, recording_for
from deltapatch.bench.true_shapes import CONFIGS, random_model
from deltapatch.kernels import backend, compilations
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


SMALL = {"n_layer": 3, "n_embd": 64, "n_head": 4, "vocab_size": 112, "rotary_dim": 8}


@pytest.fixture
def launched(monkeypatch):
    """What a sweep of a small random GPT-J launches, as (kernel, specialisation); nothing is computed."""
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "interpreted", lambda: True)  # so that a CPU may have the backend
    for where, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(where, name, getattr(where, name.replace("empty", "zeros")))
    model = random_model({**CONFIGS["gptj-6b"], **SMALL}, "cpu", torch.float16)

    def launch(lengths, sites, positions):
        prompts = [np.random.default_rng(0).integers(0, 112, (2, n)).tolist() for n in lengths]
        pairs = [deltapatch.PromptPair(*two, 3, 4) for two in prompts]
        options = {"precision": "fp16", "backend": "triton", "noise_sample": 0, "progress": False}
        with recording_for(90) as found:
            deltapatch.sweep(model, pairs, sites=sites, positions=positions, **options)
        return set(found)

    return launch


def test_other_prompts_and_pairs_compile_nothing_anew(launched):
    neurons, components = partial(launched, sites=["mlp_post"]), ["mlp_out", "attn_out"]
    # In blocks of one pair few neurons enter, and their columns are read as they lie.
    first = neurons([16, 12], positions="last") | neurons([14], positions="last")
    first |= launched([16, 16], components, "all")
    assert {name for name, _ in first} >= {"_add_norm_kernel", "_attention_kernel", "_dots_kernel"}
    second = neurons([11, 9, 9], positions="last") | launched([13, 9, 16], components, "all")
    assert second - first == set()
    assert {name for name, _ in launched([17], ["mlp_post"], "last") - first} == {"_attention_kernel"}


def test_patches_of_queries_keys_and_values_share_their_kernels(launched):

    def attention(lengths, *sites):
        return {key for name, key in launched(lengths, list(sites), "all") if name == "_attention_kernel"}

    queries, heads = attention([9], "q"), attention([9], "z")
    assert attention([9], "k") | attention([9], "v") | attention([10, 9], "q", "k", "v") <= queries
    assert heads <= queries  # rows that begin at a head have no scores, and need no kernel for them


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")
def test_on_a_gpu():
    with count_compilations() as n:
        for top in (10, 11, 10):  # no other test takes these
            narrow_rows(torch.zeros(2, 64, device="cuda"), torch.float16, top)
    assert n.names == ["_narrow_kernel"] * 2
