"""Workers: blocks of rows side by side on a CPU, each with one thread.

A block is dozens of small operations. Splitting each of them over all cores would make every core wait for
the slowest one dozens of times a block; giving each core a block of its own makes them wait once a layer.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class Pool:
    """Does `work` for every item: on a GPU one by one, on a CPU side by side.

    Args:
        pool: threads, or None to do everything in this one.
        count: how many.
        helper: one thread more, for what is begun ahead: it waits for blocks of its own, and must not keep a
            core from them.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor | None = None,
        count: int = 1,
        helper: ThreadPoolExecutor | None = None,
    ) -> None:
        self.pool, self.count, self.helper = pool, count, helper

    def __call__(self, work: Callable[[Any], None], items: Iterable[Any]) -> None:
        """Return when all are done; raise what one of them raised."""
        if self.pool is None:
            for item in items:
                work(item)
            return

        def alone(item: Any) -> None:
            with torch.no_grad():  # a setting of each thread
                work(item)

        for _ in self.pool.map(alone, items):
            pass

    def ahead(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Begin work whose result is needed later; call what is returned for it. Without threads it waits."""
        if self.helper is None:
            return work
        return self.helper.submit(torch.no_grad()(work)).result


@contextmanager
def workers(device: torch.device) -> Iterator[Pool]:
    """Yield a Pool with as many threads as torch has, on a CPU; there torch itself has one until the end."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield Pool()
        return
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as helper:
        torch.set_num_threads(1)
        try:
            yield Pool(pool, threads, helper)
        finally:
            torch.set_num_threads(threads)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Give torch so many threads until the end: passes are cut for as many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
