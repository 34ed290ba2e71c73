"""What the explorer's page holds of a run: every cell of its heatmaps, and the strongest heads and neurons.

A run may have half a million effects a pair, and a page should open at once: what is too much is left out
here, when the page is made, and `notes` says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltapatch.analysis.positions import by_class, columns
from deltapatch.analysis.statistics import bootstrap, mean_over_pairs
from deltapatch.explore.parts import DRAWS, NUMBERS, PAIRS, about, can_test, f32, floor, i32, notes_of, rates
from deltapatch.interventions.sites import SITES
from deltapatch.results.effects import Effects
from deltapatch.results.metrics import default_metric, quotient


@dataclass(frozen=True)
class _Axis:
    """The position axis of a site.

    Attributes:
        labels: [column].
        table: [pair][position] -> label, as of `positions.columns`; None where columns are positions.
        kept: [kept column], which of the columns the page has.
    """

    labels: list[str]
    table: list[list[str | None]] | None
    kept: np.ndarray

    def of(self, values: np.ndarray) -> np.ndarray:
        """[pair, layer, position, ...] -> [pair, layer, kept column, ...]."""
        whole = values if self.table is None else by_class(values, self.labels, self.table)
        return whole[:, :, self.kept]


def collect(effects: Effects, metrics: Sequence[str], run: str = "RUN") -> dict[str, Any]:
    """The page's content, ready for JSON; arrays are base64 of little-endian float32 or int32.

    Args:
        metrics: what the page can show.
        run: the run folder, as the copied Python names it.
    """
    share = NUMBERS // (len(effects.sites) * len(metrics))  # numbers that a metric of a site may take
    largest = max(
        len(s.layers) * (0 if SITES[name].index.counts else len(s.positions))
        for name, s in effects.sites.items()
    )
    n_pairs = min(len(effects.pairs), PAIRS, max(1, share // (2 * largest)) if largest else PAIRS)
    notes, tested = notes_of(effects, n_pairs), can_test(effects)
    sites = [
        _site(effects, name, metrics, share=share, n_pairs=n_pairs, notes=notes, tested=tested)
        for name in effects.sites
    ]
    return about(effects, metrics, run, n_pairs) | {"sites": sites, "notes": notes}


def _site(
    effects: Effects,
    name: str,
    metrics: Sequence[str],
    *,
    share: int,
    n_pairs: int,
    notes: list[str],
    tested: bool,
) -> dict[str, Any]:
    """A site: its axes, and every metric on them."""
    swept, kind = effects.sites[name], SITES[name].index
    axis = _axis(effects, name, metrics, max(1, share // (8 * len(swept.layers))), notes)
    n_index = swept.shape[3] if kind.counts else 0
    total = len(swept.layers) * len(axis.kept) * n_index
    room = min(total, share // (7 + n_pairs))
    if room < total:
        notes.append(
            f"Of {total:,} {kind.counts}s of {name} (each layer, position and {kind.counts}) the {room:,} "
            "strongest of each metric are here, some of every cell; a cell shows the strongest of all."
        )
    found: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        values, over = effects.terms(metric, name)
        cells = axis.of(values)
        each = quotient(metric, cells, over)[:n_pairs]
        if kind.counts:
            found[metric] = _strongest(cells, over, each, room, tested)
        else:
            found[metric] = _tested(cells, over, tested) | {
                "pairs": f32(quotient(metric, values, over)[:n_pairs])
            }
        found[metric]["floor"] = floor(effects.meta, metric, cells, over)
    where = _where(effects, name, axis)
    return {
        "name": name,
        "counts": kind.counts,
        "letter": kind.letter,
        "layers": swept.layers.tolist(),
        "columns": [axis.labels[c] for c in axis.kept.tolist()],
        "places": _places(effects, name, axis, where),
        "where": where[:n_pairs],
        "swept": effects.places(name)[:n_pairs],
        "metrics": found,
    }


def _axis(effects: Effects, site: str, metrics: Sequence[str], most: int, notes: list[str]) -> _Axis:
    """The position axis; of more columns than `most` those with the largest effects, and a note."""
    labels, table = columns(effects, site)
    axis = _Axis(labels, table, np.arange(len(labels)))
    if len(labels) > most:
        metric = default_metric(list(metrics))
        values, over = effects.terms(metric, site)
        mean = np.abs(np.nan_to_num(mean_over_pairs(axis.of(values), over)[0]))
        size = mean.reshape(*mean.shape[:2], -1).max(axis=(0, 2))
        kept = np.sort(np.argsort(-size, kind="stable")[:most])
        notes.append(f"{site}: {most} of {len(labels)} positions, those with the largest {metric}.")
        return _Axis(labels, table, kept)
    return axis


def _tested(cells: np.ndarray, over: np.ndarray | None, tested: bool) -> dict[str, Any]:
    """[pair, ...] -> mean, 95% interval and false-discovery rate of each cell."""
    mean = mean_over_pairs(cells, over)[0]
    low, high = bootstrap(cells, draws=DRAWS, over=over)
    return {"mean": f32(mean), "low": f32(low), "high": f32(high), "q": f32(rates(cells, tested))}


def _strongest(
    cells: np.ndarray, over: np.ndarray | None, each: np.ndarray, room: int, tested: bool
) -> dict[str, Any]:
    """[pair, layer, column, index] -> each cell's strongest index, and the entries that the page lists.

    Half of the room goes to the cells, each the same number; what is left to the strongest of all.
    """
    mean = mean_over_pairs(cells, over)[0]  # [layer, column, index]
    size = np.abs(np.nan_to_num(mean, nan=-0.0)).reshape(-1, mean.shape[-1])  # [cell, index]
    own = max(1, min(size.shape[1], room // (2 * len(size))))
    best = np.argpartition(-size, own - 1, axis=1)[:, :own] + np.arange(len(size))[:, None] * size.shape[1]
    everywhere = np.argpartition(-size.ravel(), room - 1)[:room]
    others = np.setdiff1d(everywhere, best)
    others = others[np.argsort(-size.ravel()[others], kind="stable")][: max(0, room - best.size)]
    chosen = np.concatenate([best.ravel(), others])
    chosen = chosen[~np.isnan(mean.ravel()[chosen])]
    chosen = chosen[np.argsort(-size.ravel()[chosen], kind="stable")]
    layer, column, index = np.unravel_index(chosen, mean.shape)
    low, high = bootstrap(cells.reshape(len(cells), -1)[:, chosen], draws=DRAWS, over=over)
    return {
        "layer": i32(layer),
        "column": i32(column),
        "index": i32(index),
        "mean": f32(mean.ravel()[chosen]),
        "low": f32(low),
        "high": f32(high),
        "q": f32(rates(cells, tested).ravel()[chosen]),
        "pairs": f32(each.reshape(len(each), -1)[:, chosen]),
    }


def _where(effects: Effects, site: str, axis: _Axis) -> list[list[list[int]]]:
    """[pair][column] -> the positions, from 0, that the column stands for."""
    out = []
    for i, at in enumerate(effects.places(site)):
        columns = axis.table[i] if axis.table is not None else range(len(at))
        names = axis.labels if axis.table is not None else list(range(len(at)))
        row = [
            [p for p, own in zip(at, columns, strict=True) if own == name and p is not None] for name in names
        ]
        out.append([row[c] for c in axis.kept.tolist()])
    return out


def _places(effects: Effects, site: str, axis: _Axis, where: list[list[list[int]]]) -> list[Any]:
    """Of each column what a `Patch` says: one position for all pairs, or a list of positions for each."""
    if axis.table is None:
        return [effects.positions(site)[c] for c in axis.kept.tolist()]
    out: list[Any] = []
    for k, c in enumerate(axis.kept.tolist()):
        label, each = axis.labels[c], [row[k] for row in where]
        one = int(label) if label.lstrip("-").isdigit() else label
        same = all(place == [pair.resolve(one)] for pair, place in zip(effects.pairs, each, strict=True))
        out.append(one if same else each)
    return out
