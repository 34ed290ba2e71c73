"""Interventions given one by one: patches as objects, turned into arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deltapatch.engine.pairs import EncodedPair
from deltapatch.engine.patches import PatchTable, place_of
from deltapatch.engine.sites import check_site, find_site
from deltapatch.errors import DeltapatchError
from deltapatch.models.spec import ModelSpec


@dataclass(frozen=True)
class Patch:
    """One activation to replace.

    Attributes:
        site: a name of `sites.SITES`, or TransformerLens' hook name of it.
        layer: from 0.
        position: from 0, negative from the end, or one of the pair's labels.
        index: head, neuron or coordinate, for the sites that have one.
    """

    site: str
    layer: int
    position: int | str
    index: int | None = None


@dataclass(frozen=True)
class Intervention:
    """Patches applied together to the base run of one pair."""

    pair: int
    patches: Sequence[Patch]


def tables_of(
    interventions: Sequence[Intervention], pairs: Sequence[EncodedPair], spec: ModelSpec
) -> dict[int, tuple[PatchTable, np.ndarray]]:
    """The interventions of each pair that has any: (table, which interventions they are).

    Raises:
        DeltapatchError: no interventions, one without patches, one that patches an activation twice, or
            something that the pair or the model does not have.
    """
    if not interventions:
        raise DeltapatchError("there are no interventions: give at least one")
    by_pair: dict[int, list[int]] = {}
    for i, intervention in enumerate(interventions):
        if not 0 <= intervention.pair < len(pairs):
            raise DeltapatchError(
                f"intervention {i} names pair {intervention.pair}, but there are 0 to {len(pairs) - 1}"
            )
        if not intervention.patches:
            raise DeltapatchError(f"intervention {i} has no patches: give at least one")
        by_pair.setdefault(intervention.pair, []).append(i)
    out = {}
    for pair, numbers in by_pair.items():
        patches: list[tuple[int, int, int, int]] = []
        places: dict[tuple[str, int, int | str], _Place] = {}
        for i in numbers:
            own = [
                _patch(p, f"intervention {i}", pairs[pair], spec, places) for p in interventions[i].patches
            ]
            if len(set(own)) < len(own):
                raise DeltapatchError(f"intervention {i} patches the same activation twice")
            patches += own
        columns = np.array(patches, dtype=np.int64).T
        n = len(numbers)
        row = np.repeat(np.arange(n), [len(interventions[i].patches) for i in numbers])
        out[pair] = (PatchTable(n, np.zeros(n, dtype=np.int64), row, *columns), np.array(numbers))
    return out


class _Place(NamedTuple):
    """Where in a pair's run a patch is, but for its index."""

    layer: int  # of the place
    place: int
    position: int
    site: str
    size: int  # indices of the site, 0 for none


def _patch(
    patch: Patch,
    where: str,
    pair: EncodedPair,
    spec: ModelSpec,
    places: dict[tuple[str, int, int | str], _Place],
) -> tuple[int, int, int, int]:
    """Layer, place, position and index of a patch. There may be very many: where each is is looked up once.

    Args:
        places: of the pair that are known, by the patch's site, layer and position.
    """
    key = (patch.site, patch.layer, patch.position)
    place = places.get(key)
    if place is None:
        place = places[key] = _find(patch, where, pair, spec)
    index, size = patch.index, place.size
    if not size and index is not None:
        raise DeltapatchError(f"{where}: site {place.site} takes no index, but {index} was given")
    if size and (index is None or not 0 <= index < size):
        raise DeltapatchError(f"{where}: site {place.site} needs an index from 0 to {size - 1}, not {index}")
    return place.layer, place.place, place.position, -1 if index is None else index


def _find(patch: Patch, where: str, pair: EncodedPair, spec: ModelSpec) -> _Place:
    site, named = find_site(patch.site)
    check_site(site, spec)
    layer = patch.layer if named is None else named
    if not 0 <= layer < spec.n_layers:
        raise DeltapatchError(
            f"{where}: layer {layer} does not exist: this model has 0 to {spec.n_layers - 1}"
        )
    position = pair.resolve(patch.position)
    if position is None:
        raise DeltapatchError(
            f"{where}: its pair has no position {patch.position!r}; "
            f"the prompt has {len(pair.clean)} tokens and labels {sorted(pair.labels) or 'none'}"
        )
    place, shift = place_of(site.name, 0)
    return _Place(layer + int(shift), place, position, site.name, site.n_indices(spec))
