"""Inputs of the attention difference."""

import numpy as np
import torch
from kernels_packing import drawer, here

from deltapatch.kernels.attention import QKV, AttentionBase, Rotary
from deltapatch.kernels.edits import Swap


def draw_attention(
    packing,
    seed,
    dtype=torch.float32,
    scales=(1.0, 1.0, 1.0),
    heads=(4, 4),
    d_head=5,
    turned=4,
    interleaved=False,
    scaled=False,
    swapped="",
    reads_only=False,
    softcap=None,
    window=None,
):
    """Arguments of the attention difference, all but the precision.

    `scales` are of dq, dk and dv; `turned` coordinates are in pairs; `scaled` rows have a power of two each;
    `swapped` places ("q", "k", "v", "z") have a patch for about every third line.
    """
    draw = drawer(seed, dtype)
    rng = np.random.default_rng(seed)
    n = {"q": heads[0], "k": heads[1], "v": heads[1], "z": heads[0]}
    n_tokens = len(packing.tokens)
    out = {f"d{p}": draw(n_tokens, n[p], d_head, scale=s) for p, s in zip("qkv", scales, strict=True)}
    out |= {place: draw(packing.n_base, n[place], d_head) for place in "qkv"}
    angle = drawer(seed, torch.float64)(packing.n_base, turned // 2, scale=3.0)
    out["rotary"] = Rotary(angle.cos().to(dtype), angle.sin().to(dtype), interleaved)
    powers = here(torch.from_numpy(2.0 ** rng.integers(-3, 3, n_tokens)).float())
    out["scale_of_rows"] = powers if scaled else None
    out["swaps"] = {}
    for place in swapped:
        lines = packing.n_reads if place == "z" and reads_only else n_tokens
        chosen = here(torch.from_numpy(rng.choice(lines * n[place], -(-lines // 3), replace=False)))
        source = here(torch.from_numpy(rng.integers(0, 7, len(chosen))))
        delta = draw(7, n[place], d_head, scale=max(scales))
        out["swaps"][place] = [Swap(chosen // n[place], source, chosen % n[place], delta)]
    scores = {"logit_scale": d_head**-0.5, "softcap": softcap, "window": window}
    return out | scores | {"segments": packing.segments, "reads_only": reads_only}


def as_arguments(inputs):
    """The same as an operation takes them."""
    given = dict(inputs)
    changes = QKV(*(given.pop(name) for name in ("dq", "dk", "dv", "scale_of_rows")))
    base = AttentionBase(*(given.pop(name) for name in AttentionBase._fields))
    return given | {"changes": changes, "base": base}
