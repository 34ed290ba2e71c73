"""Exhibits of an experiment as a whole: how often the model is right, and how exact its effects are."""

from collections.abc import Iterator

import numpy as np

from deltapatch.analysis.statistics import bootstrap
from deltapatch.analysis.tables import Table
from deltapatch.study.exhibit import Exhibit
from deltapatch.study.found import Found
from deltapatch.study.oracle import CHECKED


def accuracy(found: Found) -> Iterator[Exhibit]:
    """How often the model is right, by operator and together, before any filter."""
    table = accuracy_table(found)
    kept = f" {len(found.made.pairs)} of {len(found.made.asked)} pairs are kept." if _filtered(found) else ""
    yield Exhibit(
        "accuracy",
        "Accuracy",
        "Share of prompts that the model answers right: the most likely of the tokens that these pairs have "
        "in answers, as in the paper, over both prompts of a pair. Intervals are 95% bootstrap intervals "
        f"over pairs.{kept}",
        table,
        shown=40,
    )


def accuracy_table(found: Found) -> Table:
    """A row for each operator and one for all; what the paper has of this model beside it."""
    asked, right = np.array(found.made.asked, dtype=object), found.made.right
    names = [*dict.fromkeys(found.made.asked), "all"]
    if len(names) == 2:
        names = ["all"]
    rows = []
    settings = found.subject.settings
    for name in names:
        own = right[(asked == name) | (name == "all")].mean(axis=1)  # [pair]
        low, high = bootstrap(own, draws=settings.draws, seed=settings.seed)
        rows.append((name, own.mean(), float(low), float(high), len(own)))
    columns = {
        "name": np.array([row[0] for row in rows], dtype=object),
        "accuracy": np.array([row[1] for row in rows]),
        "low": np.array([row[2] for row in rows]),
        "high": np.array([row[3] for row in rows]),
        "pairs": np.array([row[4] for row in rows]),
    }
    if found.subject.paper is not None:
        own_figures = found.subject.paper.accuracy.get(found.experiment.name, {})
        columns["paper"] = np.array([own_figures.get(name, float("nan")) / 100 for name in names])
    return Table(columns, "accuracy")


def oracle(found: Found) -> Iterator[Exhibit]:
    """A sample of each run's effects against plain float64 forwards."""
    yield Exhibit(
        "oracle",
        "Agreement with float64",
        "Of each run a sample of effects, computed again by plain float64 forwards with the patches put in: "
        "the norm of the error over the norm of the effects, of the worst measured number and of each.",
        oracle_table({found.experiment.name: found}),
        columns=("run", "precision", "effects", "error"),
    )


def oracle_table(named: dict[str, Found]) -> Table:
    """A row for each run of some experiments."""
    rows = [(name, run, check) for name, found in named.items() for run, check in found.checks.items()]
    columns = {
        "experiment": np.array([name for name, _, _ in rows], dtype=object),
        "run": np.array([run for _, run, _ in rows], dtype=object),
        "precision": np.array([check["precision"] for _, _, check in rows], dtype=object),
    }
    for name in ("effects", "error", *CHECKED):
        columns[name] = np.array([check[name] for _, _, check in rows])
    return Table(columns, "error")


def _filtered(found: Found) -> bool:
    return found.subject.settings.correct_only
