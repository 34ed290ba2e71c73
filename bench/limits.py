"""What this machine can do at best: matrix products in each precision, and copying."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from deltapatch.kernels.product import PRECISIONS, cpu_multiplies, narrow, narrow_weight, product

_ROWS = 1024
_SECONDS = 0.4  # for each measurement


def product_rate(precision: str, width: int, device: str = "cpu") -> float | None:
    """FLOP/s of the products of a layer of that width in a precision of deltapatch's; the best of many tries.

    None where the machine has no such product by itself.
    """
    multiply = _product(precision, width, device)
    if multiply is None:
        return None
    return 2 * _ROWS * 4 * width * width / _best(multiply, device)


def copy_rate(device: str = "cpu") -> float:
    """Bytes read and written each second by copying a large array; the best of many tries."""
    x = torch.empty(1 << 26, dtype=torch.float32, device=device)  # 256 MiB: more than caches hold
    y = torch.empty_like(x)
    x.zero_()
    return 2 * x.numel() * x.element_size() / _best(lambda: y.copy_(x), device)


def limits(width: int, device: str = "cpu") -> dict[str, Any]:
    """All rates: {"products": {precision: FLOP/s or None}, "copy": bytes/s}."""
    products = {name: product_rate(name, width, device) for name in PRECISIONS}
    return {"products": products, "copy": copy_rate(device), "threads": torch.get_num_threads()}


def _product(precision: str, width: int, device: str) -> Callable[[], Any] | None:
    mode = PRECISIONS[precision]
    if device == "cpu" and not cpu_multiplies(mode):
        return None
    x = torch.randn(_ROWS, width, device=device, dtype=mode.base)
    w = torch.randn(4 * width, width, device=device, dtype=mode.base)
    if device == "cpu":
        a, b = x.to(mode.operand), w.to(mode.operand)
        return lambda: torch.mm(a, b.t())
    return partial(product, narrow(x, mode), narrow_weight(w, mode))


def _best(work: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest try."""
    work()
    best, until = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < until:
        began = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
