"""Activation difference: act(h + dh) - act(h), and act(g + dg)(u + du) - act(g) u where the MLP is gated."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

from torch import Tensor

from deltapatch.kernels.edits import Edit, apply_edits
from deltapatch.kernels.product import Precision, Scaled, narrow
from deltapatch.kernels.segments import Segment

CELLS = 1 << 16  # neurons worked on at a time: several arrays of 512 KiB in float64, which stay in the cache


class Neurons(NamedTuple):
    """What the up-projection or the gate gives to the hidden neurons."""

    d: Scaled  # [token, d_mlp], the rows' difference
    base: Tensor  # [base token, d_mlp]


def activation_difference(
    act: Callable[[Tensor], Tensor],
    up: Neurons,
    gate: Neurons | None,
    segments: list[Segment],
    swaps: Sequence[Edit],
    precision: Precision,
) -> Scaled:
    """Difference of the hidden neurons, narrowed.

    The subtraction is done in float64: that keeps differences of 1e-6 of the activation exact to float32, and
    one line serves every activation function.

    Args:
        act: the activation function, elementwise.
        up: of the up-projection; its difference may be overwritten.
        gate: of the gate, where there is one.
        segments: where the rows lie and what their base is.
        swaps: of single neurons.
        precision: of the product that takes the result.

    Returns:
        [token, d_mlp].
    """
    du, u = up.d.plain(), up.base
    dg, g = (None, None) if gate is None else (gate.d.plain(), gate.base)
    cells = CELLS if du.device.type == "cpu" else 1 << 25
    for segment in segments:
        d_up, base_up = segment.tokens(du), segment.own(u)  # [pair, position, row or 1, d_mlp]
        d_act, base_act = (d_up, base_up) if dg is None or g is None else (segment.tokens(dg), segment.own(g))
        steps = _steps(segment, du.shape[1], cells)
        for own in product(_slices(segment.pairs, steps[0]), _slices(segment.positions, steps[1])):
            base = base_act[own].double()
            at_base = act(base)
            for some in _slices(segment.rows, steps[2]):
                d = d_act[(*own, some)]
                change = act(base + d).sub_(at_base)
                # The same number may round differently twice, depending on where it lies in memory.
                change.masked_fill_(d == 0, 0)
                if dg is None:
                    d.copy_(change)
                else:
                    # act(g + dg)(u + du) - act(g) u = act(g + dg) du + change u: no huge du is left where
                    # the gate is closed.
                    mine = d_up[(*own, some)]
                    mine.copy_((at_base + change).mul_(mine).add_(change.mul_(base_up[own])))
    apply_edits(du, swaps)
    return narrow(du, precision)


def _steps(segment: Segment, d_mlp: int, cells: int) -> tuple[int, int, int]:
    """How many pairs, positions and rows of a segment are worked on together."""
    rows = max(1, min(segment.rows, cells // d_mlp))
    positions = max(1, min(segment.positions, cells // (d_mlp * rows)))
    return max(1, cells // (d_mlp * rows * positions)), positions, rows


def _slices(n: int, step: int) -> list[slice]:
    return [slice(a, a + step) for a in range(0, n, step)]
