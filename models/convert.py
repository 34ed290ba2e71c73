"""`deltapatch convert`: PyTorch .bin weights, of a model or a LoRA adapter, and GGUF into safetensors."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deltapatch.errors import DeltapatchError
from deltapatch.models.checkpoint import Checkpoint
from deltapatch.models.config import Config
from deltapatch.models.folder import TOKENIZER_FILES, find_folder, read_index, read_json
from deltapatch.models.gguf import is_gguf, write_gguf
from deltapatch.models.header import check_file
from deltapatch.models.registry import read_config
from deltapatch.models.tensors import ModuleTensors

_MODEL, _INDEX, _ADAPTER = "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"
_COPIED = ("config.json", "generation_config.json", "adapter_config.json", *TOKENIZER_FILES)
_WANTED = (_MODEL, _INDEX, "pytorch_model-*-of-*.bin", _ADAPTER, *_COPIED)


def convert(path_or_id: str | Path, out: str | Path, *, revision: str | None = None) -> Path:
    """Rewrite a checkpoint as safetensors, with its config and tokenizer; dtypes stay.

    Files are unpickled as tensors only (`weights_only`), so nothing in them can run. Everything is written to
    a temporary folder beside `out` that takes its name at the end: `out` is whole or not there.

    Args:
        path_or_id: a folder or hub id with pytorch_model.bin, its shards, or adapter_model.bin; or a GGUF
            file, whose quantised values become float32.
        out: the folder to make; it must not exist.
        revision: of a checkpoint of the hub, as for `load_model`.

    Returns:
        The folder that was made.

    Raises:
        DeltapatchError: `out` exists, the checkpoint is broken or not supported, or the disk is full.
    """
    target, gguf = Path(out).expanduser(), is_gguf(path_or_id)
    source = Path(path_or_id) if gguf else find_folder(path_or_id, _WANTED, revision=revision)
    for file in (_MODEL, _INDEX, _ADAPTER):
        check_file(source / file)
    if target.exists() or target.is_symlink():
        raise DeltapatchError(f"{target} exists already: choose another output, or remove it first")
    if gguf:
        _make_whole(target, partial(write_gguf, source))
        return target
    shards = {file: _load(source / file) for file in _weight_files(source)}
    if _ADAPTER not in shards:
        shards = _check_model(source, shards)
    _make_whole(target, partial(_write, source, shards))
    return target


def _make_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Have a folder written under another name; it takes its own at the end."""
    part = target.parent / f".{target.name}.{os.getpid()}.part"
    try:
        part.mkdir(parents=True)
        write(part)
        part.rename(target)
    except (OSError, SafetensorError) as error:
        raise DeltapatchError(f"{target} could not be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _weight_files(source: Path) -> list[str]:
    if (source / _MODEL).is_file():
        return [_MODEL]
    if (source / _INDEX).is_file():
        return sorted(set(read_index(source / _INDEX).values()))
    if (source / _ADAPTER).is_file():
        return [_ADAPTER]
    if any(source.glob("*.safetensors")):
        raise DeltapatchError(f"{source} holds safetensors already: load it as it is")
    raise DeltapatchError(f"{source} has nothing to convert: no {_MODEL}, {_INDEX} or {_ADAPTER}")


def _load(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DeltapatchError(f"{path} is missing: the checkpoint is incomplete")
    check_file(path)
    try:
        # Only the format of torch before 1.6 is no zip archive, and that cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise DeltapatchError(
            f"{path} is broken or holds more than tensors, and is not loaded because it could run code"
        ) from error
    except Exception as error:  # torch's reader raises whatever a broken file leads it to
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DeltapatchError(f"{path} cannot be read, it may be truncated: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise DeltapatchError(f"{path} does not hold a dictionary of tensors")
    return state


def _check_model(source: Path, shards: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The shards without what is no weight, once names and shapes are seen to fit config.json."""
    if not (source / "config.json").is_file():
        raise DeltapatchError(f"{source} has no config.json: it is not a model folder")
    architecture, spec = read_config(Config(read_json(source / "config.json"), str(source / "config.json")))
    state = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    Checkpoint(architecture, spec, ModuleTensors(str(source), state))
    return {
        file: {name: tensor for name, tensor in shard.items() if architecture.find(name)}
        for file, shard in shards.items()
    }


def _write(source: Path, shards: dict[str, dict[str, Tensor]], part: Path) -> None:
    home: dict[str, str] = {}
    for file, shard in shards.items():
        name = file.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
        save_file(_unshared(shard), part / name, metadata={"format": "pt"})
        home |= dict.fromkeys(shard, name)
    if _MODEL not in shards and _ADAPTER not in shards:
        index = json.dumps({"metadata": {}, "weight_map": home}, indent=2)
        (part / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    for file in _COPIED:
        if (source / file).is_file():
            shutil.copyfile(source / file, part / file)


def _unshared(shard: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as the format wants them; tied weights become two."""
    seen: set[int] = set()
    result = {}
    for name, tensor in ((name, t.detach()) for name, t in shard.items()):
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or not tensor.is_contiguous() or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        result[name] = tensor
    return result
