"""Files of prompts that are no pairs: plain text, a prompt a line, or JSON lines."""

import json
import os
from typing import Any

from deltapatch.errors import DeltapatchError, path_of


def load_prompts(path: str | os.PathLike[str]) -> list[Any]:
    """Read a file of prompts, one a line.

    A file whose name ends in .jsonl has a JSON string or a list of token ids in each line, or an object of
    one as "prompt" and "labels"; any other has text, which is taken as it stands, spaces included.

    Raises:
        DeltapatchError: the file is missing, unreadable or empty, or a line has no prompt. The message names
            the file and the line.
    """
    file = path_of(path, "a file of prompts")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DeltapatchError(
            f"The file of prompts {file} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise DeltapatchError(
            f"The file of prompts {file} cannot be read ({error.strerror}): give one with a prompt a line."
        ) from None
    lines = text.removesuffix("\n").split("\n") if text.strip() else []
    if not lines:
        raise DeltapatchError(f"The file of prompts {file} is empty; it needs one prompt a line.")
    read = _from_json if file.suffix == ".jsonl" else _from_text
    return [read(line, f"{file}, line {n}") for n, line in enumerate(lines, start=1)]


def _from_text(line: str, name: str) -> str:
    if not line.strip():
        raise DeltapatchError(f"{name}: the line is empty; remove it, or write a prompt there.")
    return line.removesuffix("\r")


def _from_json(line: str, name: str) -> Any:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    labelled = isinstance(found, dict) and found.keys() == {"prompt", "labels"}
    prompt = found["prompt"] if labelled else found
    ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if prompt and (ids or isinstance(prompt, str)):
        return found
    raise DeltapatchError(
        f"{name}: a line must be a prompt as a JSON string, or a list of token ids, or an object of one of "
        'these and labels, {"prompt": ..., "labels": {...}}.'
    )
