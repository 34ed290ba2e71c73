"""Locks of a run folder: processes that would hurt each other are kept apart, on one machine or several."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltapatch.errors import DeltapatchError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


@contextmanager
def held(path: Path, busy: str, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock file of that name, which is made where it is missing; the system frees it at a kill.

    Args:
        path: of the lock file.
        busy: what to say when another process holds it.
        shared: others may share it too.
        wait: for the others, rather than say so.

    Raises:
        DeltapatchError: another process holds it.
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
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its folder was removed just now, by a run that finished
            continue
        try:
            if fcntl is not None:
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
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
