"""Exhibits of two checkpoints on the same pairs: before and after fine-tuning, for example; differences."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from deltapatch.analysis.curves import last_position
from deltapatch.analysis.heatmaps import layer_panels
from deltapatch.analysis.positions import by_class, class_table
from deltapatch.analysis.significance import benjamini_hochberg, sign_flip_test
from deltapatch.analysis.statistics import bootstrap, mean_over_pairs
from deltapatch.analysis.study_plots import group_curves
from deltapatch.analysis.tables import Table
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.encode import encode_pairs
from deltapatch.models.model import Model
from deltapatch.results.metrics import METRICS
from deltapatch.study.components import SITES
from deltapatch.study.exhibit import Exhibit
from deltapatch.study.found import Found
from deltapatch.study.neurons import KINDS, overlap
from deltapatch.study.pairs import Made
from deltapatch.tasks.answered import answered

INTERVALS = "Intervals are 95% bootstrap intervals over pairs, each pair drawn for both checkpoints at once."


def same_pairs(made: Made, model: Model, other: Model, among: str) -> Made:
    """The pairs of one checkpoint for another.

    Raises:
        DeltapatchError: the other tokenises them in another way.
    """
    own = encode_pairs(made.pairs, model.tokenizer, model.spec.d_vocab)
    theirs = encode_pairs(made.pairs, other.tokenizer, other.spec.d_vocab)
    if any((a.clean, a.corrupted) != (b.clean, b.corrupted) for a, b in zip(own, theirs, strict=True)):
        raise DeltapatchError("the two checkpoints tokenise its prompts in different ways")
    asked = [str(pair.meta.get("operator", "all")) for pair in made.pairs]
    return Made(made.pairs, made.dropped, made.answers, asked, answered(other, made.pairs, among))


def differences(one: Found, other: Found) -> Iterator[Exhibit]:
    """How an experiment differs between two checkpoints: accuracy, importance, effects, neurons."""
    who = f"{one.subject.title} less {other.subject.title}"
    yield _accuracy(one, other, who)
    yield _importance(one, other, who)
    first, second = (found.effects("components") for found in (one, other))
    if first.site("mlp_out").shape != second.site("mlp_out").shape:
        return
    panels, table = _effects(one, other)
    label = f"difference in {METRICS[one.signed].title}"
    yield Exhibit(
        "differences",
        "Differences by layer and position",
        f"Mean difference in {METRICS[one.signed].title}, {who}, over {one.over}; 0 where the checkpoints "
        f"are alike. {INTERVALS} p is of a sign-flip permutation test that the mean difference is 0, q its "
        "false-discovery rate over all rows.",
        table,
        lambda: layer_panels(panels, one.signed, "position", rotate=True, label=label),
    )
    layers, seed, names = first.layers_of("mlp_out"), one.subject.settings.seed, _names(one, other)
    for site in SITES:
        lines = {}
        for name, effects in zip(names, (first, second), strict=True):
            values = last_position(effects, one.signed, site)
            assert values is not None
            lines[name] = values
        yield Exhibit(
            f"curves_{site}",
            f"{site} at the last token",
            f"Mean {METRICS[one.signed].title} of replacing {site} at the last token, by layer, in both "
            f"checkpoints, over {one.over}. Bands are 95% bootstrap intervals over pairs.",
            figure=lambda lines=lines, site=site: group_curves(  # type: ignore[misc]
                layers, lines, one.signed, f"{site}, last token", seed
            ),
        )
    for run in ("coordinates", "neurons"):
        site = KINDS[run][0]
        if site in one.means and site in other.means and one.means[site].shape == other.means[site].shape:
            means = dict(zip(names, (one.means[site], other.means[site]), strict=True))
            top = one.subject.settings.top
            yield replace(overlap(f"overlap_{run}", "before and after", run, means, top), figure=None)


def _names(one: Found, other: Found) -> tuple[str, str]:
    """What legends call the two: never one name for both."""
    for name in ("short", "title"):
        first, second = getattr(one.subject, name), getattr(other.subject, name)
        if first != second:
            return first, second
    return f"{first}, the first", f"{second}, the second"


def _accuracy(one: Found, other: Found, who: str) -> Exhibit:
    """Of the pairs that are kept, in both checkpoints."""
    settings = one.subject.settings
    right = one.made.right
    if settings.correct_only:
        right = right[right.all(axis=1)]
    rows = []
    for name, numbers in {**one.members, "all": np.arange(len(right))}.items():
        first, second = right[numbers].mean(axis=1), other.made.right[numbers].mean(axis=1)
        low, high = bootstrap(first - second, draws=settings.draws, seed=settings.seed)
        difference = first.mean() - second.mean()
        rows.append((name, first.mean(), second.mean(), difference, float(low), float(high), len(numbers)))
    columns = _columns(rows, "pairs")
    _tuned(one, columns, "accuracy")
    return Exhibit(
        "accuracy",
        "Accuracy of both checkpoints",
        f"Share of prompts answered right by operator, and the difference, {who}; of the pairs that are "
        f"kept. {INTERVALS}",
        Table(columns, "difference"),
        shown=40,
    )


def _columns(rows: list[tuple[Any, ...]], last: str) -> dict[str, np.ndarray]:
    """Rows of a comparison, as columns: what is compared, both checkpoints, their difference, and `last`."""
    names = ("name", "model", "other", "difference", "low", "high", last)
    columns = dict(zip(names, (np.array(column) for column in zip(*rows, strict=True)), strict=True))
    return columns | {"name": columns["name"].astype(object)}


def _importance(one: Found, other: Found, who: str) -> Exhibit:
    rows = []
    for name in one.importance:
        if name in other.importance:
            first, second = one.importance[name], other.importance[name]
            rows.append((name, first.value, second.value, *first.minus(second), first.null))
    columns = _columns(rows, "null")
    _tuned(one, columns, "importance")
    return Exhibit(
        "importance",
        "Relative importance in both checkpoints",
        f"Relative importance of the late MLPs at the last token, and the difference, {who}. {INTERVALS}",
        Table(columns, "difference"),
        shown=40,
    )


def _tuned(one: Found, columns: dict[str, np.ndarray], what: str) -> None:
    """What the paper reports of this model, and of it fine-tuned, beside what we find."""
    paper, name = one.subject.paper, one.experiment.name
    if paper is None:
        return
    before = paper.importance.get(name) if what == "importance" else paper.accuracy.get(name, {}).get("all")
    after = (paper.tuned_importance if what == "importance" else paper.tuned_accuracy).get(name)
    for column, value in (("paper", before), ("paper_tuned", after)):
        if value is not None:
            rows = columns["name"].tolist()
            columns[column] = np.array([value / 100 if row == "all" else np.nan for row in rows])


def _effects(one: Found, other: Found) -> tuple[list[tuple[str, list[str], np.ndarray, np.ndarray]], Table]:
    """Differences by site, layer and class: the panels of a heatmap, and a table with tests."""
    settings, panels, parts = one.subject.settings, [], []
    for site in SITES:
        effects, theirs = one.effects("components"), other.effects("components")
        classes, table = class_table(effects, site)
        change = effects.values(one.signed, site) - theirs.values(one.signed, site)
        values = by_class(change, classes, table)  # [pair, layer, class]
        mean, stderr, n = mean_over_pairs(values)
        low, high = bootstrap(values, draws=settings.draws, seed=settings.seed)
        p = sign_flip_test(values, settings.draws, settings.seed)
        layers = effects.layers_of(site)
        panels.append((site, classes, mean, layers))
        row, column = (a.ravel() for a in np.indices(mean.shape))
        numbers = {"difference": mean, "stderr": stderr, "low": low, "high": high, "p": p, "pairs": n}
        parts.append(
            {
                "site": np.full(mean.size, site, dtype=object),
                "layer": layers[row],
                "class": np.array(classes, dtype=object)[column],
                **{name: array.ravel() for name, array in numbers.items()},
            }
        )
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    pairs = columns.pop("pairs")
    whole = Table(columns | {"q": benjamini_hochberg(columns["p"]), "pairs": pairs}, "difference")
    return panels, whole.top(len(pairs))
