"""Sweeps on a Ray cluster of two workers on this machine: lost workers, workers that differ, bad input."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from engine_survivor import budget, cut_off, make_hf_model, make_pairs, passes_of, same

import deltapatch
from deltapatch import DeltapatchError
from deltapatch.engine.cluster import team as ray_team
from deltapatch.engine.cluster.sweep import Cluster, ray_sweep, ray_sweep_edges
from deltapatch.engine.cluster.worker import Worker
from deltapatch.engine.wavefront.pool import threads
from deltapatch.results.kept import KeptPasses

ray = pytest.importorskip("ray")

PAIRS = make_pairs(10)


@pytest.fixture(scope="module")
def _cluster():
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """On a busy machine a worker may take a while to start."""
    monkeypatch.setattr(ray_team, "_PATIENCE", 300.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that is on the disk, as workers need it."""
    path = tmp_path_factory.mktemp("model")
    make_hf_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def options(folder):
    """A sweep of ten passes."""
    model = deltapatch.load_model(folder, device="cpu")
    few = budget(model, precision="fp32")
    return {"sites": "mlp_out,z", "positions": [1, -1], "precision": "fp32", "memory_budget": few}


@pytest.fixture(scope="module")
def alone(folder, options, tmp_path_factory):
    """The run folder of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    sweep(run, folder, options)
    return run


def sweep(run, folder, options, **more):
    with threads(1):
        model = deltapatch.load_model(folder, device="cpu")
        return deltapatch.sweep(model, PAIRS, out=run, progress=False, **options, **more)


def on_ray(run, folder, options, *, address=None, loading=(), **more):
    cluster = Cluster(cpus=1, address=address, loading=dict(loading))
    return ray_sweep(folder, PAIRS, cluster, out=run, progress=False, **options, **more)


def kill_one(monkeypatch, after):
    """Kill a worker that is at work once so many passes are kept."""
    give, keep, teams, kept = ray_team.Team._give, KeptPasses.write, [], []

    def watched(team, member, todo):
        teams[:] = [team]
        give(team, member, todo)

    def write(self, number, found):
        keep(self, number, found)
        kept.append(number)
        if len(kept) == after:
            at_work = next(m for m in teams[0]._members if m.number is not None)
            os.kill(int(at_work.where.split("process ")[1].rstrip(")")), signal.SIGKILL)

    monkeypatch.setattr(ray_team.Team, "_give", watched)
    monkeypatch.setattr(KeptPasses, "write", write)


@pytest.mark.usefixtures("_cluster")
def test_one_of_two_workers_is_killed_halfway(folder, options, alone, tmp_path, monkeypatch):
    kill_one(monkeypatch, after=4)
    with pytest.warns(UserWarning, match=r"Ray worker .* failed \(.*died.*\): pass \d is done again"):
        found = on_ray(tmp_path / "run", folder, options)
    assert same(tmp_path / "run", alone)
    assert found.meta["passes"] == 10
    assert found.meta["model"] == str(folder)
    assert found.values("ie", "z").shape == (10, 2, 2, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_edges_go_there_too(folder, tmp_path):
    options = {"receivers": "m,a<v>", "effect": "both", "precision": "fp32", "progress": False}
    with threads(1):
        model = deltapatch.load_model(folder, device="cpu")
        deltapatch.sweep_edges(model, PAIRS, out=tmp_path / "alone", memory_budget="40MB", **options)
    found = ray_sweep_edges(
        folder, PAIRS, Cluster(cpus=1), out=tmp_path / "run", memory_budget="40MB", **options
    )
    assert same(tmp_path / "run", tmp_path / "alone")
    assert found.edges == deltapatch.load_edges(tmp_path / "alone").edges
    with pytest.raises(DeltapatchError, match="load_edges reads it"):
        ray_sweep_edges(folder, PAIRS, Cluster(cpus=1), out=tmp_path / "run", **options)


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_a_run_goes_from_ray_to_one_process_and_back(folder, options, alone, tmp_path, monkeypatch):
    keep = KeptPasses.write

    def stop(self, number, found):
        if len(self.numbers()) == 3:
            raise KeyboardInterrupt
        keep(self, number, found)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(KeptPasses, "write", stop)
        with pytest.raises(KeyboardInterrupt, match=r"Interrupted; 3 of 10 passes are kept in .* --resume"):
            on_ray(run, folder, options)
    with pytest.raises(DeltapatchError, match="different direction: denoise there, noise here"):
        on_ray(run, folder, options, resume=True, direction="noise")
    model = deltapatch.load_model(folder, device="cpu")
    cut_off(run, 3, model=model, pairs=PAIRS, resume=True, noise_sample=None, **options)
    shard = sorted((run / "unfinished").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    done = passes_of(monkeypatch)
    with pytest.warns(UserWarning, match="is damaged: its pass is computed again"):
        on_ray(run, folder, options, resume=True)
    assert len(done) == 5
    assert same(run, alone)
    with pytest.raises(DeltapatchError, match="is finished already: load_effects reads it"):
        on_ray(run, folder, options, resume=True)


def faulty(monkeypatch, folder: Path, passes: dict[int, int], starts: int = 0) -> None:
    """Workers that have no memory for some passes, so often, and of which so many do not start.

    The class is local, so that it travels to the workers as a whole.
    """

    class Faulty(Worker):
        def carry_out(self, number):
            while starts and not (folder / "start.0").exists():
                time.sleep(0.05)  # not so fast that nobody else is needed
            for i in range(passes.get(number, 0)):
                mark = folder / f"{number}.{i}"
                if not mark.exists():
                    mark.touch()
                    raise MemoryError("no room\nat all")
            return super().carry_out(number)

        def join(self, *args):
            for i in range(starts):
                try:
                    (folder / f"start.{i}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                raise DeltapatchError("a different version of PyTorch")
            super().join(*args)

    monkeypatch.setattr(ray_team, "Worker", Faulty)


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_passes_that_fail_are_done_elsewhere(folder, options, alone, tmp_path, monkeypatch):
    faulty(monkeypatch, tmp_path, {2: 2, 7: 1})
    with pytest.warns(UserWarning, match=r"\(MemoryError: no room\): pass [27] is done again") as said:
        on_ray(tmp_path / "run", folder, options)
    assert len(said) == 3
    assert same(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Ray worker")
@pytest.mark.usefixtures("_cluster")
def test_a_pass_that_always_fails(folder, options, alone, tmp_path, monkeypatch):
    faulty(monkeypatch, tmp_path, {9: 3})
    said = r"pass 9 failed on 3 Ray workers, the last time on .*: no room\); .*9 of 10 passes are kept in"
    with pytest.raises(DeltapatchError, match=said):
        on_ray(tmp_path / "run", folder, options)
    on_ray(tmp_path / "run", folder, options, resume=True)
    assert same(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_a_worker_that_differs_is_left_out(folder, options, alone, tmp_path, monkeypatch):
    faulty(monkeypatch, tmp_path, {}, starts=1)
    with pytest.warns(UserWarning, match="Ray worker .* is left out: a different version of PyTorch"):
        on_ray(tmp_path / "run", folder, options)
    assert same(tmp_path / "run", alone)


def test_a_worker_refuses_another_plan(folder, options):
    from deltapatch.engine.cluster.worker import Request
    from deltapatch.engine.options import SweepOptions

    request = Request(str(folder), {"device": "cpu"}, PAIRS, None, SweepOptions(**options), None, 1)
    worker = Worker()
    report = worker.start(request)
    assert (report.rows, report.warnings) == (120, [])
    manifest, encoded, given = worker.plan(1)
    assert len(encoded) == 10
    assert given is None
    for name, value in (("torch", "1.0"), ("device", "cuda 9.0"), ("model", "00ff"), ("backend", "triton")):
        manifest.settings[name], before = value, manifest.settings[name]
        with pytest.raises(DeltapatchError, match=f"{value} there, .* here"):
            Worker().join(request, manifest, "run")
        manifest.settings[name] = before
    worker.adopt(manifest, "run")
    assert len(worker.row_layers()) == manifest.n_passes == 10
    assert sum(worker.row_layers()) == report.row_layers
    for number in (3, 1, 8):  # in any order
        assert worker.carry_out(number).pairs.tolist() == worker.carry_out(number).pairs.tolist()
        assert worker.progress() == worker.row_layers()[number]


def test_a_worker_knows_who_sees_a_patch(folder):
    from deltapatch.engine.cluster.worker import Request
    from deltapatch.engine.options import Options

    chosen = {"precision": "fp32", "noise_sample": 0, "progress": False}
    given = [
        deltapatch.Intervention(i, [deltapatch.Patch("mlp_out", 0, 1, into=into)])
        for i, into in enumerate(("logits", "m1", None))
    ]
    want = deltapatch.run(deltapatch.load_model(folder, device="cpu"), PAIRS, given, **chosen)
    worker = Worker()
    worker.start(Request(str(folder), {"device": "cpu"}, PAIRS, None, Options(**chosen), given, 1))
    manifest, _, arrays = worker.plan(1)
    assert arrays is not None
    assert arrays["seen_by"][:, 0].tolist() == [0, 1]
    worker.adopt(manifest, "run")
    for number in range(manifest.n_passes):
        found = worker.carry_out(number)
        for name, values in found.measured.items():
            np.testing.assert_array_equal(values, want.measured[name][found.out])


@pytest.mark.usefixtures("_cluster")
def test_what_a_cluster_does_not_have(folder, options, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(DeltapatchError, match=r"the Ray cluster has no GPUs: .*--ray-cpus N"):
        ray_sweep(folder, PAIRS, out=run, **options)
    with pytest.raises(DeltapatchError, match="no machine of the Ray cluster has 64 CPUs: the largest has 2"):
        ray_sweep(folder, PAIRS, Cluster(cpus=64), out=run, **options)
    with pytest.raises(DeltapatchError, match=r"^model folder .*/nothing does not exist$"):
        on_ray(run, tmp_path / "nothing", options)
    with pytest.raises(DeltapatchError, match="no pair has a position labelled 'op1'"):
        on_ray(run, folder, options | {"positions": ["op1"]})
    assert not run.exists()


def test_clusters_that_are_not_there(folder, options, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for address, said in (
        ("127.0.0.1:9", r"there is no Ray cluster at 127.0.0.1:9 \(Connection refused\)"),
        ("ray://127.0.0.1:9", "there is no Ray cluster at ray://127.0.0.1:9"),
        ("nonsense", "Ray address 'nonsense' means nothing"),
        ("host:99999999", "means nothing"),
    ):
        with pytest.raises(DeltapatchError, match=said):
            on_ray(run, folder, options, address=address)
    with pytest.raises(DeltapatchError, match="device 'cuda' does not go with workers on cpu"):
        on_ray(run, folder, options, loading={"device": "cuda"})
    with pytest.raises(
        DeltapatchError, match="device 'cpu' does not go with workers on cuda: give --ray-cpus"
    ):
        ray_sweep(folder, PAIRS, Cluster(loading={"device": "cpu"}), out=run, **options)
    with pytest.raises(TypeError, match="colour"):
        on_ray(run, folder, options, colour="red")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        DeltapatchError, match=r"Ray, which is not installed: pip install 'deltapatch\[ray\]'"
    ):
        on_ray(run, folder, options)
    assert not run.exists()
