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
    sites: dict[str, _Site] = {}
    for pair, numbers in by_pair.items():
        patches: list[tuple[int, int, int, int]] = []
        positions: dict[int | str, int] = {}
        for i in numbers:
            own = [
                _patch(p, f"intervention {i}", pairs[pair], spec, sites, positions)
                for p in interventions[i].patches
            ]
            if len(set(own)) < len(own):
                raise DeltapatchError(f"intervention {i} patches the same activation twice")
            patches += own
        columns = np.array(patches, dtype=np.int64).T
        n = len(numbers)
        row = np.repeat(np.arange(n), [len(interventions[i].patches) for i in numbers])
        out[pair] = (PatchTable(n, np.zeros(n, dtype=np.int64), row, *columns), np.array(numbers))
    return out


class _Site(NamedTuple):
    """What a name of a site means in a model."""

    name: str
    place: int
    layer: int | None  # that a hook name names
    shift: int  # from a patch's layer to that of its place
    size: int  # indices, 0 for none


def _patch(
    patch: Patch,
    where: str,
    pair: EncodedPair,
    spec: ModelSpec,
    sites: dict[str, _Site],
    positions: dict[int | str, int],
) -> tuple[int, int, int, int]:
    """Layer, place, position and index of a patch. There may be very many: what names mean is looked up once.

    Args:
        sites: that are known.
        positions: of the pair that are known.
    """
    site = sites.get(patch.site)
    if site is None:
        found, named = find_site(patch.site)
        check_site(found, spec)
        place, shift = place_of(found.name, 0)
        site = sites[patch.site] = _Site(found.name, place, named, int(shift), found.n_indices(spec))
    layer = patch.layer if site.layer is None else site.layer
    if not 0 <= layer < spec.n_layers:
        raise DeltapatchError(
            f"{where}: layer {layer} does not exist: this model has 0 to {spec.n_layers - 1}"
        )
    position = positions.get(patch.position)
    if position is None:
        place_of_it = pair.resolve(patch.position)
        if place_of_it is None:
            raise DeltapatchError(
                f"{where}: its pair has no position {patch.position!r}; "
                f"the prompt has {len(pair.clean)} tokens and labels {sorted(pair.labels) or 'none'}"
            )
        position = positions[patch.position] = place_of_it
    if not site.size and patch.index is not None:
        raise DeltapatchError(f"{where}: site {site.name} takes no index, but {patch.index} was given")
    if site.size and (patch.index is None or not 0 <= patch.index < site.size):
        raise DeltapatchError(
            f"{where}: site {site.name} needs an index from 0 to {site.size - 1}, not {patch.index}"
        )
    return layer + site.shift, site.place, position, -1 if patch.index is None else patch.index
