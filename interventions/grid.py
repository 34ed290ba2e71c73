"""Grids: what a sweep patches, as axes, and the patches of one pair as arrays, never as objects."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deltapatch.arguments import position, several, whole
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.roles import Roles, no_place
from deltapatch.interventions.runs import RunShape
from deltapatch.interventions.sites import DIRECTION, SITES, Site, check_site, find_site
from deltapatch.interventions.table import EDIT, TOGETHER, PatchTable, place_of, without_before
from deltapatch.interventions.vectors import Vectors
from deltapatch.models.spec import ModelSpec

Positions = str | int | Sequence[int | str]
Layers = str | int | Sequence[int]


@dataclass(frozen=True)
class SiteGrid:
    """One site's axes. Its effects are an array [pair, layer, position, index], here counted flat."""

    site: Site
    layers: np.ndarray
    positions: list[int | str]
    n_indices: int  # 0: the whole vector
    offset: int  # where its effects begin among those of all sites
    roles: Roles
    numbers: np.ndarray | None = None  # [layer, index], the vectors of patches along directions

    def shape(self, n_pairs: int) -> tuple[int, ...]:
        """The shape of its effects."""
        index = (self.n_indices,) if self.n_indices else ()
        return (n_pairs, len(self.layers), len(self.positions), *index)

    def patches(self, number: int, pair: EncodedPair) -> tuple[np.ndarray, ...]:
        """Every patch of one pair: the table's COLUMNS, and where its row's effect goes, each [patch]."""
        spots = self.spots(pair)
        column = np.array([i for i, _ in spots], dtype=np.int64)
        position = np.array([p for _, p in spots], dtype=np.int64)  # [spot, patch of a row]
        position = position.reshape(len(spots), -1 if spots else 1)
        n_layers, n_index = len(self.layers), max(1, self.n_indices)
        shape = (n_layers, len(spots), n_index, position.shape[1])
        place, layer = place_of(self.site.name, self.layers)
        edit = EDIT["along" if self.site.index is DIRECTION else "one" if self.n_indices else "whole"]
        index = np.arange(n_index)[:, None] if self.numbers is None else self.numbers[:, None, :, None]
        out = (
            (number * n_layers + np.arange(n_layers)[:, None, None]) * len(self.positions)
            + column[:, None]
        ) * n_index + np.arange(n_index)  # fmt: skip
        return (
            np.broadcast_to(np.asarray(layer)[:, None, None, None], shape).ravel(),
            np.full(int(np.prod(shape)), place),
            np.broadcast_to(position[:, None], shape).ravel(),
            np.full(int(np.prod(shape)), edit),
            np.broadcast_to(index, shape).ravel(),
            self.offset + np.broadcast_to(out[..., None], shape).ravel(),
        )

    def spots(self, pair: EncodedPair) -> list[tuple[int, list[int]]]:
        """The positions that a pair has: which they are among `positions`, and which places they join.

        Places are those of the base run.
        """
        if self.positions == [TOGETHER]:
            base, _ = self.roles.prompts(pair)
            return [(0, list(range(self.roles.first(pair), len(base))))]
        places = ((i, self.roles.place(pair, at)) for i, at in enumerate(self.positions))
        return [(i, [place]) for i, place in places if place is not None]

    def position_tokens(self, pair: EncodedPair, run: RunShape) -> np.ndarray:
        """[position that the pair has], the tokens of a row that starts there.

        None behind the read-out, and none where the source says what the base run says.
        """
        first = np.array([joined[0] for _, joined in self.spots(pair)], dtype=np.int64)
        there = (first >= self.roles.brings_from(pair)) & (first < run.prompt)
        return np.where(there, run.length - first, 0)

    def row_sizes(self, pair: EncodedPair, run: RunShape) -> tuple[np.ndarray, np.ndarray]:
        """[patch] twice, how many tokens each row has, and where it enters."""
        each = np.repeat(self.position_tokens(pair, run), max(1, self.n_indices))
        layers = np.asarray(place_of(self.site.name, self.layers)[1])
        return np.tile(each, len(self.layers)), np.repeat(layers, len(each))


@dataclass(frozen=True)
class Grid:
    """What a sweep patches."""

    sites: list[SiteGrid]
    n_pairs: int
    n_effects: int
    vectors: Vectors = field(default_factory=Vectors)  # of patches along directions

    @property
    def places(self) -> frozenset[str]:
        """Where patches go."""
        return frozenset(g.site.place for g in self.sites)

    @property
    def together(self) -> bool:
        """Whether sites are patched at all positions of a prompt at once."""
        return self.sites[0].positions == [TOGETHER]

    @property
    def acted(self) -> list[int]:
        """The pairs that are patched: all of them."""
        return list(range(self.n_pairs))

    def settings(self) -> dict[str, Any]:
        """What tells it from others."""
        sites = [
            {"site": g.site.name, "layers": g.layers.tolist(), "indices": g.n_indices} for g in self.sites
        ]
        return {"sites": sites, "positions": self.sites[0].positions}

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any], n_pairs: int) -> "Grid":
        """What `settings` told, for so many pairs."""
        sites = [(SITES[s["site"]], s["layers"], s["indices"]) for s in settings["sites"]]
        roles = Roles(settings["direction"], settings["source"])
        return cls.of(sites, settings["positions"], n_pairs, roles)

    @classmethod
    def of(
        cls,
        sites: Sequence[tuple[Site, list[int], int]],
        positions: list[int | str],
        n_pairs: int,
        roles: Roles,
    ) -> "Grid":
        """Of sites, their layers and how many indices they have, one site's effects after the other's."""
        grids, offset = [], 0
        for site, layers, n_indices in sites:
            grid = SiteGrid(site, np.array(layers, dtype=np.int64), positions, n_indices, offset, roles)
            offset += math.prod(grid.shape(n_pairs))
            grids.append(grid)
        return cls(grids, n_pairs, offset)

    def table(self, number: int, pair: EncodedPair) -> tuple[PatchTable, np.ndarray]:
        """One pair's interventions, and where their effects go: [row].

        Where the source says what the base run says a row has no patch: nothing changes, exactly.
        """
        *columns, effect = (
            np.concatenate(parts)
            for parts in zip(*(g.patches(number, pair) for g in self.sites), strict=True)
        )
        new = np.diff(effect, prepend=-1) != 0  # the patches of a row come together
        out = effect[new]
        n = len(out)
        table = PatchTable(n, np.zeros(n, dtype=np.int64), np.cumsum(new) - 1, *columns)
        return without_before(table, self.sites[0].roles.brings_from(pair)), out

    def n_rows(self, number: int, pair: EncodedPair) -> int:
        """How many interventions of a pair there are, without an array of them."""
        return sum(len(g.layers) * len(g.spots(pair)) * max(1, g.n_indices) for g in self.sites)

    def entering(self, pair: EncodedPair, run: RunShape, n_layers: int) -> np.ndarray:
        """[1 + layer], the row tokens of a pair that enter at the embedding and in each layer."""
        out = np.zeros(1 + n_layers, dtype=np.int64)
        for g in self.sites:
            tokens = int(g.position_tokens(pair, run).sum()) * max(1, g.n_indices)
            np.add.at(out, 1 + np.asarray(place_of(g.site.name, g.layers)[1]), tokens)
        return out

    def in_flight(self, pair: EncodedPair, run: RunShape, n_layers: int) -> np.ndarray:
        """[layer], the row tokens of a pair that pass through each: those that entered before it."""
        return np.cumsum(self.entering(pair, run, n_layers))[:-1]

    def row_sizes(self, number: int, pair: EncodedPair, run: RunShape) -> tuple[np.ndarray, np.ndarray]:
        """[row] twice, the tokens and the layer of each intervention of a pair, in the order of `table`."""
        tokens, layers = zip(*(g.row_sizes(pair, run) for g in self.sites), strict=True)
        return np.concatenate(tokens), np.concatenate(layers)

    def describe(self, effect: int) -> str:
        """Which patch an effect belongs to, in words."""
        for g in reversed(self.sites):
            if effect >= g.offset:
                at = np.unravel_index(effect - g.offset, g.shape(self.n_pairs))
                index = f", index {at[3]}" if len(at) > 3 else ""
                where = f"layer {g.layers[at[1]]}, position {g.positions[at[2]]}"
                return f"pair {at[0]}, {g.site.name}, {where}{index}"
        raise IndexError(effect)


def make_grid(
    sites: str | Sequence[str],
    positions: Positions,
    layers: Layers,
    pairs: list[EncodedPair],
    spec: ModelSpec,
    roles: Roles,
) -> Grid:
    """The grid of a sweep.

    Args:
        sites: names, or one name; TransformerLens' hook names carry their layer.
        positions: "all", "last", "together", or ints and label names.
        layers: "all", or ints and ranges.
        pairs: decide how many positions "all" are, and which labels there are.
        spec: of the model.
        roles: of the pairs' prompts.

    Raises:
        DeltapatchError: an unknown site, layer, position or label; a position where no pair can be patched.
    """
    chosen: dict[str, tuple[Site, list[int]]] = {}
    every = layers_of(layers, spec)
    for name in listed(sites):
        site, layer = find_site(name)
        check_site(site, spec)
        wanted = every if layer is None else layers_of([layer], spec)
        known = chosen.setdefault(site.name, (site, []))[1]
        known += [l for l in wanted if l not in known]
    if not chosen:
        raise DeltapatchError("no sites were given: name at least one, for example mlp_out")
    at = positions_of(positions, pairs, roles)
    found = [(site, sorted(wanted), site.n_indices(spec)) for site, wanted in chosen.values()]
    return Grid.of(found, at, len(pairs), roles)


def single_positions(
    positions: Positions, pairs: list[EncodedPair], roles: Roles, what: str
) -> list[int | str]:
    """As `positions_of`, for what is patched one position at a time. DeltapatchError for 'together'."""
    found = positions_of(positions, pairs, roles)
    if found == [TOGETHER]:
        raise DeltapatchError(f"{what} are patched one position at a time: 'together' is none")
    return found


def spots_of(positions: Sequence[int | str], pair: EncodedPair, roles: Roles) -> list[tuple[int, int]]:
    """The places of a pair's base run that are asked for, each once, and how results tell of each.

    A number is told as it was asked for, -1 the last token of every pair; of a label the position is told.
    """
    found: dict[int, int] = {}
    for asked in positions:
        place, at = roles.place(pair, asked), pair.resolve(asked)
        if place is not None and at is not None and place not in found:
            found[place] = asked if isinstance(asked, int) else at
    return list(found.items())


def listed(names: str | Sequence[str]) -> list[str]:
    """Names of sites, given as a list or with commas between. DeltapatchError where it is something else."""
    if isinstance(names, str):
        return [n.strip() for n in names.split(",") if n.strip()]
    return list(several(names, "sites", "names such as ['mlp_out', 'z']"))  # type: ignore[arg-type]


def _spread(given: Sequence[object], pairs: list[EncodedPair]) -> list[object]:
    """Positions, those of a label's every token (subject[:]) one by one."""
    out: list[object] = []
    for item in given:
        if not isinstance(item, str) or not item.endswith("[:]"):
            out.append(item)
            continue
        every = re.compile(re.escape(item[:-3]) + r"\[(\d+)\]")
        found = {
            int(match[1]) for pair in pairs for label in pair.labels if (match := every.fullmatch(label))
        }
        out += [f"{item[:-3]}[{i}]" for i in sorted(found)] or [item]
    return out


def layers_of(layers: Layers, spec: ModelSpec) -> list[int]:
    """The layers that a sweep was asked for. DeltapatchError where the model has no such layer."""
    if isinstance(layers, str) and layers != "all":
        raise DeltapatchError(f"layers must be 'all' or a list of numbers, not {layers!r}")
    given = list(several(layers, "layers", "'all' or a list of numbers"))
    if _is_all(given):
        return list(range(spec.n_layers))
    out: list[int] = []
    for item in given:
        layer = whole(item, "a layer must be a whole number")
        if not 0 <= layer < spec.n_layers:
            raise DeltapatchError(
                f"layer {layer} does not exist: this model has layers 0 to {spec.n_layers - 1}"
            )
        out.append(layer)
    if not out:
        raise DeltapatchError("no layers were given: name at least one, or 'all'")
    return list(dict.fromkeys(out))


def _is_all(given: Sequence[object]) -> bool:
    """Whether "all" was asked for, by itself or as the one item of a list."""
    return len(given) == 1 and isinstance(given[0], str) and given[0] == "all"


def positions_of(positions: Positions, pairs: list[EncodedPair], roles: Roles) -> list[int | str]:
    """The positions that a sweep was asked for; just TOGETHER for all of a prompt at once.

    Raises:
        DeltapatchError: no pair has one of them, or none can be patched there.
    """
    longest = max(len(p.clean) for p in pairs)
    asked = -1 if isinstance(positions, str) and positions == "last" else positions
    given = list(several(asked, "positions", "'all', 'last', 'together', or a list of numbers and labels"))
    if _is_all(given):
        return list(range(longest))
    if TOGETHER in given:
        if len(given) > 1:
            raise DeltapatchError("'together' means all positions of a prompt at once, and stands alone")
        return [TOGETHER]
    out: list[int | str] = []
    for item in _spread(given, pairs):
        at = position(item)
        if isinstance(at, str) and at != "last" and not any(at in p.labels for p in pairs):
            known = sorted({label for p in pairs for label in p.labels})
            has = f"the pairs' labels are {', '.join(known)}" if known else "the pairs have no labels"
            alone = "'all' stands alone" if at == "all" else f"no pair has a position labelled {at!r}"
            raise DeltapatchError(f"{alone}: {has}; or use all, last or numbers")
        if isinstance(at, int) and not -longest <= at < longest:
            raise DeltapatchError(
                f"position {at} does not exist: the longest prompt has positions 0 to {longest - 1}"
            )
        if all(roles.place(p, at) is None for p in pairs):
            raise DeltapatchError(next(no_place(p, at) for p in pairs if p.resolve(at) is not None))
        if at not in out:
            out.append(at)
    if not out:
        raise DeltapatchError("no positions were given: name at least one, or 'all'")
    return out
