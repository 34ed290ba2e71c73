"""Patch tables: interventions as arrays, one entry a patch, as grids and lists of interventions make them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltapatch.interventions.nodes import READS
from deltapatch.interventions.runs import RunShape
from deltapatch.interventions.sites import PLACES, SITES

TOGETHER = "together"  # in the place of positions: all those of a prompt at once
# Of edges it is what their receiver reads.
PLACE = {place: i for i, place in enumerate((*PLACES, *READS))}

# Kinds of edits, in the order in which those at one place are carried out: the whole vector is replaced, or
# one head, neuron or coordinate of it, or its part along given directions; features are set; a given vector
# is added. Then those of edges, whose effect is total or direct, at one position or at this and all after it
# in the prompt together.
SITE_EDITS = ("whole", "one", "along", "feature", "add")
EDGE_EDITS = ("total one", "total together", "direct one", "direct together")
EDITS = (*SITE_EDITS, *EDGE_EDITS)
EDIT = {edit: i for i, edit in enumerate(EDITS)}
# What has an entry for each patch, beside its row.
COLUMNS = ("layer", "place", "position", "edit", "index")


@dataclass(frozen=True)
class PatchTable:
    """Patches of a set of interventions, one array entry a patch, sorted by row.

    Attributes:
        n_rows: interventions; `row` refers to them.
        pair: [row], the pair of each intervention.
        row, layer, place, position, edit, index: [patch]. `layer` -1 stands for the embedding; `place` and
            `edit` count in PLACES and EDITS; `position` counts from 0; `index` is what the edit takes: the
            head, neuron or coordinate, 0 for the whole vector; of given vectors `vectors.code`; of
            features that are set their number among them; of an edge
            `edges.code`. The layer of a direct effect is the last one, behind which it is read.
    """

    n_rows: int
    pair: np.ndarray
    row: np.ndarray
    layer: np.ndarray
    place: np.ndarray
    position: np.ndarray
    edit: np.ndarray
    index: np.ndarray

    def columns(self, which: Any) -> list[np.ndarray]:
        """COLUMNS of some patches, as numpy picks them."""
        return [getattr(self, name)[which] for name in COLUMNS]


def place_of(site: str, layer: np.ndarray | int) -> tuple[int, np.ndarray | int]:
    """Place and layer of a site. What enters a layer is what left the one before: resid_pre has no place."""
    shift = 1 if site.startswith("resid_pre") else 0
    return PLACE[SITES[site].place], layer - shift


def is_direct(edit: np.ndarray) -> np.ndarray:
    """Which edits are of edges whose effect is direct."""
    return np.isin(edit, [EDIT["direct one"], EDIT["direct together"]])


def is_together(edit: np.ndarray) -> np.ndarray:
    """Which edits are of edges that are patched at all positions from the first one on."""
    return np.isin(edit, [EDIT["total together"], EDIT["direct together"]])


def first_positions(table: PatchTable) -> np.ndarray:
    """[row], each intervention's first patched position."""
    first = np.full(table.n_rows, np.iinfo(np.int64).max)
    np.minimum.at(first, table.row, table.position)
    return first


def row_tokens(table: PatchTable, run: RunShape) -> np.ndarray:
    """[row], tokens of each intervention's row; none where all patches lie behind the read-out."""
    first = first_positions(table)
    return np.where(first < run.prompt, run.length - first, 0)


def first_layers(table: PatchTable) -> np.ndarray:
    """[row], each intervention's first patched layer; 0 of one without patches."""
    first = np.full(table.n_rows, np.iinfo(np.int64).max)
    np.minimum.at(first, table.row, table.layer)
    return np.where(np.bincount(table.row, minlength=table.n_rows) > 0, first, 0)


def row_layers(table: PatchTable, runs: Sequence[RunShape], n_layers: int) -> int:
    """Row tokens times the layers that they pass, for pairs whose runs have these shapes."""
    first = first_positions(table)
    prompt, length = (
        np.array(sizes)[table.pair] for sizes in zip(*((r.prompt, r.length) for r in runs), strict=True)
    )
    return int((np.where(first < prompt, length - first, 0) * (n_layers - 1 - first_layers(table))).sum())


def without_before(table: PatchTable, begin: int) -> PatchTable:
    """The same interventions without the patches before a position, where both runs are the same.

    A swap there changes nothing, and without it a row begins later or not at all; but in a row that adds
    vectors it takes back what these brought.
    """
    adds = np.zeros(table.n_rows, dtype=bool)
    adds[table.row[table.edit == EDIT["add"]]] = True
    kept = adds[table.row] | (table.position >= begin)
    return PatchTable(table.n_rows, table.pair, table.row[kept], *table.columns(kept))


def take(table: PatchTable, rows: np.ndarray) -> PatchTable:
    """Some interventions; `rows` ascends."""
    number = np.full(table.n_rows, -1)
    number[rows] = np.arange(len(rows))
    new = number[table.row]
    kept = new >= 0
    return PatchTable(len(rows), table.pair[rows], new[kept], *table.columns(kept))


def by_pair(table: PatchTable) -> dict[int, tuple[PatchTable, np.ndarray]]:
    """The interventions of each pair that has any, with pairs counted from 0, and which they are: [row]."""
    order = np.argsort(table.pair, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))  # [row], its place among rows sorted by pair
    moved = number[table.row]
    patches = np.argsort(moved, kind="stable")
    columns = table.columns(patches)
    row = moved[patches]
    pairs, first = np.unique(table.pair[order], return_index=True)
    ends = [*first.tolist()[1:], table.n_rows]
    out = {}
    for pair, a, b in zip(pairs.tolist(), first.tolist(), ends, strict=True):
        mine = slice(*np.searchsorted(row, [a, b]).tolist())
        zero = np.zeros(b - a, dtype=np.int64)
        own = PatchTable(b - a, zero, row[mine] - a, *(c[mine] for c in columns))
        out[pair] = own, order[a:b]
    return out
