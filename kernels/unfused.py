"""Edits that no Triton kernel has: PyTorch carries them out before or behind the kernel that does all else.

Swaps are fused into the kernels. A direction that is swapped or a vector that is added falls on few tokens of
a block, in one layer of a row: indexing costs little there, where the reference would take the whole block.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from deltapatch.kernels.attention import QKV, AttentionBase, edited_heads
from deltapatch.kernels.attention_triton import attention_difference_triton
from deltapatch.kernels.edits import Edit, apply_edits
from deltapatch.kernels.norm import Norms, Part, add_up
from deltapatch.kernels.norm_triton import add_norm_triton
from deltapatch.kernels.product import Precision, Scaled, narrow
from deltapatch.kernels.segments import Segment


def _fused(edits: Iterable[Edit]) -> bool:
    return all(edit.fused for edit in edits)


def add_norm_and_edits(
    parts: list[Part],
    swaps: Sequence[Edit],
    norms: Norms | None,
    segments: list[Segment],
    precision: Precision,
    *,
    out: Tensor | None = None,
    to: Tensor | None = None,
) -> list[Scaled]:
    """`add_norm` with edits of any kind: where one is not fused the kernel is given the sum."""
    like = norms.x if out is None and norms is not None else out
    if like is not None and not _fused([*swaps, *(edit for part in parts for edit in part.swaps)]):
        shape = sum(s.n_tokens for s in segments), *like.shape[1:]
        parts, swaps = [Part(Scaled(add_up(parts, swaps, like, shape), None), [])], []
    return add_norm_triton(parts, swaps, norms, segments, precision, out=out, to=to)


def attention_and_edits(
    changes: QKV,
    base: AttentionBase,
    segments: list[Segment],
    swaps: Mapping[str, Sequence[Edit]],
    precision: Precision,
    *,
    reads_only: bool,
    pattern: Tensor | None = None,
) -> Scaled:
    """`attention_difference` with edits of any kind: of q, k and v before the kernel, of z behind it."""
    left = dict(swaps)
    if not _fused(edit for place in "qkv" for edit in swaps.get(place, [])):
        q, k, v = (
            edited_heads(d, changes.scale, left.pop(place, []))
            for d, place in zip(changes[:3], "qkv", strict=True)
        )
        changes = QKV(q, k, v, None)
    of_z = [] if _fused(swaps.get("z", [])) else left.pop("z")
    taken = precision.exact if of_z else precision
    z = attention_difference_triton(
        changes, base, segments, left, taken, reads_only=reads_only, pattern=pattern
    )
    if not of_z:
        return z
    apply_edits(z.values.unflatten(1, changes.q.shape[1:]), of_z)
    return narrow(z.values, precision)
