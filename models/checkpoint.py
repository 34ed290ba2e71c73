"""The weights of one checkpoint by slot: checked against the spec, read one at a time, LoRA merged."""

import hashlib
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property

import torch
from torch import Tensor

from deltapatch.errors import DeltapatchError
from deltapatch.models.architecture import Architecture, Slot, assign, expected_shape, expected_shapes
from deltapatch.models.lora import Adapter
from deltapatch.models.spec import ModelSpec
from deltapatch.models.tensors import Tensors, check_finite, is_finite
from deltapatch.models.weights import EndWeights, LayerWeights, assemble_ends, assemble_layer

EMBEDDING, UNEMBEDDING = Slot(None, "embedding.weight"), Slot(None, "unembedding.weight")
POSITIONS = Slot(None, "positions.weight")
_CPU = torch.device("cpu")


class Checkpoint:
    """The weights of one model, each by its slot.

    Args:
        architecture, spec: of the model.
        tensors: where they are read from.
        device: where they are taken to.
        dtype: what they are converted to; None leaves them as they are.
        adapter: is merged as they are read, after the change of dtype: a wider one keeps the update's digits.

    Raises:
        DeltapatchError: a tensor is missing, unknown, of the wrong shape, or at odds with the spec. Only the
            headers are looked at here; values are checked when they are read.
    """

    def __init__(
        self,
        architecture: Architecture,
        spec: ModelSpec,
        tensors: Tensors,
        *,
        device: torch.device = _CPU,
        dtype: torch.dtype | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.spec, self.device, self._architecture = spec, device, architecture
        self._tensors, self._given, self._adapter = tensors, dtype, adapter
        self._found_finite: set[Slot] = set()
        self._held: dict[
            str, Tensor
        ] = {}  # tensors that several slots share, until the last has been asked for
        self._names = assign(architecture, tensors.names(), tensors.where)
        expected = set()
        for slot, shape in expected_shapes(spec):
            if slot not in self._names:
                raise DeltapatchError(f"{tensors.where} lacks tensor {architecture.tensor_name(slot)!r}")
            self._check_shape(slot, shape)
            expected.add(slot)
        self._drop_tied_output()
        for slot in self._names.keys() - expected:
            raise DeltapatchError(
                f"{tensors.where} holds tensor {self._names[slot]!r}, for which its config.json has no "
                "place: the two do not belong together"
            )

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the weights are read as (of a mixed checkpoint, its matrices)."""
        return self._given or self._raw_dtype(EMBEDDING)

    @cached_property
    def n_bytes(self) -> int:
        """What all of them take as they are read."""
        return sum(self._count(s) * (self._given or self._raw_dtype(s)).itemsize for s in self._names)

    def raw_bytes(self, slot: Slot) -> int:
        """What one takes as the checkpoint has it."""
        return self._count(slot) * self._raw_dtype(slot).itemsize

    @property
    def in_file(self) -> bool:
        """Whether they are pages of a mapped file."""
        return self._tensors.in_file

    @property
    def makes_tensors(self) -> bool:
        """Whether what is read takes memory of its own, rather than being pages of a mapped file."""
        changed = self.dtype != self._raw_dtype(EMBEDDING) or self._adapter is not None
        return changed or self.device.type != "cpu" or not self.in_file

    def layer(self, index: int, read: Callable[[Slot], Tensor] | None = None) -> LayerWeights:
        """One block; `read` gives the tensor of a slot, in place of the method of that name."""
        return assemble_layer(self.spec, lambda name: (read or self.read)(Slot(index, name)))

    def ends(self, read: Callable[[Slot], Tensor] | None = None) -> EndWeights:
        """What is outside the blocks, read like these."""
        return assemble_ends(self.spec, lambda name: (read or self.read)(Slot(None, name)))

    def read(self, slot: Slot) -> Tensor:
        """One tensor, shared with where it lives if nothing about it changes.

        Raises:
            DeltapatchError: it holds NaN or infinity, or is quantised. So do the other ways to read.
        """
        return self._finished(slot, self._tensors.read, lambda raw: raw.to(self.device, self._given))

    def fetch(self, slot: Slot, move: Callable[[Tensor], Tensor]) -> Tensor:
        """One tensor, read from the file now; `move` takes it to the device."""
        return self._finished(slot, self._tensors.fetch, move)

    def rows(self, slot: Slot, which: Tensor) -> Tensor:
        """Lines of a table, such as the embeddings of some tokens, [..., d_model] on the CPU, for [...].

        Nothing else is read.
        """
        rows = self._raw(slot, self._tensors.read)[which.cpu()]
        self._check_finite(slot, rows)
        return self._fitting(slot, rows, rows.to(dtype=self._given))

    def _finished(self, slot: Slot, get: Callable[[str], Tensor], move: Callable[[Tensor], Tensor]) -> Tensor:
        """A checked tensor on the device, in its dtype, with its update."""
        raw = self._raw(slot, get)
        if slot not in self._found_finite:
            self._check_finite(slot, raw)
            self._found_finite.add(slot)
        tensor = move(raw).to(dtype=self._given)
        if self._adapter is not None:
            tensor = self._adapter.merge(slot, tensor)
        return self._fitting(slot, raw, tensor)

    def _check_finite(self, slot: Slot, raw: Tensor) -> None:
        name = self._names[slot]
        check_finite(raw, name, self._tensors.place(name))

    def _fitting(self, slot: Slot, raw: Tensor, tensor: Tensor) -> Tensor:
        """A tensor as it is used, seen to hold no number that its dtype cannot."""
        narrower = torch.finfo(tensor.dtype).max < torch.finfo(raw.dtype).max
        changed = self._adapter is not None and self._adapter.changes(slot)
        if (narrower or changed) and not is_finite(tensor):
            name, dtype = self._names[slot], str(tensor.dtype).removeprefix("torch.")
            what = " with the adapter's update" if changed else ""
            raise DeltapatchError(
                f"{self._tensors.place(name)}: tensor {name!r}{what} has numbers larger than {dtype} holds "
                f"({torch.finfo(tensor.dtype).max:.5g}): load the model with dtype 'float32'"
            )
        return tensor

    def _raw(self, slot: Slot, get: Callable[[str], Tensor]) -> Tensor:
        """The tensor of a slot as the checkpoint has it: here alone a named tensor becomes that of a slot.

        Of one that several slots share it is a view of its rows. These are asked for in order: the tensor is
        got for the first, and kept until the last.
        """
        name, rows = self._names[slot], self._rows(slot)
        held = self._held.pop(name, None)
        tensor = get(name) if held is None else held
        if slot != list(rows)[-1]:
            self._held[name] = tensor
        if slot.name in self._architecture.transposed:
            tensor = tensor.t()
        return tensor if len(rows) == 1 else tensor[rows[slot]]

    def _raw_shape(self, slot: Slot) -> tuple[int, ...]:
        """The shape of `_raw`; of a tensor whose slots do not fit together, its own."""
        shape = self._tensors.shape(self._names[slot])
        if slot.name in self._architecture.transposed:
            shape = shape[::-1]
        rows = self._rows(slot)
        if len(rows) == 1 or not shape or shape[0] != max(r.stop for r in rows.values()):
            return shape
        return rows[slot].stop - rows[slot].start, *shape[1:]

    def _rows(self, slot: Slot) -> dict[Slot, slice]:
        """The slots that share a slot's tensor, itself among them, and where the rows of each are."""
        out, start = {}, 0
        for one in self._architecture.find(self._names[slot]):
            n_rows = (expected_shape(self.spec, one) or (0,))[0]
            out[one] = slice(start, start + n_rows)
            start += n_rows
        return out

    def _raw_dtype(self, slot: Slot) -> torch.dtype:
        """The dtype of `_raw`."""
        return self._tensors.dtype(self._names[slot])

    def _count(self, slot: Slot) -> int:
        return math.prod(self._raw_shape(slot))

    def _check_shape(self, slot: Slot, expected: tuple[int, ...]) -> None:
        name, shape = self._names[slot], self._raw_shape(slot)
        if shape != expected:
            raise DeltapatchError(
                f"{self._tensors.place(name)}: tensor {name!r} has shape {list(shape)}, but config.json "
                f"asks for {list(expected)}"
            )

    def _drop_tied_output(self) -> None:
        # A tied output matrix may be in the file all the same. Equal, it says nothing new; different, one of
        # config and file is wrong, and no guess is safe.
        if not self.spec.tied_embeddings or UNEMBEDDING not in self._names:
            return
        embedding, output = (self._raw(slot, self._tensors.read) for slot in (EMBEDDING, UNEMBEDDING))
        name = self._names.pop(UNEMBEDDING)
        if output.data_ptr() != embedding.data_ptr() and not torch.equal(output, embedding):
            raise DeltapatchError(
                f"{self._tensors.place(name)}: {name!r} differs from the embedding, though config.json says "
                "'tie_word_embeddings': set it to false to use both"
            )

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
                shape, dtype = list(self._raw_shape(slot)), self._raw_dtype(slot)
                digest.update(f"{slot.layer} {slot.name} {shape} {dtype}".encode())
                digest.update(own)
        if self._adapter is not None:
            digest.update(self._adapter.digest())
        return digest.hexdigest()[:32]
