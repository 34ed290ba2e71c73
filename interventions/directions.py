"""Directions that a sweep is given: by site, for all layers or for each; what tells them from others."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.grid import Grid, layers_of
from deltapatch.interventions.sites import ALONG, DIRECTION, Site, find_site
from deltapatch.interventions.vectors import VectorsMade, as_rows
from deltapatch.models.header import read_tensors
from deltapatch.models.spec import ModelSpec

# [direction, width], or layer -> the same, by site.
Directions = Mapping[str, Any]


def load_directions(path: str | os.PathLike[str]) -> Directions:
    """Directions from a safetensors file, as `sweep` and `sweep_directions` take them.

    Args:
        path: its tensors are named after sites (`resid_post`), or a site and a layer (`resid_post.3`).

    Raises:
        DeltapatchError: the file is none, or a name is no site.
    """
    tensors = read_tensors(path, "directions")
    found: dict[str, Any] = {}
    for name, tensor in sorted(tensors.items()):
        site, _, layer = name.rpartition(".")
        if not site or not layer.isdecimal():
            find_site(name)
            found[name] = tensor
            continue
        find_site(site)
        if site in tensors:
            raise DeltapatchError(f"the directions {path} are for all layers and for layer {layer} of {site}")
        found.setdefault(site, {})[int(layer)] = tensor
    return found


def by_site(directions: object) -> dict[str, Any]:
    """Directions by the name of their site, not of a hook. DeltapatchError where they are something else."""
    if not isinstance(directions, Mapping) or not directions:
        raise DeltapatchError(
            f"directions must be a dictionary such as {{'resid_post': probes}}, not {shown(directions)}"
        )
    found: dict[str, Any] = {}
    for name, value in directions.items():
        site, layer = find_site(name)
        if layer is not None and not isinstance(value, Mapping):
            value = {layer: value}
        if site.name in found:
            raise DeltapatchError(f"directions of {site.name} are given twice: join them")
        found[site.name] = value
    return found


def of_layers(value: Any, layers: list[int], spec: ModelSpec) -> dict[int, Any]:
    """A site's directions by layer, those of the layers of a sweep alone."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(layers, value)
    return {layer: value[layer] for layer in layers_of(list(value), spec) if layer in layers}


def with_directions(grid: Grid, directions: Mapping[str, Any] | None, spec: ModelSpec) -> Grid:
    """A grid whose sites that are swapped along directions have them as their index.

    Args:
        directions: as of `by_site`.

    Raises:
        DeltapatchError: such a site, or one of its layers, has none, or not as many as its other layers; they
            do not fit it; or they are of a site that is not swept so.
    """
    wanted = [g.site.name for g in grid.sites if g.site.index is DIRECTION]
    given = directions or {}
    for name in given:
        if name + ALONG not in wanted:
            raise DeltapatchError(f"directions of {name} are given: name {name}{ALONG} among the sites, too")
    if not wanted:
        return grid
    made = VectorsMade()
    numbers = {
        g.site.name: _numbers(g.site, given, g.layers.tolist(), spec, made)
        for g in grid.sites
        if g.site.name in wanted
    }
    indices = {g.site.name: g.n_indices for g in grid.sites} | {n: a.shape[1] for n, a in numbers.items()}
    sites = [(g.site, g.layers.tolist(), indices[g.site.name]) for g in grid.sites]
    found = Grid.of(sites, grid.sites[0].positions, grid.n_pairs, grid.sites[0].roles)
    own = [replace(g, numbers=numbers.get(g.site.name)) for g in found.sites]
    return replace(found, sites=own, vectors=made.done())


def _numbers(
    site: Site, directions: Mapping[str, Any], layers: list[int], spec: ModelSpec, made: VectorsMade
) -> np.ndarray:
    """[layer, direction], the numbers of a site's directions among those that are made."""
    of = site.name.removesuffix(ALONG)
    if of not in directions:
        raise DeltapatchError(
            f"site {site.name} is swapped along directions: give directions={{{of!r}: [n, d_model]}}"
        )
    given, rows = of_layers(directions[of], layers, spec), []
    for layer in layers:
        if layer not in given:
            raise DeltapatchError(
                f"layer {layer} of {of} has no directions: give some, or choose the layers that have"
            )
        own = as_rows(given[layer], f"directions of {of}", spec.d_model)
        where = [f"direction {j} of {of} in layer {layer}" for j in range(len(own))]
        rows.append([made.along(row, spec.d_model, at) for row, at in zip(own, where, strict=True)])
    if len({len(row) for row in rows}) > 1:
        raise DeltapatchError(
            f"the layers of {of} have different numbers of directions: give as many at each, or use "
            "sweep_directions, which lists them"
        )
    return np.array(rows, dtype=np.int64)


def digest(directions: Mapping[str, Any] | None) -> str | None:
    """What tells them from others, as a run's record has it."""
    if directions is None:
        return None
    found = hashlib.sha256()
    for site, value in sorted(directions.items()):
        parts = sorted(value.items()) if isinstance(value, Mapping) else [("all", value)]
        for layer, part in parts:
            rows = np.ascontiguousarray(as_rows(part, f"directions of {site}"))
            found.update(f"{site} {layer} {rows.shape}".encode() + rows.tobytes())
    return found.hexdigest()
