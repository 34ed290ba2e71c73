"""Reading run folders: all that a file says is checked before it counts, whoever wrote it.

A run folder that was damaged on its way is told by its checksum. What has a right checksum and makes no sense
is refused as well: nothing that a file says is allocated for, looked up or joined to a path unchecked.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from safetensors import SafetensorError

from deltapatch.arguments import check_label
from deltapatch.errors import DeltapatchError, path_of, shown
from deltapatch.interventions.alignment import makes_sense
from deltapatch.interventions.edges import SETTINGS, EdgeGrid
from deltapatch.interventions.given import Listed
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.sites import SITES
from deltapatch.models.header import check_file, check_regular, open_safetensors
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.effects import Effects, SiteEffects
from deltapatch.results.folder import (
    CHECKSUM,
    EFFECTS,
    FORMAT,
    FORMAT_VERSION,
    INTERVENTIONS,
    PAIRS,
    RUN,
    checksum,
    is_begun,
)
from deltapatch.results.interactions import Interactions
from deltapatch.results.measured import Found
from deltapatch.results.metrics import Direction, Reference, is_measured, know_all
from deltapatch.results.outcome import Outcome

_KINDS: dict[type, tuple[str, str]] = {
    Effects: ("a sweep", "load_effects"),
    EdgeEffects: ("a sweep of edges", "load_edges"),
    Outcome: ("a run of given interventions", "load_outcome"),
}
_MEND = "copy it again, or remove it and run the sweep again"
_HINTS = get_type_hints(EncodedPair)
# Without those that older runs do not have.
_REQUIRED = _HINTS.keys() - {"clean_others", "corrupted_others", "align", "weights"}
_MOST = 2**50  # of anything that is counted
_DAMAGE = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)


def load_effects(path: str | os.PathLike[str]) -> Effects:
    """The effects of the sweep in a run folder.

    Raises:
        DeltapatchError: it is none, is of given interventions, is damaged, or is of a newer format.
    """
    return _of_kind(Effects, read_run(path), path)


def load_outcome(path: str | os.PathLike[str]) -> Outcome:
    """The outcome of the given interventions in a run folder.

    Raises:
        DeltapatchError: it is none, is of a sweep, is damaged, or is of a newer format.
    """
    return _of_kind(Outcome, read_run(path), path)


def load_edges(path: str | os.PathLike[str]) -> EdgeEffects:
    """The effects of the sweep of edges in a run folder.

    Raises:
        DeltapatchError: it is none, is of sites or given interventions, is damaged, or is of a newer format.
    """
    return _of_kind(EdgeEffects, read_run(path), path)


def load_interactions(path: str | os.PathLike[str]) -> Interactions:
    """The interactions of the parts in a run folder.

    Raises:
        DeltapatchError: it is none, is of something else, is damaged, or is of a newer format.
    """
    return Interactions(load_outcome(path))


Kind = TypeVar("Kind", bound=Found)


def _of_kind(kind: type[Kind], found: Found, path: object) -> Kind:
    """What was read, if it is of a kind. DeltapatchError where it is of another."""
    if not isinstance(found, kind):
        what, reader = called(found)
        raise DeltapatchError(f"{path} is {what}, not {_KINDS[kind][0]}: {reader} reads it")
    return found


def called(found: Found) -> tuple[str, str]:
    """What a run is, in words, and what reads it."""
    if isinstance(found, Outcome) and found.meta.get("screen"):
        return "a screen, which `deltapatch effects` lists", "load_screened"
    return _KINDS[type(found)]


def read_run(path: str | os.PathLike[str]) -> Found:
    """What a run folder holds: the effects of a sweep or of its edges, or the outcome of given interventions.

    Raises:
        DeltapatchError: it is not a run folder, is damaged, or is of a newer format.
    """
    path = path_of(path, "a run folder")
    if not path.exists():
        raise DeltapatchError(f"run folder {path} does not exist")
    if is_begun(path) and not (path / RUN).exists():
        raise DeltapatchError(
            f"run {path} is not finished: the same sweep with --resume (in Python resume=True) goes on "
            "with it, and `deltapatch merge` finishes one whose parts (--shard) are all done"
        )
    check_file(path / RUN)
    if not (path / RUN).is_file():
        raise DeltapatchError(f"{path} is not a run folder: it has no {RUN}")
    try:
        about = json.loads((path / RUN).read_text(encoding="utf-8"))
        found = (about.get("format"), about.get("format_version"))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DeltapatchError(
            f"run folder {path} is damaged: {RUN} cannot be read ({error}): {_MEND}"
        ) from error
    if found[0] != FORMAT:
        raise DeltapatchError(f"{path} is not a run folder: its {RUN} is not one of deltapatch")
    if not isinstance(found[1], int) or found[1] > FORMAT_VERSION:
        raise DeltapatchError(
            f"run folder {path} has format {shown(found[1])}, newer than this deltapatch reads "
            f"({FORMAT_VERSION}): upgrade deltapatch"
        )
    if found[1] < FORMAT_VERSION:
        raise DeltapatchError(
            f"run folder {path} has format {found[1]}, older than this deltapatch reads ({FORMAT_VERSION}): "
            "run the sweep again"
        )
    try:
        return _effects(path, about)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise DeltapatchError(f"run folder {path} is damaged ({_reason(error)}): {_MEND}") from error


def read_pairs_text(text: str) -> list[EncodedPair]:
    """The pairs in what pairs.jsonl holds; ValueError or RecursionError where it is damaged."""
    return [_pair(json.loads(line)) for line in text.split("\n") if line]


def _effects(path: Path, about: dict[str, Any]) -> Found:
    _need(about.get(CHECKSUM) == checksum(about, path), "its files are not those that were written")
    know_all(about.get("functions"))
    given, edges = "interventions" in about, "senders" in about
    _need(isinstance(about["direction"], str) and about["direction"] in get_args(Direction), "direction")
    if given:
        _check_number(about["interventions"])
    elif edges:
        _need(_distinct(about["measured"], str) and is_measured(about["measured"]), "measured numbers")
    else:
        _check_coordinates(about)
    for name in (PAIRS, EFFECTS, *([INTERVENTIONS] if given else [])):
        check_regular(path / name)
    pairs = read_pairs_text((path / PAIRS).read_text(encoding="utf-8"))
    with open_safetensors(path / EFFECTS, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    reference = Reference(**{name: tensors.pop(f"reference/{name}") for name in Reference.empty(0).arrays()})
    for name, array in reference.arrays().items():
        like = Reference.empty(len(pairs)).arrays()[name]
        _need((array.shape, array.dtype) == (like.shape, like.dtype), f"reference/{name}")
    own = {"format", "format_version", "direction", "sites", "interventions", "axes", CHECKSUM}
    own |= set(SETTINGS) if edges else set()
    meta = {key: value for key, value in about.items() if key not in own}
    if given:
        listed = read_interventions(path / INTERVENTIONS, pairs)
        names = about["interventions"]["measured"]
        measured = {name: tensors.pop(f"measured/{name}") for name in names}
        right = not tensors and about["interventions"]["number"] == listed.n_effects
        _need(right, f"{EFFECTS} holds other numbers than {RUN} tells")
        for name, array in measured.items():
            fits = array.shape == (listed.n_effects,) and array.dtype in (np.float32, np.float64)
            _need(fits, f"measured/{name} does not fit {RUN}")
        return Outcome(measured, listed, pairs, reference, about["direction"], meta)
    if edges:
        grid = EdgeGrid.of_settings(about, len(pairs))
        measured = {name: tensors.pop(f"measured/{name}") for name in meta.pop("measured")}
        _need(not tensors, f"{EFFECTS} holds other numbers than {RUN} tells")
        for name, array in measured.items():
            fits = array.shape == grid.shape and array.dtype in (np.float32, np.float64)
            _need(fits, f"measured/{name} does not fit {RUN}")
        return EdgeEffects(grid, measured, pairs, reference, about["direction"], meta)
    sites: dict[str, SiteEffects] = {}
    for site, c in about["sites"].items():
        measured = {name: tensors.pop(f"{site}/{name}") for name in c["measured"]}
        index = () if not SITES[site].index.counts else next(iter(measured.values())).shape[3:]
        shape = (len(pairs), len(c["layers"]), len(c["positions"]), *index)
        for name, array in measured.items():
            fits = array.shape == shape and array.dtype in (np.float32, np.float64)
            _need(fits and len(index) <= 1, f"{site}/{name} does not fit {RUN}")
        sites[site] = SiteEffects(site, np.array(c["layers"], dtype=np.int64), c["positions"], measured)
    _need(not tensors, f"{EFFECTS} holds other numbers than {RUN} tells")
    return Effects(sites, pairs, reference, about["direction"], meta)


def read_interventions(path: Path, pairs: list[EncodedPair]) -> Listed:
    """Given interventions from their file. ValueError, KeyError or SafetensorError where it is damaged."""
    check_regular(path)
    with open_safetensors(path, "numpy") as file:
        return Listed.of_arrays({name: file.get_tensor(name) for name in file.keys()}, pairs)  # noqa: SIM118


def _check_number(found: Any) -> None:
    _need(isinstance(found, dict) and set(found) == {"number", "measured"}, "interventions")
    measured = found["measured"]
    _need(_distinct(measured, str) and is_measured(measured), "measured numbers")


def _check_coordinates(about: dict[str, Any]) -> None:
    """Check what run.json says of the axes. ValueError or KeyError where it makes no sense."""
    sites = about["sites"]
    _need(isinstance(sites, dict) and bool(sites), "sites")
    for site, c in sites.items():
        _need(site in SITES and isinstance(c, dict), "sites")
        layers, positions, measured = c["layers"], c["positions"], c["measured"]
        _need(_distinct(layers, int) and all(0 <= layer < _MOST for layer in layers), f"layers of {site}")
        _need(_distinct(positions, int, str), f"positions of {site}")
        _need(all(isinstance(p, str) or abs(p) < _MOST for p in positions), f"positions of {site}")
        _need(_distinct(measured, str) and is_measured(measured), f"measured numbers of {site}")


def _distinct(found: Any, *kinds: type) -> bool:
    """Whether it is a list of different values of some kinds, at least one."""
    right = isinstance(found, list) and bool(found) and all(type(value) in kinds for value in found)
    return right and len(set(found)) == len(found)


def _pair(found: Any) -> EncodedPair:
    _need(isinstance(found, dict) and _REQUIRED <= found.keys() <= _HINTS.keys(), f"a pair in {PAIRS}")
    for name in ("clean_answer", "corrupted_answer"):
        _need(bool(found[name]), f"{name} of a pair in {PAIRS}")
    for name, value in found.items():
        _need(_is(value, _HINTS[name]), f"{name} of a pair in {PAIRS}")
    if found.get("weights") is not None:
        found["weights"] = [(token, weight) for token, weight in found["weights"]]
    pair = EncodedPair(**found)
    _need(makes_sense(pair.align, (len(pair.clean), len(pair.corrupted))), f"align of a pair in {PAIRS}")
    for label, place in pair.labels.items():
        check_label(label, place, len(pair.clean), PAIRS)
    return pair


def _is(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type: a plain one, a list, a tuple, a dictionary or a choice."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_is(value, part) for part in parts)
    if kind is list:
        return isinstance(value, list) and _all(value, parts[0])
    if kind is tuple:
        return isinstance(value, list) and len(value) == len(parts) and all(map(_is, value, parts))
    if kind is dict:
        return isinstance(value, dict) and _all(value.values(), parts[1])
    return hint is Any or type(value) is hint or (hint is type(None) and value is None)


def _all(values: Iterable[Any], hint: Any) -> bool:
    return all(_is(value, hint) for value in values)


def _need(true: bool, what: str) -> None:
    if not true:
        raise ValueError(what)


def _reason(error: Exception) -> str:
    """What is wrong, in a line."""
    return shown(" ".join(str(error).split()), 200)[1:-1] or type(error).__name__
