"""Features of sparse autoencoders, each patched alone, exactly.

A feature with activation f in the base run and f* in the source run moves what its autoencoder reads by
(f* - f) times its decoder's row; what the autoencoder gets wrong stays as it is. A feature that is the same
in both runs changes nothing, and is not run.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.options import Options, takes
from deltapatch.engine.sweep import run_listed
from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.given import Listed
from deltapatch.interventions.grid import Positions, single_positions, spots_of
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.pairs_file import Pairs
from deltapatch.interventions.roles import Roles
from deltapatch.interventions.runs import run_alike
from deltapatch.interventions.sites import check_site, find_site
from deltapatch.interventions.table import EDIT, PatchTable, place_of
from deltapatch.interventions.vectors import Vectors
from deltapatch.models.activations import read_activations
from deltapatch.models.autoencoder import Autoencoder
from deltapatch.models.model import Model
from deltapatch.models.spec import ModelSpec
from deltapatch.results.outcome import Outcome

_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")
_SOURCES = ("counterpart", "zero")


@takes(Options)
def sweep_features(
    model: Model,
    pairs: Pairs,
    autoencoders: Autoencoder | Sequence[Autoencoder],
    *,
    positions: Positions = "all",
    least: float = 0.0,
    **options: Any,
) -> Outcome:
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

    Raises:
        DeltapatchError: bad input; an autoencoder that does not fit the model; a source that no feature has.
    """
    saes = [autoencoders] if isinstance(autoencoders, Autoencoder) else list(autoencoders)
    asked = Options(**options)
    if asked.source not in _SOURCES:
        raise DeltapatchError(f"features have the sources {' and '.join(_SOURCES)}, not {asked.source!r}")
    if not isinstance(least, int | float) or not 0 <= least < float("inf"):
        raise DeltapatchError(f"least must be a number that is not negative, not {shown(least)}")

    def make(spec: ModelSpec, encoded: list[EncodedPair]) -> Listed:
        if not saes:
            raise DeltapatchError("no autoencoders were given: name at least one")
        places = [_place(sae, spec) for sae in saes]
        roles = asked.roles
        at = single_positions(positions, encoded, roles, "features")
        spots = [spots_of(at, pair, roles) for pair in encoded]
        return _listed(spec, saes, places, spots, _changes(model, saes, places, encoded, roles), least)

    return run_listed(model, pairs, make, **options)


class _Place(NamedTuple):
    """What an autoencoder reads."""

    site: str
    layer: int
    heads: int  # whose numbers are side by side; 0: a whole vector


class _Change(NamedTuple):
    """Features of one pair."""

    before: Tensor  # [T, d_sae] float64, in the base run
    after: Tensor  # [T, d_sae], in the source run where it lines up; elsewhere as before
    scale: Tensor  # [T, 1], what a change is multiplied with behind the decoder


def _place(sae: Autoencoder, spec: ModelSpec) -> _Place:
    """Where an autoencoder reads in a model. DeltapatchError where that is nowhere."""
    if not isinstance(sae, Autoencoder):
        raise DeltapatchError(f"autoencoders must be what load_sae reads, not {shown(sae)}")
    if sae.site is None or sae.layer is None:
        raise DeltapatchError(
            f"autoencoder {sae.name} does not say where it reads: load it with site= and layer=, for example "
            'load_sae(path, site="resid_post", layer=3)'
        )
    site, _ = find_site(sae.site)
    check_site(site, spec)
    if site.name not in _SITES:
        raise DeltapatchError(f"an autoencoder reads one of {', '.join(_SITES)}, not {site.name}")
    if type(sae.layer) is not int or not 0 <= sae.layer < spec.n_layers:
        raise DeltapatchError(
            f"autoencoder {sae.name} is of layer {shown(sae.layer)}, and this model has 0 to "
            f"{spec.n_layers - 1}"
        )
    heads = spec.n_heads if site.name == "z" else 0
    width = heads * spec.d_head if heads else spec.d_model
    if sae.d_in != width:
        raise DeltapatchError(
            f"autoencoder {sae.name} reads {sae.d_in} numbers, and {site.name} of this model has {width}"
        )
    return _Place(site.name, sae.layer, heads)


def _changes(
    model: Model,
    saes: Sequence[Autoencoder],
    places: Sequence[_Place],
    pairs: Sequence[EncodedPair],
    roles: Roles,
) -> Iterator[tuple[int, int, _Change]]:
    """Pair, autoencoder, and what its features are in both runs."""
    zero = roles.source == "zero"
    both = [roles.prompts(pair) for pair in pairs]
    prompts = [prompt for base, source in both for prompt in ((base,) if zero else (base, source))]
    read = read_activations(model, prompts, {(place.site, place.layer) for place in places})
    each = 1 if zero else 2
    for s, (sae, place) in enumerate(zip(saes, places, strict=True)):
        here = read[place.site, place.layer]
        for i, pair in enumerate(pairs):
            before, scale = sae.encode(here[each * i])
            if zero:
                after = torch.zeros_like(before)
            else:  # what only sees the same tokens is the same, whatever products round to
                base, source = both[i]
                alike = run_alike(pair, (len(base), len(source)), model.spec)
                moved = [(b, s) for b, s in roles.mapped(pair) if b != s or b >= alike]
                at, of = torch.tensor(moved, dtype=torch.int64).reshape(-1, 2).T
                after = before.clone()
                after[at] = sae.encode(here[each * i + 1])[0][of]
            yield i, s, _Change(before, after, scale)


def _listed(
    spec: ModelSpec,
    saes: Sequence[Autoencoder],
    places: Sequence[_Place],
    spots: Sequence[Sequence[tuple[int, int]]],
    changes: Iterator[tuple[int, int, _Change]],
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
    spec: ModelSpec, saes: Sequence[Autoencoder], places: Sequence[_Place], made: dict[str, np.ndarray]
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
