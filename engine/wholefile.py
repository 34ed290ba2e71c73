"""Files that are there whole or not at all."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, see it to the disk, and rename it.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        write(draft)
        flush(draft)
        os.replace(draft, path)
        flush(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """See a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
