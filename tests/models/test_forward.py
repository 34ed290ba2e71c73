"""The pieces of the forward on their own: rotary, attention, projections, activations."""

import math

import pytest
import torch
import transformers.activations
from hypothesis import given, settings
from hypothesis import strategies as st

from deltapatch import from_transformers
from deltapatch.models import forward
from deltapatch.models.config import _ACTIVATIONS
from deltapatch.models.forward import (
    activation,
    attend,
    block,
    contexts,
    project_qkv,
    rope_tables,
    rotate,
    split_qkv,
)
from deltapatch.models.spec import RopeSpec, Scores


@settings(max_examples=40, deadline=None)
@given(
    half=st.integers(1, 4),
    rest=st.integers(0, 3),
    interleaved=st.booleans(),
    position=st.integers(0, 4000),
    base=st.floats(10, 1e6),
)
def test_rotation_is_a_turn_of_each_pair(half, rest, interleaved, position, base):
    dim = 2 * half
    rope = RopeSpec(dim=dim, base=base, interleaved=interleaved)
    cos, sin = rope_tables(rope, position + 1, torch.float64, "cpu")
    assert cos.shape == sin.shape == (position + 1, half)
    x = torch.randn(1, 2, dim + rest, dtype=torch.float64)
    y = rotate(x, cos[position:], sin[position:], rope)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turn = torch.complex(x[0, :, a], x[0, :, b]) * complex(
            math.cos(position * base ** (-2 * i / dim)), math.sin(position * base ** (-2 * i / dim))
        )
        assert torch.allclose(torch.complex(y[0, :, a], y[0, :, b]), turn, atol=1e-11)
    assert torch.equal(y[..., dim:], x[..., dim:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_linear_and_takes_gathered_positions(interleaved):
    rope = RopeSpec(dim=4, interleaved=interleaved)
    cos, sin = rope_tables(rope, 9, torch.float64, "cpu")
    rows = torch.tensor([7, 0, 3])
    x, y = torch.randn(2, 2, 3, 5, 6, dtype=torch.float64)
    turned = rotate(x, cos[rows], sin[rows], rope)
    assert turned.shape == x.shape
    summed = rotate(x + y, cos[rows], sin[rows], rope) - turned
    assert torch.allclose(summed, rotate(y, cos[rows], sin[rows], rope), atol=1e-12)
    whole = torch.zeros(2, 9, 5, 6, dtype=torch.float64)
    whole[:, rows] = x
    assert torch.equal(rotate(whole, cos, sin, rope)[:, rows], turned)


def test_float32_tables_are_the_true_values_rounded():
    rope = RopeSpec(dim=64)
    exact = rope_tables(rope, 2000, torch.float64, "cpu")
    single = rope_tables(rope, 2000, torch.float32, "cpu")
    for a, b in zip(exact, single, strict=True):
        assert torch.equal(a.float(), b)


def _naive_attention(q, k, v):
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2).transpose(1, 2) for t in (k, v))
    scores = q.transpose(1, 2) @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ v).transpose(1, 2)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 17),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    budget=st.integers(1, 600),
)
def test_attention_in_any_chunks(batch, length, kv, group, budget):
    shape = (batch, length)
    scores = Scores(5**-0.5)
    q = 3 * torch.randn(*shape, kv * group, 5, dtype=torch.float64)
    k, v = torch.randn(2, *shape, kv, 5, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "_MAX_SCORES", budget)
        z = attend(q, k, v, scores)
    assert torch.allclose(z, _naive_attention(q, k, v), atol=1e-12)


def test_attention_over_2048_tokens_is_exact_enough_in_float32():
    q, k, v = torch.randn(3, 1, 2048, 2, 16, dtype=torch.float64)
    exact = attend(q, k, v, Scores(0.25))
    single = attend(q.float(), k.float(), v.float(), Scores(0.25))
    assert single.dtype == torch.float32
    assert float((single - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("name", _ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    theirs = transformers.activations.ACT2FN[name](x)
    ours = activation(_ACTIVATIONS[name])(x)
    # gelu_fast rounds sqrt(2/π) to ten digits; the others differ by the order of products alone.
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10 if name == "gelu_fast" else 1e-14)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt_neox", {}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gptj", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    ],
)
def test_a_block_adds_up(kind, options, build):
    model = from_transformers(build(kind, **options).double())
    spec, layer = model.spec, model.layer(1, torch.float64)
    x = torch.randn(3, 7, spec.d_model, dtype=torch.float64)
    a = block(x, layer, contexts(spec, 9, torch.float64, "cpu")[1])
    assert a.q.shape == a.q_rotated.shape == a.z.shape == (3, 7, spec.n_heads, spec.d_head)
    assert a.k.shape == a.k_rotated.shape == a.v.shape == (3, 7, spec.n_kv_heads, spec.d_head)
    assert a.up.shape == a.mlp_post.shape == (3, 7, spec.d_mlp)
    assert (a.gate is None) != spec.gated
    assert (a.resid_mid is None) == spec.parallel
    assert torch.equal(a.resid_pre, x)
    assert torch.allclose(a.resid_post, x + a.attn_out + a.mlp_out, atol=1e-12)
    down = a.mlp_post @ layer.down.weight.T
    assert torch.allclose(a.mlp_out, down if layer.down.bias is None else down + layer.down.bias)
    assert all(t is None or t.dtype == torch.float64 for t in a)


@pytest.mark.parametrize(("kind", "options"), [("gpt_neox", {}), ("llama", {"attention_bias": True})])
def test_differences_of_queries_keys_and_values_need_no_bias(kind, options, build):
    model = from_transformers(build(kind, **options).double())
    spec, layer = model.spec, model.layer(0, torch.float64)
    x, d = torch.randn(2, 5, spec.d_model, dtype=torch.float64)
    moved = project_qkv(x + d, layer, spec)
    still = project_qkv(x, layer, spec)
    change = split_qkv([d @ part.weight.T for part in layer.qkv], spec)
    assert not torch.allclose(change[0], project_qkv(d, layer, spec)[0])
    for m, s, c in zip(moved, still, change, strict=True):
        assert torch.allclose(m - s, c, atol=1e-12)
