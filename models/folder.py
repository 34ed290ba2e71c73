"""A model's folder: where it is, here or on the hub, and its config.json and safetensors files."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from shlex import quote
from typing import Any

from deltapatch.errors import DeltapatchError, path_of, shown
from deltapatch.models.builtin_models import BUILTIN, builtin_model_path
from deltapatch.models.header import check_file
from deltapatch.models.tensors import SafetensorsFiles

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LARGEST_JSON = 100_000_000  # characters, as safetensors allows a header
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

_LONGEST_NAME = 255  # bytes of a file's name, on all file systems that are in use
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


def read_folder(folder: Path, name: str) -> tuple[dict[str, Any], SafetensorsFiles]:
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
        # A name that leaves the folder, or that no folder can hold, has no business in an index.
        named = isinstance(file, str) and Path(file).name == file and file not in ("", "..")
        if not named or len(file.encode(errors="replace")) > _LONGEST_NAME:
            raise DeltapatchError(f"{path}: {shown(file)} is not the name of a file in the same folder")
    return index
