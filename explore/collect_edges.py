"""What the explorer's page holds of a run of edges: the strongest edges, some of every pair of layers.

A real model has a hundred thousand edges: what is too much is left out here, and `notes` says so.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from deltapatch.analysis.statistics import bootstrap, mean_over_pairs
from deltapatch.explore.parts import DRAWS, NUMBERS, PAIRS, about, can_test, f32, floor, i32, notes_of, rates
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.metrics import check_metric, quotient

DRAWABLE = 300  # edges of the graph at most; so many strongest ones of the mean and of every pair are there
_LISTED = 1000  # strongest edges of the mean that are there in any case


def collect_edges(edges: EdgeEffects, metrics: Sequence[str], run: str = "RUN") -> dict[str, Any]:
    """The page's content, ready for JSON; arguments are those of `collect`."""
    grid = edges.grid
    share = NUMBERS // (len(grid.effects) * len(metrics))  # numbers that a metric of an effect may take
    total = len(edges.edges) * len(edges.positions)
    n_pairs = min(len(edges.pairs), PAIRS, max(1, share // (2 * min(total, _LISTED))))
    notes = notes_of(edges, n_pairs)
    room = min(total, max(_LISTED, share // (7 + n_pairs)))
    if room < total:
        each = "" if grid.together else " (each edge at each position)"
        notes.append(
            f"Of {total:,} edges{each} the {room:,} strongest of each metric are here, the strongest of each "
            "pair of layers, and the strongest of each pair of prompts."
        )
    nodes = grid.nodes
    found = {
        effect: {metric: _found(edges, effect, metric, room, n_pairs) for metric in metrics}
        for effect in grid.effects
    }
    return about(edges, metrics, run, n_pairs) | {
        "effects": list(grid.effects),
        "positions": list(edges.positions),
        "senders": edges.senders,
        "receivers": edges.receivers,
        "parallel": nodes.parallel,
        "group": nodes.n_heads // nodes.n_kv_heads,
        # Whether a circuit can be chosen from it, and whether any edge leads to the logits.
        "whole": grid.together and nodes.keys == "query" and len(edges.edges) == nodes.n_edges,
        "ends": "input" in edges.senders and "logits" in edges.receivers,
        "drawable": min(DRAWABLE, len(edges.edges)),
        "towards": {metric: check_metric(metric).sign(edges.direction) for metric in metrics},
        "found": found,
        "notes": notes,
    }


def _found(edges: EdgeEffects, effect: str, metric: str, room: int, n_pairs: int) -> dict[str, Any]:
    """Of one metric of one effect: the edges that the page lists, strongest first, and the noise floor."""
    values, over = edges.terms(metric, effect)
    cells = values if values.ndim == 3 else values[..., None]  # [pair, edge, position]
    flat = cells.reshape(len(cells), -1)
    mean, each = mean_over_pairs(flat, over)[0], quotient(metric, flat, over)
    chosen = _chosen(edges, mean, each[:n_pairs], room)
    edge, position = np.divmod(chosen, cells.shape[2])
    sender, receiver = edges.grid.edges[edge].T
    low, high = bootstrap(flat[:, chosen], draws=DRAWS, over=over)
    return {
        "sender": i32(np.searchsorted(edges.grid.senders, sender)),
        "receiver": i32(receiver),
        "position": i32(position),
        "mean": f32(mean[chosen]),
        "low": f32(low),
        "high": f32(high),
        "q": f32(rates(flat, can_test(edges))[chosen]),
        "pairs": f32(each[:n_pairs, chosen]),
        "floor": floor(edges.meta, metric, flat, over),
    }


def _chosen(edges: EdgeEffects, mean: np.ndarray, each: np.ndarray, room: int) -> np.ndarray:
    """Numbers of [edge and position], strongest first: of the mean, of each pair and each cell of layers."""
    size = np.abs(np.nan_to_num(mean, nan=-0.0))
    order = np.argsort(-size, kind="stable")
    cell = np.repeat(_cells(edges), len(mean) // len(edges.edges))
    _, first = np.unique(cell[order], return_index=True)
    own = [np.argsort(-np.abs(np.nan_to_num(one)), kind="stable")[:DRAWABLE] for one in each]
    chosen = np.unique(np.concatenate([order[:room], order[first], *own]))
    chosen = chosen[~np.isnan(mean[chosen])]
    return chosen[np.argsort(-size[chosen], kind="stable")]


def _cells(edges: EdgeEffects) -> np.ndarray:
    """[edge], the number of its cell where the heads of a layer stand together."""
    rows, columns = (
        np.unique([re.sub(r"\.(h|kv)\d+", "", name) for name in names], return_inverse=True)[1]
        for names in (edges.senders, edges.receivers)
    )
    sender, receiver = edges.grid.edges.T
    out: np.ndarray = (
        rows[np.searchsorted(edges.grid.senders, sender)] * (columns.max() + 1) + columns[receiver]
    )
    return out
