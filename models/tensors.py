"""Named tensors that a model is read from: those of safetensors files, of a module in memory, or made.

Files are memory-mapped: reading a tensor costs nothing until its pages are touched, and a CPU model in the
checkpoint's own dtype shares those pages with every other process that maps the file.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from deltapatch.errors import DeltapatchError, shown
from deltapatch.models.fetch import fetch, hash_of_file, hash_of_tensor, tensor_spans
from deltapatch.models.header import check_file, open_safetensors

# What safetensors calls the dtypes that a model may have; whole numbers and 8 bits are quantised weights.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Tensors(ABC):
    """Named tensors that a model is read from.

    Args:
        where: what a sentence calls the whole.
        shapes: name -> shape.
        dtypes: name -> dtype, or what is said to be one.

    Attributes:
        in_file: whether tensors are pages of a mapped file.
    """

    in_file = False

    def __init__(
        self, where: str, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype | str]
    ) -> None:
        self.where, self._shapes, self._dtypes = where, shapes, dtypes

    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one, without reading it."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one, without reading it.

        Raises:
            DeltapatchError: it is quantised: its dtype is not a floating-point one of 16 bits or more.
        """
        dtype = self._dtypes[name]
        if isinstance(dtype, str) or dtype not in _DTYPES.values():
            raise DeltapatchError(
                f"{self.place(name)}: tensor {name!r} is of dtype {dtype}, and quantised weights are not "
                "supported: float32, float16 or bfloat16 are"
            )
        return dtype

    def place(self, name: str) -> str:
        """What a sentence calls the place that one is read from."""
        return self.where

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor itself, shared with where it lives.

        Raises:
            DeltapatchError: it is quantised, or has no data.
        """

    def fetch(self, name: str) -> Tensor:
        """The same with its data read now; it takes no memory once it is dropped."""
        return self.read(name)

    def hash(self, name: str) -> bytes:
        """A hash of all bytes of one, as they are now."""
        return hash_of_tensor(self.read(name))


class SafetensorsFiles(Tensors):
    """The tensors of one or several safetensors files, memory-mapped.

    Raises:
        DeltapatchError: a file is missing, truncated, or lacks a tensor that the index promises.
    """

    in_file = True

    def __init__(self, where: str, files: list[Path], index: dict[str, str] | None = None) -> None:
        self._absolute = {path.name: path.absolute() for path in files}  # read from wherever the program goes
        self._looks = {name: _look(path) for name, path in self._absolute.items()}  # before they are opened
        self._files = {path.name: _open(path) for path in files}
        self._paths = {path.name: path for path in files}
        if index is None:
            index = {name: path.name for path in files for name in self._files[path.name].keys()}  # noqa: SIM118
        held = {file: set(opened.keys()) for file, opened in self._files.items()}
        for name, file in index.items():
            if name not in held[file]:
                raise DeltapatchError(
                    f"{self._paths[file]} lacks tensor {shown(name)}, which the index promises"
                )
        self._home = index
        self._spans: dict[str, dict[str, tuple[int, int]]] = {}
        headers = {name: self._files[file].get_slice(name) for name, file in index.items()}
        dtypes = {name: header.get_dtype() for name, header in headers.items()}
        super().__init__(
            where,
            {name: tuple(header.get_shape()) for name, header in headers.items()},
            {name: _DTYPES.get(dtype, dtype) for name, dtype in dtypes.items()},
        )

    def place(self, name: str) -> str:
        """The path of the file that holds a tensor."""
        return str(self._paths[self._home[name]])

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, as a view of the mapped file."""
        self.dtype(name)
        tensor: Tensor = self._files[self._home[name]].get_tensor(name)
        return tensor

    def fetch(self, name: str) -> Tensor:
        """One tensor, on the CPU, read from the file now into a mapping of its own.

        Raises:
            DeltapatchError: it is quantised, or the file is another one by now.
        """
        self._check_unchanged(name)
        found = fetch(*self._span(name), self.dtype(name))
        return self.read(name) if found is None else found.view(self.shape(name))

    def hash(self, name: str) -> bytes:
        """A hash of all bytes of one tensor, which are read from the file where it is not known yet.

        Raises:
            DeltapatchError: the file is another one by now.
        """
        self._check_unchanged(name)
        return hash_of_file(*self._span(name))

    def _check_unchanged(self, name: str) -> None:
        file = self._home[name]
        if _look(self._absolute[file]) != self._looks[file]:
            raise DeltapatchError(
                f"{self._paths[file]} has changed since the model was loaded: load the model again"
            )

    def _span(self, name: str) -> tuple[Path, tuple[int, int]]:
        """The file of a tensor, and where it lies there."""
        file = self._home[name]
        if file not in self._spans:
            self._spans[file] = tensor_spans(self._absolute[file])
        return self._absolute[file], self._spans[file][name]


class ModuleTensors(Tensors):
    """The parameters and buffers of a PyTorch module in memory, shared with it."""

    def __init__(self, where: str, state: dict[str, Tensor]) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        super().__init__(where, shapes, {name: tensor.dtype for name, tensor in state.items()})
        self._state = {name: tensor.detach() for name, tensor in state.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, wherever the module keeps it.

        Raises:
            DeltapatchError: it is quantised, or on no device.
        """
        self.dtype(name)
        if self._state[name].is_meta:
            raise DeltapatchError(f"{self.where}: tensor {name!r} has no data (device 'meta'): load it first")
        return self._state[name]


class MadeTensors(Tensors):
    """Tensors that are made when they are read, in place of those of a file.

    Args:
        where: what a sentence calls the place that they come from.
        shapes: name -> shape.
        dtype: of all.
        make: makes one, from its name and shape.
        in_file: what they say of themselves.
    """

    def __init__(
        self,
        where: str,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        make: Callable[[str, tuple[int, ...]], Tensor],
        *,
        in_file: bool = False,
    ) -> None:
        super().__init__(where, shapes, dict.fromkeys(shapes, dtype))
        self._make, self.in_file = make, in_file

    def read(self, name: str) -> Tensor:
        """Made now."""
        return self._make(name, self.shape(name))


def check_finite(tensor: Tensor, name: str, place: str) -> None:
    """Raise DeltapatchError where a tensor holds NaN or an infinity."""
    if is_finite(tensor):
        return
    if tensor.dtype == torch.float16 and not tensor.isnan().any():
        raise DeltapatchError(
            f"{place}: tensor {name!r} holds infinity, which float16 makes of numbers above 65504: it "
            "overflowed when it was saved; save it again in bfloat16 or float32"
        )
    raise DeltapatchError(f"{place}: tensor {name!r} holds NaN or infinity: the checkpoint is damaged")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity."""
    # Both ends pass a NaN on, in one pass over the data and without a mask of its size.
    return not tensor.numel() or all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def _look(path: Path) -> tuple[int, ...] | None:
    """What tells a file from one that has taken its place, or that was written to; None where it is gone."""
    try:
        about = os.stat(path)
    except (OSError, ValueError):  # what it is called may be no path
        return None
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def _open(path: Path) -> Any:
    check_file(path)
    if not path.is_file():
        raise DeltapatchError(f"{path} is missing: the checkpoint is incomplete")
    try:
        return open_safetensors(path, "pt")
    except (SafetensorError, OSError) as error:
        raise DeltapatchError(
            f"{path} is not a whole safetensors file ({error}): it may be truncated; "
            "copy or download it again"
        ) from error
