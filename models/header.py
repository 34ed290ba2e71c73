"""The first checks of a file: is it one, and is a safetensors header of a size that is worth reading?

The safetensors library checks the rest before it gives anything out: that the header is JSON of the right
form, that every tensor's shape and dtype make up the bytes between its offsets, and that these cover the file
without gaps and overlaps. But it reads headers of 100 MB, which may take more than a gigabyte of memory.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deltapatch.errors import DeltapatchError, path_of

_POINTER = b"version https://git-lfs.github.com/spec/"
_NO_FILES = {
    stat.S_ISFIFO: "a FIFO (a pipe)",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}
_LARGEST = 16 << 20  # bytes; the files of the largest models have headers of some hundred kilobytes


def check_regular(path: Path) -> None:
    """Raise OSError where a path is none, or is a pipe or a device: reading one might never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def check_file(path: Path) -> None:
    """Refuse what is no file with the thing itself in it; that there is nothing is for the caller to say.

    Raises:
        DeltapatchError: reading would never end (a FIFO, a device), or gives git-lfs's note of where the
            content is to be had.
        OSError: it cannot be read.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # there is none, or can be none of that name
        return
    for kind, what in _NO_FILES.items():
        if kind(mode):
            raise DeltapatchError(
                f"{path} is {what}, not a regular file: save what it gives to a file, and name that"
            )
    if stat.S_ISREG(mode):
        with open(path, "rb") as file:
            begins = file.read(len(_POINTER))
        if begins == _POINTER:
            raise DeltapatchError(
                f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` where it was cloned, "
                "or download it again"
            )


def open_safetensors(path: Path, framework: str) -> Any:
    """Open a safetensors file whose header is not absurd.

    Raises:
        DeltapatchError: it is, or the file is none (see `check_file`).
        SafetensorError, OSError: the file cannot be read, or is not whole.
    """
    check_file(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _LARGEST:
        raise DeltapatchError(f"{path} is no safetensors file: its header would have {size:,} bytes")
    return safe_open(path, framework=framework)


def read_tensors(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """All tensors of a small safetensors file, by name.

    Args:
        what: a sentence calls them, in the plural.

    Raises:
        DeltapatchError: the file is none, cannot be read, or holds nothing.
    """
    path = path_of(path, f"a file of {what}")
    try:
        with open_safetensors(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DeltapatchError(f"the {what} {path} cannot be read ({error})") from error
    if not found:
        raise DeltapatchError(f"the {what} {path} hold no tensor")
    return found
