"""Kept passes: what each pass of an unfinished run found, one file a pass, whole or not there.

A file carries its checksum, its number and the checksum of the manifest that it belongs to. So one rename
makes it count, and no list kept beside it can disagree with it after a kill.
"""

import os
import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from deltapatch.models.header import open_safetensors
from deltapatch.results.measured import PassEffects
from deltapatch.results.metrics import Reference
from deltapatch.results.tensorfile import digest, save_file
from deltapatch.results.wholefile import write_whole

_REFERENCE = tuple(Reference.empty(0).arrays())


class DamagedPass(Exception):
    """What is kept of a pass is truncated, changed, or of another run."""


class KeptPasses:
    """The kept passes in a folder.

    Args:
        folder: where they lie, as 0.safetensors and so on.
        plan: the checksum of the manifest.
    """

    def __init__(self, folder: Path, plan: str) -> None:
        self.folder, self.plan = folder, plan

    def path(self, number: int) -> Path:
        """Where a pass is kept. Made from the number alone: no file says where another one lies."""
        return self.folder / f"{number}.safetensors"

    def write(self, number: int, found: PassEffects) -> None:
        """Keep a pass. OSError where it cannot be written; then there is none."""
        tensors = {"out": found.out.astype(np.int64), "pairs": found.pairs.astype(np.int64)}
        tensors |= {f"measured/{name}": values for name, values in found.measured.items()}
        tensors |= {f"reference/{name}": array for name, array in found.reference.arrays().items()}
        metadata = {"plan": self.plan, "pass": str(number), "seconds": repr(found.seconds)}
        metadata["sha256"] = digest(tensors, metadata)
        write_whole(self.path(number), lambda path: save_file(tensors, path, metadata))

    def read(self, number: int) -> PassEffects | None:
        """What a pass found; None where nothing is kept.

        Raises:
            DamagedPass: what is there is not what was written.
        """
        path = self.path(number)
        if not os.path.lexists(path):
            return None
        try:
            with open_safetensors(path, "numpy") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum = metadata.pop("sha256", "")
            whole = checksum == digest(tensors, metadata)
            if not whole or metadata["plan"] != self.plan or metadata["pass"] != str(number):
                raise DamagedPass
            found = PassEffects(
                tensors.pop("out"),
                tensors.pop("pairs"),
                {n.removeprefix("measured/"): a for n, a in tensors.items() if n.startswith("measured/")},
                Reference(*(tensors[f"reference/{name}"] for name in _REFERENCE)),
                float(metadata["seconds"]),
            )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedPass from error
        _check_shapes(found)
        return found

    def numbers(self) -> list[int]:
        """The passes that are kept, whole or not."""
        names = (path.stem for path in self.folder.glob("*.safetensors"))
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d{0,14}", name))


def _check_shapes(found: PassEffects) -> None:
    n, pairs = found.out.shape, found.pairs.shape
    shapes = {a.shape for a in found.measured.values()} | {n}
    kinds = {a.dtype.name for a in found.measured.values()}
    like = Reference.empty(found.pairs.size).arrays()
    fits = len(n) == len(pairs) == 1 and shapes == {n} and kinds <= {"float32", "float64"}
    for name, array in found.reference.arrays().items():
        fits &= (array.shape, array.dtype) == (like[name].shape, like[name].dtype)
    fits &= found.out.dtype == found.pairs.dtype == np.int64
    if not fits:
        raise DamagedPass
