"""Safetensors files whose bytes follow from their content alone.

The safetensors library writes metadata in an order that changes from one process to the next; two runs that
found the same must give the same file. Files are read with the library, which checks their headers.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_DTYPES = {"float64": "F64", "int64": "I64", "float32": "F32", "bool": "BOOL", "uint8": "U8"}


def save_file(tensors: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str]) -> None:
    """Write arrays of float64, int64, float32, bool or uint8. OSError where the file cannot be written."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # keeps all aligned
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for name, array in ordered:
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in ordered:
            file.write(_bytes(array))


def digest(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """The sha256, in hex, of arrays with their names, kinds and shapes, and of metadata."""
    out = hashlib.sha256(json.dumps(dict(sorted(metadata.items()))).encode())
    for name, array in sorted(tensors.items()):
        out.update(f"\n{name} {array.dtype.name} {array.shape}\n".encode())
        out.update(_bytes(array))
    return out.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
