"""Workers: blocks of rows side by side on a CPU, each with one thread, where there are enough blocks.

A block is dozens of small operations. Splitting each of them over all cores makes every core wait for the
slowest one dozens of times a block; giving each core blocks of its own makes them wait once a layer. But what
Python does between operations is done by one thread at a time: of few rows, which are little work an
operation, threads wait longer for Python than they save, and all of them share each operation instead.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

# Blocks of the largest layer that go side by side: two for each thread at least, more where threads are few.
# On two, sharing each operation took 4 to 25% less time up to forty blocks, and 2% more at seventy.
_EACH, _MORE = 2, 120


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

    def of_blocks(self, n: int) -> "Pool":
        """The same, or one that does everything in this thread, for work whose largest layer has n blocks."""
        return self if shared(n, self.count) else Pool()

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


def shared(blocks: int, threads: int) -> bool:
    """Whether threads share so many blocks, or else each operation."""
    return threads == 1 or blocks >= _EACH * threads + _MORE // threads


@contextmanager
def workers(device: torch.device) -> Iterator[Pool]:
    """Yield a Pool with as many threads as torch has, on a CPU; in each of them torch has one."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield Pool()
        return

    def alone(n: int) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,))

    with alone(threads) as pool, alone(1) as helper:
        try:
            yield Pool(pool, threads, helper)
        finally:
            torch.set_num_threads(threads)  # which a worker has set for threads to come


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Give torch so many threads until the end: passes are cut for as many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
