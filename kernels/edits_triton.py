"""Swaps as kernels walk through them, and the entry of hidden neurons by a Triton kernel; see swap.py."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltapatch.kernels.edits import Edit, Swap, swaps_of
from deltapatch.kernels.lang import jit, next_power_of_two, on_device, tl


class Patches(NamedTuple):
    """The patches of some places, ordered by token and place, and then as they were given.

    Those of place i at token t stand from `first[t * places + i]` to where the next ones begin.
    """

    first: Tensor  # [token * places + 1] int32
    source: Tensor  # [patch] int64, row of the place's delta
    at: Tensor  # [patch] int64, coordinate; -1: the whole vector
    deltas: list[Tensor]  # [place], [source token, width] contiguous; anything where a place has no patch


def order_patches(places: Sequence[Sequence[Edit]], n_tokens: int) -> Patches | None:
    """The swaps of some places in one table, made on the device; None where there are none."""
    keys, sources, ats = [], [], []
    deltas: list[Tensor | None] = []
    for i, edits in enumerate(places):
        swaps = swaps_of(edits)
        delta, offsets = _join(swaps)
        deltas.append(delta)
        for swap, offset in zip(swaps, offsets, strict=True):
            keys.append(swap.token * len(places) + i)
            sources.append(swap.source + offset)
            ats.append(torch.full_like(swap.token, -1) if swap.at is None else swap.at)
    if not sum(len(k) for k in keys):
        return None
    key, order = torch.sort(torch.cat(keys), stable=True)
    every = torch.arange(n_tokens * len(places) + 1, device=key.device)
    first = torch.searchsorted(key, every, out_int32=True)
    some = next(d for d in deltas if d is not None)
    return Patches(
        first, torch.cat(sources)[order], torch.cat(ats)[order], [some if d is None else d for d in deltas]
    )


def _join(swaps: list[Swap]) -> tuple[Tensor | None, list[int]]:
    """One delta for all swaps of a place, and where each one's rows begin in it."""
    if not swaps:
        return None, []
    different = [swaps[0].delta]
    offsets = [0]
    for swap in swaps[1:]:
        if swap.delta is not different[-1]:
            different.append(swap.delta)
        offsets.append(sum(len(d) for d in different[:-1]))
    return (different[0] if len(different) == 1 else torch.cat(different)).contiguous(), offsets


def gather_columns_triton(edits: Sequence[Edit], weight: Tensor, n_tokens: int) -> Tensor:
    """The same as `gather_columns`; each token's patches add up in a fixed order."""
    d_model, d_mlp = weight.shape
    patches = order_patches([edits], n_tokens)
    if patches is None:
        return weight.new_zeros(n_tokens, d_model)
    n_patches = len(patches.source)
    if n_patches * 4 > d_mlp:
        # Reading columns of a row-major matrix is slow: where many are needed, transpose it once.
        weight = weight.t().contiguous().t()
    out = weight.new_empty(n_tokens, d_model)
    block_p = 1 if n_patches <= 2 * n_tokens else 8
    block_d = min(1024 // block_p, next_power_of_two(d_model))
    with on_device(out):
        _gather_kernel[(n_tokens, -(-d_model // block_d))](
            p_out=out,
            p_delta=patches.deltas[0],
            p_weight=weight,
            p_first=patches.first,
            p_source=patches.source,
            p_at=patches.at,
            d_model=d_model,
            d_mlp=d_mlp,
            s_out=weight.stride(0),
            s_in=weight.stride(1),
            BLOCK_P=block_p,
            BLOCK_D=block_d,
        )
    return out


@jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    p_out,
    p_delta,
    p_weight,
    p_first,
    p_source,
    p_at,
    d_model,
    d_mlp,
    s_out,
    s_in,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token, some coordinates; some of its patches at a time."""
    token = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BLOCK_P)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d_model
    end = tl.load(p_first + token + 1)
    p_weight += o_d.to(tl.int64)[None, :] * s_out
    acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for p0 in range(tl.load(p_first + token), end, BLOCK_P):
        m_p = p0 + o_p < end
        source = tl.load(p_source + p0 + o_p, mask=m_p, other=0)
        at = tl.load(p_at + p0 + o_p, mask=m_p, other=0)
        scale = tl.load(p_delta + source * d_mlp + at, mask=m_p, other=0.0)
        column = tl.load(p_weight + at[:, None] * s_in, mask=m_p[:, None] & m_d[None, :], other=0.0)
        acc += column * scale[:, None]
    tl.store(p_out + token * d_model + o_d, tl.sum(acc, 0), mask=m_d)
