"""Parts: patches that are joined with each other, as they are named, and as a file keeps them."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np

from deltapatch.errors import DeltapatchError, path_of
from deltapatch.interventions.sites import SITES
from deltapatch.models.header import check_file


@dataclass(frozen=True)
class Part:
    """Where one part is, as it was asked for.

    Attributes:
        site: a name of `sites.SITES`.
        layer: from 0.
        position: from 0, negative from the end, a label, or "together", all positions of the prompt at once.
        index: head, neuron or coordinate; None for whole vectors.
    """

    site: str
    layer: int
    position: int | str
    index: int | None = None

    @property
    def name(self) -> str:
        """Short, for tables and figures: `z L3.H2 @last`."""
        at = "last" if self.position == -1 else self.position
        index = "" if self.index is None else f".{SITES[self.site].index.letter}{self.index}"
        return f"{self.site} L{self.layer}{index} @{at}"


def names_of(parts: Sequence[Part]) -> list[str]:
    """A name for each; parts of one name, which differ in their directions, are counted."""
    names = [part.name for part in parts]
    return [
        name if names.count(name) == 1 else f"{name} #{names[:i].count(name) + 1}"
        for i, name in enumerate(names)
    ]


def load_parts(path: str | os.PathLike[str]) -> list[Part]:
    """Parts from a file of one JSON object a line, with site, layer, position and, of some sites, index.

    Raises:
        DeltapatchError: the file cannot be read, or a line is no part. The message names the line.
    """
    path = path_of(path, "a file of parts")
    try:
        check_file(path)
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DeltapatchError(f"the file of parts {path} cannot be read ({error})") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            told = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DeltapatchError(f"{where} is not JSON ({error})") from error
        known = {f.name for f in fields(Part)}
        if not isinstance(told, dict) or not known - {"index"} <= told.keys() <= known:
            raise DeltapatchError(
                f'{where} is no part such as {{"site": "z", "layer": 3, "position": "last", "index": 2}}'
            )
        found.append(Part(**told))
    return found


def parts_as_file(parts: Sequence[Part]) -> dict[str, np.ndarray]:
    """As a file of arrays keeps them: the bytes of their JSON."""
    text = json.dumps([astuple(part) for part in parts]).encode()
    return {"parts": np.frombuffer(text, dtype=np.uint8)} if parts else {}


def parts_of_file(arrays: Mapping[str, np.ndarray]) -> tuple[Part, ...]:
    """What `parts_as_file` gave. ValueError where it makes no sense."""
    if "parts" not in arrays:
        return ()
    if arrays["parts"].dtype != np.uint8 or arrays["parts"].ndim != 1:
        raise ValueError("parts")
    found = json.loads(arrays["parts"].tobytes())
    if not isinstance(found, list) or not all(isinstance(one, list) and len(one) == 4 for one in found):
        raise ValueError("parts")
    for site, layer, position, index in found:
        right = isinstance(site, str) and site in SITES and type(layer) is int
        if not right or type(position) not in (int, str) or not (index is None or type(index) is int):
            raise ValueError("parts")
    return tuple(Part(*one) for one in found)
