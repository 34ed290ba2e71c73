"""Finding and reading checkpoints: a folder or a hub id, config.json, safetensors in one file or in shards.

Tensors are memory-mapped: reading one costs nothing until its pages are touched, and a CPU model in the
checkpoint's own dtype shares those pages with every other process that maps the file.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from deltapatch.errors import DeltapatchError, path_of, shown
from deltapatch.models.builtin_models import BUILTIN, builtin_model_path
from deltapatch.models.fetch import fetch, hash_of_file, hash_of_tensor, tensor_spans
from deltapatch.models.header import check_file, open_safetensors

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LARGEST_JSON = 100_000_000  # characters, as safetensors allows a header
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# What safetensors calls the dtypes that a model may have; whole numbers and 8 bits are quantised weights.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
CHECKPOINT_FILES = ("config.json", _SINGLE, _INDEX, "model-*-of-*.safetensors", *TOKENIZER_FILES)


class Tensors(Protocol):
    """Named tensors that a model is read from: files, or a model in memory."""

    where: str  # what a sentence calls the whole
    in_file: bool  # whether tensors are pages of a mapped file

    def names(self) -> Iterable[str]:
        """The names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one, without reading it."""

    def place(self, name: str) -> str:
        """What a sentence calls the place that it is read from."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one, without reading it."""

    def read(self, name: str) -> Tensor:
        """The tensor itself, shared with where it lives."""

    def fetch(self, name: str) -> Tensor:
        """The same with its data read now; it takes no memory once it is dropped."""

    def hash(self, name: str) -> bytes:
        """A hash of all bytes of one."""


class SafetensorsFiles:
    """The tensors of one or several safetensors files, memory-mapped.

    Raises:
        DeltapatchError: a file is missing, truncated, or lacks a tensor that the index promises.
    """

    in_file = True

    def __init__(self, where: str, files: list[Path], index: dict[str, str] | None = None) -> None:
        self.where = where
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

    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._home.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the header."""
        return tuple(self._files[self._home[name]].get_slice(name).get_shape())

    def place(self, name: str) -> str:
        """The path of the file that holds a tensor."""
        return str(self._paths[self._home[name]])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor, from the header.

        Raises:
            DeltapatchError: it is not a floating-point one of 16 bits or more.
        """
        dtype = self._files[self._home[name]].get_slice(name).get_dtype()
        if dtype not in _DTYPES:
            raise DeltapatchError(
                f"{self.place(name)}: tensor {name!r} is of dtype {dtype}, and quantised weights are not "
                "supported: float32, float16 or bfloat16 are"
            )
        return _DTYPES[dtype]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, as a view of the mapped file.

        Raises:
            DeltapatchError: its dtype is not a floating-point one of 16 bits or more.
        """
        self.dtype(name)
        tensor: Tensor = self._files[self._home[name]].get_tensor(name)
        return tensor

    def fetch(self, name: str) -> Tensor:
        """One tensor, on the CPU, read from the file now into a mapping of its own.

        Raises:
            DeltapatchError: its dtype is not a floating-point one of 16 bits or more, or the file is another
                one by now.
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


class ModuleTensors:
    """The parameters and buffers of a PyTorch module in memory, shared with it."""

    in_file = False

    def __init__(self, where: str, state: dict[str, Tensor]) -> None:
        self.where = where
        self._state = {name: tensor.detach() for name, tensor in state.items()}

    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._state.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return tuple(self._state[name].shape)

    def place(self, name: str) -> str:
        """What a sentence calls the place of a tensor: the module."""
        return self.where

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor."""
        return self._state[name].dtype

    def fetch(self, name: str) -> Tensor:
        """One tensor, which is in memory already."""
        return self.read(name)

    def hash(self, name: str) -> bytes:
        """A hash of all bytes of one tensor, as they are now."""
        return hash_of_tensor(self.read(name))

    def read(self, name: str) -> Tensor:
        """One tensor, wherever the module keeps it.

        Raises:
            DeltapatchError: it is quantised, or on no device.
        """
        tensor = self._state[name]
        if tensor.dtype not in _DTYPES.values():
            raise DeltapatchError(
                f"{self.where}: tensor {name!r} is of dtype {tensor.dtype}, and quantised weights are not "
                "supported: float32, float16 or bfloat16 are"
            )
        if tensor.is_meta:
            raise DeltapatchError(f"{self.where}: tensor {name!r} has no data (device 'meta'): load it first")
        return tensor


def find_folder(
    path_or_id: str | Path, files: Iterable[str] = CHECKPOINT_FILES, *, revision: str | None = None
) -> Path:
    """The local folder of a checkpoint: as given, of `builtin:NAME`, or of a hub id.

    What a hub id names is downloaded into the hub's cache, `files` only, and of a revision (a branch, a tag
    or a commit) if one is given.

    Raises:
        DeltapatchError: there is no such folder, and the hub has no such model or revision or cannot be
            reached; a revision of what is no hub id.
    """
    if revision is not None and (not isinstance(revision, str) or not revision.strip()):
        raise DeltapatchError(f"a revision is a branch, tag or commit of the hub, not {revision!r}")
    path = path_of(path_or_id, "a model or adapter").expanduser()
    builtin = str(path_or_id).startswith(BUILTIN)
    if revision is not None and (builtin or path.is_dir()):
        raise DeltapatchError(
            f"{path_or_id} is not a model of the hub, and has no revision {shown(revision)}: give its "
            "hub id, or leave the revision out"
        )
    if builtin:
        return builtin_model_path(str(path_or_id).removeprefix(BUILTIN))
    if path.is_dir():
        return path
    if path.exists():
        raise DeltapatchError(f"{path} is a file: give the folder that holds config.json and the weights")
    name = str(path_or_id)
    if not _HUB_ID.fullmatch(name):
        raise DeltapatchError(f"model folder {name} does not exist")
    from huggingface_hub import snapshot_download

    of: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        return Path(snapshot_download(name, allow_patterns=list(files), **of))
    except Exception as error:  # the hub's client raises whatever its transport raises
        reason = str(error).strip().split("\n")[0]
        what = "model of that name" if revision is None else f"revision {shown(revision)} of such a model"
        raise DeltapatchError(
            f"there is no folder {name}, and the Hugging Face hub gives no {what}: {reason}"
        ) from error


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache holds; None of another folder."""
    inside = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if inside else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DeltapatchError: the file cannot be read or does not hold a JSON object.
    """
    try:
        check_file(path)
        with open(path, encoding="utf-8") as file:
            text = file.read(_LARGEST_JSON + 1)
        if len(text) > _LARGEST_JSON:
            raise ValueError(f"it is longer than {_LARGEST_JSON:,} characters")
        fields = json.loads(text)
    except DeltapatchError:
        raise
    except OSError as error:
        raise DeltapatchError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DeltapatchError(f"{path} is not a text file") from error
    except json.JSONDecodeError as error:
        raise DeltapatchError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or endless brackets
        raise DeltapatchError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise DeltapatchError(f"{path} must hold a JSON object, not a {type(fields).__name__}")
    return fields


def read_checkpoint(folder: Path, name: str) -> tuple[dict[str, Any], SafetensorsFiles]:
    """The fields of config.json and the tensors of a model folder; `name` is what the user called it.

    Raises:
        DeltapatchError: a file is missing, broken or truncated; for a folder with PyTorch files only, the
            sentence says how to convert them.
    """
    config_path = folder / "config.json"
    for file in (config_path, folder / _SINGLE, folder / _INDEX):
        check_file(file)
    if not config_path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise DeltapatchError(
                f"{folder} holds a LoRA adapter: load its base model and give this as the adapter"
            )
        raise DeltapatchError(f"{folder} has no config.json: it is not a model folder")
    config = read_json(config_path)
    if (folder / _SINGLE).is_file():
        return config, SafetensorsFiles(str(folder), [folder / _SINGLE])
    if (folder / _INDEX).is_file():
        index = read_index(folder / _INDEX)
        return config, SafetensorsFiles(str(folder), [folder / n for n in sorted(set(index.values()))], index)
    if any(folder.glob("*.bin")) or not Path(name).is_dir():  # of a hub's model, .bin files are not fetched
        raise DeltapatchError(
            f"{name} has no safetensors, and PyTorch .bin files are not read directly: "
            f"convert them once with `deltapatch convert {quote(name)} --out OUT` and load OUT"
        )
    raise DeltapatchError(f"{folder} has no weights: neither {_SINGLE} nor {_INDEX} is there")


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint.

    Raises:
        DeltapatchError: the index is broken.
    """
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise DeltapatchError(f"{path} has no 'weight_map'")
    for file in index.values():
        # A name that leaves the folder has no business in an index.
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise DeltapatchError(f"{path}: {shown(file)} is not the name of a file in the same folder")
    return index


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
