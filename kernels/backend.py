"""Backends: one set of fused operations under fixed signatures. Adding a backend is one entry here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from deltapatch.errors import DeltapatchError
from deltapatch.kernels.activation import Neurons, activation_difference
from deltapatch.kernels.activation_triton import activation_difference_triton
from deltapatch.kernels.attention import QKV, AttentionBase, attention_difference
from deltapatch.kernels.edits import Edit, gather_columns
from deltapatch.kernels.edits_triton import gather_columns_triton
from deltapatch.kernels.lang import HAS_TRITON, interpreted
from deltapatch.kernels.norm import Norms, Part, add_norm
from deltapatch.kernels.pieces import ForEach, in_turn
from deltapatch.kernels.product import Precision, Scaled
from deltapatch.kernels.readout import BaseReadout, ReadRows, Unembedding, readout
from deltapatch.kernels.readout_triton import readout_triton
from deltapatch.kernels.segments import Segment
from deltapatch.kernels.unfused import add_norm_and_edits, attention_and_edits

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Backend(Protocol):
    """The operations that the wavefront is made of; each is described beside its reference.

    Attributes:
        name: as users ask for it.
        block_tokens: row tokens that go through a layer together, within half as many more or a third less.
        expands: whether the read-out takes expansions (readout_tail.py).
    """

    name: str
    block_tokens: int
    expands: bool

    def add_norm(
        self,
        parts: list[Part],
        swaps: Sequence[Edit],
        norms: Norms | None,
        segments: list[Segment],
        precision: Precision,
        *,
        out: Tensor | None = None,
        to: Tensor | None = None,
    ) -> list[Scaled]:
        """Add up differences of the residual stream, and take that of its norms."""
        ...

    def activation_difference(
        self,
        act: Callable[[Tensor], Tensor],
        up: Neurons,
        gate: Neurons | None,
        segments: list[Segment],
        swaps: Sequence[Edit],
        precision: Precision,
    ) -> Scaled:
        """Difference of the hidden neurons, narrowed."""
        ...

    def attention_difference(
        self,
        changes: QKV,
        base: AttentionBase,
        segments: list[Segment],
        swaps: Mapping[str, Sequence[Edit]],
        precision: Precision,
        *,
        reads_only: bool,
        pattern: Tensor | None = None,
    ) -> Scaled:
        """Difference of the attention's output before the output projection."""
        ...

    def readout(
        self,
        rows: ReadRows,
        unembedding: Unembedding,
        base: BaseReadout,
        *,
        measured: Sequence[str],
        pool: ForEach = in_turn,
    ) -> dict[str, Tensor]:
        """The measured numbers of each row."""
        ...

    def gather_columns(self, edits: Sequence[Edit], weight: Tensor, n_tokens: int) -> Tensor:
        """Entry of hidden neurons without a matrix product."""
        ...


class _Reference:
    """PyTorch on any device, in any precision."""

    name = "reference"
    # Blocks of a few hundred tokens keep the elementwise work in the cache and the products at full rate.
    block_tokens = 512
    expands = True
    add_norm = staticmethod(add_norm)
    activation_difference = staticmethod(activation_difference)
    attention_difference = staticmethod(attention_difference)
    readout = staticmethod(readout)
    gather_columns = staticmethod(gather_columns)


def _or_reference(
    reference: Callable[Arguments, Result], kernel: Callable[Arguments, Result]
) -> Callable[Arguments, Result]:
    """The kernel, of the reference's signature; float64, which no kernel has, goes through the reference."""

    @wraps(reference)
    def operation(*args: Arguments.args, **named: Arguments.kwargs) -> Result:
        narrow = _base_dtype([*args, *named.values()]) != torch.float64
        return (kernel if narrow else reference)(*args, **named)

    return operation


def _base_dtype(arguments: list[object]) -> torch.dtype:
    """The dtype of the base runs: the precision says it, or the tensor where there is no precision."""
    told = next(_all(Precision, arguments), None)
    return next(_all(Tensor, arguments)).dtype if told is None else told.base


def _all(kind: type[Result], value: object) -> Iterator[Result]:
    """All of a kind among the arguments of an operation."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _all(kind, part)


class _Triton:
    """Triton's kernels, on a GPU or in its interpreter."""

    name = "triton"
    # No product has less than 8,192 rows where there are that many: it does far more than read its weights.
    block_tokens = 12288
    expands = False
    add_norm = staticmethod(_or_reference(add_norm, add_norm_and_edits))
    activation_difference = staticmethod(_or_reference(activation_difference, activation_difference_triton))
    attention_difference = staticmethod(_or_reference(attention_difference, attention_and_edits))
    readout = staticmethod(_or_reference(readout, readout_triton))
    gather_columns = staticmethod(_or_reference(gather_columns, gather_columns_triton))


REFERENCE: Backend = _Reference()
TRITON: Backend = _Triton()
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
