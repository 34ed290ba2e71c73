"""Relative importance against a plain sum, its null value, and its interval; the paper's position classes."""

import numpy as np
import pytest

from deltapatch.analysis.importance import relative_importance
from deltapatch.analysis.positions import class_table, position_class
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.results.effects import SiteEffects


def classes(length: int, labels: dict[str, int]) -> list[str]:
    ids, text = [0] * length, ["a"] * length
    pair = EncodedPair(ids, ids, [1], [2], labels, {}, text, text, "1", "2")
    return [position_class(pair, place) for place in range(length)]


def plainly(effects, floor: float | None, metric: str) -> float:
    """The definition, cell by cell."""
    values, over = effects.terms(metric, "mlp_out")
    over = np.ones(len(values)) if over is None else over
    names, table = class_table(effects, "mlp_out", paper=True)
    total = chosen = 0.0
    for layer in range(values.shape[1]):
        for name in names:
            per_pair, by = [], []
            for pair, row in enumerate(table):
                own = [values[pair, layer, j] for j, found in enumerate(row) if found == name]
                if own:
                    per_pair.append(np.mean(own))
                    by.append(over[pair])
            mean = float(np.mean(per_pair) / np.mean(by))
            weight = np.log((mean if floor is None else max(mean, floor)) + 1)
            total += weight
            chosen += weight * (name == "last" and layer >= values.shape[1] // 2)
    return chosen / total


@pytest.mark.parametrize(("metric", "floor"), [("ie", 0.1), ("ie", None), ("recovered", 0.01)])
@pytest.mark.parametrize("lengths", [(8,) * 6, (8, 10, 9, 8)])
def test_the_value_is_the_definitions(make_effects, metric, floor, lengths) -> None:
    effects = make_effects(lengths=lengths, n_layers=5, seed=3)
    found = relative_importance(effects, metric=metric, floor=floor)
    assert found.value == pytest.approx(plainly(effects, floor, metric))
    assert found.low <= found.value <= found.high
    # early, op1, middle (where the operator is), op2, late and last
    assert (found.chosen, found.cells) == (3, 30)
    assert found.null == 3 / 30
    assert relative_importance(effects, metric=metric, floor=floor).low == found.low
    other = relative_importance(effects, metric=metric, floor=floor, seed=1)
    assert not np.array_equal(other.draws, found.draws)


def test_without_any_effect_it_is_the_null_value(make_effects) -> None:
    effects = make_effects()
    for array in effects.sites["mlp_out"].measured.values():
        array[:] = 0
    found = relative_importance(effects)
    assert found.value == found.low == found.high == pytest.approx(found.null)
    assert np.isnan(relative_importance(effects, floor=None).value)


def test_differences_are_within_pairs(make_effects) -> None:
    effects = make_effects(n_layers=4)
    one = relative_importance(effects)
    value, low, high = one.minus(relative_importance(effects))
    assert value == low == high == 0
    other = relative_importance(make_effects(n_layers=4, seed=1))
    value, low, high = one.minus(other)
    assert low < value < high
    with pytest.raises(DeltapatchError, match="different numbers of draws"):
        one.minus(relative_importance(effects, draws=5))


def test_what_it_is_not_about(make_effects) -> None:
    effects = make_effects()
    with pytest.raises(DeltapatchError, match="z has an index"):
        relative_importance(effects, "z")
    with pytest.raises(DeltapatchError, match="this run has one only"):
        relative_importance(make_effects(n_layers=1))
    with pytest.raises(DeltapatchError, match="effects of -1 or less"):
        relative_importance(make_effects(lengths=(8, 8), seed=3), metric="logit_diff", floor=None)
    s = effects.sites["mlp_out"]
    cut = {name: array[:, :, :3] for name, array in s.measured.items()}
    effects.sites["mlp_out"] = SiteEffects(s.site, s.layers, [0, 1, 2], cut)
    with pytest.raises(DeltapatchError, match="needs the last position"):
        relative_importance(effects)
    single = relative_importance(make_effects(lengths=(8,)))
    assert np.isnan(single.low)
    assert np.isnan(single.high)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"op1_first": 1, "op1": 3, "op2": 5}, "early op1 op1 op1 middle op2 late last"),
        (
            {"operator_first": 1, "operator": 2, "op1": 4, "op2": 6},
            "early operator operator early op1 middle op2 last",
        ),
        (
            {"entity_first": 2, "entity": 5},
            "early early entity_first entity_middle entity_middle entity late last",
        ),
        ({"number1": 1, "entity1": 2, "entity": 5}, "early number1 entity1 middle middle entity late last"),
        ({"subject_first": 0, "subject": 1}, "subject_first subject late late late late late last"),
        ({"diff1_first": 3, "diff1": 4}, "early early early diff1 diff1 late late last"),
    ],
)
def test_pieces_of_several_tokens(labels, expected) -> None:
    assert classes(8, labels | {"last": 7}) == expected.split()


def test_the_papers_classes_leave_the_operator_and_the_numbers_out(make_effects) -> None:
    effects = make_effects(lengths=(10, 10))
    assert class_table(effects, "mlp_out", paper=True)[0] == ["early", "op1", "middle", "op2", "late", "last"]
    for pair in effects.pairs:
        pair.labels.clear()
        pair.labels.update(number1=1, entity1=2, entity_first=4, entity=5, last=9)
    names, table = class_table(effects, "mlp_out", paper=True)
    assert names == ["early", "entity_first", "entity", "late", "last"]
    assert table[0][:4] == ["early"] * 4
