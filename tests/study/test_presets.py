"""The presets: everything they name exists, and experiments are chosen by name or by beginning."""

import inspect

import pytest

from deltapatch.errors import DeltapatchError
from deltapatch.study.across import KINDS_OF_COMPARISON
from deltapatch.study.exhibits import EXHIBITS
from deltapatch.study.presets import EXPERIMENTS, RUNS, choose, comparisons, experiments
from deltapatch.study.settings import SIZES
from deltapatch.tasks.registry import TASKS


def test_presets_name_what_exists() -> None:
    assert len({e.name for e in EXPERIMENTS}) == len(EXPERIMENTS)
    for experiment in experiments(3).values():
        assert set(experiment.exhibits) <= set(EXHIBITS)
        assert set(experiment.options) <= set(TASKS[experiment.task].options)
        assert len(experiment.sizes) == len(SIZES)
        assert list(experiment.sizes) == sorted(experiment.sizes)
        assert experiment.runs[0] == "components"
    assert {run for e in EXPERIMENTS for run in e.runs} == set(RUNS)
    assert {name for e in EXPERIMENTS for name in e.exhibits} == set(EXHIBITS)
    for comparison in comparisons(3):
        assert comparison.kind in KINDS_OF_COMPARISON
        assert set(comparison.experiments) <= set(experiments(3))


def test_every_exhibit_says_what_it_is() -> None:
    for make in EXHIBITS.values():
        assert inspect.getdoc(make)


def test_experiments_with_fewer_exemplars() -> None:
    assert [name for name in experiments(3) if name.startswith("shots-")] == ["shots-0", "shots-1", "shots-2"]
    assert not [name for name in experiments(0) if name.startswith("shots-")]


def test_choosing() -> None:
    assert choose((), 2, ("word-problems",)) == [n for n in experiments(2) if n != "word-problems"]
    assert choose(("retrieval", "words"), 2) == [
        "words-operands",
        "words-same-result",
        "words-operator",
        "retrieval",
    ]
    assert "word-problems" not in choose(("words",), 2)
    with pytest.raises(DeltapatchError, match="unknown experiment 'nonsense': choose from numerals-operands"):
        choose(("nonsense",), 2)
