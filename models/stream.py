"""Weights that are read from the file once a pass: each layer by a thread, while the one before is at work.

On a CPU a layer is used where it is read, in a mapping of the file. To a GPU it goes through pinned memory,
on a stream of its own: the GPU computes meanwhile, and no call of the pass waits for it. Only the thread that
reads waits, for a layer to be done with before one more comes: three are on the GPU at a time.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from deltapatch.models.weights import EndWeights, LayerWeights, map_tensors

STAGE = 64 << 20  # bytes of one of the two pieces of pinned memory
HELD = 3  # layers that are on a GPU together: in use, ready, and on their way


class Lane:
    """A stream for copies on a CUDA device. Others are those of the thread that calls."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._stream = device, torch.cuda.Stream(device)

    def copying(self) -> AbstractContextManager[Any]:
        """Until its end, work is queued on the stream for copies."""
        return torch.cuda.stream(self._stream)

    def pinned(self, n_bytes: int) -> Tensor:
        """Pinned memory, [n_bytes] uint8."""
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Memory of the GPU for a tensor."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)

    def mark(self) -> torch.cuda.Event:
        """A mark behind everything that was queued on the current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait_here(self, mark: torch.cuda.Event) -> None:
        """The calling thread waits until a mark is reached; others go on meanwhile."""
        mark.synchronize()

    def wait_there(self, mark: torch.cuda.Event) -> None:
        """What is queued on the current stream from now on waits until a mark is reached."""
        mark.wait(torch.cuda.current_stream(self.device))

    def used_here(self, tensor: Tensor) -> None:
        """A tensor is used on the current stream too: once dropped, its memory is free when that is done."""
        tensor.record_stream(torch.cuda.current_stream(self.device))


class Upload:
    """Takes tensors to a GPU through two pieces of pinned memory: one is filled while the other is copied."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._stages: list[Tensor] = []
        self._marks: list[Any] = [None, None]
        self._turn = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor on the GPU, once what is queued on the current stream is done."""
        if not self._stages:
            self._stages = [self.lane.pinned(STAGE) for _ in range(2)]
        out = self.lane.empty_like(tensor)
        if tensor.numel():
            source, target = (t.contiguous().view(-1).view(torch.uint8) for t in (tensor, out))
            for a in range(0, len(source), STAGE):
                self._piece(source[a : a + STAGE], target[a : a + STAGE])
        return out

    def _piece(self, source: Tensor, target: Tensor) -> None:
        stage = self._stages[self._turn]
        if self._marks[self._turn] is not None:
            self.lane.wait_here(self._marks[self._turn])
        stage[: len(source)].copy_(source)
        target.copy_(stage[: len(source)], non_blocking=True)
        self._marks[self._turn] = self.lane.mark()
        self._turn = 1 - self._turn


class ReadAhead:
    """The layers of one pass and then the ends, each read by a thread while the one before is at work.

    It holds nothing that the caller has dropped.

    Args:
        read: reads layer l, and at `n_layers` the ends; called in a thread, one ahead.
        n_layers: how many there are.
        lane: to the GPU that `read` takes them to; None on a CPU.
    """

    def __init__(self, read: Callable[[int], Any], n_layers: int, lane: Lane | None) -> None:
        self._read, self._n_layers, self._lane = read, n_layers, lane
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reading")
        self._next: Future[tuple[Any, Any]] | None = self._thread.submit(self._one, 0)
        self._asked: list[Any] = []  # [part], a mark behind all that was queued when it was asked for

    def layer(self, index: int) -> LayerWeights:
        """Those of a block, ready for the current stream."""
        weights: LayerWeights = self._part(index)
        return weights

    def ends(self) -> EndWeights:
        """Final norm and unembedding."""
        weights: EndWeights = self._part(self._n_layers)
        return weights

    def _part(self, index: int) -> Any:
        if index != len(self._asked) or self._next is None:
            raise IndexError(f"part {index} was asked for in place of {len(self._asked)}")
        self._asked.append(None if self._lane is None else self._lane.mark())
        weights, copied = self._next.result()
        self._next = self._thread.submit(self._one, index + 1) if index < self._n_layers else None
        if self._lane is not None:
            self._lane.wait_there(copied)
            map_tensors(weights, self._used_here)
        return weights

    def close(self) -> None:
        """End the thread; what was read and not asked for is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _used_here(self, tensor: Tensor) -> Tensor:
        assert self._lane is not None
        self._lane.used_here(tensor)
        return tensor

    def _one(self, index: int) -> tuple[Any, Any]:
        with torch.no_grad():
            if self._lane is None:
                return self._read(index), None
            if index >= HELD:
                # Behind this mark lies everything that reads part `index - HELD`.
                self._lane.wait_here(self._asked[index - HELD + 1])
            with self._lane.copying():
                return self._read(index), self._lane.mark()
