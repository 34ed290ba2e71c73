"""Features of sparse autoencoders, each patched alone, exactly.

A feature with activation f in the base run and f* in the source run moves what its autoencoder reads by
(f* - f) times its decoder's row; what the autoencoder gets wrong stays as it is. A feature that is the same
in both runs changes nothing, and is not run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, TypeAlias, overload

import numpy as np
import torch

from deltapatch.engine.options import Options, ScreenOptions, takes
from deltapatch.engine.sweep import run_listed, screen_listed
from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.features import (
    SOURCES_OF_FEATURES,
    Change,
    SaePlace,
    changes_of,
    in_model,
    place_of_sae,
)
from deltapatch.interventions.given import Listed
from deltapatch.interventions.grid import Positions, single_positions, spots_of
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.pairs_file import Pairs
from deltapatch.interventions.table import EDIT, PatchTable, place_of
from deltapatch.interventions.vectors import Vectors
from deltapatch.models.autoencoder import Autoencoder
from deltapatch.models.model import Model
from deltapatch.models.spec import ModelSpec
from deltapatch.results.outcome import Outcome
from deltapatch.results.screened_outcome import ScreenedOutcome

Saes: TypeAlias = Autoencoder | Sequence[Autoencoder]


@overload
def sweep_features(
    model: Model, pairs: Pairs, autoencoders: Saes, *, screen: None = None, **options: Any
) -> Outcome: ...
@overload
def sweep_features(
    model: Model, pairs: Pairs, autoencoders: Saes, *, screen: str, **options: Any
) -> ScreenedOutcome: ...
@takes(ScreenOptions)
def sweep_features(
    model: Model,
    pairs: Pairs,
    autoencoders: Saes,
    *,
    positions: Positions = "all",
    least: float = 0.0,
    **options: Any,
) -> Outcome | ScreenedOutcome:
    """Patch every feature of some autoencoders that differs between base and source run, each alone.

    Encoders read the unpatched runs in float64. With `source="zero"` a feature is taken out of the base run.

    Args:
        model, pairs: as of `sweep`.
        autoencoders: one or several, as `load_sae` reads them.
        positions: as of `sweep`; features are patched one position at a time.
        least: features that change by this much or less, in either direction, are left out.
        {options}

    Returns:
        Outcome: `columns()` has a row a feature that was patched, with its autoencoder (`sae`, its number
        among those given), `layer`, `position`, `feature`, and its activations `before` and `after`. What
        is not there has the effect 0. A
        position is told as it was asked for where that is a number, -1 for the last.
        With `screen`, ScreenedOutcome: estimates of all that change, as (activation after - before) times the
        decoder's row times the gradient where the autoencoder reads; the exact effects of some; and what may
        have been missed. All that change have these `labels`.

    Raises:
        DeltapatchError: bad input; an autoencoder that does not fit the model; a source that no feature has.
    """
    saes = [autoencoders] if isinstance(autoencoders, Autoencoder) else list(autoencoders)
    asked = ScreenOptions(**options)
    if asked.source not in SOURCES_OF_FEATURES:
        raise DeltapatchError(
            f"features have the sources {' and '.join(SOURCES_OF_FEATURES)}, not {asked.source!r}"
        )
    if not isinstance(least, int | float) or not 0 <= least < float("inf"):
        raise DeltapatchError(f"least must be a number that is not negative, not {shown(least)}")

    def make(spec: ModelSpec, encoded: list[EncodedPair]) -> Listed:
        if not saes:
            raise DeltapatchError("no autoencoders were given: name at least one")
        places = [place_of_sae(sae, spec) for sae in saes]
        roles = asked.roles
        at = single_positions(positions, encoded, roles, "features")
        spots = [spots_of(at, pair, roles) for pair in encoded]
        reading = in_model(model, saes, places)
        return _listed(spec, saes, places, spots, changes_of(model, reading, places, encoded, roles), least)

    if asked.screen is not None:
        return screen_listed(model, pairs, make, asked)
    own = {each.name: getattr(asked, each.name) for each in fields(Options)}
    return run_listed(model, pairs, make, **own)


def _listed(
    spec: ModelSpec,
    saes: Sequence[Autoencoder],
    places: Sequence[SaePlace],
    spots: Sequence[Sequence[tuple[int, int]]],
    changes: Iterator[tuple[int, int, Change]],
    least: float,
) -> Listed:
    """An intervention for each feature that changes, at each of its pair's spots, as of `spots_of`."""
    found: list[dict[str, np.ndarray]] = []
    for i, s, change in changes:
        at, told = np.array(spots[i], dtype=np.int64).reshape(-1, 2).T
        moved = (change.after - change.before)[at.tolist()]
        spot, feature = (t.cpu().numpy() for t in (moved.abs() > least).nonzero().unbind(1))
        position = at[spot]
        values = {
            name: getattr(change, name).cpu().numpy()[position, 0 if name == "scale" else feature]
            for name in ("before", "after", "scale")
        }
        whole = {"pair": i, "sae": s, "layer": places[s].layer}
        found.append(
            {name: np.full(len(position), n) for name, n in whole.items()}
            | {"position": position, "told": told[spot], "feature": feature}
            | values
        )
    made = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
    n = len(made["pair"])
    if not n:
        raise DeltapatchError(
            "no feature changes between base and source run at these positions: nothing is to be patched"
        )
    return _as_patches(spec, saes, places, made)


def _as_patches(
    spec: ModelSpec, saes: Sequence[Autoencoder], places: Sequence[SaePlace], made: dict[str, np.ndarray]
) -> Listed:
    """Interventions that add multiples of decoder rows; of heads side by side, one patch for each head."""
    n = len(made["pair"])
    parts = np.array([max(1, place.heads) for place in places])  # [autoencoder], patches of a feature
    arrays: list[np.ndarray] = []
    first = np.zeros(n, dtype=np.int64)  # [intervention], the array of its row, or of its first head
    for s, (sae, place) in enumerate(zip(saes, places, strict=True)):
        mine = made["sae"] == s
        features, number = np.unique(made["feature"][mine], return_inverse=True)
        first[mine] = len(arrays) + number * parts[s]
        rows = sae.rows(torch.from_numpy(features)).cpu().numpy()
        arrays += list(rows.reshape(-1, 1, spec.d_head if place.heads else spec.d_model))
    each = parts[made["sae"]]
    row = np.repeat(np.arange(n), each)
    of = made["sae"][row]
    head = np.arange(len(row)) - np.repeat(np.cumsum(each) - each, each)
    where = np.array([place_of(place.site, place.layer) for place in places])  # [autoencoder, (place, layer)]
    table = PatchTable(
        n_rows=n,
        pair=made["pair"],
        row=row,
        layer=where[of, 1],
        place=where[of, 0],
        position=made["position"][row],
        edit=np.full(len(row), EDIT["add"]),
        index=np.arange(len(row)) * parts[of] + head,  # as of `vectors.code`, each patch having its own
    )
    scale = made["scale"] * (made["after"] - made["before"])
    labels = {name: made[name] for name in ("sae", "layer", "feature", "before", "after")}
    labels["position"] = made["told"]
    return Listed(table, Vectors(tuple(arrays), first[row] + head, scale[row]), labels)
