"""The manifest of an unfinished run: its plan, checked before it is trusted, and never changed.

Everything that decides a bit of the result is in `settings`: what the user chose, and what was taken from
the machine when the run began (the memory budget, the threads and whether the model is streamed, which
decide how passes are cut, and the precision). A run that is resumed takes the latter from here.

`check_same` holds every process that resumes, shares or asks again for a run to them, finished or not.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.grid import Grid, SiteGrid
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.sites import SITES
from deltapatch.interventions.sources import SOURCES
from deltapatch.kernels.product import PRECISIONS
from deltapatch.results.effects import Effects
from deltapatch.results.folder import pairs_as_text
from deltapatch.results.metrics import MEASURED, Direction, Reference
from deltapatch.results.truth import Sampled, Truth

FORMAT, FORMAT_VERSION = "deltapatch unfinished run", 2

# What must be the same for two processes to work on one run, and what a sentence calls it.
_WORDS = {
    "plan": "version of the plan",
    "deltapatch": "version of deltapatch",
    "torch": "version of PyTorch",
    "model": "model (fingerprint)",
    "dtype": "dtype",
    "device": "kind of device",
    "backend": "backend",
    "pairs": "pairs",
    "sites": "sites or layers",
    "positions": "positions",
    "direction": "direction",
    "source": "source",
    "readout": "readout",
    "metrics": "metrics",
    "seed": "seed",
    "noise_scale": "noise scale",
    "noise_sample": "noise sample",
    "precision": "precision",
    "memory_budget": "memory budget",
    "threads": "number of threads",
    "stream": "way of keeping weights",
}
_LEFT_OPEN = {"precision", "memory_budget", "threads", "stream", "backend"}  # None takes what the run has
# Nobody asks for these, and they change the last bits at most: one run is of one kind, but one that is
# finished answers for all.
_SURROUNDINGS = {"plan", "deltapatch", "torch", "device", "threads"}
_SHORT = 120  # characters of a value that fit into a sentence
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
        """The checksum that its shards carry."""
        return _digest(self._body())

    def grid(self) -> Grid:
        """What the run patches."""
        grids, offset = [], 0
        for s in self.settings["sites"]:
            layers = np.array(s["layers"], dtype=np.int64)
            grids.append(SiteGrid(SITES[s["site"]], layers, self.settings["positions"], s["indices"], offset))
            size = self.n_pairs * len(layers) * len(self.settings["positions"]) * max(1, s["indices"])
            offset += size
        return Grid(grids, offset)

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


def settings_of_run(effects: Effects) -> dict[str, Any]:
    """The settings of a finished run, as `settings_of` has them: those of what it holds, not what it says."""
    meta, sites = effects.meta, effects.sites.values()
    versions = meta["versions"] if isinstance(meta.get("versions"), dict) else {}
    positions = {site.site: list(site.positions) for site in sites}
    alike = len({str(at) for at in positions.values()}) == 1
    measured = {site.site: list(site.measured) for site in sites}
    said = {name: meta.get(name) for name in _WORDS}
    return said | {
        "deltapatch": versions.get("deltapatch"),
        "torch": versions.get("torch"),
        "model": meta.get("fingerprint"),
        "device": meta.get("device_kind"),
        "pairs": digest_of(effects.pairs),
        "sites": [
            {"site": s.site, "layers": s.layers.tolist(), "indices": s.shape[3] if len(s.shape) > 3 else 0}
            for s in sites
        ],
        "positions": next(iter(positions.values())) if alike else positions,
        "direction": effects.direction,
        "metrics": next(iter(measured.values()))
        if len({str(m) for m in measured.values()}) == 1
        else measured,
    }


def check_same(own: Mapping[str, Any], asked: Mapping[str, Any], where: object, finished: bool) -> None:
    """Check that what a process was asked for is what a run was begun with, or holds.

    Args:
        own: the settings of the run.
        asked: those of the process; None leaves a choice to the run where there is one.
        where: what a sentence calls the run.
        finished: whether it is; then a difference of version or machine is a warning.

    Raises:
        DeltapatchError: something differs; what, and both values.
    """
    differ = {
        name: f"{word}: {_both(name, own.get(name), asked[name])}"
        for name, word in _WORDS.items()
        if own.get(name) != asked[name] and not (asked[name] is None and name in _LEFT_OPEN)
    }
    if not differ:
        return
    what = f"a different {'; a different '.join(differ.values())}"
    if not finished:
        raise DeltapatchError(
            f"cannot resume {where}: it was begun with {what}; give the same, or choose another output path"
        )
    if differ.keys() <= _SURROUNDINGS:
        warnings.warn(f"run {where} was finished with {what}", stacklevel=4)
        return
    raise DeltapatchError(
        f"run {where} is finished, with {what}; give the same, choose another output path, or remove it"
    )


def _both(name: str, own: Any, mine: Any) -> str:
    """Two values that differ, on one line, whatever was read: from where they do where they are long."""
    texts = [_said(name, own), _said(name, mine)]
    if max(map(len, texts)) > _SHORT:
        same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), 0)
        begin = max(0, same - _SHORT // 3)
        texts = [("..." if begin else "") + text[begin:] for text in texts]
        texts = [text if len(text) <= _SHORT else f"{text[:_SHORT]}..." for text in texts]
    return "{} there, {} here".format(*texts)


def _said(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name == "pairs":
        return f"sha256 {str(value)[:12]}"
    if name == "sites" and isinstance(value, list) and all(isinstance(s, dict) for s in value):
        value = "; ".join(f"{s.get('site')} of layers {_ranges(s.get('layers'))}" for s in value)
    return " ".join(str(value).split())


def _ranges(numbers: Any) -> str:
    """0-5,9."""
    found: list[list[Any]] = []
    for n in numbers if isinstance(numbers, list) else []:
        if found and isinstance(n, int) and found[-1][1] == n - 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


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
    _need(isinstance(settings, dict) and list(settings) == list(_WORDS), "settings")
    _check_settings(settings)
    truth = None if body.get("truth") is None else _read_truth(body["truth"], tuple(settings["metrics"]))
    manifest = Manifest(settings, n_passes, n_pairs, body["meta"], truth)
    if truth is not None:
        _need(bool(((truth.at >= 0) & (truth.at < manifest.grid().n_effects)).all()), "truth")
    return manifest


def _check_settings(s: dict[str, Any]) -> None:
    sites, positions, metrics = s["sites"], s["positions"], s["metrics"]
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
    _need(isinstance(metrics, list) and bool(metrics) and set(map(str, metrics)) <= set(MEASURED), "metrics")
    _need(len(set(metrics)) == len(metrics), "metrics")
    _need(s["direction"] in get_args(Direction) and s["source"] in list(SOURCES), "direction or source")
    _need(isinstance(s["precision"], str) and s["precision"] in PRECISIONS, "precision")
    _need(_counts(s["memory_budget"]) and s["memory_budget"] > 0, "memory budget")
    _need(_counts(s["threads"]) and 0 < s["threads"] <= 4096, "threads")
    _need(isinstance(s["stream"], bool), "stream")
    for name in ("model", "pairs", "deltapatch", "torch", "dtype", "device", "backend"):
        _need(isinstance(s[name], str), name)


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
