"""Reading a model's weights onto its device: to keep them, or part by part, again in every pass."""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from deltapatch.models.architecture import Slot
from deltapatch.models.store import Store
from deltapatch.models.stream import CudaLane, Upload
from deltapatch.models.weights import EndWeights, LayerWeights, assemble_ends, assemble_layer, layer_shapes

_EMBEDDING = Slot(None, "embedding.weight")


class WeightReader:
    """Reads layers and ends.

    Args:
        store: where from.
        device: where to.
        dtype: what they are converted to; None leaves them as the checkpoint has them.
    """

    def __init__(self, store: Store, device: torch.device, dtype: torch.dtype | None) -> None:
        self.store, self.spec, self.device, self._given = store, store.spec, device, dtype
        self.dtype: torch.dtype = dtype or store.dtype(_EMBEDDING)
        self.n_bytes = store.n_bytes(dtype)

    @property
    def makes_tensors(self) -> bool:
        """Whether what is read takes memory of its own, rather than being pages of a mapped file."""
        converts = self.dtype != self.store.dtype(_EMBEDDING) or self.store.changes_weights
        return converts or self.device.type != "cpu" or not self.store.in_file

    def layer(self, index: int) -> LayerWeights:
        """One block."""
        return assemble_layer(self.spec, lambda name: self._read(Slot(index, name)))

    def ends(self) -> EndWeights:
        """What is outside the blocks."""
        return assemble_ends(self.spec, lambda name: self._read(Slot(None, name)))

    def embeddings(self, token_ids: Tensor) -> Tensor:
        """Those of some tokens, [..., d_model] on the CPU, for ids [...]: nothing else is read."""
        return self.store.rows(_EMBEDDING, token_ids.cpu(), self._given)

    def fetch(self, part: int) -> LayerWeights | EndWeights:
        """A layer, or at `n_layers` the ends, for one pass; their embedding is empty unless it is tied."""
        if part < self.spec.n_layers:
            return assemble_layer(self.spec, lambda name: self._fetch(Slot(part, name)))
        return assemble_ends(self.spec, lambda name: self._fetch(Slot(None, name)))

    def read_some(self, n_bytes: int) -> tuple[int, int, int]:
        """Read about so many bytes from layers that lie evenly in the model, and drop them.

        Returns:
            How many were read; how many a layer has, and the ends that a pass reads.
        """
        names, n_layers = list(layer_shapes(self.spec)), self.spec.n_layers
        sizes = {name: self.store.slot_bytes(Slot(0, name)) for name in names}
        largest = max(names, key=lambda name: sizes[name])
        step = max(1, n_layers // max(1, n_bytes // sizes[largest]))
        layers = range(step // 2, n_layers, step)
        for l in layers:
            self._fetch(Slot(l, largest))
        last = _EMBEDDING if self.spec.tied_embeddings else Slot(None, "unembedding.weight")
        return len(layers) * sizes[largest], sum(sizes.values()), self.store.slot_bytes(last)

    @cached_property
    def lane(self) -> CudaLane | None:
        """The way to a GPU; None on a CPU."""
        return CudaLane(self.device) if self.device.type == "cuda" else None

    @cached_property
    def _move(self) -> Callable[[Tensor], Tensor]:
        return (lambda tensor: tensor) if self.lane is None else Upload(self.lane)

    def _read(self, slot: Slot) -> Tensor:
        return self.store.read(slot, self.device, self._given)

    def _fetch(self, slot: Slot) -> Tensor:
        if slot == _EMBEDDING and not self.spec.tied_embeddings:
            return torch.empty(0, self.spec.d_model, dtype=self.dtype, device=self.device)
        return self.store.fetch(slot, self._move, self._given)
