"""What metrics mean, in both directions: held to the one table that says it, and to plain runs."""

import numpy as np
import pytest

import deltapatch as dp
from deltapatch.results.metrics import METRICS, definitions

PAIRS = [
    dp.PromptPair("12 + 30 =", "12 + 41 =", " 42", " 53", labels={"op": 2}),
    dp.PromptPair("7 + 5 =", "8 + 9 =", " 12", " 17", labels={"op": 2}),
]
DIRECTIONS = ("denoise", "noise")


@pytest.fixture(scope="module")
def model():
    return dp.load_model("builtin:gpt-neox-arithmetic", device="cpu")


@pytest.fixture(scope="module")
def everything(model):
    """direction -> what replacing the embedding of a whole prompt does, and replacing nothing that counts."""
    whole = [dp.Intervention(i, [dp.Patch("resid_pre", 0, t) for t in range(4)]) for i in range(2)]
    return {d: dp.run(model, PAIRS, whole, direction=d, progress=False) for d in DIRECTIONS}


def logit_difference(model, prompt, pair):
    logits = model.logits(model.tokenizer(prompt)["input_ids"])[-1].double()
    clean, corrupted = (
        model.tokenizer(a)["input_ids"][0] for a in (pair.clean_answer, pair.corrupted_answer)
    )
    return float(logits[clean] - logits[corrupted])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_signs_are_those_of_the_table(everything, direction):
    """Where a patch takes the base run all the way to the source run."""
    column = definitions()[0].index(direction)
    for name, *row in definitions()[1:]:
        values = everything[direction].values(name)
        said = row[column - 1]
        if said in "+-":
            assert (np.sign(values) == (1 if said == "+" else -1)).all(), name
        elif said == "either":
            assert name == "entropy"
            assert (values != 0).all()
        else:
            assert (values == float(said)).all(), name
    np.testing.assert_allclose(everything[direction].values("recovered"), 1, rtol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("source", ["counterpart", "zero", "mean", "resample"])
def test_recovered_is_measured_by_the_pairs_other_run(model, direction, source):
    effects = dp.sweep(
        model,
        PAIRS,
        sites="mlp_out",
        positions="last",
        source=source,
        direction=direction,
        layers=[3],
        progress=False,
    )
    for i, pair in enumerate(PAIRS):
        clean, corrupted = (logit_difference(model, text, pair) for text in (pair.clean, pair.corrupted))
        base, other = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
        want = effects.values("logit_diff")[i] / (other - base)
        np.testing.assert_allclose(effects.values("recovered")[i], want, rtol=1e-4)


def test_half_a_pair_without_a_difference_is_undefined_and_the_mean_is_not(make_effects):
    effects = make_effects(lengths=(8, 8))
    effects.reference.logit[0] = 1.0
    with pytest.warns(UserWarning, match=r"recovered is undefined \(NaN\) for 1 pair"):
        values = effects.values("recovered", "mlp_out")
    assert np.isnan(values[0]).all()
    assert not np.isnan(values[1]).any()
    change, over = effects.terms("recovered", "mlp_out")
    assert over[0] == 0
    assert not np.isnan(change).any()


def test_what_is_shown_unless_told(make_effects):
    effects = make_effects()
    assert "recovered" in effects.columns(sites="z")
    for swept in effects.sites.values():
        del swept.measured["logit_diff"]
    assert "ie" in effects.columns(sites="z")


def test_every_metric_says_all_of_itself():
    header, *rows = definitions()
    assert [row[0] for row in rows] == list(METRICS)
    assert all(len(row) == len(header) and all(row) for row in rows)
