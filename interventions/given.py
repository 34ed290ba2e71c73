"""Interventions given one by one: patches as objects, turned into arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deltapatch.arguments import position, several, whole
from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.sites import check_site, find_site
from deltapatch.interventions.table import PatchTable, place_of
from deltapatch.models.spec import ModelSpec


@dataclass(frozen=True)
class Patch:
    """One activation to replace.

    Attributes:
        site: a name of `sites.SITES`, or TransformerLens' hook name of it.
        layer: from 0; the same as in the site's name where that has one (``blocks.3.attn.hook_z``).
        position: from 0, negative from the end, or one of the pair's labels.
        index: head, neuron or coordinate, for the sites that have one.
    """

    site: str
    layer: int
    position: int | str
    index: int | None = None


@dataclass(frozen=True)
class Intervention:
    """Patches, one or several, applied together to the base run of one pair."""

    pair: int
    patches: Sequence[Patch]


def checked(interventions: Intervention | Sequence[Intervention]) -> list[Intervention]:
    """Interventions, given as several or as one, each with a list of patches.

    Raises:
        DeltapatchError: they are something else, or there are none.
    """
    found: list[Intervention] = []
    for given in several(interventions, "interventions", "a list of Intervention"):
        where = f"intervention {len(found)}"
        if not isinstance(given, Intervention):
            raise DeltapatchError(
                f"{where} must be Intervention(pair, patches), not {shown(given)}; a Patch belongs in one"
            )
        pair = whole(given.pair, f"{where}: pair must be the number of a pair")
        patches = list(several(given.patches, f"{where}: patches", "a list of Patch"))
        for patch in patches:
            if not isinstance(patch, Patch):
                raise DeltapatchError(f"{where}: patches must be a list of Patch, not of {shown(patch)}")
        found.append(Intervention(pair, patches))  # type: ignore[arg-type]  # just checked
    if not found:
        raise DeltapatchError("there are no interventions: give at least one")
    return found


def tables_of(
    interventions: Sequence[Intervention], pairs: Sequence[EncodedPair], spec: ModelSpec
) -> dict[int, tuple[PatchTable, np.ndarray]]:
    """The interventions of each pair that has any: (table, which interventions they are).

    Args:
        interventions: as `checked` gives them.

    Raises:
        DeltapatchError: one is without patches or patches an activation twice, or names something that the
            pair or the model does not have.
    """
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
    # Checked before they are looked up: 1.0 and True are equal to 1.
    site, layer, at, index = patch.site, patch.layer, patch.position, patch.index
    if not isinstance(site, str):
        find_site(site)
    if type(layer) is not int:
        layer = whole(layer, f"{where}: a layer must be a whole number")
    if type(at) is not int:
        at = position(at, f"{where}: a position must be a whole number or a label")
    place = places.get((site, layer, at))
    if place is None:
        place = places[site, layer, at] = _find(site, layer, at, where, pair, spec)
    size = place.size
    if not size and index is not None:
        raise DeltapatchError(f"{where}: site {place.site} takes no index, but {shown(index)} was given")
    if not size:
        return place.layer, place.place, place.position, -1
    needs = f"{where}: site {place.site} needs an index from 0 to {size - 1}"
    index = whole(index, needs)
    if not 0 <= index < size:
        raise DeltapatchError(f"{needs}, not {index}")
    return place.layer, place.place, place.position, index


def _find(name: str, layer: int, at: int | str, where: str, pair: EncodedPair, spec: ModelSpec) -> _Place:
    site, named = find_site(name)
    check_site(site, spec)
    if named not in (None, layer):
        raise DeltapatchError(
            f"{where}: site {name!r} is in layer {named}, but layer {layer} is given beside it: give the same"
        )
    if not 0 <= layer < spec.n_layers:
        raise DeltapatchError(
            f"{where}: layer {layer} does not exist: this model has 0 to {spec.n_layers - 1}"
        )
    place = pair.resolve(at)
    if place is None:
        raise DeltapatchError(
            f"{where}: its pair has no position {at!r}; "
            f"the prompt has {len(pair.clean)} tokens and labels {sorted(pair.labels) or 'none'}"
        )
    number, shift = place_of(site.name, 0)
    return _Place(layer + int(shift), number, place, site.name, site.n_indices(spec))
