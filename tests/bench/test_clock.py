"""The clock: on a GPU it times the work, not the host's way to it. A stand-in plays the GPU."""

import pytest
import torch

from deltapatch.bench import clock
from deltapatch.bench.clock import Clock

HOST, WORK = 200e-6, 5e-6  # what a launch takes the host, and what the GPU does then


class Gpu:
    """A host and a GPU with a queue between them, in made-up time."""

    def __init__(self, queue=10_000):
        self.now = self.free = 0.0  # the host's clock; when the GPU has done all that is queued
        self.ends, self.queue, self.sleeps = [], queue, []

    def launch(self, seconds, host=0.0):
        self.now += host
        self.ends = [end for end in self.ends if end > self.now]
        if len(self.ends) >= self.queue:
            self.now = self.ends[-self.queue]
        self.free = max(self.free, self.now) + seconds
        self.ends.append(self.free)

    def Event(self, enable_timing=False):
        return Event(self)

    def synchronize(self):
        self.now = max(self.now, self.free)

    def _sleep(self, cycles):
        self.sleeps.append(cycles)
        self.launch(cycles / 2e9)


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.free, self.gpu.now)

    def query(self):
        return self.at <= self.gpu.now

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def timed(monkeypatch):
    def make(**options):
        gpu = Gpu(**options)
        monkeypatch.setattr(clock.time, "perf_counter", lambda: gpu.now)
        found = Clock(torch.device("cuda"), gpu)
        found._cold = torch.empty(1)
        return gpu, found

    return make


def test_the_host_takes_no_part_in_what_a_kernel_takes(timed):
    gpu, found = timed()
    assert found.seconds(lambda: gpu.launch(WORK, HOST)) == pytest.approx(WORK)


def test_a_host_that_slows_down_makes_the_gpu_sleep_longer(timed):
    gpu, found = timed()
    calls = iter(range(1000))
    work = found.seconds(lambda: gpu.launch(WORK, HOST if next(calls) < 4 else 3 * HOST))
    assert work == pytest.approx(WORK)
    assert len(gpu.sleeps) == 2


def test_what_is_compiled_before_does_not_count(timed):
    gpu, found = timed()
    calls = iter(range(1000))
    work = found.seconds(lambda: gpu.launch(WORK, HOST if next(calls) else 30.0))
    assert work == pytest.approx(WORK)
    assert gpu.sleeps == [pytest.approx(2 * 10 * HOST * 2e9)]
    assert gpu.now < 31


def test_a_queue_that_is_full_ends_too(timed):
    gpu, found = timed(queue=4)
    assert found.seconds(lambda: gpu.launch(WORK, 0.0)) == pytest.approx(WORK)


def test_a_cpu_is_timed_by_its_own_clock():
    assert Clock(torch.device("cpu")).seconds(lambda: sum(range(1000)), repeats=3) > 0
    result, seconds, peak = Clock(torch.device("cpu")).whole(lambda: 7)
    assert (result, peak) == (7, 0)
    assert seconds >= 0
