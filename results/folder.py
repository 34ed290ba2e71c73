"""A run folder: what was run, on which pairs, with what effects; written whole or not at all.

    run.json              what was run: model, options, seeds, versions, machine; the axes of every tensor;
                          a checksum of all that
    pairs.jsonl           one EncodedPair a line
    effects.safetensors   "<site>/<measured number>" for each site, and the reference runs;
                          "measured/<number>" of a run of given interventions, which are in
    interventions.safetensors   as arrays

Numbers are kept as measured, so that every metric can be asked for later. While a sweep is not finished,
there is no run.json, and what is done lies in a folder `unfinished` (see checkpoint.py). reading.py reads
what is written here.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

import deltapatch
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.models.header import check_regular
from deltapatch.results.metrics import Reference
from deltapatch.results.tensorfile import save_file
from deltapatch.results.wholefile import flush as _flush

FORMAT = "deltapatch run"
FORMAT_VERSION = 2
CHECKSUM = "sha256"  # in run.json
RUN, PAIRS, EFFECTS = "run.json", "pairs.jsonl", "effects.safetensors"
INTERVENTIONS = "interventions.safetensors"
UNFINISHED, MANIFEST, LOCK = "unfinished", "manifest.json", "run.lock"
ROUNDS = "rounds"  # in UNFINISHED, of a sweep that goes on until it has found enough: a run folder each
_REFERENCE_AXES = {
    "logit": "pair,run,answer",
    "logp": "pair,run,answer",
    "prediction": "pair,run",
    "says": "pair,run,answer",
}


def is_begun(path: Path) -> bool:
    """Whether an unfinished run lies in a folder, or what a finished one has not removed yet."""
    folder = path / UNFINISHED
    if not folder.is_dir():
        return False
    return any((folder / name).exists() for name in (LOCK, MANIFEST, ROUNDS)) or not any(folder.iterdir())


def check_output(path: str | os.PathLike[str]) -> Path:
    """The path, if something can be written there: it is free, or an empty folder.

    Raises:
        DeltapatchError: the path is taken.
    """
    path = Path(path)
    with plain_errors(path):
        if path.is_dir() and not any(path.iterdir()):
            return path
        if is_begun(path) and not (path / RUN).exists():
            raise DeltapatchError(
                f"output path {path} is taken: it is a run that is not finished; the same sweep with "
                "--resume (in Python resume=True) goes on from there, or remove it"
            )
        if path.exists() or path.is_symlink():
            kind = "a folder that is not empty" if path.is_dir() else "a file"
            raise DeltapatchError(f"output path {path} is taken: it is {kind}; choose another or remove it")
    return path


@dataclass(frozen=True)
class Record:
    """What a run folder holds.

    Attributes:
        about: what run.json says: what was run, and the coordinates of its effects.
        pairs: what pairs.jsonl holds.
        tensors: name -> array, of effects.safetensors.
        axes: name -> the names of its axes, with commas between.
        interventions: the arrays of interventions.safetensors, of a run of given ones.
    """

    about: dict[str, Any]
    pairs: Sequence[EncodedPair]
    tensors: dict[str, np.ndarray]
    axes: dict[str, str]
    interventions: dict[str, np.ndarray] | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Their names; the one that makes it a run folder comes last."""
        return (EFFECTS, *([INTERVENTIONS] if self.interventions is not None else []), PAIRS, RUN)


def reference_tensors(reference: Reference) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The unpatched runs as effects.safetensors has them, and their axes."""
    arrays = {f"reference/{name}": np.ascontiguousarray(a) for name, a in reference.arrays().items()}
    return arrays, {f"reference/{name}": axes for name, axes in _REFERENCE_AXES.items()}


def write_run(record: Record, path: str | os.PathLike[str]) -> None:
    """Write a run folder beside its final place, then rename it, so that a run folder is always whole.

    Raises:
        DeltapatchError: the path is taken or cannot be written, or the disk is full.
    """
    path = check_output(path)
    with plain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.parent / f".{path.name}.{os.getpid()}.partial"
        try:
            draft.mkdir()
            _write_files(record, draft)
            os.replace(draft, path)
            _flush(path.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def put_files(record: Record, drafts: Path, path: Path) -> None:
    """Write the files of a run folder that already exists: first into a folder of drafts, then in place.

    The one that makes it a finished run comes last. OSError where the disk is full.
    """
    try:
        drafts.mkdir(exist_ok=True)
        _write_files(record, drafts)
        for name in record.files:
            os.replace(drafts / name, path / name)
            _flush(path)
    except BaseException:
        shutil.rmtree(drafts, ignore_errors=True)
        raise


def pairs_as_text(pairs: Sequence[EncodedPair]) -> str:
    """What pairs.jsonl holds."""
    return "".join(json.dumps(asdict(pair), default=_plain) + "\n" for pair in pairs)


def checksum(about: dict[str, Any], folder: Path) -> str:
    """The sha256, in hex, of a run's effects and pairs, and of its run.json but for date and time taken.

    OSError where a file cannot be read.
    """
    said = {key: value for key, value in about.items() if key not in (CHECKSUM, "date", "seconds")}
    out = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    given = (INTERVENTIONS,) if "interventions" in about else ()
    for name in (EFFECTS, PAIRS, *given):
        check_regular(folder / name)
        with open(folder / name, "rb") as file:
            out.update(hashlib.file_digest(file, "sha256").digest())
    return out.hexdigest()


def environment() -> dict[str, Any]:
    """Where and with what a run is made: versions, machine, date. Loads none of the packages it names."""
    machine = {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
    }
    return {
        "versions": dict(_versions()),
        "machine": machine,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache  # each one's metadata is read from its file
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "deltapatch": deltapatch.__version__}
    for package in ("torch", "triton", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@cache
def _processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({platform.machine()})" if names else platform.processor() or platform.machine()


def _write_files(record: Record, folder: Path) -> None:
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **environment(),  # of this moment, unless the effects already say where they were made
        **record.about,
        "axes": record.axes,
    }
    save_file(record.tensors, folder / EFFECTS, metadata=record.axes)
    (folder / PAIRS).write_text(pairs_as_text(record.pairs), encoding="utf-8")
    if record.interventions is not None:
        save_file(record.interventions, folder / INTERVENTIONS, metadata={})
    about = json.loads(json.dumps(about, default=_plain))
    about[CHECKSUM] = checksum(about, folder)
    with open(folder / RUN, "w", encoding="utf-8") as file:
        file.write(json.dumps(about, indent=2) + "\n")
    for name in record.files:
        _flush(folder / name)
    _flush(folder)


def _plain(value: Any) -> Any:
    """What JSON does not know: numpy numbers and arrays as lists, paths and everything else as text."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


@contextmanager
def plain_errors(path: Path, kept: str = "nothing was written, free some and run again") -> Iterator[None]:
    """Say in one sentence why a path cannot be written, and what is there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors has its own word for what the system said
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "os error 28" in str(error).lower() or "StorageFull" in str(error):
            why = f"no space left on the disk to write {path}: {kept}"
        else:
            why = f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        raise DeltapatchError(why) from error
