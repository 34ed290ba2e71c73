"""Backends: one set of fused operations under fixed signatures. Adding a backend is one entry here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from deltapatch.errors import DeltapatchError
from deltapatch.kernels.activation import activation_difference
from deltapatch.kernels.activation_triton import activation_difference_triton
from deltapatch.kernels.attention import attention_difference
from deltapatch.kernels.attention_triton import attention_difference_triton
from deltapatch.kernels.lang import HAS_TRITON, interpreted
from deltapatch.kernels.norm import add_norm
from deltapatch.kernels.norm_triton import add_norm_triton
from deltapatch.kernels.product import Scaled
from deltapatch.kernels.readout import readout
from deltapatch.kernels.readout_triton import readout_triton
from deltapatch.kernels.swap import gather_columns
from deltapatch.kernels.swap_triton import gather_columns_triton


class Backend(NamedTuple):
    """The operations that the wavefront is made of; each is described beside its reference."""

    name: str
    block_tokens: int  # row tokens that go through a layer together, within half as many more or a third less
    expands: bool  # whether the read-out takes expansions (readout_tail.py)
    add_norm: Callable[..., list[Scaled]]
    activation_difference: Callable[..., Scaled]
    attention_difference: Callable[..., Scaled]
    readout: Callable[..., dict[str, torch.Tensor]]
    gather_columns: Callable[..., torch.Tensor]


# Blocks of a few hundred tokens keep the elementwise work inside the cache and the products at full rate.
REFERENCE = Backend(
    "reference",
    512,
    True,
    add_norm,
    activation_difference,
    attention_difference,
    readout,
    gather_columns,
)
# No product has less than 8,192 rows where there are that many: it does far more than read its weights then.
# float64 goes through the references.
TRITON = Backend(
    "triton",
    12288,
    False,
    add_norm_triton,
    activation_difference_triton,
    attention_difference_triton,
    readout_triton,
    gather_columns_triton,
)
BACKENDS = {"reference": REFERENCE, "triton": TRITON}


def choose_backend(name: str, device: Any) -> Backend:
    """The backend of that name; "auto" is triton on a GPU where Triton is installed, else reference.

    Raises:
        DeltapatchError: no backend has that name, or it cannot run on that device.
    """
    on_gpu = torch.device(device).type == "cuda"
    if name == "auto":
        return TRITON if on_gpu and HAS_TRITON else REFERENCE
    if name not in BACKENDS:
        raise DeltapatchError(f"unknown backend {name!r}: choose from auto, {', '.join(BACKENDS)}")
    if name == "triton" and not HAS_TRITON:
        raise DeltapatchError("the triton backend needs Triton, which is not installed: use backend='auto'")
    if name == "triton" and not on_gpu and not interpreted():
        raise DeltapatchError(f"the triton backend needs a CUDA device, not {device}: use backend='auto'")
    return BACKENDS[name]
