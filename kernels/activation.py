"""Activation difference: act(h + dh) - act(h), and act(g + dg)(u + du) - act(g) u where the MLP is gated."""

from collections.abc import Callable

from torch import Tensor

from deltapatch.kernels.product import Precision, Scaled, narrow
from deltapatch.kernels.segments import Segment
from deltapatch.kernels.swap import Swap, apply_swaps

_CELLS = 1 << 17  # neurons worked on at a time: 1 MiB in float64, which stays in the cache


def activation_difference(
    act: Callable[[Tensor], Tensor],
    up: Scaled,
    u: Tensor,
    segments: list[Segment],
    gate: Scaled | None,
    g: Tensor | None,
    swaps: list[Swap],
    precision: Precision,
) -> Scaled:
    """Difference of the hidden neurons, narrowed.

    The subtraction is done in float64: that keeps differences of 1e-6 of the activation exact to float32, and
    one line serves every activation function.

    Args:
        act: the activation function, elementwise.
        up: [token, d_mlp], difference of the up-projection; may be overwritten.
        u: [base token, d_mlp], its base.
        segments: where the rows lie and what their base is.
        gate, g: the same of the gate, where there is one.
        swaps: of single neurons.
        precision: of the product that takes the result.

    Returns:
        [token, d_mlp].
    """
    du, dg = up.plain(), None if gate is None else gate.plain()
    for segment in segments:
        d_up, base_up = segment.tokens(du), segment.own(u)  # [pair, position, row or 1, d_mlp]
        if dg is None or g is None:
            base, d_act = base_up.double(), d_up
        else:
            base, d_act = segment.own(g).double(), segment.tokens(dg)
        at_base = act(base)
        rows = max(1, _CELLS // (segment.pairs * segment.positions * du.shape[1]))
        for some in (slice(r, r + rows) for r in range(0, segment.rows, rows)):
            d = d_act[:, :, some]
            change = act(base + d).sub_(at_base)
            # The same number may round differently twice, depending on where it lies in memory.
            change.masked_fill_(d == 0, 0)
            if dg is None:
                d.copy_(change)
            else:
                # act(g + dg)(u + du) - act(g) u = act(g + dg) du + change u: a closed gate leaves no huge du.
                mine = d_up[:, :, some]
                mine.copy_((at_base + change).mul_(mine).add_(change.mul_(base_up)))
    apply_swaps(du, swaps)
    return narrow(du, precision)
