"""Interventions given one by one: patches as objects, turned into arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    for pair in by_pair:
        patches: list[tuple[int, int, int, int, int]] = []
        known: dict[Patch, tuple[int, int, int, int]] = {}  # growing sets have the same patches over and over
        for row, i in enumerate(by_pair[pair]):
            own = []
            for patch in interventions[i].patches:
                if patch not in known:
                    known[patch] = _patch(patch, f"intervention {i}", pairs[pair], spec)
                own.append((row, *known[patch]))
            if len(set(own)) < len(own):
                raise DeltapatchError(f"intervention {i} patches the same activation twice")
            patches += own
        columns = np.array(patches, dtype=np.int64).T
        n = len(by_pair[pair])
        table = PatchTable(n, np.zeros(n, dtype=np.int64), *columns)
        out[pair] = (table, np.array(by_pair[pair]))
    return out


def _patch(patch: Patch, where: str, pair: EncodedPair, spec: ModelSpec) -> tuple[int, int, int, int]:
    """Layer, place, position and index of a patch."""
    site, named_layer = find_site(patch.site)
    check_site(site, spec)
    layer = patch.layer if named_layer is None else named_layer
    if not 0 <= layer < spec.n_layers:
        raise DeltapatchError(
            f"{where}: layer {layer} does not exist: this model has 0 to {spec.n_layers - 1}"
        )
    position = pair.resolve(patch.position)
    if position is None:
        raise DeltapatchError(
            f"{where}: its pair has no position {patch.position!r}; the prompt has {len(pair.clean)} tokens "
            f"and labels {sorted(pair.labels) or 'none'}"
        )
    size = site.n_indices(spec)
    if not size and patch.index is not None:
        raise DeltapatchError(f"{where}: site {site.name} takes no index, but {patch.index} was given")
    if size and (patch.index is None or not 0 <= patch.index < size):
        raise DeltapatchError(
            f"{where}: site {site.name} needs an index from 0 to {size - 1}, not {patch.index}"
        )
    place, shifted = place_of(site.name, layer)
    return int(shifted), place, position, -1 if patch.index is None else patch.index
