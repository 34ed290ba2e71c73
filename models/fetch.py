"""Tensors of a safetensors file, each read into a mapping of its own, which is gone when the tensor is.

What is read stays in the system's cache of files where there is room; the process itself holds it only as
long as the tensor lives.
"""

import json
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor


def tensor_spans(path: Path) -> dict[str, tuple[int, int]]:
    """Name -> (first byte, byte after the last) of every tensor of a file that `safetensors` has opened."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    begin = 8 + length
    return {name: tuple(begin + at for at in about["data_offsets"]) for name, about in header.items()}


def fetch(path: Path, span: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """The numbers in part of a file, read now, flat; None where they do not lie as memory must.

    Pages that are written to are copies: the file stays as it is.
    """
    found = _mapped(path, span, dtype, "MADV_SEQUENTIAL")  # long reads, each before it is asked for
    if found is not None:
        # A byte of every page: whoever uses the tensor finds it in memory.
        found.view(torch.uint8)[:: mmap.PAGESIZE].amax()
    return found


def sample(path: Path, span: tuple[int, int], dtype: torch.dtype, step: int) -> Tensor | None:
    """Every `step`th of the numbers in part of a file: little else is read, and nothing stays mapped."""
    found = _mapped(path, span, dtype, "MADV_RANDOM")
    return None if found is None else found[::step].clone()


def _mapped(path: Path, span: tuple[int, int], dtype: torch.dtype, advice: str) -> Tensor | None:
    first, n_bytes = span[0] // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY, span[1] - span[0]
    if not n_bytes or (span[0] - first) % dtype.itemsize:
        return None
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < span[1]:
            raise OSError(f"{path} has become shorter while it is in use")
        mapped = mmap.mmap(file.fileno(), span[1] - first, access=mmap.ACCESS_COPY, offset=first)
    if hasattr(mapped, "madvise") and hasattr(mmap, advice):
        mapped.madvise(getattr(mmap, advice))
    return torch.frombuffer(mapped, dtype=dtype, offset=span[0] - first, count=n_bytes // dtype.itemsize)
