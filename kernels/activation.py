"""Activation difference: act(h + dh) - act(h), and act(g + dg)(u + du) - act(g) u where the MLP is gated."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import pi
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltapatch.kernels.edits import Edit, apply_edits
from deltapatch.kernels.product import Precision, Scaled, narrow
from deltapatch.kernels.segments import Segment

_TWICE, _CUBE = 2 * (2 / pi) ** 0.5, 0.044715  # tanh's gelu is x σ(_TWICE (x + _CUBE x³))
_FAR = 30.0
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

    Functions of the form x σ(u(x)) have one without cancellation. Of others the subtraction is done in
    float64: that keeps differences of 1e-6 of the activation exact to float32.

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
    form = _Sigmoidal if name_of(act) in ("silu", "gelu_tanh") else _Subtracted
    for segment in segments:
        d_up, base_up = segment.tokens(du), segment.own(u)  # [pair, position, row or 1, d_mlp]
        d_act, base_act = (d_up, base_up) if dg is None or g is None else (segment.tokens(dg), segment.own(g))
        steps = _steps(segment, du.shape[1], cells)
        for own in product(_slices(segment.pairs, steps[0]), _slices(segment.positions, steps[1])):
            at = form(act, base_act[own])
            for some in _slices(segment.rows, steps[2]):
                d = d_act[(*own, some)]
                if dg is None:
                    d.copy_(at.change(d))
                else:
                    # act(g + dg)(u + du) - act(g) u = act(g + dg) du + change u: no huge du is left where
                    # the gate is closed.
                    mine, change = d_up[(*own, some)], at.change(d)
                    mine.copy_(at.after(d, change).mul_(mine).add_(change.mul_(base_up[own])))
    apply_edits(du, swaps)
    return narrow(du, precision)


def name_of(act: Callable[[Tensor], Tensor]) -> str | None:
    """What an activation function is called here, if it is one that has forms of its own."""
    if isinstance(act, partial) and act.func is F.gelu and act.keywords == {"approximate": "tanh"}:
        return "gelu_tanh"
    return {F.gelu: "gelu", F.silu: "silu", F.relu: "relu", torch.relu: "relu"}.get(act)


class _Subtracted:
    """Any activation function: the difference of its values, in float64.

    Args:
        act: the function.
        base: [..., 1, d_mlp], where rows begin.
    """

    def __init__(self, act: Callable[[Tensor], Tensor], base: Tensor) -> None:
        self.act, self.base = act, base.double()
        self.at_base = act(self.base)

    def change(self, d: Tensor) -> Tensor:
        """act(base + d) - act(base), [..., row, d_mlp]."""
        change = self.act(self.base + d).sub_(self.at_base)
        # The same number may round differently twice, depending on where it lies in memory.
        return change.masked_fill_(d == 0, 0)

    def after(self, d: Tensor, change: Tensor) -> Tensor:
        """act(base + d), for the change that was just asked for."""
        return self.at_base + change


class _Sigmoidal:
    """silu and tanh's gelu, x σ(u(x)), args as of `_Subtracted`: as the Triton kernel has them.

    The change is d σ(u') + x (σ(u') - σ(u)), and σ(u') - σ(u) = -σ(u') σ(-u) expm1(u - u').
    """

    def __init__(self, act: Callable[[Tensor], Tensor], base: Tensor) -> None:
        self.act, self.x, self.is_silu = act, base, act is F.silu
        self.closed = torch.sigmoid(-self._u(base)).mul_(base)  # x σ(-u)

    def change(self, d: Tensor) -> Tensor:
        """act(x + d) - act(x), [..., row, d_mlp]."""
        self.y = self.x + d
        self.share = torch.sigmoid(self._u(self.y))
        less = -(d if self.is_silu else _TWICE * d * (1 + _CUBE * (3 * self.x * self.y + d * d)))  # u - u'
        change = torch.sub(d, torch.expm1(less).mul_(self.closed)).mul_(self.share)
        far = less > _FAR
        if far.is_cuda or far.any():  # expm1 overflows there, and the plain difference does not cancel
            change = torch.where(far, self.y * self.share - self.act(self.x), change)
        return change

    def after(self, d: Tensor, change: Tensor) -> Tensor:
        """act(x + d), for the change that was just asked for."""
        return self.y.mul_(self.share)

    def _u(self, x: Tensor) -> Tensor:
        return x if self.is_silu else _TWICE * x * (1 + _CUBE * x * x)


def _steps(segment: Segment, d_mlp: int, cells: int) -> tuple[int, int, int]:
    """How many pairs, positions and rows of a segment are worked on together."""
    rows = max(1, min(segment.rows, cells // d_mlp))
    positions = max(1, min(segment.positions, cells // (d_mlp * rows)))
    return max(1, cells // (d_mlp * rows * positions)), positions, rows


def _slices(n: int, step: int) -> list[slice]:
    return [slice(a, a + step) for a in range(0, n, step)]
