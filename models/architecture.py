"""What one architecture declares: how its config reads, and which tensor of a file fills which slot."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from deltapatch.errors import DeltapatchError, shown
from deltapatch.models.config import Config
from deltapatch.models.spec import ModelSpec
from deltapatch.models.weights import end_shapes, layer_shapes

_NUMBER = re.compile(r"\.([0-9]{1,9})\.")


class Slot(NamedTuple):
    """A place in the canonical set of weights: "qkv.0.weight" of layer 3, "embedding.weight" of no layer."""

    layer: int | None
    name: str


@dataclass(frozen=True)
class Architecture:
    """One family of checkpoints.

    Attributes:
        name: `model_type` in config.json.
        read_spec: config.json -> ModelSpec.
        prefix: what the names of a model with an output matrix begin with; a name is found with and without.
        names: name of a tensor, with {l} for the layer's number and {h} for a head's, where it has one ->
            slot; several slots where their rows follow each other in one tensor; None for one that is ignored
            on purpose, because it is not a weight.
        older: what names begin with in files of other versions of transformers.
        others: what the names of other parts of a model begin with, which are no part of the language model.
        transposed: slots whose matrices are stored [in, out].
        ignored: fields of a config that are known not to change what such a model computes.
    """

    name: str
    read_spec: Callable[[Config], ModelSpec]
    prefix: str
    names: Mapping[str, str | tuple[str, ...] | None]
    older: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    transposed: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()

    def find(self, tensor: str) -> tuple[Slot, ...]:
        """The slots that a tensor of a file fills, in order; none where it is ignored.

        Raises:
            KeyError: the architecture knows no tensor of that name.
        """
        if self.others and tensor.startswith(self.others):
            return ()
        prefix = next((p for p in (self.prefix, *self.older) if tensor.startswith(p)), "")
        numbers = _NUMBER.findall(tensor)
        generic = _NUMBER.sub(".{l}.", tensor.removeprefix(prefix), count=1)
        if len(numbers) > 1:
            generic = _NUMBER.sub(".{h}.", generic, count=1)
        found = self.names[generic]
        names = () if found is None else (found,) if isinstance(found, str) else found
        return tuple(
            Slot(int(numbers[0]) if numbers else None, name.replace("{h}", numbers[-1]) if numbers else name)
            for name in names
        )

    def tensor_name(self, slot: Slot) -> str:
        """What a file calls that slot, for messages."""
        return self.tensor_names(slot)[0]

    def tensor_names(self, slot: Slot) -> list[str]:
        """All that files of a model with an output matrix call that slot."""
        number = _NUMBER.search(slot.name)
        head = number[1] if number else ""
        bare = [
            name.replace("{l}", str(slot.layer)).replace("{h}", head)
            for name, found in self.names.items()
            for one in ((found,) if isinstance(found, str) else found or ())
            if slot.name == one.replace("{h}", head)
        ]
        return bare if slot.name.startswith("unembedding") else [self.prefix + name for name in bare]


def expected_shapes(spec: ModelSpec) -> Iterator[tuple[Slot, tuple[int, ...]]]:
    """Every slot of a model and its shape; a tied output matrix is not among them.

    One by one: the number of layers is only what a config says until their tensors are found.
    """
    for name, shape in end_shapes(spec).items():
        if name != "unembedding.weight" or not spec.tied_embeddings:
            yield Slot(None, name), shape
    of_layer = layer_shapes(spec)
    for l in range(spec.n_layers):
        for name, shape in of_layer.items():
            yield Slot(l, name), shape


def file_shapes(architecture: Architecture, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of a file of such a model, under the first of its names, and its shape there."""
    out: dict[str, tuple[int, ...]] = {}
    for slot, shape in expected_shapes(spec):
        name, turned = architecture.tensor_name(slot), slot.name in architecture.transposed
        before = out.get(name)
        rows = shape[0] + (0 if before is None else before[-1 if turned else 0])
        whole = (rows, *shape[1:])
        out[name] = whole[::-1] if turned else whole
    return out


def expected_shape(spec: ModelSpec, slot: Slot) -> tuple[int, ...] | None:
    """The shape of one slot, None where a model has no such slot."""
    if slot.layer is not None:
        return layer_shapes(spec).get(slot.name) if slot.layer < spec.n_layers else None
    tied = spec.tied_embeddings and slot.name == "unembedding.weight"
    return None if tied else end_shapes(spec).get(slot.name)


def assign(architecture: Architecture, tensors: Iterable[str], where: str) -> dict[Slot, str]:
    """The tensor that fills each slot. `where` names the checkpoint in a sentence.

    Raises:
        DeltapatchError: a tensor that the architecture does not know, or two for one slot.
    """
    found: dict[Slot, str] = {}
    for tensor in tensors:
        try:
            slots = architecture.find(tensor)
        except KeyError:
            raise DeltapatchError(
                f"{where} holds a tensor {shown(tensor)} that a model of type {architecture.name!r} "
                "does not have"
            ) from None
        for slot in slots:
            if slot in found:
                raise DeltapatchError(
                    f"{where} holds {found[slot]!r} and {tensor!r}, which are the same weight"
                )
            found[slot] = tensor
    return found
