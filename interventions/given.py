"""Interventions given one by one: patches as objects, turned into arrays."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltapatch.arguments import position, several, whole
from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.edges import is_edge
from deltapatch.interventions.nodes import OF_SENDERS, Nodes
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.parts import Part, parts_as_file, parts_of_file
from deltapatch.interventions.roles import Roles, no_place
from deltapatch.interventions.runs import RunShape
from deltapatch.interventions.sites import ALONG, DIRECTION, PLACES, check_site, find_site
from deltapatch.interventions.table import (
    COLUMNS,
    EDIT,
    EDITS,
    PLACE,
    SITE_EDITS,
    PatchTable,
    by_pair,
    first_layers,
    place_of,
    row_tokens,
    without_before,
)
from deltapatch.interventions.vectors import Vectors, VectorsMade, code
from deltapatch.models.spec import ModelSpec

if TYPE_CHECKING:
    from deltapatch.interventions.features import FeaturesAsked


@dataclass(frozen=True)
class Patch:
    """One activation to replace.

    Attributes:
        site: a name of `sites.SITES`, or TransformerLens' hook name of it.
        layer: from 0; the same as in the site's name where that has one (``blocks.3.attn.hook_z``).
        position: of the clean prompt, from 0, negative from the end, or one of the pair's labels.
        index: head, neuron or coordinate, for the sites that have one.
        into: receivers that alone see the change, named as in `sweep_edges`; None: all do. Where any patch of
            a run has it, all are at what nodes say: `z` of a head, `attn_out`, `mlp_out`, or `resid_pre` of
            layer 0.
        along: [width] or [k, width]: only the part along these directions is replaced. Of sites that are
            vectors: whole ones, of d_model numbers, and heads, of d_head.
        add: [width]: is added to what is there (steering), and nothing is replaced.
        feature: (autoencoder, number), as `load_sae` reads one, at what it reads, or a transcoder writes: the
            feature becomes what it is in the source run, whatever other patches did to it. The index is left
            out.
    """

    site: str
    layer: int
    position: int | str
    index: int | None = None
    into: str | Sequence[str] | None = None
    along: Any = None
    add: Any = None
    feature: Any = None


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


@dataclass(frozen=True)
class Listed:
    """Interventions given one by one, as arrays: their effects are [intervention].

    Attributes:
        table_of_all: with the numbers of the pairs that they act on; positions are those of the base runs.
        vectors: of patches along directions, and of those that add.
        labels: name -> [intervention], what their maker says of each.
        seen_by: [n, (patch, receiver)], the receivers that alone see a patch, as `Nodes` counts them; what
            is not named is seen by all.
        parts: what they join, as it was asked for, where their maker counts parts in its labels.
        begins: [pair], the position before which both of its runs are the same; unknown unless given.
        nodes: of the model, where each intervention is an edge; None where they patch sites.
    """

    table_of_all: PatchTable
    vectors: Vectors = field(default_factory=Vectors)
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    seen_by: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    parts: tuple[Part, ...] = ()
    begins: Sequence[int] | None = None
    nodes: Nodes | None = None

    @property
    def n_effects(self) -> int:
        """One an intervention."""
        return self.table_of_all.n_rows

    @cached_property
    def places(self) -> frozenset[str]:
        """Where patches go; of edges what of the source runs is looked at."""
        if self.nodes is not None:
            return OF_SENDERS
        return frozenset(PLACES[i] for i in np.unique(self.table_of_all.place))

    @property
    def acted(self) -> list[int]:
        """The pairs that have any, ascending."""
        return list(self._by_pair)

    @cached_property
    def _by_pair(self) -> dict[int, tuple[PatchTable, np.ndarray]]:
        found = by_pair(self.table_of_all)
        if self.begins is None:
            return found
        return {i: (without_before(table, self.begins[i]), out) for i, (table, out) in found.items()}

    def table(self, number: int, pair: EncodedPair) -> tuple[PatchTable, np.ndarray]:
        """One pair's interventions, and where their effects go: [row]."""
        return self._by_pair[number]

    def n_rows(self, number: int, pair: EncodedPair) -> int:
        """How many interventions of a pair there are."""
        return self._by_pair[number][0].n_rows if number in self._by_pair else 0

    def row_sizes(self, number: int, pair: EncodedPair, run: RunShape) -> tuple[np.ndarray, np.ndarray]:
        """[row] twice, the tokens and the first patched layer of each intervention of a pair."""
        table, _ = self._by_pair[number]
        return row_tokens(table, run), first_layers(table)

    def describe(self, effect: int) -> str:
        """An intervention in words."""
        return f"intervention {effect}"

    def settings(self) -> dict[str, Any]:
        """What tells them from others."""
        known = [PLACES, SITE_EDITS] if self.nodes is None else [[*PLACE], EDITS]
        digest = hashlib.sha256(json.dumps(known).encode())
        for array in self.arrays().values():
            digest.update(np.ascontiguousarray(array))
        return {"interventions": {"number": self.n_effects, "sha256": digest.hexdigest()}}

    def arrays(self) -> dict[str, np.ndarray]:
        """As a file keeps them: `pair` [intervention], the others [patch]; places and edits are numbers."""
        names = ("pair", "row", *COLUMNS)
        columns = {name: getattr(self.table_of_all, name).astype(np.int64) for name in names}
        labels = {f"label/{name}": array for name, array in sorted(self.labels.items())}
        seen_by = {"seen_by": self.seen_by} if len(self.seen_by) else {}
        nodes = {} if self.nodes is None else {"nodes": self.nodes.as_array()}
        return columns | self.vectors.as_file() | labels | seen_by | parts_as_file(self.parts) | nodes

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray], pairs: Sequence[EncodedPair]) -> "Listed":
        """What `arrays` gave. ValueError or KeyError where it makes no sense for these pairs."""
        columns = {name: arrays[name] for name in ("pair", "row", *COLUMNS)}
        pair, row = columns["pair"], columns["row"]
        fits = all(a.ndim == 1 and a.dtype == np.int64 for a in columns.values())
        fits = fits and all(len(a) == len(row) for name, a in columns.items() if name != "pair")
        if not fits or not len(pair) or pair.min() < 0 or pair.max() >= len(pairs):
            raise ValueError("interventions")
        if (np.unique(row) != np.arange(len(pair))).any() or (np.diff(row) < 0).any():
            raise ValueError("interventions")
        longest = np.array([max(len(one.clean), len(one.corrupted)) for one in pairs])[pair[row]]
        inside = (columns["position"] >= 0) & (columns["position"] < longest) & (columns["layer"] >= -1)
        inside &= columns["index"] >= 0
        nodes = Nodes.of_array(arrays["nodes"]) if "nodes" in arrays else None
        if nodes is not None:
            inside &= is_edge(columns, nodes)
        else:
            for name, known in (("place", PLACES), ("edit", SITE_EDITS)):
                inside &= (columns[name] >= 0) & (columns[name] < len(known))
        if not inside.all():
            raise ValueError("interventions")
        labels = {name[len("label/") :]: a for name, a in arrays.items() if name.startswith("label/")}
        if any(len(array) != len(pair) or array.ndim != 1 for array in labels.values()):
            raise ValueError("labels")
        vectors = Vectors.of_file(arrays)
        given = np.isin(columns["edit"], [EDIT["along"], EDIT["add"]])
        if given.any() and not len(vectors):
            raise ValueError("vectors")
        if (columns["edit"] == EDIT["feature"]).any() and vectors.features is None:
            raise ValueError("features")
        seen_by = arrays.get("seen_by", np.empty((0, 2), np.int64))
        fits = seen_by.ndim == 2 and seen_by.shape[1:] == (2,) and seen_by.dtype == np.int64
        if not fits or (seen_by < 0).any() or (seen_by[:, 0] >= len(row)).any():
            raise ValueError("interventions")
        parts = parts_of_file(arrays)
        return cls(PatchTable(len(pair), **columns), vectors, labels, seen_by, parts, nodes=nodes)


def listed_interventions(
    interventions: Sequence[Intervention],
    pairs: Sequence[EncodedPair],
    spec: ModelSpec,
    roles: Roles,
    features: "FeaturesAsked | None" = None,
) -> Listed:
    """Given interventions as arrays.

    Args:
        interventions: as `checked` gives them.
        roles: of the pairs' prompts.
        features: collects those of autoencoders that are set; None where none may be.

    Raises:
        DeltapatchError: one is without patches or patches an activation twice, or names something that the
            pair or the model does not have; a position without a counterpart is patched from there.
    """
    patches: list[tuple[int, ...]] = []
    seen_by: list[tuple[int, int]] = []
    nodes = Nodes.of(spec)
    order = {name: number for number, name in enumerate(nodes.receivers)}
    vectors = VectorsMade()
    places = [_Places(i, pair, spec, roles) for i, pair in enumerate(pairs)]
    for i, intervention in enumerate(interventions):
        pair = intervention.pair
        if not 0 <= pair < len(pairs):
            raise DeltapatchError(f"intervention {i} names pair {pair}, but there are 0 to {len(pairs) - 1}")
        if not intervention.patches:
            raise DeltapatchError(f"intervention {i} has no patches: give at least one")
        where = f"intervention {i}"
        for number, patch in enumerate(intervention.patches, len(patches)):
            if patch.into is not None:
                seen_by += [(number, order[name]) for name in nodes.choose_receivers(patch.into)]
        own = [_patch(p, where, places[pair], vectors, features) for p in intervention.patches]
        if len(set(own)) < len(own):
            raise DeltapatchError(f"intervention {i} patches the same activation twice")
        patches += own
    n = len(interventions)
    row = np.repeat(np.arange(n), [len(one.patches) for one in interventions])
    columns = np.array(patches, dtype=np.int64).T
    table = PatchTable(n, np.array([one.pair for one in interventions]), row, *columns)
    made = vectors.done()
    if features:
        if seen_by:
            raise DeltapatchError("patches that some receivers alone see are at nodes: features are none")
        made = replace(made, features=features.read())
    return Listed(table, made, seen_by=np.array(seen_by, np.int64).reshape(-1, 2))


class _Place(NamedTuple):
    """Where in a pair's base run a patch is, but for its index."""

    layer: int  # of the place
    place: int
    position: int
    site: str
    size: int  # indices of the site, 0 for none
    width: int  # of the vector there, of one head where it has heads; 0 where it is no vector


class _Places:
    """The places of patches in the base run of one pair. There may be very many: each is looked up once."""

    def __init__(self, number: int, pair: EncodedPair, spec: ModelSpec, roles: Roles) -> None:
        self.number, self.pair, self.spec, self.roles = number, pair, spec, roles
        self._known: dict[tuple[str, int, int | str, bool], _Place] = {}

    def of(self, site: str, layer: int, at: int | str, where: str, *, adds: bool) -> _Place:
        """Of a patch's site, layer and position.

        Args:
            where: what errors call the patch.
            adds: whether it takes nothing from the source run.
        """
        key = site, layer, at, adds
        if key not in self._known:
            self._known[key] = self._found(site, layer, at, where, self.roles.adding if adds else self.roles)
        return self._known[key]

    def _found(self, name: str, layer: int, at: int | str, where: str, roles: Roles) -> _Place:
        site, named = find_site(name)
        spec = self.spec
        check_site(site, spec)
        if site.index is DIRECTION:
            raise DeltapatchError(
                f"{where}: {site.name} is of sweeps: give Patch({site.name.removesuffix(ALONG)!r}, ..., "
                "along=...) with the direction"
            )
        if named not in (None, layer):
            raise DeltapatchError(
                f"{where}: site {name!r} is in layer {named}, but layer {layer} is given beside it: give the "
                "same"
            )
        if not 0 <= layer < spec.n_layers:
            raise DeltapatchError(
                f"{where}: layer {layer} does not exist: this model has 0 to {spec.n_layers - 1}"
            )
        place = roles.place(self.pair, at)
        if place is None:
            raise DeltapatchError(f"{where}: {no_place(self.pair, at)}")
        if site.place == "pattern" and not roles.everywhere(self.pair):
            raise DeltapatchError(
                f"{where}: an attention pattern is over all positions, and the prompts of its pair do not "
                "line up entirely: give prompts of equal length"
            )
        number, shift = place_of(site.name, 0)
        counts = site.index.counts
        width = {"": spec.d_model, "head": spec.d_head}.get(counts, 0) if site.place != "pattern" else 0
        return _Place(layer + int(shift), number, place, site.name, site.n_indices(spec), width)


def _patch(
    patch: Patch, where: str, places: _Places, vectors: VectorsMade, features: "FeaturesAsked | None"
) -> tuple[int, int, int, int, int]:
    """The table's COLUMNS of a patch.

    Args:
        places: of its pair.
        vectors, features: of all patches.
    """
    # Checked before they are looked up: 1.0 and True are equal to 1.
    site, layer, at, index = patch.site, patch.layer, patch.position, patch.index
    if not isinstance(site, str):
        find_site(site)
    if type(layer) is not int:
        layer = whole(layer, f"{where}: a layer must be a whole number")
    if type(at) is not int:
        at = position(at, f"{where}: a position must be a whole number or a label")
    place = places.of(site, layer, at, where, adds=patch.add is not None)
    there = place.layer, place.place, place.position
    if patch.feature is not None:
        if (patch.index, patch.along, patch.add) != (None, None, None):
            raise DeltapatchError(f"{where}: a feature is set by itself: leave out index, along and add")
        if features is None:
            raise DeltapatchError(f"{where}: a feature is patched in `run`, not joined with other parts")
        of = place.site, layer
        return *there, EDIT["feature"], features.add(patch.feature, places.number, place.position, of, where)
    size = place.size
    if not size and index is not None:
        raise DeltapatchError(f"{where}: site {place.site} takes no index, but {shown(index)} was given")
    if size:
        needs = f"{where}: site {place.site} needs an index from 0 to {size - 1}"
        index = whole(index, needs)
        if not 0 <= index < size:
            raise DeltapatchError(f"{needs}, not {index}")
    if patch.along is None and patch.add is None:
        return *there, EDIT["one" if size else "whole"], index or 0
    if patch.along is not None and patch.add is not None:
        raise DeltapatchError(f"{where}: along and add are two patches: give each its own")
    if not place.width:
        raise DeltapatchError(
            f"{where}: site {place.site} is no vector: along and add are for whole sites and heads"
        )
    if patch.along is not None:
        number = vectors.along(patch.along, place.width, where)
        return *there, EDIT["along"], code(number, index or 0, size)
    return *there, EDIT["add"], code(vectors.add(patch.add, place.width, where), index or 0, size)
