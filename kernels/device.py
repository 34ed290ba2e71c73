"""What PyTorch is asked of devices: uploads without waiting, and how numbers are multiplied."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(array: np.ndarray, device: torch.device | str) -> Tensor:
    """An array as a tensor on the device; on a CPU it shares the array's memory where it can.

    From pinned memory the copy is queued behind the kernels; from other memory the host would wait for them.
    """
    array = np.ascontiguousarray(array)
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@contextmanager
def float32_products(mode: str) -> Iterator[None]:
    """Multiply float32 with all its bits ("ieee") or on tensor cores ("tf32") until the end.

    Whatever the program has asked for holds again after it.
    """
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = mode
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


@cache
def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32. PyTorch has no public word for it."""
    return any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
