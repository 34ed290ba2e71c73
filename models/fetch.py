"""Tensors of a safetensors file, each read into a mapping of its own, which is gone when the tensor is.

What is read stays in the system's cache of files where there is room; the process itself holds it only as
long as the tensor lives. Their bytes are hashed here too, for fingerprints: by sha256, of what hashlib has
the fastest on processors with instructions for it, and several tensors at a time.
"""

import hashlib
import json
import mmap
import os
import time
from pathlib import Path

import torch
from torch import Tensor

_PIECE = 4 << 20  # bytes that are hashed together
_SETTLED = 2 * 10**9  # ns: a file changed more lately may change again without its times telling
_known: dict[tuple[object, ...], bytes] = {}  # hashes, by file and part


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
    first, n_bytes = span[0] // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY, span[1] - span[0]
    if not n_bytes or (span[0] - first) % dtype.itemsize:
        return None
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < span[1]:
            raise OSError(f"{path} has become shorter while it is in use")
        mapped = mmap.mmap(file.fileno(), span[1] - first, access=mmap.ACCESS_COPY, offset=first)
    if hasattr(mapped, "madvise") and hasattr(mmap, "MADV_SEQUENTIAL"):
        mapped.madvise(mmap.MADV_SEQUENTIAL)  # long reads, each before it is asked for
    found = torch.frombuffer(mapped, dtype=dtype, offset=span[0] - first, count=n_bytes // dtype.itemsize)
    # A byte of every page: whoever uses the tensor finds it in memory.
    found.view(torch.uint8)[:: mmap.PAGESIZE].amax()
    return found


def hash_of_file(path: Path, span: tuple[int, int]) -> bytes:
    """The sha256 of part of a file; taken once for as long as the file's path, size, inode and times stay."""
    about = os.stat(path)
    file = os.path.abspath(path), about.st_dev, about.st_ino, about.st_size
    key = (*file, about.st_mtime_ns, about.st_ctime_ns, span)
    found = _known.get(key)
    if found is None:
        found = _hash_span(path, span)
        if time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) > _SETTLED:
            _known[key] = found
    return found


def hash_of_tensor(tensor: Tensor) -> bytes:
    """The sha256 of a tensor's bytes, the same as in a file; little of one on a GPU is copied at a time."""
    out = hashlib.sha256()
    for piece in tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(_PIECE):
        out.update(piece.cpu().numpy())
    return out.digest()


def _hash_span(path: Path, span: tuple[int, int]) -> bytes:
    out, left = hashlib.sha256(), span[1] - span[0]
    buffer = memoryview(bytearray(min(left, _PIECE)))
    with open(path, "rb", buffering=0) as file:
        file.seek(span[0])
        while left:
            n = file.readinto(buffer[:left]) or 0
            if not n:
                raise OSError(f"{path} has become shorter while it is in use")
            out.update(buffer[:n])
            left -= n
    return out.digest()
