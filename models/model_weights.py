"""The weights of a model: in memory, or streamed, which every pass reads from the file."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from deltapatch.models.architecture import Slot
from deltapatch.models.checkpoint import EMBEDDING, POSITIONS, Checkpoint
from deltapatch.models.fetch import hash_of_tensor
from deltapatch.models.memory import fits
from deltapatch.models.stream import Lane, ReadAhead, Upload
from deltapatch.models.surroundings import Shared
from deltapatch.models.weights import EndWeights, LayerWeights, layer_shapes, map_tensors

# Where a pass takes its weights from: the layers in order, and then the ends.
PassWeights: TypeAlias = "ModelWeights | ReadAhead"


class ModelWeights(ABC):
    """The weights of a model, as they are stored, on its device: read when they are asked for, or before."""

    stream: bool  # whether every pass reads them

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @abstractmethod
    def reading(self, n_layers: int) -> AbstractContextManager[PassWeights]:
        """One pass over the first of the layers, and the ends."""

    def layer(self, index: int) -> LayerWeights:
        """Those of a block."""
        return self.checkpoint.layer(index)

    def ends(self) -> EndWeights:
        """Embedding, final norm and unembedding."""
        return self.checkpoint.ends()

    def embeddings(self, token_ids: Tensor) -> Tensor:
        """Those of some tokens, [..., d_model], for ids [...]: of weights that are read, nothing else is."""
        return _sent(self.checkpoint.rows(EMBEDDING, token_ids), self.checkpoint.device)

    def positions(self, positions: Tensor) -> Tensor:
        """The learned embeddings of some positions, likewise."""
        return _sent(self.checkpoint.rows(POSITIONS, positions), self.checkpoint.device)

    def read_some(self, n_bytes: int) -> int:
        """Read about so many bytes as a pass would, and drop them: how many it was."""
        return 0

    @property
    def edited(self) -> bool:
        """Whether weights that were read from a file were changed in memory since."""
        return False

    def fingerprint(self) -> str:
        """That of the checkpoint, or of what has become of it (see `Checkpoint.fingerprint`)."""
        return self.checkpoint.fingerprint()


class InMemory(ModelWeights):
    """Weights that are read once.

    Args:
        checkpoint: where from.
        shared: the module in memory that they belong to; every pass sees that it is what it was.
    """

    stream = False

    def __init__(self, checkpoint: Checkpoint, shared: Shared | None = None) -> None:
        super().__init__(checkpoint)
        self._shared = shared
        self._ends = checkpoint.ends()
        self._layers = [checkpoint.layer(l) for l in range(checkpoint.spec.n_layers)]
        self._as_read = self._versions()

    def layer(self, index: int) -> LayerWeights:
        """Those of a block."""
        return self._layers[index]

    def ends(self) -> EndWeights:
        """Embedding, final norm and unembedding."""
        return self._ends

    def embeddings(self, token_ids: Tensor) -> Tensor:
        """Those of some tokens, where the embedding is."""
        return self._ends.embedding[_sent(token_ids, self._ends.embedding.device)]

    def positions(self, positions: Tensor) -> Tensor:
        """The learned embeddings of some positions, where these are."""
        assert self._ends.positions is not None
        return self._ends.positions[_sent(positions, self._ends.positions.device)]

    def reading(self, n_layers: int) -> AbstractContextManager[PassWeights]:
        """Nothing is read.

        Raises:
            DeltapatchError: the module has got hooks or other weights.
        """
        if self._shared is not None:
            self._shared.check()
        return nullcontext(self)

    @property
    def edited(self) -> bool:
        """Seen by PyTorch's count of writes."""
        return self.checkpoint.in_file and self._versions() != self._as_read

    def fingerprint(self) -> str:
        """That of the checkpoint; of weights that were edited, one of their own."""
        found = self.checkpoint.fingerprint()
        if not self.edited:
            return found
        digest = hashlib.sha256(found.encode())
        for tensor in self._tensors():
            digest.update(hash_of_tensor(tensor))
        return digest.hexdigest()[:32]

    def _versions(self) -> list[int]:
        """How often each tensor was written to, as PyTorch counts."""
        return [0 if tensor.is_inference() else tensor._version for tensor in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = []

        def take(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        map_tensors((*self._layers, self._ends), take)
        return found


class Streamed(ModelWeights):
    """Weights that are read from the file layer by layer, again in every pass."""

    stream = True

    def layer(self, index: int) -> LayerWeights:
        """Those of a block, which take no memory once they are dropped."""
        read = self.checkpoint

        def fetch(slot: Slot) -> Tensor:
            return read.fetch(slot, lambda tensor: tensor.to(read.device))

        return read.layer(index, fetch)

    def reading(self, n_layers: int) -> AbstractContextManager[PassWeights]:
        """Each is read ahead by a thread; the ends are without an embedding that nothing else is tied to."""
        read = self.checkpoint

        def fetch(part: int) -> LayerWeights | EndWeights:
            return read.layer(part, self._fetch) if part < n_layers else read.ends(self._fetch)

        return closing(ReadAhead(fetch, n_layers, self._lane))

    def read_some(self, n_bytes: int) -> int:
        """Read the largest matrix of layers that lie evenly in the model."""
        of_layer = [Slot(0, name) for name in layer_shapes(self.checkpoint.spec)]
        size, largest = max((self.checkpoint.raw_bytes(slot), slot.name) for slot in of_layer)
        n_layers = self.checkpoint.spec.n_layers
        step = max(1, n_layers // max(1, n_bytes // size))
        layers = range(step // 2, n_layers, step)
        for l in layers:
            self._fetch(Slot(l, largest))
        return len(layers) * size

    @cached_property
    def _lane(self) -> Lane | None:
        """The way to a GPU; None on a CPU."""
        device = self.checkpoint.device
        return Lane(device) if device.type == "cuda" else None

    @cached_property
    def _move(self) -> Callable[[Tensor], Tensor]:
        return (lambda tensor: tensor) if self._lane is None else Upload(self._lane)

    def _fetch(self, slot: Slot) -> Tensor:
        read = self.checkpoint
        if slot == EMBEDDING and not read.spec.tied_embeddings:
            return torch.empty(0, read.spec.d_model, dtype=read.dtype, device=read.device)
        return read.fetch(slot, self._move)


def weights_of(checkpoint: Checkpoint, *, stream: bool) -> ModelWeights:
    """The weights in memory; streamed where that is asked for, or where they do not fit."""
    if stream or not fits(checkpoint.n_bytes, checkpoint.device):
        return Streamed(checkpoint)
    return InMemory(checkpoint)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; a GPU is not waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
