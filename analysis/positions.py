"""Position classes: what the positions of different prompts have in common.

A pair with labels divides its prompt as in Stolfo et al. 2023: `early` before the first operand, the labelled
positions themselves, `middle` between operands, `late` after the last operand, `last`. A piece of several
tokens, from name_first to name, is one class, but for entities and subjects: of those the first token and
what is in the middle are classes of their own. Without labels a position is only its number.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from deltapatch.analysis.statistics import mean_over_pairs
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.results.effects import Effects

# The order on an axis; other labels come where they stand in the prompts.
_ORDER = ("early", "op1", "middle", "operator", "op2", "between", "op3", "late", "last")
_OPERAND = re.compile(r"op\d+")
_DIVIDED = re.compile(r"entity|subject")  # pieces of which the paper tells first, middle and last apart
_PAPER = re.compile(r"(op\d+|entity|subject)(_first)?")


def position_class(pair: EncodedPair, place: int) -> str:
    """The class of one position (from 0) of a pair."""
    last = len(pair.clean) - 1
    pieces = _pieces(pair)
    for name, (first, end) in pieces.items():
        if first <= place <= end:
            if not _DIVIDED.fullmatch(name) or place == end:
                return name
            return f"{name}_first" if place == first else f"{name}_middle"
    if place == last:
        return "last"
    operands = sorted(end for name, (_, end) in pieces.items() if _OPERAND.fullmatch(name))
    anchors = operands or sorted(end for _, end in pieces.values())
    if not anchors or place < anchors[0]:
        return "early"
    if place > anchors[-1]:
        return "late"
    return "between" if len(operands) > 2 and place > anchors[1] else "middle"


def paper_labels(pair: EncodedPair) -> EncodedPair:
    """The pair with the labels that the paper's classes are made of, operands, entity or subject, if any."""
    kept = {name: where for name, where in pair.labels.items() if _PAPER.fullmatch(name)}
    return replace(pair, labels=kept) if kept else pair


def _pieces(pair: EncodedPair) -> dict[str, tuple[int, int]]:
    """Name -> first and last position of each labelled piece; smaller ones come first."""
    found = {}
    for name, where in pair.labels.items():
        base = name.removesuffix("_first")
        if name != "last" and (base == name or base not in pair.labels):
            found[name] = (pair.labels.get(f"{name}_first", where), where)
    return dict(sorted(found.items(), key=lambda item: item[1][1] - item[1][0]))


def has_classes(effects: Effects) -> bool:
    """Whether every pair says with labels what its positions are."""
    return all(set(pair.labels) - {"last"} for pair in effects.pairs)


def class_table(
    effects: Effects, site: str | None = None, paper: bool = False
) -> tuple[list[str], list[list[str | None]]]:
    """The classes in order, and the class of each position of each pair, [pair][position].

    None where a pair has no effect at such a position. With `paper` only the paper's classes are told apart.
    """
    positions = effects.positions(site)
    table: list[list[str | None]] = []
    for given, places in zip(effects.pairs, effects.places(site), strict=True):
        pair = paper_labels(given) if paper else given
        table.append([None if place is None else position_class(pair, place) for place in places])
    return _in_order(effects, table, positions), table


def aligned(
    effects: Effects, metric: str, site: str | None = None
) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """The labels of a figure's position axis, and a metric's terms on it (see `Effects.terms`).

    Pairs with labels are aligned by class; pairs of one length by token; others by the distance from the end,
    because positions counted from the start mean something else in each of them.

    Returns:
        labels; [pair, layer, label, ...]; and [pair] or None, what a mean over pairs is measured by.
    """
    values, over = effects.terms(metric, site)
    labels, table = columns(effects, site)
    return labels, values if table is None else by_class(values, labels, table), over


def columns(effects: Effects, site: str | None = None) -> tuple[list[str], list[list[str | None]] | None]:
    """The labels of a figure's position axis, and under which each position of each pair stands.

    Returns:
        labels; [pair][position], None where a pair has no such position, or None for it all where every
        swept position is a column of its own.
    """
    positions = effects.positions(site)
    if len(effects.pairs) > 1 and has_classes(effects):
        return class_table(effects, site)
    lengths = {len(pair.clean) for pair in effects.pairs}
    if len(lengths) == 1 or all(isinstance(p, str) or p < 0 for p in positions):
        return token_labels(effects, site), None
    ends: list[list[str | None]] = []
    for pair, places in zip(effects.pairs, effects.places(site), strict=True):
        ends.append([None if place is None else str(place - len(pair.clean)) for place in places])
    return sorted({name for row in ends for name in row if name is not None}, key=int), ends


def peaks(effects: Effects, metric: str, site: str | None = None) -> np.ndarray | None:
    """What a mean over the positions of a class hides, [layer, class, ...], as a mean over pairs.

    It is the largest magnitude at a single position, and 0 where it is less than twice that of the mean. None
    where `aligned` does not average over positions.
    """
    if len(effects.pairs) == 1 or not has_classes(effects):
        return None
    values, over = effects.terms(metric, site)
    table = class_table(effects, site)
    sizes = by_class(np.abs(values), *table, np.max), np.abs(by_class(values, *table))
    by = None if over is None else np.abs(over)
    largest, shown = (np.nan_to_num(mean_over_pairs(size, by)[0]) for size in sizes)
    return np.where(largest > 2 * shown, largest, 0.0)


def by_class(
    values: np.ndarray,
    classes: Sequence[str],
    table: list[list[str | None]],
    reduce: Callable[..., Any] = np.mean,
) -> np.ndarray:
    """[pair, layer, position, ...] -> [pair, layer, class, ...]: the mean over a pair's positions of a class.

    NaN where a pair has no position of a class. `reduce` takes another of them than the mean.
    """
    out = np.full((*values.shape[:2], len(classes), *values.shape[3:]), np.nan)
    for i, row in enumerate(table):
        for c, name in enumerate(classes):
            where = [j for j, found in enumerate(row) if found == name]
            if where:
                out[i, :, c] = reduce(values[i][:, where], axis=1)
    return out


def token_labels(effects: Effects, site: str | None = None) -> list[str]:
    """One label a position: its number, and the token where all prompts have the same one there.

    With one pair, where clean and corrupted prompts differ, the clean token stands for both.
    """
    labels = []
    for position in effects.positions(site):
        tokens = set()
        for pair in effects.pairs:
            place = pair.resolve(position)
            if place is None:
                continue
            tokens.add(pair.clean_text[place])
            there = pair.counterparts[place]
            if len(effects.pairs) > 1 and there is not None:
                tokens.add(pair.corrupted_text[there])
        token = _visible(tokens.pop()) if len(tokens) == 1 else ""
        labels.append(f"{position} '{token}'" if token and isinstance(position, int) else str(position))
    return labels


def _visible(token: str) -> str:
    return token.strip().replace("\n", "\\n").replace("\t", "\\t") or repr(token)[1:-1]


def _in_order(effects: Effects, table: list[list[str | None]], positions: list[int | str]) -> list[str]:
    """Known classes in the order of _ORDER; if there are others, all in the order of their mean place."""
    places: dict[str, list[float]] = {}
    for pair, row in zip(effects.pairs, table, strict=True):
        for position, name in zip(positions, row, strict=True):
            place = pair.resolve(position)
            if name is not None and place is not None:
                places.setdefault(name, []).append(place / len(pair.clean))
    if set(places) <= set(_ORDER):
        return [name for name in _ORDER if name in places]
    fixed = {"early": -1.0, "late": 2.0, "last": 3.0}
    return sorted(places, key=lambda name: fixed.get(name, float(np.mean(places[name]))))
