"""The first check of a safetensors file: is its header of a size that is worth reading?

The safetensors library checks the rest before it gives anything out: that the header is JSON of the right
form, that every tensor's shape and dtype make up the bytes between its offsets, and that these cover the file
without gaps and overlaps. But it reads headers of 100 MB, which may take more than a gigabyte of memory.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Any

from safetensors import safe_open

from deltapatch.errors import DeltapatchError

_LARGEST = 16 << 20  # bytes; the files of the largest models have headers of some hundred kilobytes


def check_regular(path: Path) -> None:
    """Raise OSError where a path is none, or is a pipe or a device: reading one might never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def open_safetensors(path: Path, framework: str) -> Any:
    """Open a safetensors file whose header is not absurd.

    Raises:
        DeltapatchError: it is.
        SafetensorError, OSError: the file cannot be read, or is not whole.
    """
    check_regular(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _LARGEST:
        raise DeltapatchError(f"{path} is no safetensors file: its header would have {size:,} bytes")
    return safe_open(path, framework=framework)
