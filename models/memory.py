"""How much memory there is: of a GPU, or of this machine within the limits that a container sets."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

_UNKNOWN = 8 << 30  # where the system does not say
_ROOT = Path("/")


_SHARE = 3 / 4  # of what is free: what a model may take, so that a sweep has room beside it


def fits(n_bytes: int, device: torch.device) -> bool:
    """Whether a model of that size can be kept in memory."""
    return n_bytes <= _SHARE * available(device)


def available(device: torch.device | None = None, root: Path = _ROOT) -> int:
    """Bytes that can be had now without swapping; what only caches files counts as free.

    Args:
        device: a GPU's own memory, else the host's. What PyTorch keeps of what it freed counts as free: the
            next tensors take it.
        root: where the system's files are found.
    """
    if device is not None and device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return max(0, min(_of_machine(root), *_of_groups(root)))


def _of_machine(root: Path) -> int:
    return _fields(root / "proc/meminfo").get("MemAvailable:", _UNKNOWN >> 10) << 10


def _of_groups(root: Path) -> Iterator[int]:
    """What each control group that this process is in leaves; of either version."""
    yield 1 << 62
    for line in _lines(root / "proc/self/cgroup"):
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            top, limit, used, cached = root / "sys/fs/cgroup", "memory.max", "memory.current", "file"
        elif "memory" in kinds.split(","):
            top, limit, used, cached = (
                root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"
            )  # fmt: skip
        else:
            continue
        inside = path.strip("/").split("/") if path.strip("/") else []
        # A container sees its own group at the top, whatever the path says.
        for depth in range(len(inside) + 1):
            group = top.joinpath(*inside[:depth])
            most, now = _number(group / limit), _number(group / used)
            if most is not None and now is not None:
                stat = _fields(group / "memory.stat")
                shared = stat.get("shmem", stat.get("total_shmem", 0))  # counted as cache, but kept
                yield most - now + max(0, stat.get(cached, 0) - shared)


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text().splitlines()
    return []


def _fields(path: Path) -> dict[str, int]:
    """Of lines such as "name 12 kB"."""
    words = (line.split() for line in _lines(path))
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none ("max": no limit)."""
    words = " ".join(_lines(path)).split()
    return int(words[0]) if len(words) == 1 and words[0].isdigit() else None
