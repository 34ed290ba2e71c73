"""Outcomes: their columns, their run folder, and what is said of broken ones."""

import json

import numpy as np
import pytest
from safetensors import safe_open

import deltapatch as dp
from deltapatch.interventions.given import Listed
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.table import PatchTable
from deltapatch.results.folder import EFFECTS, INTERVENTIONS, RUN, checksum
from deltapatch.results.metrics import MEASURED, Reference
from deltapatch.results.outcome import Outcome
from deltapatch.results.tensorfile import save_file

PATCHES = np.array([1, 4, 1, 2, 9])  # of each intervention


def a_pair() -> EncodedPair:
    return EncodedPair([1, 2, 3], [1, 5, 3], [4], [6], {}, {}, ["a", "b", "c"], ["a", "d", "c"], "e", "f")


@pytest.fixture
def outcome() -> Outcome:
    rng = np.random.default_rng(0)
    measured = {name: rng.normal(size=5).astype(np.float32) for name in MEASURED}
    logit = rng.normal(size=(3, 2, 2)) + 5 * np.eye(2)
    says = np.broadcast_to(np.eye(2, dtype=bool), (3, 2, 2)).copy()
    reference = Reference(logit, logit - 9, np.zeros((3, 2), dtype=np.int64), says)
    n = int(PATCHES.sum())
    row, zero = np.repeat(np.arange(5), PATCHES), np.zeros(n, dtype=np.int64)
    table = PatchTable(5, np.array([0, 0, 2, 1, 2]), row, np.arange(n), zero, zero + 2, zero, zero)
    meta = {"model": "made-up", "precision": "fp32"}
    return Outcome(measured, Listed(table), [a_pair() for _ in range(3)], reference, "noise", meta)


def test_a_row_an_intervention(outcome):
    frame = outcome.to_pandas(["recovered", "ie"])
    assert list(frame) == ["intervention", "pair", "patches", "recovered", "ie"]
    assert frame["patches"].tolist() == [1, 4, 1, 2, 9]
    np.testing.assert_array_equal(frame["ie"], outcome.values("ie"))
    assert list(outcome.to_pandas()) == ["intervention", "pair", "patches", "recovered"]
    with pytest.raises(dp.DeltapatchError, match="unknown metric 'best'"):
        outcome.to_pandas("best")


def test_a_few_lines_say_what_it_is(outcome):
    said = repr(outcome)
    assert said.startswith(
        "Outcome of 5 intervention(s) of 1 to 9 patch(es) on 3 pair(s), noise, made-up, fp32\n"
    )
    assert "recovered" in said
    assert len(said.splitlines()) == 2


def test_a_run_folder_gives_it_back(outcome, tmp_path):
    outcome.save(tmp_path / "deep" / "run")
    found = dp.load_outcome(tmp_path / "deep" / "run")
    assert repr(found) == repr(outcome)
    assert found.pairs == outcome.pairs
    assert {key: found.meta[key] for key in outcome.meta} == outcome.meta
    for metric in outcome.metrics:
        np.testing.assert_array_equal(found.values(metric), outcome.values(metric))
    for name, array in outcome.interventions.arrays().items():
        np.testing.assert_array_equal(found.interventions.arrays()[name], array)
    with pytest.raises(dp.DeltapatchError, match="is taken: it is a folder that is not empty"):
        outcome.save(tmp_path / "deep" / "run")
    with pytest.raises(dp.DeltapatchError, match="run of given interventions, not a sweep: load_outcome"):
        dp.load_effects(tmp_path / "deep" / "run")


def arrays(path):
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        (INTERVENTIONS, lambda t: t.pop("pair"), "is damaged"),
        (INTERVENTIONS, lambda t: t.update(pair=t["pair"] + 9), "is damaged .interventions"),
        (INTERVENTIONS, lambda t: t.update(row=t["row"][1:]), "is damaged .interventions"),
        (INTERVENTIONS, lambda t: t.update(row=t["row"][::-1].copy()), "is damaged .interventions"),
        (INTERVENTIONS, lambda t: t.update(place=t["place"] + 99), "is damaged .interventions"),
        (INTERVENTIONS, lambda t: t.update(position=t["position"] + 1), "is damaged .interventions"),
        (EFFECTS, lambda t: t.update({"measured/best": t["measured/kl"]}), "is damaged .effects.safetensors"),
        (EFFECTS, lambda t: t.update({"measured/kl": t["measured/kl"][1:]}), "is damaged .measured/kl"),
        (EFFECTS, lambda t: t.update({"reference/logit": t["reference/logit"][:, 0]}), "is damaged"),
        (RUN, lambda about: about["interventions"].update(number=4), "is damaged"),
        (RUN, lambda about: about["interventions"].update(measured=["best"]), "is damaged .measured numbers"),
        (RUN, lambda about: about.update(interventions=7), "is damaged .interventions"),
    ],
)
def test_broken_folders_are_one_sentence(outcome, tmp_path, file, change, sentence):
    outcome.save(run := tmp_path / "run")
    about = json.loads((run / RUN).read_text())
    if file == RUN:
        change(about)
    else:
        found = arrays(run / file)
        change(found)
        save_file(found, run / file, {})
    (run / RUN).write_text(json.dumps(about))
    with pytest.raises(dp.DeltapatchError, match="its files are not those that were written"):
        dp.load_outcome(run)
    (run / RUN).write_text(json.dumps(about | {"sha256": checksum(about, run)}))  # what meant to do harm
    with pytest.raises(dp.DeltapatchError, match=sentence) as error:
        dp.load_outcome(run)
    assert str(run) in str(error.value)


def test_a_file_that_is_cut_off_or_not_there(outcome, tmp_path):
    outcome.save(run := tmp_path / "run")
    (run / EFFECTS).write_bytes((run / EFFECTS).read_bytes()[:-9])
    with pytest.raises(dp.DeltapatchError, match="is damaged"):
        dp.load_outcome(run)
    with pytest.raises(dp.DeltapatchError, match="does not exist"):
        dp.load_outcome(tmp_path / "nothing")
