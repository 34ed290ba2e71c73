"""A stand-in for a model whose weights are elsewhere: its shapes, and numbers that cost nothing to make."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from deltapatch.models.architecture import expected_shapes, file_shapes
from deltapatch.models.checkpoint import Checkpoint
from deltapatch.models.config import Config
from deltapatch.models.load import DTYPES
from deltapatch.models.memory import fits
from deltapatch.models.model import Model, Origin
from deltapatch.models.model_weights import weights_of
from deltapatch.models.registry import read_config
from deltapatch.models.tensors import MadeTensors

_LAYERS = 3  # that there are weights of
_DRAWN = 1 << 16  # random numbers, over and over


def stand_in(fields: dict[str, Any], where: str, device: torch.device, stream: bool) -> Model:
    """A model with the shapes of a config.json, of which only the first layers can be run.

    Args:
        fields: of the config.json.
        where: what a sentence calls it.
        device: where it is.
        stream: whether it is streamed; one that would not fit is all the same.

    Raises:
        DeltapatchError: the config is not one of a supported model.
    """
    architecture, spec = read_config(Config(fields, where))
    own = stored_dtype(fields)
    few = replace(spec, n_layers=min(_LAYERS, spec.n_layers))
    # In a file, as those of the model that is stood in for.
    tensors = MadeTensors(where, file_shapes(architecture, few), own, _drawn(own), in_file=True)
    n_bytes = own.itemsize * sum(math.prod(shape) for _, shape in expected_shapes(spec))
    checkpoint = Checkpoint(architecture, few, tensors, device=device)
    weights = weights_of(checkpoint, stream=stream or not fits(n_bytes, device))
    return Model(weights, Origin(where), spec=spec, n_bytes=n_bytes)


def stored_dtype(fields: dict[str, Any]) -> torch.dtype:
    """What a config.json says that its weights are stored in; float32 where it says nothing."""
    named = str(fields.get("dtype") or fields.get("torch_dtype") or "float32")
    return DTYPES.get(named.removeprefix("torch."), torch.float32)


def _drawn(dtype: torch.dtype) -> Callable[[str, tuple[int, ...]], Tensor]:
    """Makes tensors of the size that numbers have in a matrix of that shape; those of one shape are one."""
    drawn = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0)).to(dtype)

    @cache
    def of(shape: tuple[int, ...]) -> Tensor:
        n = math.prod(shape)
        return (drawn * shape[-1] ** -0.5).repeat(-(-n // _DRAWN))[:n].view(shape)

    return lambda name, shape: of(shape)
