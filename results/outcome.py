"""Outcomes: what given interventions did, as arrays, in memory and in a file."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from safetensors import SafetensorError

from deltapatch.errors import DeltapatchError, shown
from deltapatch.models.header import open_safetensors
from deltapatch.results.effects import import_pandas
from deltapatch.results.folder import plain_errors
from deltapatch.results.metrics import MEASURED, METRICS, Direction, Reference, asked_of, compute, terms
from deltapatch.results.tensorfile import save_file
from deltapatch.results.wholefile import write_new

FORMAT = "deltapatch outcome"
_KINDS = {"prediction": "i", "says": "b"}  # of the reference's arrays; others are float64


@dataclass(repr=False)
class Outcome:
    """What `run` found, one number for each intervention and metric.

    Attributes:
        measured: name (see `metrics.MEASURED`) -> [intervention].
        pair: [intervention], the number of the pair that it acts on.
        patches: [intervention], how many patches it joins.
        reference: the unpatched runs of all pairs.
        direction: of the run.
        meta: what was run.
    """

    measured: dict[str, np.ndarray]
    pair: np.ndarray
    patches: np.ndarray
    reference: Reference
    direction: Direction
    meta: dict[str, Any]

    def __len__(self) -> int:
        return len(self.pair)

    @property
    def metrics(self) -> list[str]:
        """The metrics that this run can answer."""
        return [name for name, metric in METRICS.items() if set(metric.needs) <= set(self.measured)]

    def values(self, metric: str) -> np.ndarray:
        """A metric of every intervention: float64, [intervention].

        Raises:
            DeltapatchError: an unknown metric, or one that was not measured.
        """
        return compute(metric, self.measured, self.reference.of(self.pair), self.direction)

    def terms(self, metric: str) -> tuple[np.ndarray, np.ndarray | None]:
        """A metric as it is averaged, as of `Effects.terms`: [intervention], and [intervention] or None."""
        return terms(metric, self.measured, self.reference.of(self.pair), self.direction)

    def columns(self, metrics: str | Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The long form: intervention (its number), pair, patches (how many) and the metrics.

        Args:
            metrics: `recovered` by default, or the first that the run can answer.

        Raises:
            DeltapatchError: an unknown metric, or one that was not measured.
        """
        own = {"intervention": np.arange(len(self)), "pair": self.pair, "patches": self.patches}
        return own | {name: self.values(name) for name in asked_of(self.metrics, metrics)}

    def to_pandas(self, metrics: str | Sequence[str] | None = None) -> Any:
        """A DataFrame of `columns`, a row an intervention. DeltapatchError where pandas is not installed."""
        return import_pandas().DataFrame(self.columns(metrics))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, which `load_outcome` reads.

        Raises:
            DeltapatchError: the path is taken or cannot be written.
        """
        path = Path(path)
        tensors = {f"measured/{name}": values for name, values in self.measured.items()}
        tensors |= {f"reference/{name}": array for name, array in self.reference.arrays().items()}
        tensors |= {"pair": self.pair.astype(np.int64), "patches": self.patches.astype(np.int64)}
        about = {"direction": self.direction, "meta": self.meta}
        metadata = {"format": FORMAT, "about": json.dumps(about, sort_keys=True, default=str)}
        with plain_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            new = write_new(path, lambda draft: save_file(tensors, draft, metadata))
        if not new:
            raise DeltapatchError(f"output path {path} is taken: choose another or remove it")

    def __repr__(self) -> str:
        known = ("model", "precision", "backend")
        what = "".join(f", {self.meta[key]}" for key in known if key in self.meta)
        sizes = sorted({int(self.patches.min()), int(self.patches.max())}) if len(self) else [0]
        patches, pairs = " to ".join(map(str, sizes)), len(set(self.pair.tolist()))
        return (
            f"Outcome of {len(self)} intervention(s) of {patches} patch(es) on {pairs} pair(s), "
            f"{self.direction}{what}\n  metrics: {', '.join(self.metrics)}"
        )


def load_outcome(path: str | os.PathLike[str]) -> Outcome:
    """What `Outcome.save` wrote.

    Raises:
        DeltapatchError: there is no such file, or it is damaged or another file.
    """
    path = Path(path)
    if not path.is_file():
        raise DeltapatchError(f"{path} does not exist, or is no file: give one that Outcome.save wrote")
    try:
        with open_safetensors(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise DeltapatchError(f"{path} is not an outcome that Outcome.save wrote")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _outcome(tensors, json.loads(metadata["about"]))
    except (SafetensorError, OSError, KeyError, TypeError, RecursionError, ValueError) as error:
        if isinstance(error, DeltapatchError):
            raise
        reason = shown(" ".join(str(error).split()), 200)[1:-1]
        raise DeltapatchError(f"{path} is damaged ({reason}): copy it again, or run again") from error


def _outcome(tensors: dict[str, np.ndarray], about: dict[str, Any]) -> Outcome:
    """The checked outcome. ValueError, KeyError or TypeError where what was read makes no sense."""
    reference = Reference(**{name: tensors.pop(f"reference/{name}") for name in Reference.empty(0).arrays()})
    n_pairs = len(reference.logit)
    for name, array in reference.arrays().items():
        _need(array.shape == ((n_pairs, 2) if name == "prediction" else (n_pairs, 2, 2)), name)
        _need(array.dtype.kind == _KINDS.get(name, "f"), name)
    pair, patches = tensors.pop("pair"), tensors.pop("patches")
    measured = {name.removeprefix("measured/"): array for name, array in tensors.items()}
    _need(bool(measured) and set(measured) <= set(MEASURED), "measured numbers")
    for name, array in {"pair": pair, "patches": patches, **measured}.items():
        _need(array.ndim == 1 and len(array) == len(pair), name)
        _need(array.dtype.kind == ("f" if name in measured else "i"), name)
    _need(not len(pair) or (pair.min() >= 0 and pair.max() < n_pairs), "pair")
    _need(about["direction"] in get_args(Direction) and isinstance(about["meta"], dict), "direction or meta")
    return Outcome(measured, pair, patches, reference, about["direction"], about["meta"])


def _need(true: bool, what: str) -> None:
    if not true:
        raise ValueError(what)
