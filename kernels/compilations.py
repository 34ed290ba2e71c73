"""Counts what Triton compiles, so that a timed call can say that it timed no compiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from deltapatch.kernels.lang import HAS_TRITON


@dataclass
class Compilations:
    """Kernels that were made ready, one name for each specialisation, in their order."""

    names: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.names)


@contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Within it, every specialisation that a launch meets for the first time in this process is counted.

    One that Triton's cache on the disk has is counted too: it is read and loaded while the launch waits.
    Nothing is compiled in the interpreter, nor where Triton is not installed.
    """
    found = Compilations()
    if not HAS_TRITON:
        yield found
        return
    from triton import knobs

    before = knobs.runtime.jit_post_compile_hook

    def count(*args: Any, **told: Any) -> Any:
        found.names.append(told["fn"].name.rpartition(".")[2])
        return None if before is None else before(*args, **told)

    knobs.runtime.jit_post_compile_hook = count
    try:
        yield found
    finally:
        knobs.runtime.jit_post_compile_hook = before
