"""Locks of a run folder: processes that would hurt each other are kept apart, on one machine or several.

They are flock's, which NFS and most cluster file systems carry from machine to machine. Where there are none
(Lustre mounted without `flock`, for example) that is said, and work goes on: all files are whole or not
there, and the plan is written once, so processes that do the same pass waste time and spoil nothing.
"""

import errno
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltapatch.errors import DeltapatchError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

_PLAINLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a link or pipe leads nowhere
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def held(path: Path, busy: str, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock file of that name, which is made where it is missing; the system frees it at a kill.

    Args:
        path: of the lock file.
        busy: what to say when another process holds it.
        shared: others may share it too.
        wait: for the others, rather than say so.

    Raises:
        DeltapatchError: another process holds it, or it is a folder, a pipe or a device.
    """
    handle = _acquire(path, busy, shared, wait)
    try:
        yield
    finally:
        os.close(handle)


def _acquire(path: Path, busy: str, shared: bool, wait: bool) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | _PLAINLY, 0o666)
        except FileNotFoundError:  # its folder was removed just now, by a run that finished
            continue
        except IsADirectoryError as error:
            raise DeltapatchError(_no_lock(path)) from error
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise DeltapatchError(_no_lock(path))
            if fcntl is not None:
                _lock(handle, path, shared, wait)
            # A run that finished may have removed the file between opening and locking it.
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(handle)):
                return handle
        except BlockingIOError as error:
            os.close(handle)
            raise DeltapatchError(busy) from error
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _no_lock(path: Path) -> str:
    return f"{path} should be a lock, and is no regular file: remove it"


def _lock(handle: int, path: Path, shared: bool, wait: bool) -> None:
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"the file system of {path.parent} has no locks: "
            "see to it that no two processes do the same work",
            stacklevel=2,
        )
