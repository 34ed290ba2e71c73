"""Position classes and the position axis of figures."""

import numpy as np
import pytest

from deltapatch.analysis.positions import aligned, by_class, class_table, position_class, token_labels
from deltapatch.interventions.pairs import EncodedPair


def record(length, labels):
    ids, text = [0] * length, ["a"] * length
    return EncodedPair(ids, ids, [1], [2], labels, {}, text, text, "1", "2")


def classes(length, labels):
    pair = record(length, labels)
    return [position_class(pair, place) for place in range(length)]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (
            {"op1": 2, "operator": 4, "op2": 6, "last": 8},
            ["early", "early", "op1", "middle", "operator", "middle", "op2", "late", "last"],
        ),
        (  # "the sum of 3 and 4": the operator comes first, and is no operand
            {"operator": 1, "op1": 3, "op2": 5, "last": 8},
            ["early", "operator", "early", "op1", "middle", "op2", "late", "late", "last"],
        ),
        (
            {"op1": 0, "op2": 2, "op3": 4},
            ["op1", "middle", "op2", "between", "op3", "late", "late", "late", "last"],
        ),
        ({"entity": 3}, ["early", "early", "early", "entity", "late", "late", "late", "late", "last"]),
        ({"op1": 2, "op2": 8}, ["early"] * 2 + ["op1"] + ["middle"] * 5 + ["op2"]),
    ],
)
def test_every_position_has_one_class(labels, expected):
    assert classes(9, labels) == expected


def test_classes_come_in_the_order_of_the_prompt(make_effects):
    effects = make_effects(lengths=(8, 10))
    names, table = class_table(effects, "mlp_out")
    assert names == ["early", "op1", "operator", "op2", "late", "last"]
    assert table[0][8:] == [None, None]
    for pair in effects.pairs:
        pair.labels["subject"] = pair.labels.pop("op1")
        del pair.labels["op2"]
    assert class_table(effects, "mlp_out")[0] == ["early", "subject", "operator", "late", "last"]


def test_a_class_is_the_mean_of_its_positions():
    values = np.arange(6.0).reshape(1, 2, 3)
    grouped = by_class(values, ["a", "b", "c"], [["a", "a", "b"]])
    np.testing.assert_array_equal(grouped, [[[0.5, 2, np.nan], [3.5, 5, np.nan]]])


def test_one_pair_is_labelled_by_token(make_effects):
    effects = make_effects(lengths=(8,))
    labels, values, _ = aligned(effects, "ie", "mlp_out")
    assert labels[0] == "0 'Q:'"
    assert labels[4] == "4 'plus'"
    assert values.shape == (1, 3, 8)


def test_pairs_with_labels_are_aligned_by_class(make_effects):
    labels, values, _ = aligned(make_effects(lengths=(8, 9)), "ie", "mlp_out")
    assert labels == ["early", "op1", "operator", "op2", "late", "last"]
    assert not np.isnan(values).any()


def test_pairs_of_one_length_keep_their_positions_and_common_tokens(make_effects):
    effects = make_effects(labels=False)
    labels, *_ = aligned(effects, "ie", "mlp_out")
    assert labels[4] == "4 'plus'"
    assert labels[3] == "3"  # the operands differ
    assert token_labels(effects, "mlp_post") == ["-1 'A:'"]


def test_pairs_of_several_lengths_are_aligned_from_the_end(make_effects):
    effects = make_effects(lengths=(8, 9, 10), labels=False)
    labels, values, _ = aligned(effects, "ie", "mlp_out")
    assert labels == [str(i) for i in range(-10, 0)]
    np.testing.assert_array_equal(values[0, :, -1], effects.values("ie", "mlp_out")[0, :, 7])
    assert np.isnan(values[0, :, :2]).all()
