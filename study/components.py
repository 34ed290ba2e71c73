"""Exhibits of an experiment's MLP and attention outputs: where effects are, how large, what they change."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from deltapatch.analysis.curves import at_last
from deltapatch.analysis.heatmaps import group_heatmaps, layer_panels, position_heatmaps
from deltapatch.analysis.importance import PAPER_FLOOR, RelativeImportance, relative_importance
from deltapatch.analysis.magnitudes import magnitudes
from deltapatch.analysis.positions import by_class, class_table
from deltapatch.analysis.predictions import prediction_changes
from deltapatch.analysis.statistics import bootstrap, mean_over_pairs
from deltapatch.analysis.study_plots import group_curves, importance_bars, prediction_curves
from deltapatch.analysis.tables import Table
from deltapatch.errors import DeltapatchError
from deltapatch.results.effects import Effects
from deltapatch.results.metrics import METRICS
from deltapatch.study.exhibit import Exhibit
from deltapatch.study.found import Found

SITES = ("mlp_out", "attn_out")
BAND = "Bands are 95% bootstrap intervals over pairs."


def heatmaps(found: Found) -> Iterator[Exhibit]:
    """Layer by position class, in the paper's measure and in one without quotients."""
    effects = found.effects("components")
    same = found.experiment.same_result
    yield Exhibit(
        "heatmap_ie",
        "Indirect effect by layer and position",
        f"Mean indirect effect over {found.over} of replacing the MLP's or the attention's output in one "
        "layer and class of positions; where nothing has an effect it is 0, as before the prompts differ."
        + (" Both prompts have the same answer, so it is (P*-P)²/(2PP*)." if same else ""),
        figure=lambda: position_heatmaps(effects, "ie", SITES),
    )
    if same:
        panels, table = _absolute(effects, found.subject.settings.draws, found.subject.settings.seed)
        yield Exhibit(
            "heatmap_change",
            "Change of the answer's probability by layer and position",
            f"Mean |P*-P| of the answer that both prompts have, over {found.over}, with 95% bootstrap "
            "intervals over pairs in the table; where nothing has an effect it is 0.",
            table,
            lambda: layer_panels(panels, "kl", "position", rotate=True, label="|change of P(answer)|"),
        )
    else:
        yield Exhibit(
            f"heatmap_{found.signed}",
            "Change of the logit difference by layer and position",
            f"Mean change over {found.over} of logit(clean answer) - logit(corrupted answer); where nothing "
            "has an effect it is 0.",
            figure=lambda: position_heatmaps(effects, found.signed, SITES),
        )


def operator_heatmaps(found: Found) -> Iterator[Exhibit]:
    """The heatmap of each operator."""
    found.check_groups()
    if found.grouped:
        for site in SITES:
            yield Exhibit(
                f"heatmap_operators_{site}",
                f"{site} by operator",
                f"Mean {METRICS[found.signed].title} of replacing {site}, for each operator by itself "
                f"({_counts(found)}), on one colour scale; where nothing has an effect it is 0.",
                figure=partial(group_heatmaps, found.by_group("components"), found.signed, site),
            )


def curves(found: Found) -> Iterator[Exhibit]:
    """Effects at the last token by layer, of all pairs and of each operator."""
    effects, seed = found.effects("components"), found.subject.settings.seed
    layers = effects.layers_of("mlp_out")
    for metric in ("ie", found.signed):
        label = METRICS[metric].title
        lines = {site: _last(effects, site, effects.values(metric, site)) for site in SITES}
        yield Exhibit(
            f"curves_{metric}",
            f"{label[0].upper()}{label[1:]} at the last token",
            f"Mean {label} by layer at the last token, over {found.over}. {BAND}",
            figure=partial(group_curves, layers, lines, metric, "last token", seed),
        )
    if found.grouped:
        last = _last(effects, "mlp_out", effects.values(found.signed, "mlp_out"))
        lines = {name: last[numbers] for name, numbers in found.grouped.items()}
        yield Exhibit(
            "curves_operators",
            "MLPs at the last token by operator",
            f"Mean {METRICS[found.signed].title} of replacing the MLP's output at the last token, by layer "
            f"and operator ({_counts(found)}). {BAND}",
            figure=partial(group_curves, layers, lines, found.signed, "mlp_out, last token", seed),
        )


def importance(found: Found) -> Iterator[Exhibit]:
    """Relative importance of the late MLPs at the last token, together and by operator."""
    effects, settings = found.effects("components"), found.subject.settings
    parts = {"all": effects} | (found.by_group("components") if found.grouped else {})
    bare = {}
    for name, part in parts.items():
        measure = partial(relative_importance, part, draws=settings.draws, seed=settings.seed)
        found.importance[name] = measure()
        try:
            bare[name] = measure(floor=None).value
        except DeltapatchError:  # an effect of -1 or less, whose logarithm there is not
            bare[name] = float("nan")
    found.bare_importance = bare["all"]
    table = importance_table(found.importance, bare, {n: len(p.pairs) for n, p in parts.items()})
    if found.subject.paper is not None:
        own = found.subject.paper.importance.get(found.experiment.name, float("nan")) / 100
        table.columns["paper"] = np.array([own if name == "all" else np.nan for name in parts])
    yield Exhibit(
        "importance",
        "Relative importance of the late MLPs",
        "The share that the MLPs of the upper half of layers have, at the last token, of all MLPs' "
        "log(effect + 1), with the effect of a layer and class of positions raised to at least "
        f"{PAPER_FLOOR} as in the paper's code. If all had the same effect, or none, it would be the null "
        "value. Intervals are 95% bootstrap intervals over pairs; without_floor takes effects as they are.",
        table,
        lambda: importance_bars(found.importance),
    )


def importance_table(
    named: dict[str, RelativeImportance], bare: dict[str, float], pairs: dict[str, int]
) -> Table:
    """A row for each name: importance, its interval and null value, and what it is without the floor."""
    columns = {
        "name": np.array(list(named), dtype=object),
        "importance": np.array([r.value for r in named.values()]),
        "low": np.array([r.low for r in named.values()]),
        "high": np.array([r.high for r in named.values()]),
        "null": np.array([r.null for r in named.values()]),
        "without_floor": np.array([bare[name] for name in named]),
        "chosen": np.array([r.chosen for r in named.values()]),
        "cells": np.array([r.cells for r in named.values()]),
        "pairs": np.array([pairs[name] for name in named]),
    }
    return Table(columns, "importance")


def sizes(found: Found) -> Iterator[Exhibit]:
    """Effects by layer and position class in every metric, with intervals and tests."""
    effects, settings = found.effects("components"), found.subject.settings
    by = ["layer", "class"]
    parts: list[dict[str, np.ndarray]] = []
    for metric in found.metrics:
        c = magnitudes(effects, metric, by, SITES, draws=settings.draws, seed=settings.seed).columns
        named = {"metric": np.full(len(c["q"]), metric, dtype=object), "mean": c[metric]}
        c = {"median": np.full(len(c["q"]), np.nan)} | c | named
        parts.append({name: c[name] for name in _LONG})
    size = np.abs(np.nan_to_num(parts[found.metrics.index(found.signed)]["mean"]))
    order = np.argsort(-size, kind="stable")
    # The strongest first, each cell's metrics together.
    columns = {name: np.stack([part[name][order] for part in parts], axis=1).ravel() for name in _LONG}
    yield Exhibit(
        "magnitudes",
        "Magnitudes",
        f"Mean effects by site, layer and class of positions over {found.over}, those with the largest "
        f"{METRICS[found.signed].title} first; of the indirect effect the median too, since a few pairs can "
        "make most of its mean. 95% bootstrap intervals over pairs, p of a sign-flip "
        "permutation test that the mean is 0, and q, its false-discovery rate over all cells.",
        Table(columns, "mean"),
        shown=4 * len(found.metrics),
    )


_LONG = ("site", "layer", "class", "metric", "mean", "median", "stderr", "low", "high", "p", "q", "pairs")


def predictions(found: Found) -> Iterator[Exhibit]:
    """Desired and undesired changes of prediction at the last token."""
    effects, settings = found.effects("components"), found.subject.settings
    changes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    rows: list[dict[str, np.ndarray]] = []
    for site in SITES:
        found_here = prediction_changes(effects, site)
        desired, undesired = (_last(effects, site, v) for v in (found_here.desired, found_here.undesired))
        changes[site] = desired, undesired
        layers = effects.layers_of(site)
        columns = {"site": np.full(len(layers), site, dtype=object), "layer": layers}
        for name, values in (("desired", desired), ("undesired", undesired)):
            low, high = bootstrap(values, draws=settings.draws, seed=settings.seed)
            columns |= {name: mean_over_pairs(values)[0], f"{name}_low": low, f"{name}_high": high}
        rows.append(columns)
    yield Exhibit(
        "predictions",
        "Changes of prediction",
        f"Share of {found.over} in which replacing a layer's output at the last token changes what the model "
        "says, the most likely token at each token of an answer, to the other prompt's answer (desired), or "
        f"away from a right answer (undesired). Without an effect both are 0. {BAND}",
        Table({name: np.concatenate([row[name] for row in rows]) for name in rows[0]}, "desired"),
        lambda: prediction_curves(effects.layers_of("mlp_out"), changes, settings.seed),
        shown=24,
    )


def _last(effects: Effects, site: str, values: np.ndarray) -> np.ndarray:
    """[pair, layer, position] -> [pair, layer] at the last token, which a study always sweeps."""
    found = at_last(effects, site, values)
    assert found is not None
    return found


def _absolute(
    effects: Effects, draws: int, seed: int
) -> tuple[list[tuple[str, list[str], np.ndarray, np.ndarray]], Table]:
    """|P*-P| by layer and class: the panels of a figure, and a table with intervals."""
    panels, parts = [], []
    for site in SITES:
        classes, table = class_table(effects, site)
        values = by_class(np.abs(effects.values("dp_clean", site)), classes, table)  # [pair, layer, class]
        mean, _, n = mean_over_pairs(values)
        low, high = bootstrap(values, draws=draws, seed=seed)
        layers = effects.layers_of(site)
        panels.append((site, classes, mean, layers))
        row, column = (a.ravel() for a in np.indices(mean.shape))
        parts.append(
            {
                "site": np.full(mean.size, site, dtype=object),
                "layer": layers[row],
                "class": np.array(classes, dtype=object)[column],
                "change": mean.ravel(),
                "low": low.ravel(),
                "high": high.ravel(),
                "pairs": n.ravel(),
            }
        )
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return panels, Table(columns, "change").top(len(columns["change"]))


def _counts(found: Found) -> str:
    counts = {len(numbers) for numbers in found.grouped.values()}
    low, high = min(counts), max(counts)
    said = f"{low} pairs each" if low == high else f"{low} to {high} pairs each"
    left = [name for name in found.members if name not in found.grouped]
    return said + (f"; left out with a single pair: {', '.join(left)}" if left else "")
