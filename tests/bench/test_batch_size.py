"""Each peer takes the batch size that is fastest on its own cells; a machine that is not quiet is told."""

import subprocess
import sys
import time

import numpy as np
import pytest

from deltapatch.bench.peers.base import Peer, chunks
from deltapatch.bench.runs import tell_shares, together
from deltapatch.bench.sides import batch_size, quiet
from deltapatch.bench.sides.batch_size import choose
from deltapatch.bench.sides.cells import Cells
from deltapatch.bench.sides.quiet import Others
from deltapatch.bench.sides.workload import Workload

LONG = 1e9  # seconds


class Rows(Peer):
    """A forward costs `fixed` and as much again for every so many rows, in made-up time."""

    name, what, batched = "rows", "", True

    work = Workload("", [[1]], [[2]], [[0, 1]])

    def __init__(self, seconds):
        self.seconds, self.now, self.tried = seconds, 0.0, []

    def batches(self, cells):
        return chunks(np.arange(len(cells)), cells.pair, self.batch)

    def measure(self, cells):
        self.now += self.seconds(len(cells))
        self.tried.append(len(cells))


def cells_of(*sizes):
    """Cells of as many places as there are sizes, which go into one batch each at most."""
    pair = np.repeat(np.arange(len(sizes)), sizes)
    rest = np.zeros((len(pair), 1), dtype=int)
    return Cells("mlp_out", pair, rest, rest, rest)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        (lambda n: 1 + n / 1000, 256),  # what a forward costs beside its rows decides
        (lambda n: n + 1000 * (n > 32), 16),  # rows beyond a cache do
        (lambda n: 10 + n + 1000 * (n > 100), 64),
    ],
)
def test_the_fastest_size_is_taken(seconds, best):
    peer = Rows(seconds)
    found = choose(peer, cells_of(300, 300), (64, 16, 256), LONG, lambda: peer.now)
    assert set(found) == {16, 64, 256}
    assert peer.batch == best
    assert found[best] == min(found.values())


def test_a_try_that_was_disturbed_does_not_decide():
    disturbed = iter([0.1, 0.1, 0.01, 0.1, *[0.01] * 999])  # of 256 rows: once to be warm, then tries
    peer = Rows(lambda n: 0.01 + n / 1e6 + (next(disturbed) if n == 256 else 0.01))
    choose(peer, cells_of(256), (64, 256), LONG, lambda: peer.now)
    assert peer.batch == 256


def test_no_size_is_tried_that_makes_no_larger_batches():
    peer = Rows(lambda n: 1.0)
    assert choose(peer, cells_of(10, 10), (16, 64), LONG, lambda: peer.now) == {}
    assert peer.batch == 16
    assert not peer.tried
    assert set(choose(peer, cells_of(40, 10), (16, 64, 256), LONG, lambda: peer.now)) == {16, 64}
    peer.batched, peer.batch = False, 7
    assert choose(peer, cells_of(300), (16, 64), LONG, lambda: peer.now) == {}
    assert peer.batch == 7


def test_no_size_is_tried_whose_batches_take_longer_than_a_sample():
    peer = Rows(lambda n: n / 10)
    assert set(choose(peer, cells_of(300), (16, 64, 256), 10.0, lambda: peer.now)) == {16, 64}
    assert max(peer.tried) == 64


def test_no_size_is_tried_that_memory_may_not_hold(monkeypatch):
    peaks = iter([100, 110, 110, 200])  # before and after 16 rows, and 64
    monkeypatch.setattr(batch_size, "_peak", lambda: next(peaks))
    monkeypatch.setattr(batch_size, "available", lambda device: 300)
    peer = Rows(lambda n: 1.0)
    # 64 rows may take 40 bytes, and 256 may take 360: half of what is free is 150
    assert set(choose(peer, cells_of(300), (16, 64, 256), LONG, lambda: peer.now)) == {16, 64}
    assert peer.batch == 64


def column(rates, batch=64, **more):
    same = {"trials": {}, "peak_bytes": 1, "sampled": False, "measured_seconds": [1.0] * len(rates)}
    lists = {"seconds": [1 / rate for rate in rates], "rates": rates, "others": [0.0] * len(rates)}
    rate = float(np.median(rates))
    known = {"status": "measured", "agreement": {"error": 0.0}, "product_rate": [100.0] * len(rates)}
    return {**same, **lists, **known, "batch": batch, "rate": rate, **more}


def test_runs_are_put_together_and_each_has_its_ratio():
    runs = [
        {"hooks": column([1.0, 1.0]), "paper": column([0.5, 0.5]), "deltapatch-fp32": column([4.0, 2.0])},
        {"hooks": column([1.0, 1.0]), "paper": column([2.0, 2.0], 16), "deltapatch-fp32": column([4.0, 4.0])},
    ]
    found = together(runs)
    assert found["deltapatch-fp32"]["times_as_fast"] == [3.0, 2.0]  # another is the fastest in each
    assert found["paper"]["batch"] == [64, 16]
    assert found["deltapatch-fp32"]["rates"] == [4.0, 2.0, 4.0, 4.0]
    assert found["deltapatch-fp32"]["spread"] == [2.0, 4.0]
    runs[1]["hooks"] = {"status": "failed", "reason": "no memory"}
    assert together(runs)["hooks"] == runs[1]["hooks"]


def test_shares_are_of_the_product_rate_beside_them():
    sweep = {"necessary_flops": 300, "interventions": 3, "columns": {"a": column([1.0, 2.0, 4.0])}}
    sweep["columns"]["a"]["product_rate"] = [200.0, 800.0, 800.0]
    products = {"fp32": 500.0}
    tell_shares(sweep, {"a": {"precision": "fp32", "exact": True}}, products)
    assert sweep["columns"]["a"]["of_product_rate"] == 0.5  # of 0.5, 0.25 and 0.5
    assert products == {"fp32": 800.0}


@pytest.mark.skipif(Others().share() is None, reason="the system does not say what its CPUs do")
def test_what_others_take_is_seen_and_what_this_process_takes_is_not():
    others = Others()
    spin = "import time\nwhile time.process_time() < 0.6: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    with_it = others.share() * (time.perf_counter() - others.began) * len(others.cpus)
    assert with_it > 0.5  # seconds of a processor


def test_own_time_is_not_that_of_others(monkeypatch, tmp_path):
    stat = tmp_path / "stat"
    monkeypatch.setattr(quiet, "_STAT", stat)
    monkeypatch.setattr(quiet, "pinned", lambda: [1, 3])
    clock = {"wall": 0.0, "own": 0.0}
    monkeypatch.setattr(quiet.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(quiet.time, "process_time", lambda: clock["own"])
    tick = quiet.os.sysconf("SC_CLK_TCK")

    def says(one, three):
        idle = "900 800"
        lines = [f"cpu{n} {b} 0 0 {idle} 0 0 {s} 0 0" for n, b, s in ((0, 77, 7), (1, *one), (3, *three))]
        stat.write_text("cpu 1 2 3 4 5 6 7 8 9 10\n" + "\n".join(lines) + "\nintr 5\n")

    says((0, 0), (0, 0))
    others = Others()
    says((6 * tick, 0), (4 * tick, 3 * tick))  # 10 seconds busy, 3 stolen
    clock.update(wall=10.0, own=9.0)
    assert others.share() == pytest.approx((10 + 3 - 9) / 20)
    stat.unlink()
    assert others.share() is None


def test_a_machine_that_is_not_quiet_is_told():
    sweep = {"name": "z", "columns": {"hooks": column([1.0], others=[0.2]), "paper": column([1.0])}}
    found = quiet.quiet([sweep, {"name": "q", "columns": {"hooks": {"status": "lacks"}}}])
    assert found["others"] == 0.2
    assert "NOT QUIET: other processes took 20% of the CPUs of hooks in z" in found["note"]
    assert "was quiet" in quiet.quiet([{"name": "z", "columns": {"paper": column([1.0])}}])["note"]
    unknown = quiet.quiet([{"name": "z", "columns": {"paper": column([1.0], others=[None])}}])
    assert unknown["others"] is None
    assert "not known" in unknown["note"]
