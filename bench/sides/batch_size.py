"""The batch size at which a peer is fastest, found by a short trial on the cells that it is measured on."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from deltapatch.bench.peers.base import Peer
from deltapatch.bench.sides.cells import Cells
from deltapatch.bench.sides.memory import device_peak_bytes, peak_bytes, reset_peaks
from deltapatch.models.memory import available

_SECONDS = 0.5  # that each size is tried for, at least
_PLACES = 4  # of the sweep, evenly apart
_SHARE = 0.5  # of the free memory: what a size may be expected to take


def choose(
    peer: Peer, cells: Cells, sizes: Sequence[int], longest: float, now: Callable[[], float]
) -> dict[int, float]:
    """Give a peer its best batch size: what each took, in seconds a cell; {} where there is no choice.

    All sizes are tried on the same places of the sweep, since layers and positions cost differently. Sizes
    that make no larger batches are left out, as are those that would take more memory than there is, or more
    seconds for a batch than a sample of the sweep should take.

    Args:
        peer: at work, started on the site.
        cells: of the sweep.
        sizes: rows of a batch.
        longest: seconds that a batch may be expected to take.
        now: the time in seconds.
    """
    sizes = _different(peer, cells, sizes)
    if len(sizes) < 2:
        peer.batch = sizes[0] if sizes else peer.batch
        return {}
    peer.batch = sizes[-1]
    every = peer.batches(cells)
    most = max(map(len, every))
    places = spread([batch for batch in every if len(batch) == most], _PLACES)  # no remainders
    places = places[len(places) // 2 :] + places[: len(places) // 2]  # the middle comes first
    device = torch.device(peer.work.device)
    found: dict[int, float] = {}
    grown = 0  # bytes, by the size before
    for size in sizes:
        seconds = min(found.values(), default=0.0) * size  # that a batch is expected to take
        if found and (seconds > longest or grown * size / max(found) > _SHARE * available(device)):
            break
        peer.batch = size
        if seconds < _SECONDS:
            peer.measure(cells[spread(peer.batches(cells), 1)[0]])  # so that it is warm
        reset_peaks()
        before = _peak()
        times: dict[int, float] = {}  # place -> seconds a cell, the least of some tries
        spent = 0.0
        while spent <= _SECONDS:
            for number, place in enumerate(places):
                seconds, n = _time(peer, cells[place], now)
                times[number] = min(seconds / n, times.get(number, seconds / n))
                spent += seconds
                if not found and spent > _SECONDS:
                    break
        places = places[: len(times)]  # the first size says for how many there is time
        found[size] = float(np.mean(list(times.values())))
        grown = _peak() - before
    peer.batch = min(found, key=lambda size: found[size])
    return found


def _different(peer: Peer, cells: Cells, sizes: Sequence[int]) -> list[int]:
    """The sizes, ascending, of which each makes larger batches than the one before."""
    out, longest = [], 0
    for size in sorted(sizes) if peer.batched else ():
        peer.batch = size
        most = max(map(len, peer.batches(cells)))
        if most > longest:
            out.append(size)
        longest = most
    return out


def _time(peer: Peer, cells: Cells, now: Callable[[], float]) -> tuple[float, int]:
    """Seconds of two batches at most of these cells, and how many cells they have."""
    batches = spread(peer.batches(cells), 2)
    began = now()
    for batch in batches:
        peer.measure(cells[batch])
    return now() - began, sum(map(len, batches))


def _peak() -> int:
    on_device = device_peak_bytes()
    return peak_bytes() if on_device is None else on_device


def spread(items: list[np.ndarray], n: int) -> list[np.ndarray]:
    """n of the items, evenly apart: batches are in order of layers, and these cost differently."""
    if n >= len(items):
        return items
    return [items[i] for i in ((np.arange(n) + 0.5) * len(items) / n).astype(int)]
