"""Files that are there whole or not at all."""

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # file systems without hard links


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, see it to the disk, and rename it.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    with _drafted(path, write) as draft:
        os.replace(draft, path)
        flush(path.parent)


def write_new(path: Path, write: Callable[[Path], object]) -> bool:
    """As `write_whole`, but never over a file that is there: False then. Holds without locks, on NFS too.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    with _drafted(path, write) as draft:
        try:
            os.link(draft, path)
        except FileExistsError:
            # NFS may say so of a link that it has just made itself.
            return os.path.samestat(os.stat(draft), os.stat(path))
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                return False
            os.replace(draft, path)
        flush(path.parent)
        return True


@contextmanager
def _drafted(path: Path, write: Callable[[Path], object]) -> Iterator[Path]:
    """A file beside its place, written and on the disk; in the end it is gone, or has been moved."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        write(draft)
        flush(draft)
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """See a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
