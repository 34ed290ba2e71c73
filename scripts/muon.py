"""Muon in float32: torch's rounds to bfloat16, which many CPUs multiply thirty times slower than float32."""

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, as in torch.optim.Muon
_STEPS = 5
_MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal before each step, with Nesterov's look ahead.

    Rates mean what they mean to AdamW (torch's `adjust_lr_fn="match_rms_adamw"`); weight decay is decoupled.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step. Matrices of one shape are made orthogonal together."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for _, same in groupby(sorted(trained, key=_shape), key=_shape):
                params = list(same)
                updates = orthogonal(torch.stack([self._momentum(p) for p in params]))
                scale = group["lr"] * 0.2 * max(params[0].shape) ** 0.5
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - _MOMENTUM)
        return torch.lerp(p.grad, state["momentum"], _MOMENTUM)


def _shape(p: Tensor) -> tuple[int, ...]:
    return tuple(p.shape)


def orthogonal(x: Tensor) -> Tensor:
    """Nearly orthogonal matrices with the singular vectors of x, [n, rows, columns], by Newton-Schulz."""
    a, b, c = _COEFFICIENTS
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * (gram @ gram)) @ wide
    return wide if x.shape[1] <= x.shape[2] else wide.mT
