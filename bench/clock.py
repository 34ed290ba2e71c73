"""How long one call takes on a device: on a GPU the work itself, without the host's share of starting it."""

import time
from collections.abc import Callable
from typing import Any

import torch

_WARM = 3  # calls that do not count
_COLD = 256 << 20  # bytes that are written between calls: more than an L2 cache holds
_CYCLES = 2e9  # of a GPU in a second, about
_TRIES = 3
_LONGEST = 1.0  # seconds of sleep


class Clock:
    """Times calls on a device.

    Args:
        device: a CPU or a GPU.
        cuda: what PyTorch has for GPUs.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.on_gpu, self.device, self.cuda = device.type == "cuda", device, cuda
        self._cold: Any = None

    def seconds(self, work: Callable[[], Any], repeats: int = 10) -> float:
        """The median time of a call, after some that do not count; on a GPU with a cold L2 cache."""
        for _ in range(_WARM):
            work()
        if not self.on_gpu:
            return _median([self._one(work) for _ in range(repeats)])
        # Everything is queued while the GPU sleeps, so that it never waits for the host between two events.
        # How long that takes is seen of a call that compiles nothing and finds the queue empty.
        self.cuda.synchronize()
        asleep = min(_LONGEST, 2 * repeats * self._one(work))
        self.cuda.synchronize()
        for _ in range(_TRIES):
            times, waited = self._queued(work, repeats, asleep)
            if not waited:
                break
            asleep = min(_LONGEST, 4 * asleep)
        # A queue that is full makes the host wait for the GPU: then the GPU has enough to do without a sleep.
        return _median(times)

    def whole(self, work: Callable[[], Any]) -> tuple[Any, float, int]:
        """What a call gives, its seconds on the wall, and the most bytes of tensors on the GPU meanwhile."""
        if not self.on_gpu:
            began = time.perf_counter()
            return work(), time.perf_counter() - began, 0
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = work()
        self.cuda.synchronize()
        return result, time.perf_counter() - began, int(self.cuda.max_memory_allocated())

    def _one(self, work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def _queued(self, work: Callable[[], Any], repeats: int, asleep: float) -> tuple[list[float], bool]:
        """Seconds of each call, queued behind a sleep of so many; whether the GPU woke before the last."""
        if self._cold is None:
            self._cold = torch.empty(_COLD, dtype=torch.uint8, device=self.device)
        events = [[self.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        awake = self.cuda.Event()
        self.cuda._sleep(int(asleep * _CYCLES))
        awake.record()
        for begin, end in events:
            self._cold.zero_()
            begin.record()
            work()
            end.record()
        waited = awake.query()
        self.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in events], waited


def _median(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]
