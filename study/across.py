"""Exhibits across experiments: accuracy, relative importance, neurons in common, agreement with float64."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from deltapatch.analysis.study_plots import importance_bars
from deltapatch.analysis.tables import Table
from deltapatch.study.accuracy import accuracy_table, oracle_table
from deltapatch.study.components import importance_table
from deltapatch.study.exhibit import Exhibit
from deltapatch.study.found import Found
from deltapatch.study.neurons import KINDS, overlap
from deltapatch.study.presets import Comparison
from deltapatch.study.published import OVERLAP

ALL = "all"


def accuracy(comparison: Comparison, done: Mapping[str, Found]) -> Iterator[Exhibit]:
    """The accuracy of every experiment and operator; of many shapes or relations only all together."""
    rows: list[tuple[str, Table, list[int]]] = []
    for name, found in done.items():
        table = accuracy_table(found)
        few = len(table) <= 9
        rows.append((name, table, list(range(len(table))) if few else [len(table) - 1]))
    columns = {"experiment": np.array([name for name, _, at in rows for _ in at], dtype=object)}
    for key in rows[0][1].columns:
        columns[key] = np.concatenate([table.columns[key][at] for _, table, at in rows])
    columns["operator"] = columns.pop("name")
    shown = ("experiment", "operator", "accuracy", "low", "high", "pairs", "paper")
    yield Exhibit(
        comparison.name,
        comparison.title,
        "Share of prompts that the model answers right, by experiment and operator, with 95% bootstrap "
        "intervals over pairs." + _paper(done, "paper is what the paper reports of this model."),
        Table(columns, "accuracy"),
        shown=200,
        columns=tuple(name for name in shown if name in columns),
    )


def importance(comparison: Comparison, done: Mapping[str, Found]) -> Iterator[Exhibit]:
    """Relative importance of every experiment, all operators together."""
    have = {name: found for name, found in done.items() if ALL in found.importance}
    named = {name: found.importance[ALL] for name, found in have.items()}
    if not named:
        return
    bare = {name: found.bare_importance for name, found in have.items()}
    table = importance_table(named, bare, {name: len(found.made.pairs) for name, found in have.items()})
    papers = {name: found.subject.paper for name, found in have.items()}
    marks = None
    if any(papers.values()):
        own = [
            np.nan if p is None else p.importance.get(have[name].experiment.name, np.nan) / 100
            for name, p in papers.items()
        ]
        table.columns["paper"] = marks = np.array(own)
    yield Exhibit(
        comparison.name,
        comparison.title,
        "Relative importance of the late MLPs at the last token in each experiment, with its 95% bootstrap "
        "interval over pairs; the mark is what it would be if every layer and class of positions had the "
        "same effect." + _paper(done, "paper is what the paper reports of this model."),
        table,
        lambda: importance_bars(named, marks),
        shown=60,
    )


def overlaps(comparison: Comparison, done: Mapping[str, Found]) -> Iterator[Exhibit]:
    """Which of their strongest neurons tasks have in common."""
    for run in ("coordinates", "neurons"):
        site = KINDS[run][0]
        means = {name: found.means[site] for name, found in done.items() if site in found.means}
        if len(means) < 2:
            continue
        top = next(iter(done.values())).subject.settings.top
        note = ""
        paper = next(iter(done.values())).subject.paper
        if paper is not None and paper.name == "GPT-J" and run == "coordinates":
            said = [f"{a} with {b} {share}%" for (a, b), share in OVERLAP.items()]
            note = f" The paper reports {', '.join(said)}."
        yield overlap(f"{comparison.name}_{run}", "by task", run, means, top, note)


def oracle(comparison: Comparison, done: Mapping[str, Found]) -> Iterator[Exhibit]:
    """Every experiment's effects against plain float64 forwards, on a sample."""
    table = oracle_table(dict(done))
    yield Exhibit(
        comparison.name,
        comparison.title,
        "Of each run a sample of effects, computed again by plain float64 forwards with the patches put in: "
        "the norm of the error over the norm of the effects, of the worst measured number and of each.",
        table,
        shown=200,
        columns=("experiment", "run", "precision", "effects", "error"),
    )


KINDS_OF_COMPARISON: dict[str, Callable[[Comparison, Mapping[str, Found]], Iterator[Exhibit]]] = {
    "accuracy": accuracy,
    "importance": importance,
    "overlap": overlaps,
    "oracle": oracle,
}


def compare(comparison: Comparison, done: Mapping[str, Found]) -> list[Exhibit]:
    """The exhibits of a comparison, of those of its experiments that were done; none where these are few."""
    have = {comparison.labels.get(name, name): done[name] for name in comparison.experiments if name in done}
    least = 2 if comparison.kind in ("importance", "overlap") else 1
    return list(KINDS_OF_COMPARISON[comparison.kind](comparison, have)) if len(have) >= least else []


def _paper(done: Mapping[str, Found], sentence: str) -> str:
    return f" {sentence}" if any(found.subject.paper is not None for found in done.values()) else ""
