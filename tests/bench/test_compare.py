"""A comparison in one process: what it reports, and that nothing wrong gets a speed."""

import json
import time

import numpy as np
import pytest

import deltapatch as dp
from deltapatch.bench import markdown
from deltapatch.bench.compare import compare
from deltapatch.bench.figures import draw_all
from deltapatch.bench.growth import growth
from deltapatch.bench.peers.base import Peer
from deltapatch.bench.peers.hooks_batched import HooksBatched
from deltapatch.bench.peers.ours import Ours
from deltapatch.bench.random_models import Shape
from deltapatch.bench.report import comparison
from deltapatch.bench.report import growth as growth_table
from deltapatch.bench.results import joined, stamp, write
from deltapatch.bench.runs import fastest_peer
from deltapatch.bench.setup import absent
from deltapatch.bench.sides.agreement import disagreement, rank_correlation, top_overlap
from deltapatch.bench.sides.cells import make_cells
from deltapatch.bench.sides.job import Options
from deltapatch.bench.sides.side import carry_out
from deltapatch.errors import DeltapatchError


class Wrong(HooksBatched):
    """Patches one position too early: plausible, and wrong."""

    name = "wrong"

    def measure(self, cells):
        shifted = type(cells)(cells.site, cells.pair, cells.layer, cells.position - 1, cells.index)
        return super().measure(shifted)


class WrongWhenTimed(HooksBatched):
    """Right when it is checked, after two starts, and wrong before and after."""

    name = "wrong-when-timed"
    starts = 0

    def start(self, site):
        self.starts += 1
        super().start(site)

    def measure(self, cells):
        return super().measure(cells) * (1 if self.starts == 3 else 1.5)


class Silent(HooksBatched):
    """Its hooks do nothing."""

    name = "silent"

    def measure(self, cells):
        return np.zeros((len(cells), len(self.work.columns)))


class NotFinite(WrongWhenTimed):
    """The same, and what is wrong is no number at all."""

    name = "not-finite"

    def measure(self, cells):
        values = HooksBatched.measure(self, cells)
        if self.starts != 3:
            values[0] = np.nan
        return values


class Broken(Peer):
    """Fails when it should measure."""

    name, what = "broken", "fails"

    def prepare(self, work, spec):
        self.work = work

    def measure(self, cells):
        raise RuntimeError("no such kernel")


class Lacking(HooksBatched):
    """Has no MLP outputs."""

    name, sites = "lacking", ("z",)


class Slow(HooksBatched):
    """Runs one at a time, so that it is measured on a sample."""

    name = "slow"

    def batches(self, cells):
        return [np.array([i]) for i in range(len(cells))]


class Sleepy(HooksBatched):
    """Waits, as for a CPU that others use."""

    name = "sleepy"

    def measure(self, cells):
        time.sleep(0.2)
        return super().measure(cells)


PEERS = [
    Wrong(),
    WrongWhenTimed(),
    Silent(),
    NotFinite(),
    Broken(),
    Lacking(),
    Slow(),
    HooksBatched(),
    Ours("fp32"),
]
NAMES = [*(peer.name for peer in PEERS), "absent"]


def local(name, job):
    if name == "absent":
        return absent("its environment cannot be made")
    (peer,) = (p for p in PEERS if p.name == name)
    return carry_out(peer, job)


@pytest.fixture(autouse=True)
def _quick_limits(monkeypatch):
    monkeypatch.setattr("deltapatch.bench.limits._SECONDS", 0.001)


@pytest.fixture(scope="module")
def result(work_of):
    work = work_of()
    spec = dp.load_model(work.folder).spec
    cells = make_cells("mlp_out", spec, len(work.clean), work.length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deltapatch.bench.limits._SECONDS", 0.001)
        patch.setattr("deltapatch.bench.limits.copy_rate", lambda device: 1e9)
        patch.setattr("deltapatch.bench.sides.side._TRIAL_SECONDS", 1e-9)
        options = Options(rounds=2, limit=0.01, sample=1e-4, check=10)
        return stamp("compare", compare(work, [("mlp_out", cells)], NAMES, local, options))


@pytest.mark.parametrize("processor", [True, False])
def test_seconds_are_the_processor_s_or_the_clock_s(work_of, processor):
    work = work_of()
    cells = make_cells("mlp_out", dp.load_model(work.folder).spec, len(work.clean), work.length)
    options = Options(rounds=1, check=4, processor=processor)
    found = compare(
        work, [("mlp_out", cells)], ["sleepy"], lambda name, job: carry_out(Sleepy(), job), options
    )
    column = found["sweeps"][0]["columns"]["sleepy"]
    waited = 0.2 * column["batches"]
    assert column["status"] == "measured"
    assert (column["seconds"][0] < waited) == processor


def test_what_agrees_is_measured(result):
    (sweep,) = result["sweeps"]
    assert sweep["interventions"] == 36
    assert sweep["oracle"]["error"] < 1e-10
    for name in ("hooks-batched", "slow", "deltapatch-fp32"):
        column = sweep["columns"][name]
        assert column["status"] == "measured"
        assert len(column["rates"]) == len(column["seconds"]) == 2
        assert column["spread"][0] <= column["rate"] <= column["spread"][1]
        assert column["rate"] == pytest.approx(np.median(column["rates"]))
        assert column["agreement"]["difference"] < 1e-4
        assert column["agreement"]["rank_correlation"] > 0.999
        assert column["first_seconds"] > 0
        assert column["peak_bytes"] > 1e7
    assert sweep["columns"]["deltapatch-fp32"]["agreement"]["error"] < 1e-5
    assert fastest_peer(sweep) in ("hooks-batched", "slow")


@pytest.mark.parametrize("name", ["wrong", "wrong-when-timed", "silent", "not-finite"])
def test_a_wrong_peer_gets_no_speed(result, name):
    column = result["sweeps"][0]["columns"][name]
    assert column["status"] == "disagrees"
    assert ("not finite" if name == "not-finite" else "off by") in column["reason"]
    assert not {"rate", "rates", "seconds", "spread", "of_product_rate", "first_seconds"} & set(column)
    (line,) = (
        line
        for line in comparison(result).splitlines()
        if line.startswith(f"{name} ") and "disagrees: " in line
    )
    assert " - " not in line  # no spread
    assert "disagrees" in line


def test_what_fails_or_is_lacking_is_reported(result):
    columns = result["sweeps"][0]["columns"]
    assert columns["broken"] == {"status": "failed", "reason": "RuntimeError: no such kernel"}
    assert columns["lacking"] == {"status": "lacks", "reason": "no mlp_out"}
    assert columns["absent"]["reason"] == "its environment cannot be made"
    text = comparison(result)
    assert "no such kernel" in text
    assert "not measured: lacking (no mlp_out), absent (not here)" in text
    assert "its environment cannot be made" in text


def test_a_slow_peer_is_sampled_and_scaled(result):
    column = result["sweeps"][0]["columns"]["slow"]
    assert column["sampled"]
    assert 4 <= column["cells"] < 36
    assert all(a > b for a, b in zip(column["seconds"], column["measured_seconds"], strict=True))
    (line,) = (line for line in comparison(result).splitlines() if line.startswith("slow ") and " - " in line)
    assert "~" in line


def test_the_result_is_plain_json(result):
    again = json.loads(json.dumps(result, allow_nan=False))
    assert again["format"] == "deltapatch bench"
    assert again["kind"] == "compare"
    assert {"versions", "machine", "date", "model", "workload", "options", "limits", "sides", "sweeps"} < set(
        again
    )
    assert set(again["sides"]) == set(again["sweeps"][0]["columns"]) == set(NAMES)
    assert again["limits"]["products"]["fp32"] > 0
    assert again["sides"]["hooks-batched"]["versions"]["torch"]


def test_what_else_is_kept_of_every_repeat_and_run(result):
    columns = result["sweeps"][0]["columns"]
    for name in ("hooks-batched", "deltapatch-fp32"):
        assert len(columns[name]["product_rate"]) == len(columns[name]["others"]) == 2
        assert columns[name]["of_product_rate"] > 0
    assert columns["hooks-batched"]["batch"] == [5]
    assert columns["deltapatch-fp32"]["batch"] == [None]
    assert columns[fastest_peer(result["sweeps"][0])]["times_as_fast"] == [1.0]
    assert result["workload"]["batches"] == [5]
    assert result["sides"]["hooks-batched"]["threads"] == result["limits"]["threads"]
    text = comparison(result)
    assert result["quiet"]["note"] in text
    (line,) = (line for line in text.splitlines() if line.startswith("hooks-batched ") and " - " in line)
    assert line.split()[6] == "5"  # after side, rate, spread of three words and ratio


def test_several_models_are_one_result(result, tmp_path):
    names = "one, random weights", "two, random weights"
    models = [{**result, "model": {**result["model"], "name": name}} for name in names]
    both = stamp("compare", joined(models))
    text, table = comparison(both), markdown.table(both)
    alone = markdown.table(result)
    assert table == f"**{names[0]}**\n\n{alone}\n\n**{names[1]}**\n\n{alone}"
    assert [text.count(f"{name}: gpt_neox") for name in names] == [1, 1]
    assert joined(models[:1]) == models[0]
    write(tmp_path / "both.json", both)
    assert draw_all([tmp_path / "both.json"], tmp_path)


def test_two_runs_are_made_with_new_sides(work_of):
    work, made, names = work_of(), [], ["hooks-batched", "deltapatch-fp32"]

    def make(name, job):
        made.append(name)
        (peer,) = (p for p in PEERS if p.name == name)
        return carry_out(peer, job)

    spec = dp.load_model(work.folder).spec
    cells = make_cells("mlp_out-last", spec, len(work.clean), work.length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deltapatch.bench.limits.copy_rate", lambda device: 1e9)
        found = compare(work, [("mlp_out-last", cells)], names, make, Options(rounds=2, runs=2, check=4))
    assert made == names * 2
    for column in found["sweeps"][0]["columns"].values():
        assert len(column["rates"]) == 4
        assert len(column["times_as_fast"]) == 2


def test_no_process_is_started_that_memory_may_not_hold(work_of, monkeypatch):
    work = work_of()
    cells = make_cells("mlp_out-last", dp.load_model(work.folder).spec, len(work.clean), work.length)
    free = iter([100, 60, 60])  # before and after the first, and before the second, which may take 80
    monkeypatch.setattr("deltapatch.bench.compare.available", lambda: next(free))
    monkeypatch.setattr("deltapatch.bench.limits.copy_rate", lambda device: 1e9)
    names = ["hooks-batched", "deltapatch-fp32"]
    found = compare(work, [("mlp_out-last", cells)], names, local, Options(rounds=1, check=4))
    assert [c["status"] for c in found["sweeps"][0]["columns"].values()] == ["measured", "missing"]
    assert "give fewer --peers" in comparison({**found, "model": {**found["model"], "name": "tiny"}})


def test_growth_measures_every_point():
    shape = Shape(layers=2, d_model=8, d_mlp=8, heads=2, vocab=20, context=32)
    options = Options(rounds=1, check=4)
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deltapatch.bench.limits.copy_rate", lambda device: 1e9)
        found = growth(
            ["rows", "vocab"],
            shape,
            4,
            ["hooks-batched", "deltapatch-fp32"],
            local,
            options,
            values=[8, 16],
            keep=lambda result: kept.append([len(points) for points in result["axes"].values()]),
        )
    assert kept == [[1], [2], [2, 1], [2, 2]], "a point that is done is not kept"
    assert [p["value"] for p in found["axes"]["vocab"]] == [8, 16]
    assert [p["interventions"] for p in found["axes"]["rows"]] == [8, 16]
    assert "Interventions per second by vocab" in growth_table(found)
    assert found["quiet"]["note"] in growth_table(found)
    with pytest.raises(DeltapatchError, match="unknown axis 'depth'"):
        growth(["depth"], shape, 4, [], local, options)


def test_options_are_checked():
    with pytest.raises(DeltapatchError, match="rounds, check, limit and sample"):
        Options(rounds=0)


def test_ranks():
    want = np.array([0.0, 1.0, 2.0, 3.0, -1.0])
    assert rank_correlation(want, want) == pytest.approx(1)
    assert rank_correlation(-want, want) == pytest.approx(-1)
    assert rank_correlation(np.array([9.0, 1.0, 2.0, 3.0, -1.0]), want) == pytest.approx(1)  # 0 has no rank
    assert rank_correlation(np.ones(5), np.arange(1.0, 6)) != rank_correlation(want, want)
    assert top_overlap(np.array([1.0, 5, 3]), np.array([1.0, 4, -6]), 2) == 1
    assert top_overlap(np.array([9.0, 5, 3]), np.array([1.0, 4, -6]), 2) == 0.5


def test_agreement_depends_on_the_precision():
    found = {"difference": 1e-6, "error": 5e-3}
    assert disagreement(found, "fp32", difference_form=False) is None
    assert disagreement(found, "bf16", difference_form=True) is None
    assert "over 1e-04" in disagreement(found, "fp32", difference_form=True)
    assert "not finite" in disagreement({"difference": 0, "error": float("nan")}, "fp32", True)
