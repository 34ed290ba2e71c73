"""The first check of a safetensors file: is its header of a size that is worth reading?

The safetensors library checks the rest before it gives anything out: that the header is JSON of the right
form, that every tensor's shape and dtype make up the bytes between its offsets, and that these cover the file
without gaps and overlaps. But it reads headers of 100 MB, which may take more than a gigabyte of memory.
"""

from pathlib import Path
from typing import Any

from safetensors import safe_open

from deltapatch.errors import DeltapatchError

_LARGEST = 16 << 20  # bytes; the files of the largest models have headers of some hundred kilobytes


def open_safetensors(path: Path, framework: str) -> Any:
    """Open a safetensors file whose header is not absurd.

    Raises:
        DeltapatchError: it is.
        SafetensorError, OSError: the file cannot be read, or is not whole.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _LARGEST:
        raise DeltapatchError(f"{path} is no safetensors file: its header would have {size:,} bytes")
    return safe_open(path, framework=framework)
