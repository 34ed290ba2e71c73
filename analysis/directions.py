"""Sweeps over given directions: each swapped alone, or added in several strengths, anywhere."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from deltapatch.arguments import several
from deltapatch.engine.options import Options, takes
from deltapatch.engine.sweep import run_listed
from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.directions import Directions, by_site, of_layers
from deltapatch.interventions.given import Listed
from deltapatch.interventions.grid import Layers, Positions, layers_of, single_positions, spots_of
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.pairs_file import Pairs
from deltapatch.interventions.sites import check_site, find_site
from deltapatch.interventions.table import EDIT, PatchTable, place_of
from deltapatch.interventions.vectors import VectorsMade, as_rows, code
from deltapatch.models.model import Model
from deltapatch.models.spec import ModelSpec
from deltapatch.results.outcome import Outcome


@takes(Options)
def sweep_directions(
    model: Model,
    pairs: Pairs,
    directions: Directions,
    *,
    positions: Positions = "all",
    layers: Layers = "all",
    strengths: float | Sequence[float] | None = None,
    **options: Any,
) -> Outcome:
    """Patch along each of some directions alone, at every chosen layer and position, exactly.

    What is swapped is the part of the difference between source and base run along the direction; all that
    is orthogonal to it stays as it is. With `strengths` nothing is swapped: multiples of each direction, as
    it is given, are added to the base run, which is steering.

    Args:
        model, pairs: as of `sweep`.
        directions: site -> [direction, d_model], at all layers, or {layer: [direction, d_model]}, such as
            {"resid_post": probe} or {"resid_post": {3: probes}}. At heads (`z`, `q`, `k`, `v`) they have
            d_head numbers, and each is patched in every head alone.
        positions, layers: as of `sweep`; directions are patched one position at a time.
        strengths: one or several; what directions are multiplied with before they are added.
        {options}

    Returns:
        Outcome: `columns()` has a row an intervention, with its `layer`, `position` and `direction`, and,
        where there are any, `head`, `strength`, and `site`, its number among several that were given. A
        position is told as it was asked for where that is a number, -1 for the last.

    Raises:
        DeltapatchError: bad input; directions that do not fit their site.
    """
    given = None if strengths is None else _numbers(strengths)
    asked = Options(**options)
    roles = asked.roles
    roles = roles if given is None else roles.adding

    def make(spec: ModelSpec, encoded: list[EncodedPair]) -> Listed:
        at = single_positions(positions, encoded, roles, "directions")
        every, vectors = layers_of(layers, spec), VectorsMade()
        cells = [
            cell
            for n, (name, value) in enumerate(by_site(directions).items())
            for cell in ((n, *cell) for cell in _cells(name, value, every, spec, vectors, given))
        ]
        spots = [spots_of(at, pair, roles) for pair in encoded]
        return _listed(np.array(cells), spots, vectors, kind="along" if given is None else "add")

    return run_listed(model, pairs, make, **options)


# What is done at one position: layer, the table's layer, place and index, and the numbers that tell of it.
_CELL = ("site", "layer", "of", "place", "index", "direction", "head", "strength")


def _cells(
    name: str,
    value: Any,
    every: list[int],
    spec: ModelSpec,
    vectors: VectorsMade,
    strengths: list[float] | None,
) -> Iterator[tuple[float, ...]]:
    """What is done at a site, as of _CELL after the first; -1 for the head of a whole vector.

    Args:
        value: its directions, for all layers or by layer.
        every: the layers of the sweep.
        strengths: of what is added; None where directions are swapped.
    """
    site, _ = find_site(name)
    check_site(site, spec)
    heads = site.n_indices(spec)
    if site.index.counts not in ("", "head") or site.place == "pattern":
        raise DeltapatchError(f"site {site.name} is no vector: directions are of whole sites and of heads")
    for layer, own in of_layers(value, every, spec).items():
        place, of = place_of(site.name, layer)
        width = spec.d_head if heads else spec.d_model
        for number, row in enumerate(as_rows(own, f"directions of {site.name}", width)):
            where = f"direction {number} of {site.name}"
            for strength in [1.0] if strengths is None else strengths:
                if strengths is None:
                    vector = vectors.along(row, width, where)
                else:
                    vector = vectors.add(strength * row, width, where)
                for head in range(max(1, heads)):
                    index = code(vector, head, heads)
                    yield layer, int(of), place, index, number, head if heads else -1, strength


def _listed(
    cells: np.ndarray,
    spots: Sequence[Sequence[tuple[int, int]]],
    vectors: VectorsMade,
    *,
    kind: str,
) -> Listed:
    """All cells, [cell, as of _CELL], at each spot of each pair, as of `spots_of`."""
    if not len(cells):
        raise DeltapatchError("no direction is at any of the chosen layers: nothing is to be patched")
    at = [(i, place, told) for i, own in enumerate(spots) for place, told in own]
    pair, position, told = np.repeat(np.array(at, dtype=np.int64).T, len(cells), axis=1)
    n = len(pair)
    column = dict(zip(_CELL, np.tile(cells, (len(at), 1)).T, strict=True))
    whole = {name: column[name].astype(np.int64) for name in _CELL if name != "strength"}
    table = PatchTable(
        n_rows=n,
        pair=pair,
        row=np.arange(n),
        layer=whole["of"],
        place=whole["place"],
        position=position,
        edit=np.full(n, EDIT[kind]),
        index=whole["index"],
    )
    labels = {"layer": whole["layer"], "position": told, "direction": whole["direction"]}
    if (whole["head"] >= 0).any():
        labels["head"] = whole["head"]
    if whole["site"].any():
        labels["site"] = whole["site"]
    if kind == "add":
        labels["strength"] = column["strength"]
    return Listed(table, vectors.done(), labels)


def _numbers(strengths: object) -> list[float]:
    found = list(several(strengths, "strengths", "a number or several"))
    for one in found:
        if isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one):
            raise DeltapatchError(f"a strength must be a number, not {shown(one)}")
    if not found:
        raise DeltapatchError("no strengths were given: name at least one")
    return [float(one) for one in found]  # type: ignore[arg-type]  # just checked
