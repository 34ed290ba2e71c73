"""Patch tables: interventions as arrays, and what the wavefront derives from them before it starts."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from deltapatch.interventions.sites import PLACES
from deltapatch.interventions.table import PLACE, SITE_EDITS, PatchTable, is_direct, is_together
from deltapatch.models.spec import ModelSpec

# Stages: where in a block a row's difference first appears, and so which products it needs there. Rows of
# edges enter behind the scores of the heads that read them, or in what the MLP or the logits read; those of
# direct effects behind the last layer, whatever reads them.
WHOLE, ATTENTION, HEADS, MIDDLE, MLP, END, LOGITS, DIRECT = STAGES = range(8)


def entry_stage(place: np.ndarray, edit: np.ndarray, parallel: bool) -> np.ndarray:
    """The stage at which a patch at a place enters its block."""
    stages = np.full(len(PLACE), END)
    for name in ("q", "k", "v", "pattern", "z"):
        stages[PLACE[name]] = ATTENTION
    if not parallel:
        stages[PLACE["attn_out"]] = stages[PLACE["resid_mid"]] = MIDDLE
    for name in ("<q>", "<k>", "<v>"):
        stages[PLACE[name]] = HEADS
    stages[PLACE["<mlp>"]], stages[PLACE["<logits>"]] = MLP, LOGITS
    return np.where(is_direct(edit) & (place != PLACE["<logits>"]), DIRECT, stages[place])


@dataclass(frozen=True)
class Rows:
    """The rows of a pass, in the engine's order: by (length, first position, pair, entry).

    Attributes:
        id_of: [intervention], row id, or -1 where no patch can reach the read-out.
        pair, start, layer, stage: [row], the pair, the first position, and where the row enters.
        patches: patches of sites that matter, their `row` in row ids, sorted by (layer, place, row).
        edges: edges that matter, one a row, sorted by it.
    """

    id_of: np.ndarray
    pair: np.ndarray
    start: np.ndarray
    layer: np.ndarray
    stage: np.ndarray
    patches: PatchTable
    edges: PatchTable

    def entering(self, layer: int, stage: int) -> np.ndarray:
        """Ids of the rows that enter at a layer and stage, ascending."""
        return np.flatnonzero((self.layer == layer) & (self.stage == stage))

    def before(self, layer: int) -> np.ndarray:
        """Ids of the rows that are in flight when a layer begins, ascending."""
        return np.flatnonzero(self.layer < layer)


class PatchedPlaces:
    """Which places the patches of a pass are at, layer by layer.

    Args:
        patches: sorted by (layer, place, row).
    """

    def __init__(self, patches: PatchTable) -> None:
        first = np.flatnonzero(np.diff(patches.layer * len(PLACES) + patches.place, prepend=-(1 << 40)))
        edges = [*first.tolist(), len(patches.layer)]
        self._found: dict[int, list[tuple[str, slice]]] = {}
        for a, b in pairwise(edges):
            there = self._found.setdefault(int(patches.layer[a]), [])
            there.append((PLACES[patches.place[a]], slice(a, b)))

    def at(self, layer: int) -> list[tuple[str, slice]]:
        """The patched places of a layer, in the order of PLACES, and which patches are there."""
        return self._found.get(layer, [])

    def places(self, layer: int) -> list[str]:
        """Their names."""
        return [name for name, _ in self.at(layer)]


def make_rows(table: PatchTable, length: np.ndarray, spec: ModelSpec) -> Rows:
    """Rows of a pass.

    Args:
        table: its interventions.
        length: [pair], tokens up to the read-out position.
        spec: of the model.
    """
    # In the last layer only the last position is read: what other positions do there is seen by nobody,
    # except through their keys and values. What comes after it is seen by nobody at all.
    last = length[table.pair[table.row]] - 1
    moved = np.isin(table.place, [PLACE[name] for name in ("k", "v", "<k>", "<v>")]) | is_together(table.edit)
    read = (table.layer < spec.n_layers - 1) | moved
    seen = (table.position == last) | (read & (table.position < last))
    row = table.row[seen]
    layer, place, position, edit, _ = columns = table.columns(seen)

    start = np.full(table.n_rows, np.iinfo(np.int64).max)
    entry = np.full(table.n_rows, np.iinfo(np.int64).max)
    np.minimum.at(start, row, position)
    stage = entry_stage(place, edit, spec.parallel)
    np.minimum.at(entry, row, layer.astype(np.int64) * len(STAGES) + stage)
    live = np.flatnonzero(entry != np.iinfo(np.int64).max)
    pair = table.pair[live]
    order = live[np.lexsort((entry[live], pair, start[live], length[pair]))]
    id_of = np.full(table.n_rows, -1)
    id_of[order] = np.arange(len(order))

    ids = id_of[row]
    by_place = np.lexsort((ids, place, layer))
    of_site = by_place[edit[by_place] < len(SITE_EDITS)]
    of_edge = np.argsort(ids)[: len(ids) - len(of_site)]  # interventions are all of one kind
    patches, edges = (
        PatchTable(len(order), table.pair[order], ids[some], *(column[some] for column in columns))
        for some in (of_site, of_edge)
    )
    # Integer division rounds down, so the embedding's layer -1 comes back as -1.
    layer, stage = np.divmod(entry[order], len(STAGES))
    return Rows(id_of, table.pair[order], start[order], layer, stage, patches, edges)
