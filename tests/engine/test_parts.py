"""Runs that several processes share: parts, merging, locks, and file systems without locks."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from engine_survivor import budget, make_hf_model, make_pairs, process, same, sweep

import deltapatch
from deltapatch import DeltapatchError
from deltapatch.engine import sweep as sweeps
from deltapatch.results import checkpoint as unfinished
from deltapatch.results.merge import merge


def test_parts_merge_to_the_same_bytes(parts, whole, tmp_path):
    run = Path(shutil.copytree(parts, tmp_path / "run"))
    with pytest.raises(DeltapatchError, match="is not finished"):
        deltapatch.load_effects(run)
    assert merge(run)
    assert same(run, whole)
    assert not merge(run)
    resumed = Path(shutil.copytree(parts, tmp_path / "resumed"))
    sweep(resumed, resume=True)
    assert same(resumed, whole)


def test_parts_that_keep_weights_in_different_ways(tmp_path):
    """A streamed model's passes are cut in another way: all parts cut as the first one did."""
    folder, pairs = tmp_path / "model", make_pairs(8)
    make_hf_model().save_pretrained(folder)
    kept, streamed = (deltapatch.load_model(folder, device="cpu", stream=s) for s in (False, True))
    few = budget(kept, tokens=80, rows=20)
    options = {"pairs": pairs, "memory_budget": few}
    sweep(tmp_path / "kept", model=kept, **options)
    sweep(tmp_path / "streamed", model=streamed, **options)
    counts = [deltapatch.load_effects(tmp_path / name).meta["passes"] for name in ("kept", "streamed")]
    assert counts[0] != counts[1]
    for first, second, like in ((kept, streamed, "kept"), (streamed, kept, "streamed")):
        run = tmp_path / f"like {like}"
        sweep(run, model=first, shard=(1, 2), **options)
        sweep(run, model=second, shard=(2, 2), **options)
        assert merge(run)
        assert deltapatch.load_effects(run).meta["passes"] == counts[like == "streamed"]
        effects = [(r / "effects.safetensors").read_bytes() for r in (run, tmp_path / like)]
        assert effects[0] == effects[1]


def test_a_part_of_a_finished_run_leaves_nothing_behind(whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "unfinished").mkdir()
    sweep(run, shard=(1, 2))
    assert not merge(run)
    with unfinished.unfinished(run, False, (0, 2)):  # one that began before it was finished
        pass
    assert same(run, whole)


def test_parts_of_what_auto_chose(tmp_path):
    sweep(tmp_path / "whole", precision="auto")
    for i in (1, 2):
        sweep(tmp_path / "run", precision="auto", shard=(i, 2))
    assert merge(tmp_path / "run")
    assert same(tmp_path / "run", tmp_path / "whole")
    assert deltapatch.load_effects(tmp_path / "run").meta["precision"] == "fp32"


def test_more_parts_than_passes_in_any_order(whole, tmp_path):
    for i in (3, 8, 1, 7, 2, 6, 5, 4):
        sweep(tmp_path / "run", shard=(i, 8))
    assert merge(tmp_path / "run")
    assert same(tmp_path / "run", whole)


def test_a_merge_verifies(parts, tmp_path):
    run = Path(shutil.copytree(parts, tmp_path / "run"))
    shard = run / "unfinished" / "3.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (run / "unfinished" / "0.safetensors").unlink()
    with pytest.raises(
        DeltapatchError, match=r"of 6 passes, 1 missing \(part 1/2\) and 1 damaged \(part 2/2\)"
    ):
        merge(run)
    shutil.copy(parts / "unfinished" / "0.safetensors", run / "unfinished")
    shard.write_bytes(content)
    (run / "unfinished" / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(DeltapatchError, match=r"cannot be merged: .*pairs.jsonl is damaged"):
        merge(run)
    with pytest.raises(DeltapatchError, match="is not a run folder"):
        merge(tmp_path)


@pytest.mark.parametrize(("shard", "out", "said"), [((3, 2), "run", "3/2"), ((1, 2), None, "output folder")])
def test_parts_that_do_not_exist(shard, out, said, tmp_path):
    with pytest.raises(DeltapatchError, match=said):
        sweep(None if out is None else tmp_path / out, shard=shard)


def test_a_second_process_is_told_and_hurts_nobody(tmp_path, whole):
    run = tmp_path / "run"
    first = process(run, pause=0.3)
    assert first.stdout.readline() == "kept\n"
    for act in (lambda: sweep(run, resume=True), lambda: sweep(run, shard=(1, 2)), lambda: merge(run)):
        with pytest.raises(DeltapatchError, match="another process works on run folder"):
            act()
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert same(run, whole)


def test_parts_share_a_folder_at_the_same_time(tmp_path, whole, monkeypatch):
    run = tmp_path / "run"
    with unfinished.unfinished(run, False, (0, 2)):
        sweep(run, shard=(2, 2))
        with pytest.raises(DeltapatchError, match="another process works"):
            sweep(run, shard=(1, 2))
        with pytest.raises(DeltapatchError, match="another process works"):
            sweep(run, resume=True)
    sweep(run, shard=(1, 2))
    assert merge(run)
    assert same(run, whole)


def test_missing_parts_are_named(tmp_path, whole):
    run = tmp_path / "run"
    sweep(run, shard=(2, 3))
    with pytest.raises(DeltapatchError, match=r"of 6 passes, 4 missing \(parts 1/3 and 3/3\) and 0 damaged"):
        merge(run)
    sweep(run, shard=(1, 4))  # passes 0 and 4, in other parts than before: then the passes have names
    sweep(run, shard=(1, 4))  # again: nothing is computed twice
    with pytest.raises(DeltapatchError, match=r"3 missing \(passes 2, 3 and 5\) and 0 damaged"):
        merge(run)
    for i in (2, 3, 4):
        sweep(run, shard=(i, 4))
    assert merge(run)
    assert same(run, whole)


@pytest.fixture
def no_locks(monkeypatch):
    def flock(handle, kind):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("links", [True, False])
def test_a_file_system_without_locks(tmp_path, whole, monkeypatch, links):
    def link(source, target):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr("os.link", link)
    run = tmp_path / "run"
    said = "the file system of .*run/unfinished has no locks: see to it"
    for i in (1, 2):
        with pytest.warns(UserWarning, match=said):
            sweep(run, shard=(i, 2))
    with pytest.warns(UserWarning, match=said):
        merge(run)
    assert same(run, whole)


@pytest.mark.usefixtures("no_locks")
@pytest.mark.filterwarnings("ignore:the file system")
def test_of_two_plans_at_once_one_counts(tmp_path, whole, monkeypatch):
    run, plan = tmp_path / "run", sweeps.plan

    def slowly(question):
        with monkeypatch.context() as patch:
            patch.setattr(sweeps, "plan", plan)
            sweep(run, shard=(2, 2))  # a process that is faster
        return plan(question)

    monkeypatch.setattr(sweeps, "plan", slowly)
    sweep(run, shard=(1, 2), memory_budget=None)  # would be cut into other passes
    assert merge(run)
    assert same(run, whole)


def test_a_lock_that_is_a_link_leads_nowhere(tmp_path):
    folder = tmp_path / "run" / "unfinished"
    folder.mkdir(parents=True)
    (tmp_path / "elsewhere").touch()
    (folder / "run.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeltapatchError, match=r"cannot write .*run: Too many levels of symbolic links"):
        sweep(tmp_path / "run", resume=True)
