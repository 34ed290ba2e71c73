"""A stand-in for a model whose weights are elsewhere: its shapes, and numbers that cost nothing to make."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deltapatch.models.architecture import expected_shapes
from deltapatch.models.config import Config
from deltapatch.models.fetch import hash_of_tensor
from deltapatch.models.model import DTYPES, Model
from deltapatch.models.registry import read_config
from deltapatch.models.store import Store

_LAYERS = 3  # that there are weights of
_DRAWN = 1 << 16  # random numbers, over and over


def stand_in(fields: dict[str, Any], where: str, device: torch.device, stream: bool) -> Model:
    """A model with the shapes of a config.json, of which only the first layers can be run.

    Args:
        fields: of the config.json.
        where: what a sentence calls it.
        device: where it is.
        stream: whether it is streamed.

    Raises:
        DeltapatchError: the config is not one of a supported model.
    """
    architecture, spec = read_config(Config(fields, where))
    own = stored_dtype(fields)
    few = replace(spec, n_layers=min(_LAYERS, spec.n_layers))
    names = {architecture.tensor_name(slot): shape for slot, shape in expected_shapes(few)}
    model = Model(Store(architecture, few, _Tensors(where, names, own)), where, device, None, stream)
    model.spec = spec
    model.n_bytes = own.itemsize * sum(math.prod(shape) for _, shape in expected_shapes(spec))
    return model


def stored_dtype(fields: dict[str, Any]) -> torch.dtype:
    """What a config.json says that its weights are stored in; float32 where it says nothing."""
    named = str(fields.get("dtype") or fields.get("torch_dtype") or "float32")
    return DTYPES.get(named.removeprefix("torch."), torch.float32)


class MadeTensors(ABC):
    """Tensors that are made when they are read, in place of those of a file.

    Args:
        where: what a sentence calls the place that they come from.
        shapes: name -> shape.
        dtype: of all.
    """

    in_file = False

    def __init__(self, where: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.where = where
        self._shapes, self._dtype = shapes, dtype

    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one."""
        return self._shapes[name]

    def place(self, name: str) -> str:
        """What a sentence calls the place that it is read from."""
        return self.where

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of all."""
        return self._dtype

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Make one."""

    def fetch(self, name: str) -> Tensor:
        """The same."""
        return self.read(name)

    def hash(self, name: str) -> bytes:
        """A hash of all bytes of one."""
        return hash_of_tensor(self.read(name))


class _Tensors(MadeTensors):
    """Tensors of one shape are one tensor."""

    in_file = True  # as those of the model that is stood in for

    def __init__(self, where: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__(where, shapes, dtype)
        self._made: dict[tuple[int, ...], Tensor] = {}
        self._drawn = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0)).to(dtype)

    def read(self, name: str) -> Tensor:
        """Numbers of the size that a matrix of this shape has."""
        shape = self._shapes[name]
        if shape not in self._made:
            n = math.prod(shape)
            drawn = self._drawn * shape[-1] ** -0.5
            self._made[shape] = drawn.repeat(-(-n // _DRAWN))[:n].view(shape)
        return self._made[shape]
