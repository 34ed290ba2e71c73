"""The weights of one checkpoint by slot: checked against the spec, read one at a time, LoRA merged."""

import hashlib
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
from torch import Tensor

from deltapatch.errors import DeltapatchError
from deltapatch.models.architecture import Architecture, Slot, assign, expected_shapes
from deltapatch.models.checkpoint import Tensors, check_finite, is_finite
from deltapatch.models.lora import Adapter
from deltapatch.models.spec import ModelSpec


class Store:
    """Reads any slot of a model.

    Raises:
        DeltapatchError: a tensor is missing, unknown, of the wrong shape, or at odds with the spec. Only the
            headers are looked at here; values are checked when they are read.
    """

    def __init__(
        self, architecture: Architecture, spec: ModelSpec, tensors: Tensors, adapter: Adapter | None = None
    ) -> None:
        self.spec = spec
        self._tensors = tensors
        self._adapter = adapter
        self._found_finite: set[Slot] = set()
        self._names = assign(architecture, tensors.names(), tensors.where)
        expected = set()
        for slot, shape in expected_shapes(spec):
            if slot not in self._names:
                raise DeltapatchError(f"{tensors.where} lacks tensor {architecture.tensor_name(slot)!r}")
            self._check_shape(self._names[slot], shape)
            expected.add(slot)
        self._drop_tied_output()
        for slot in self._names.keys() - expected:
            raise DeltapatchError(
                f"{tensors.where} holds tensor {self._names[slot]!r}, for which its config.json has no "
                "place: the two do not belong together"
            )

    def read(
        self, slot: Slot, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The tensor of a slot; without a device or dtype, where and as the checkpoint keeps it.

        A LoRA update is added after the change of dtype, so that a wider dtype keeps its digits.

        Raises:
            DeltapatchError: it holds NaN or infinity, or is quantised.
        """
        tensor = self._checked(slot, self._tensors.read(self._names[slot]))
        return self._finished(slot, tensor, tensor.to(device=device, dtype=dtype))

    def fetch(self, slot: Slot, move: Callable[[Tensor], Tensor], dtype: torch.dtype | None) -> Tensor:
        """The same, read from the file now; `move` takes it to where it is used."""
        tensor = self._checked(slot, self._tensors.fetch(self._names[slot]))
        return self._finished(slot, tensor, move(tensor).to(dtype=dtype))

    def rows(self, slot: Slot, which: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Some rows of a matrix that no adapter changes: nothing else is read.

        Raises:
            DeltapatchError: they hold NaN or infinity, or the tensor is quantised.
        """
        name = self._names[slot]
        rows = self._tensors.read(name)[which]
        check_finite(rows, name, self._tensors.place(name))
        return self._fitting(slot, rows, rows.to(dtype=dtype))

    def dtype(self, slot: Slot) -> torch.dtype:
        """What the checkpoint keeps a slot in."""
        return self._tensors.dtype(self._names[slot])

    def slot_bytes(self, slot: Slot) -> int:
        """What a slot takes in the checkpoint."""
        name = self._names[slot]
        return math.prod(self._tensors.shape(name)) * self._tensors.dtype(name).itemsize

    def n_bytes(self, dtype: torch.dtype | None = None) -> int:
        """What all tensors take, in their own dtypes unless one is given."""
        sizes = ((math.prod(self._tensors.shape(n)), self._tensors.dtype(n)) for n in self._names.values())
        return sum(count * (dtype or own).itemsize for count, own in sizes)

    @property
    def in_file(self) -> bool:
        """Whether tensors are pages of a mapped file."""
        return self._tensors.in_file

    @property
    def changes_weights(self) -> bool:
        """Whether there is an adapter, and reading makes new tensors."""
        return self._adapter is not None

    def _checked(self, slot: Slot, tensor: Tensor) -> Tensor:
        if slot not in self._found_finite:
            name = self._names[slot]
            check_finite(tensor, name, self._tensors.place(name))
            self._found_finite.add(slot)
        return tensor

    def _finished(self, slot: Slot, stored: Tensor, tensor: Tensor) -> Tensor:
        """A tensor in the dtype that is asked for, with its update, seen to fit into that dtype."""
        if self._adapter is not None:
            tensor = self._adapter.merge(slot, tensor)
        return self._fitting(slot, stored, tensor)

    def _fitting(self, slot: Slot, stored: Tensor, tensor: Tensor) -> Tensor:
        narrower = torch.finfo(tensor.dtype).max < torch.finfo(stored.dtype).max
        changed = self._adapter is not None and self._adapter.changes(slot)
        if (narrower or changed) and not is_finite(tensor):
            name, dtype = self._names[slot], str(tensor.dtype).removeprefix("torch.")
            what = " with the adapter's update" if changed else ""
            raise DeltapatchError(
                f"{self._tensors.place(name)}: tensor {name!r}{what} has numbers larger than {dtype} holds "
                f"({torch.finfo(tensor.dtype).max:.5g}): load the model with dtype 'float32'"
            )
        return tensor

    def fingerprint(self) -> str:
        """32 hex digits that tell models apart, the same for one model in one file, in shards or in memory.

        It covers the spec, shapes and dtypes, the adapter, and every byte of every tensor: all of them are
        read, by as many threads as PyTorch has. What is in a file is hashed once, unless the file changes.

        Raises:
            DeltapatchError: a file has changed since it was loaded.
        """
        slots = sorted(self._names, key=lambda s: (s.layer is None, s.layer or 0, s.name))
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            hashes = pool.map(self._tensors.hash, [self._names[slot] for slot in slots])
            digest = hashlib.sha256(json.dumps(asdict(self.spec), sort_keys=True).encode())
            for slot, own in zip(slots, hashes, strict=True):
                name = self._names[slot]
                shape, dtype = list(self._tensors.shape(name)), self._tensors.dtype(name)
                digest.update(f"{slot.layer} {slot.name} {shape} {dtype}".encode())
                digest.update(own)
        if self._adapter is not None:
            digest.update(self._adapter.digest())
        return digest.hexdigest()[:32]

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        shape = self._tensors.shape(name)
        if shape != expected:
            raise DeltapatchError(
                f"{self._tensors.place(name)}: tensor {name!r} has shape {list(shape)}, but config.json "
                f"asks for {list(expected)}"
            )

    def _drop_tied_output(self) -> None:
        # A tied output matrix may be in the file all the same. Equal, it says nothing new; different, one of
        # config and file is wrong, and no guess is safe.
        slot = Slot(None, "unembedding.weight")
        if not self.spec.tied_embeddings or slot not in self._names:
            return
        name = self._names.pop(slot)
        embedding = self._tensors.read(self._names[Slot(None, "embedding.weight")])
        output = self._tensors.read(name)
        if output.data_ptr() != embedding.data_ptr() and not torch.equal(output, embedding):
            raise DeltapatchError(
                f"{self._tensors.place(name)}: {name!r} differs from the embedding, though config.json says "
                "'tie_word_embeddings': set it to false to use both"
            )
