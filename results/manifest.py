"""The manifest of an unfinished run: its plan, checked before it is trusted, and never changed.

Everything that decides a bit of the result is in `settings`: what the user chose, and what was taken from
the machine when the run began (the memory budget, the threads and whether the model is streamed, which
decide how passes are cut, and the precision). A run that is resumed takes the latter from here.

engine/settings.py holds every process that resumes, shares or asks again for a run to them, finished or not.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from deltapatch.interventions.edges import grid_of
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.sites import SITES
from deltapatch.interventions.sources import SOURCES
from deltapatch.kernels.product import PRECISIONS
from deltapatch.results.folder import pairs_as_text
from deltapatch.results.metrics import Direction, Reference, is_measured, know_all
from deltapatch.results.truth import Sampled, Truth

FORMAT, FORMAT_VERSION = "deltapatch unfinished run", 2

_MOST = 2**50  # of anything that is counted


@dataclass(frozen=True)
class Manifest:
    """The plan of a run.

    Attributes:
        settings: see above.
        n_passes: that the plan is cut into.
        n_pairs: lines of pairs.jsonl.
        meta: what the finished run will say of itself.
        truth: effects in float64 for the noise floor, or None.
    """

    settings: dict[str, Any]
    n_passes: int
    n_pairs: int
    meta: dict[str, Any]
    truth: Truth | None

    def to_json(self) -> str:
        """As text, with a checksum."""
        body = self._body()
        return json.dumps(body | {"sha256": _digest(body)}, indent=1) + "\n"

    def digest(self) -> str:
        """The checksum that its kept passes carry."""
        return _digest(self._body())

    @property
    def n_effects(self) -> int:
        """Of the whole run."""
        if "interventions" in self.settings:
            return int(self.settings["interventions"]["number"])
        return grid_of(self.settings, self.n_pairs).n_effects

    def _body(self) -> dict[str, Any]:
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "n_passes": self.n_passes,
            "n_pairs": self.n_pairs,
            "meta": self.meta,
            "truth": None if self.truth is None else _truth_as_lists(self.truth),
        }
        # Numpy numbers and tuples become what they will be when they are read.
        plain: dict[str, Any] = json.loads(json.dumps(body, default=_plain))
        return plain


def digest_of(pairs: list[EncodedPair]) -> str:
    """The checksum of pairs, as a manifest has it."""
    return hashlib.sha256(pairs_as_text(pairs).encode()).hexdigest()


def read_manifest(text: str | bytes) -> Manifest:
    """The manifest in a text.

    Raises:
        ValueError, RecursionError: it is damaged, or not one; the message says where.
    """
    body = json.loads(text)
    _need(isinstance(body, dict) and body.get("format") == FORMAT, "format")
    _need(body.get("format_version") == FORMAT_VERSION, "format_version, of another deltapatch")
    checksum = body.pop("sha256", None)
    _need(checksum == _digest(body), "checksum")
    settings, n_passes, n_pairs = body.get("settings"), body.get("n_passes"), body.get("n_pairs")
    _need(isinstance(body.get("meta"), dict), "meta")
    _need(_counts(n_passes) and _counts(n_pairs), "counts")
    _need(isinstance(settings, dict), "settings")
    try:
        _check_settings(settings)
    except KeyError as error:
        raise ValueError(f"it does not tell its {error}") from error
    truth = None if body.get("truth") is None else _read_truth(body["truth"], tuple(settings["metrics"]))
    manifest = Manifest(settings, n_passes, n_pairs, body["meta"], truth)
    if truth is not None:
        _need(bool(((truth.at >= 0) & (truth.at < manifest.n_effects)).all()), "truth")
    return manifest


def _check_settings(s: dict[str, Any]) -> None:
    if "interventions" in s:
        _check_interventions(s["interventions"])
    elif "senders" in s:
        grid_of(s, 1)
    else:
        _check_grid(s["sites"], s["positions"])
    know_all(s.get("functions"))
    metrics = s["metrics"]
    _need(isinstance(metrics, list) and bool(metrics) and is_measured([*map(str, metrics)]), "metrics")
    _need(len(set(metrics)) == len(metrics), "metrics")
    _need(s["direction"] in get_args(Direction) and s["source"] in list(SOURCES), "direction or source")
    _need(isinstance(s["precision"], str) and s["precision"] in PRECISIONS, "precision")
    _need(_counts(s["memory_budget"]) and s["memory_budget"] > 0, "memory budget")
    _need(_counts(s["threads"]) and 0 < s["threads"] <= 4096, "threads")
    _need(isinstance(s["stream"], bool), "stream")
    for name in ("model", "pairs", "deltapatch", "torch", "dtype", "device", "backend"):
        _need(isinstance(s[name], str), name)


def _check_interventions(found: Any) -> None:
    _need(isinstance(found, dict) and set(found) == {"number", "sha256"}, "interventions")
    _need(_counts(found["number"]) and found["number"] > 0, "interventions")
    _need(isinstance(found["sha256"], str), "interventions")


def _check_grid(sites: Any, positions: Any) -> None:
    _need(isinstance(sites, list) and bool(sites), "sites")
    for site in sites:
        _need(isinstance(site, dict) and set(site) == {"site", "layers", "indices"}, "sites")
        _need(isinstance(site["site"], str) and site["site"] in SITES, "sites")
        layers = site["layers"]
        _need(isinstance(layers, list) and bool(layers) and all(map(_counts, layers)), "layers")
        _need(len(set(layers)) == len(layers) and _counts(site["indices"]), "layers")
    _need(len({site["site"] for site in sites}) == len(sites), "sites")
    _need(isinstance(positions, list) and bool(positions), "positions")
    _need(all(isinstance(p, str) or (_whole(p) and abs(p) < _MOST) for p in positions), "positions")
    _need(len(set(positions)) == len(positions), "positions")


def _truth_as_lists(truth: Truth) -> dict[str, Any]:
    reference = truth.sampled.reference
    return {
        "precision": truth.precision,
        "at": truth.at.tolist(),
        "measured": {name: values.tolist() for name, values in truth.sampled.measured.items()},
        "reference": {name: array.tolist() for name, array in reference.arrays().items()},
    }


def _read_truth(found: Any, metrics: tuple[str, ...]) -> Truth:
    try:
        at = np.array(found["at"], dtype=np.int64)
        measured = {name: np.array(found["measured"][name], dtype=np.float64) for name in metrics}
        like = Reference.empty(len(at)).arrays()
        arrays = {name: np.array(found["reference"][name], dtype=a.dtype) for name, a in like.items()}
        precision = found["precision"]
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError("its truth is wrong") from error
    _need(at.ndim == 1, "truth")
    n = len(at)
    _need(all(a.shape == (n,) for a in measured.values()), "truth")
    _need(all(arrays[name].shape == a.shape for name, a in like.items()), "truth")
    _need(precision in ("fp64", "fp32"), "truth")
    return Truth(precision, at, Sampled(measured, Reference(**arrays)))


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _need(true: bool, what: str) -> None:
    if not true:
        raise ValueError(f"its {what} is wrong")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _counts(value: Any) -> bool:
    return _whole(value) and 0 <= value < _MOST


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
