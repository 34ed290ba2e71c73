"""Whether a machine was quiet: how much of the CPUs that a process is pinned to others took meanwhile.

The system counts, for every CPU, the time that it was busy or, in a virtual machine, taken by its host. What
this process did not use of it others did. That is seen however busy this process was itself: the load
average counts this process too and lags by a minute, processor over wall time is low also where a side
waits for its own single thread, and product rates vary with the clock of the processor. Their spread is in
the result all the same.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from deltapatch.bench.sides.process import pinned

_STAT = Path("/proc/stat")
_BUSY = (1, 2, 3, 6, 7, 8)  # of a line there: user, nice, system, interrupts of both kinds, stolen
_QUIET = 0.05  # others' share: the system counts in hundredths of a second


class Others:
    """Other processes, from now on."""

    def __init__(self) -> None:
        self.cpus = pinned()
        self.busy, self.own, self.began = self._busy(), time.process_time(), time.perf_counter()

    def share(self) -> float | None:
        """Of the time of the CPUs of this process, what others took; None where the system does not say."""
        busy = self._busy()
        if self.cpus is None or busy is None or self.busy is None:
            return None
        theirs = busy - self.busy - (time.process_time() - self.own)
        return max(0.0, theirs / ((time.perf_counter() - self.began) * len(self.cpus)))

    def _busy(self) -> float | None:
        """Seconds since the system began, of these CPUs together."""
        try:
            lines = [line.split() for line in _STAT.read_text().splitlines()]
        except OSError:
            return None
        names = {f"cpu{number}" for number in self.cpus or ()}
        ticks = [int(line[i]) for line in lines if line[0] in names for i in _BUSY]
        return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def quiet(sweeps: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The most that others took of a side's CPUs in a sweep, over all its repeats, and a line about it."""
    found = [
        (float(np.mean(column["others"])), side, sweep["name"])
        for sweep in sweeps
        for side, column in sweep["columns"].items()
        if column["status"] == "measured" and None not in column["others"]
    ]
    if not found:
        return {"others": None, "note": "whether other processes took time of the CPUs is not known here"}
    most, side, sweep_name = max(found)
    took = f"{most:.0%} of the CPUs of {side} in {sweep_name}"
    note = f"the machine was quiet: other processes took {took} at most"
    if most > _QUIET:
        note = f"THE MACHINE WAS NOT QUIET: other processes took {took}; measure again when it is idle"
    return {"others": most, "note": note}
