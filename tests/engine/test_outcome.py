"""Outcomes: their columns, their file, and what is said of broken ones."""

import numpy as np
import pytest

import deltapatch as dp
from deltapatch.results.metrics import MEASURED, Reference
from deltapatch.results.outcome import Outcome
from deltapatch.results.tensorfile import save_file


@pytest.fixture
def outcome() -> Outcome:
    rng = np.random.default_rng(0)
    measured = {name: rng.normal(size=5).astype(np.float32) for name in MEASURED}
    logit = rng.normal(size=(3, 2, 2)) + 5 * np.eye(2)
    says = np.broadcast_to(np.eye(2, dtype=bool), (3, 2, 2)).copy()
    reference = Reference(logit, logit - 9, np.zeros((3, 2), dtype=np.int64), says)
    pair, patches = np.array([0, 0, 2, 1, 2]), np.array([1, 4, 1, 2, 9])
    return Outcome(measured, pair, patches, reference, "noise", {"model": "made-up", "precision": "fp32"})


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


def test_a_file_gives_it_back(outcome, tmp_path):
    outcome.save(tmp_path / "deep" / "outcome.safetensors")
    found = dp.load_outcome(tmp_path / "deep" / "outcome.safetensors")
    assert repr(found) == repr(outcome)
    assert found.meta == outcome.meta
    for metric in outcome.metrics:
        np.testing.assert_array_equal(found.values(metric), outcome.values(metric))
    with pytest.raises(dp.DeltapatchError, match="is taken: choose another or remove it"):
        outcome.save(tmp_path / "deep" / "outcome.safetensors")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t, m: t.pop("pair"), "is damaged"),
        (lambda t, m: t.update(pair=t["pair"] + 9), "is damaged .pair"),
        (lambda t, m: t.update(patches=t["patches"][1:]), "is damaged .patches"),
        (lambda t, m: t.update({"measured/best": t["measured/kl"]}), "is damaged .measured numbers"),
        (lambda t, m: t.update({"reference/logit": t["reference/logit"][:, 0]}), "is damaged .logit"),
        (lambda t, m: m.update(about="{}"), "is damaged"),
        (lambda t, m: m.update(about="[" * 9999), "is damaged"),
        (lambda t, m: m.update(format="another"), "is not an outcome that Outcome.save wrote"),
    ],
)
def test_broken_files_are_one_sentence(outcome, tmp_path, change, sentence):
    from safetensors import safe_open

    outcome.save(tmp_path / "whole")
    with safe_open(tmp_path / "whole", framework="numpy") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, tmp_path / "broken", metadata)
    with pytest.raises(dp.DeltapatchError, match=sentence) as error:
        dp.load_outcome(tmp_path / "broken")
    assert str(tmp_path / "broken") in str(error.value)


def test_a_file_that_is_cut_off_or_not_there(outcome, tmp_path):
    outcome.save(tmp_path / "whole")
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[:-9])
    with pytest.raises(dp.DeltapatchError, match="is damaged"):
        dp.load_outcome(tmp_path / "half")
    with pytest.raises(dp.DeltapatchError, match="does not exist"):
        dp.load_outcome(tmp_path / "nothing")
