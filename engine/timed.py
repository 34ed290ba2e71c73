"""A wavefront that says what its parts take, for the forecast."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.layout import Layout, PairShapes, how_many_blocks
from deltapatch.engine.pool import Map
from deltapatch.engine.readout import ReadOut, Said
from deltapatch.engine.reads import RowReads
from deltapatch.engine.rows import WHOLE
from deltapatch.engine.wavefront import Wavefront
from deltapatch.kernels.device import upload
from deltapatch.kernels.readout import BaseReadout
from deltapatch.models.weights import EndWeights
from deltapatch.results.metrics import Reference


@dataclass
class Amount:
    """Seconds of work, and of how many things in how many calls."""

    n: float = 0
    calls: float = 0
    seconds: float = 0.0

    def add(self, n: float, calls: float, seconds: float) -> None:
        """One more measurement."""
        self.n, self.calls, self.seconds = self.n + n, self.calls + calls, self.seconds + seconds


class Piece:
    """What one piece took."""

    def __init__(self) -> None:
        names = (
            "unpatched",
            "rows",
            "last",
            "entering",
            "distribution",
            "read_out",
            "layer",
            "whole",
            "table",
        )
        self.amounts = {name: Amount() for name in names}
        self.weights = self.total = 0.0

    def faster(self, other: "Piece") -> "Piece":
        """The same piece timed twice: of everything the shorter time."""
        for name, amount in self.amounts.items():
            amount.seconds = min(amount.seconds, other.amounts[name].seconds)
        self.weights, self.total = min(self.weights, other.weights), min(self.total, other.total)
        return self


class TimedWavefront(Wavefront):
    """A wavefront that says what it took. It prepares a layer only when it is asked for.

    Args:
        found: takes the amounts.
        reads: of rows, more or less.
        distributions: of unpatched runs, at least.
        arguments: those of `Wavefront`.
    """

    def __init__(self, found: Piece, reads: int, distributions: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.found, self.reads, self.at_least = found, reads, distributions
        self.prepared: list[tuple[float, float]] = []  # [layer], seconds of all, and of the unpatched runs
        # Seconds: of rows in layers, of all layers, of the read-out, and before the first layer.
        self.advanced = self.through = self.read = self.before = 0.0
        self.began = 0.0  # when the layers did
        self._runs = 0.0
        for name in ("base", "sources"):
            setattr(self.unpatched, name, self._adding(getattr(self.unpatched, name)))

    def _adding(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = self._now()
            result = work(*arguments)
            self._runs += self._now() - began
            return result

        return timed

    def _now(self) -> float:
        return now(self)

    def _prepare(self, l: int, *arguments: Any, **named: Any) -> Any:
        self._runs, began = 0.0, self._now()
        if not self.prepared:
            self.before = began - self.began
        ready = super()._prepare(l, *arguments, **named)
        self.prepared.append((self._now() - began, self._runs))
        return ready

    def _advance(self, ready: Any, l: int, parts: list[tuple[int, Layout]], *arguments: Any) -> None:
        began = self._now()
        super()._advance(ready, l, parts, *arguments)
        seconds = self._now() - began
        self.advanced += seconds
        blocks = sum(len(layout.blocks) for _, layout in parts)
        if not blocks:
            return
        # Of a layer where rows are in flight and others enter, most is of those in flight.
        whole = parts[0][1]
        name = "entering" if not whole.n_tokens else "last" if ready.here.last else "rows"
        assert parts[0][0] == WHOLE
        tokens = whole.n_tokens or sum(layout.n_tokens for _, layout in parts)
        self.found.amounts[name].add(tokens, blocks, seconds * min(blocks, self.each.count))

    def _through_layers(self, *arguments: Any) -> Any:
        self.began = self._now()
        result = super()._through_layers(*arguments)
        self.through = self._now() - self.began
        return result

    def _reader(self) -> ReadOut:
        return _TimedReadOut(self, self.model, self.prompts, self.precision, self.ops, self.each)

    def tell(self, total: float) -> None:
        """Add up what was taken; `total` is that of the pass with all that goes with it."""
        amounts, n_rows, n_layers = self.found.amounts, self.rows.patches.n_rows, len(self.prepared)
        later = self.prepared[1:] or self.prepared
        self.found.weights = min(all_ - runs for all_, runs in later)
        segments = len(self.shapes.segments(1, self.ops.block_tokens))
        runs = min(runs for _, runs in later) * min(segments, self.each.count)
        amounts["unpatched"].add(self.shapes.n_tokens, segments, runs)
        spent = self.before + sum(all_ for all_, _ in self.prepared) + self.advanced
        amounts["layer"].add(n_rows * n_layers, n_layers, max(0.0, self.through - spent))
        amounts["whole"].add(n_rows, 1, max(0.0, self.before + total - self.through - self.read))


class _TimedReadOut(ReadOut):
    def __init__(self, wavefront: TimedWavefront, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.wavefront = wavefront

    def read(
        self, ends: EndWeights, x: Tensor, dx: Tensor, rows: Tensor, row_reads: RowReads
    ) -> tuple[np.ndarray, Reference]:
        """Read rows at so many positions: some of these, or each several times."""
        n_rows, old = len(row_reads.first), row_reads
        n = max(1, self.wavefront.reads * n_rows // max(1, old.n_tokens))
        which = np.arange(n if n_rows else 0) * n_rows // n
        row_reads = RowReads(old.reads, self.wavefront.rows.pair[which], old.measured)
        own = np.arange(row_reads.n_tokens) - row_reads.first[row_reads.row]  # of each row's reads
        line = np.empty_like(own)
        line[row_reads.place] = old.place[old.first[which][row_reads.row] + own]
        rows = rows[upload(line, rows.device)]
        began, self.distributions = now(self), 0.0
        _, unpatched = super().read(ends, x, dx, rows, row_reads)
        seconds = now(self) - began
        self.wavefront.read = seconds
        amounts = self.wavefront.found.amounts
        blocks = how_many_blocks(len(rows), self.ops.block_tokens, spread=False)
        rest = max(0.0, seconds - self.distributions)
        amounts["read_out"].add(len(rows), blocks, rest * self.each.count)
        return np.zeros((len(old.measured), n_rows)), unpatched

    def _unpatched(
        self, ends: EndWeights, at: Tensor, change: Tensor, shapes: PairShapes, tokens: np.ndarray
    ) -> tuple[BaseReadout, Said]:
        result = self._watched(ends, at, change, shapes, tokens)
        times = -(-self.wavefront.at_least // len(at))
        if times > 1:  # the unembedding costs as much as many reads do: more of them tell the two apart
            runs = PairShapes(shapes.runs * times)
            self._watched(
                ends, at.repeat(times, 1), change.repeat(times, 1), runs, np.tile(tokens, (times, 1))
            )
        return result

    def _watched(
        self, ends: EndWeights, at: Tensor, change: Tensor, shapes: PairShapes, tokens: np.ndarray
    ) -> tuple[BaseReadout, Said]:
        # With few reads some of this is too little to share, and of many it is not.
        began, shared, self.each = now(self), self.each, _Watched(self.each)
        try:
            result = super()._unpatched(ends, at, change, shapes, tokens)
        finally:
            watched, self.each = self.each, shared
        took = now(self) - began
        self.distributions += took
        busy = watched.busy + (took - watched.took) * shared.count
        self.wavefront.found.amounts["distribution"].add(len(at), 1, busy)
        return result


class _Watched(Map):
    """A map that says how long it took, and how long its threads were busy."""

    def __init__(self, each: Map) -> None:
        super().__init__(each.pool, each.count, each.helper)
        self.took = self.busy = 0.0

    def __call__(self, work: Callable[[Any], None], items: Iterable[Any]) -> None:
        """As that of any map."""
        items, began = list(items), time.perf_counter()
        super().__call__(work, items)
        took = time.perf_counter() - began
        self.took += took
        self.busy += took * min(self.count, len(items))


def now(of: Any) -> float:
    """The time when a GPU has done all that it was asked for."""
    if of.model.device.type == "cuda":
        torch.cuda.synchronize(of.model.device)
    return time.perf_counter()
