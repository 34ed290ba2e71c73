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
_ROOT = 0.5**0.5  # gelu is x (1 + erf(x √½)) / 2
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
    form = _FORMS.get(name_of(act), _Subtracted)
    if form is _Gelu and u.dtype == torch.float64:
        form = _Subtracted  # it rounds base + d alone, which loses less than to round the base times _ROOT
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
                    mine.mul_(at.after(d, change)).addcmul_(change, base_up[own])
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
        d = d.double()
        return self.act(self.base + d).sub_(self.at_base).mul_(_moved(d))

    def after(self, d: Tensor, change: Tensor) -> Tensor:
        """act(base + d), for the change that was just asked for."""
        return self.at_base + change


class _Gelu:
    """gelu of float32, args as of `_Subtracted`: float64's `F.gelu` takes five times as long as its erf."""

    def __init__(self, act: Callable[[Tensor], Tensor], base: Tensor) -> None:
        self.z = base.double() * _ROOT
        self.minus = torch.addcmul(self.z, self.z, torch.erf(self.z)).mul_(-_ROOT)  # -gelu(base)

    def change(self, d: Tensor) -> Tensor:
        """gelu(base + d) - gelu(base), [..., row, d_mlp]."""
        d = d.double()
        z = torch.add(self.z, d, alpha=_ROOT)
        z.addcmul_(z, torch.erf(z))
        return torch.add(self.minus, z, alpha=_ROOT, out=z).mul_(_moved(d))

    def after(self, d: Tensor, change: Tensor) -> Tensor:
        """gelu(base + d), for the change that was just asked for."""
        return change - self.minus


class _Sigmoidal:
    """silu and tanh's gelu, x σ(u(x)), args as of `_Subtracted`.

    The change is d σ(u') + x (σ(u') - σ(u)), and with s the sign of u
        σ(u') - σ(u) = tanh((u' - u) / 2) (σ(-|u|) + tanh(|u| / 2) σ(-s u')),
    where nothing cancels and nothing overflows.
    """

    def __init__(self, act: Callable[[Tensor], Tensor], base: Tensor) -> None:
        self.is_silu = act is F.silu
        self.x, self.u = base, base if self.is_silu else _TWICE * base * (1 + _CUBE * base * base)
        self.least, self.rest = torch.sigmoid(-self.u.abs()), torch.tanh(self.u.abs() / 2)
        self.away = -self.u.sign()

    def change(self, d: Tensor) -> Tensor:
        """act(x + d) - act(x), [..., row, d_mlp]."""
        self.y = self.x + d
        half = d / 2 if self.is_silu else self._half_step(d)  # (u' - u) / 2
        u = self.y if self.is_silu else torch.add(self.u, half, alpha=2)
        step = torch.addcmul(self.least, self.rest, (u * self.away).sigmoid_()).mul_(half.tanh_())
        self.share = torch.sigmoid(u)
        return step.mul_(self.x).addcmul_(d, self.share)

    def after(self, d: Tensor, change: Tensor) -> Tensor:
        """act(x + d), for the change that was just asked for."""
        return self.y.mul_(self.share)

    def _half_step(self, d: Tensor) -> Tensor:
        """Of tanh's gelu."""
        square = (d * d).addcmul_(self.y, 3 * self.x)
        return square.mul_(_TWICE * _CUBE / 2).add_(_TWICE / 2).mul_(d)


_FORMS: dict[str | None, type[_Gelu | _Sigmoidal]] = {
    "gelu": _Gelu,
    "gelu_tanh": _Sigmoidal,
    "silu": _Sigmoidal,
}


def _moved(d: Tensor) -> Tensor:
    """1 where there is a difference, else 0.

    The change is multiplied by it, as a number may round differently twice, by where it lies in memory.
    """
    return d.sign().abs_()


def _steps(segment: Segment, d_mlp: int, cells: int) -> tuple[int, int, int]:
    """How many pairs, positions and rows of a segment are worked on together."""
    rows = max(1, min(segment.rows, cells // d_mlp))
    positions = max(1, min(segment.positions, cells // (d_mlp * rows)))
    return max(1, cells // (d_mlp * rows * positions)), positions, rows


def _slices(n: int, step: int) -> list[slice]:
    return [slice(a, a + step) for a in range(0, n, step)]
