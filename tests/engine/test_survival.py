"""Runs that are cut off, damaged or mixed up: the same bytes in the end, or one sentence."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from engine_survivor import (
    OPTIONS,
    Stop,
    budget,
    cut_off,
    make_hf_model,
    make_model,
    make_pairs,
    passes_of,
    process,
    same,
    sweep,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deltapatch
from deltapatch import DeltapatchError
from deltapatch.engine import settings as of_runs
from deltapatch.engine.wavefront.pool import threads
from deltapatch.results import checkpoint as unfinished
from deltapatch.results import manifest as manifests
from deltapatch.results.merge import merge

HYPOTHESIS = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_a_finished_folder_is_as_ever(whole, tmp_path):
    sweep(tmp_path / "again")
    assert same(tmp_path / "again", whole)
    meta = deltapatch.load_effects(whole).meta
    assert meta["passes"] == 6
    assert meta["noise_floor"]["recomputed"] == 4
    in_memory = sweep(None)
    for site, swept in deltapatch.load_effects(whole).sites.items():
        for name, values in swept.measured.items():
            np.testing.assert_array_equal(values, in_memory.sites[site].measured[name])


def test_only_what_is_missing_is_computed(cut, whole, monkeypatch):
    done = passes_of(monkeypatch)
    found = sweep(cut, resume=True)
    assert done == [4, 5]
    assert same(cut, whole)
    assert found.meta["passes"] == 6


def test_resuming_nothing_starts_and_resuming_all_does_nothing(whole, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    sweep(tmp_path / "run", resume=True)
    assert same(tmp_path / "run", whole)
    done = passes_of(monkeypatch)
    assert sweep(tmp_path / "run", resume=True).pairs == deltapatch.load_effects(whole).pairs
    assert done == []
    with pytest.raises(DeltapatchError, match="is finished, with a different direction"):
        sweep(tmp_path / "run", resume=True, direction="noise")


@pytest.fixture
def done(whole, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(whole, tmp_path / "done"))


def test_a_finished_run_answers_its_own_question_alone(done, monkeypatch):
    changes = {
        "pairs": (make_pairs(5), r"pairs: sha256 \w+ there, sha256 \w+ here"),
        "sites": ("z,mlp_out", "sites or layers: mlp_out of layers 0-1; z of layers 0-1 there, z of"),
        "layers": ([1], "sites or layers: .*, mlp_out of layers 1; z of layers 1 here"),
        "positions": ("all", r"positions: \[1, -1\] there, \[0, 1, 2, 3, 4\] here"),
        "direction": ("noise", "direction: denoise there, noise here"),
        "source": (
            "noise",
            "source: counterpart there, noise here; a different noise scale: none there, 3.0",
        ),
        "readout": (-2, "readout: last there, -2 here"),
        "metrics": ("logit_diff", r"metrics: \[.*\] there, \[.*\] here"),
        "seed": (1, "seed: 0 there, 1 here"),
        "noise_sample": (None, "noise sample: 4 there, none here"),
        "precision": ("fp32", "precision: bf16 there, fp32 here"),
        "memory_budget": (10**9, r"memory budget: \d+ there, 1000000000 here"),
    }
    monkeypatch.setattr(deltapatch.engine.passes, "carry", None)
    for name, (value, what) in changes.items():
        for joins in ({"resume": True}, {"shard": (1, 2)}):
            with pytest.raises(DeltapatchError, match=f"run .* is finished, with a different {what}"):
                sweep(done, **joins, **{name: value})
    assert sweep(done, resume=True, memory_budget=None).values("ie", "z").shape == (6, 2, 2, 2)


def test_a_finished_run_of_another_version_answers_and_says_so(done, monkeypatch):
    monkeypatch.setattr(of_runs, "PLAN_VERSION", 99)
    monkeypatch.setattr(of_runs, "device_kind", lambda device: "abacus")
    said = (
        r"was finished with a different version of the plan: \d+ there, 99 here; .*cpu.* there, abacus here"
    )
    with pytest.warns(UserWarning, match=said):
        sweep(done, resume=True)


def test_effects_that_were_saved_or_selected_are_those_of_their_sweep(tmp_path, whole):
    from deltapatch.analysis.select import select

    model = make_model()
    folder = tmp_path / "model"
    make_hf_model().save_pretrained(folder)
    from_file = deltapatch.load_model(folder, device="cpu")
    found = sweep(None, model=from_file)
    assert found.meta["fingerprint"] is None  # nothing is kept, and nothing hashed
    pickle.loads(pickle.dumps(found)).save(tmp_path / "elsewhere")
    select(found, pairs=[0, 1]).save(tmp_path / "some")
    found.save(tmp_path / "saved")
    sweep(tmp_path / "saved", model=model, resume=True)  # the same weights
    with pytest.raises(DeltapatchError, match=r"different pairs: sha256 \w+ there"):
        sweep(tmp_path / "some", resume=True)
    sweep(None).save(tmp_path / "memory")  # of weights that may be others by now
    for run in ("memory", "elsewhere"):
        with pytest.raises(DeltapatchError, match=r"different model \(fingerprint\): none there"):
            sweep(tmp_path / run, resume=True)


def test_a_sweep_that_keeps_nothing_hashes_nothing(monkeypatch):
    monkeypatch.setattr(deltapatch.Model, "fingerprint", None)
    assert sweep(None).pairs


def test_an_edited_model_is_another_one(cut, done):
    hf = make_hf_model()
    hf.gpt_neox.layers[1].attention.dense.weight.data[:, 8:] = 0  # the second of two heads
    model = deltapatch.from_transformers(hf)
    for run in (cut, done):
        with pytest.raises(
            DeltapatchError, match=r"different model \(fingerprint\): \w{32} there, \w{32} here"
        ):
            sweep(run, model=model, resume=True)


def test_long_values_are_told_from_where_they_differ():
    own, mine = list(range(500)), [*range(400), 7]
    said = of_runs._both("positions", own, mine)
    assert re.fullmatch(r"\.\.\..*, 398, 399, 400, 401, .*\.\.\. there, \.\.\..*, 398, 399, 7\] here", said)
    assert len(said) < 300


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_pipes_and_folders_in_the_place_of_files(done, cut, parts, tmp_path):
    for name in ("effects.safetensors", "pairs.jsonl"):
        (done / name).unlink()
        os.mkfifo(done / name)
        for act in (deltapatch.load_effects, merge, lambda run: sweep(run, resume=True)):
            with pytest.raises(DeltapatchError, match=r"is damaged .*no regular file"):
                act(done)
    inside = cut / "unfinished"
    (inside / "manifest.json").unlink()
    os.mkfifo(inside / "manifest.json")
    with pytest.raises(DeltapatchError, match=r"manifest.json is damaged \(it is no regular file\)"):
        sweep(cut, resume=True)
    run = Path(shutil.copytree(parts, tmp_path / "parts"))
    for name in ("pairs.jsonl", "1.safetensors"):
        (run / "unfinished" / name).unlink()
        os.mkfifo(run / "unfinished" / name)
    with pytest.raises(DeltapatchError, match=r"pairs.jsonl is damaged"):
        merge(run)
    with pytest.warns(UserWarning, match=r"1.safetensors is damaged"):
        sweep(run, resume=True)
    for name in ("run.lock", "plan.lock"):
        for make in (os.mkdir, os.mkfifo):
            other = tmp_path / f"{name} {make.__name__}"
            (other / "unfinished").mkdir(parents=True)
            (other / "unfinished" / "run.lock").touch()
            (other / "unfinished" / name).unlink(missing_ok=True)
            make(other / "unfinished" / name)
            with pytest.raises(DeltapatchError, match=f"{name} should be a lock, and is no regular file"):
                sweep(other, resume=True)


def test_readers_and_writers_of_an_unfinished_run_are_told(cut):
    with pytest.raises(DeltapatchError, match=r"is not finished: the same sweep with --resume"):
        deltapatch.load_effects(cut)
    with pytest.raises(DeltapatchError, match=r"is taken: it is a run that is not finished"):
        sweep(cut)
    with pytest.raises(DeltapatchError, match=r"of 6 passes, 2 missing \(passes 4 and 5\) and 0 damaged"):
        merge(cut)


def test_a_pass_without_interventions(tmp_path):
    pairs = make_pairs(3)
    pairs[1].labels["here"] = 2
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = {"pairs": pairs, "positions": ["here"], "memory_budget": budget(make_model(), 12, 6)}
    sweep(whole, **options)
    cut_off(run, 2, **options)
    sweep(run, resume=True, **options)
    assert same(run, whole)
    assert deltapatch.load_effects(run).accuracy() >= 0


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "mine" / "unfinished").mkdir(parents=True)
    (tmp_path / "mine" / "unfinished" / "0.safetensors").write_text("mine")
    for act in (lambda run: sweep(run, resume=True), lambda run: sweep(run, shard=(1, 2)), merge):
        with pytest.raises(DeltapatchError, match=r"is taken|is not a run folder"):
            act(tmp_path / "mine")
    assert (tmp_path / "mine" / "unfinished" / "0.safetensors").read_text() == "mine"
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "unfinished").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeltapatchError, match="is a link"):
        sweep(tmp_path / "run", resume=True)
    assert os.listdir(tmp_path / "elsewhere") == []


def test_what_the_machine_decided_is_taken_from_the_manifest(cut, whole):
    sweep(cut, resume=True, memory_budget=None)  # another would be taken now
    assert same(cut, whole)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"pairs": make_pairs(5)}, "pairs"),
        ({"sites": "mlp_out"}, "sites or layers"),
        ({"layers": [1]}, "sites or layers"),
        ({"positions": [1]}, r"positions: \[1, -1\] there, \[1\] here"),
        ({"direction": "noise"}, "direction: denoise there, noise here"),
        ({"source": "zero"}, "source: counterpart there, zero here"),
        ({"metrics": "ie"}, "metrics"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"precision": "fp32"}, "precision: bf16 there, fp32 here"),
        ({"memory_budget": 10**9}, "memory budget"),
        ({"noise_sample": 5}, "noise sample: 4 there, 5 here"),
    ],
)
def test_nothing_else_is_mixed_in(cut, changes, what, monkeypatch):
    done = passes_of(monkeypatch)
    with pytest.raises(DeltapatchError, match=f"cannot resume .* begun with a different {what}") as error:
        sweep(cut, resume=True, **changes)
    assert "\n" not in str(error.value)
    assert done == []
    assert len(list((cut / "unfinished").glob("*.safetensors"))) == 4


def test_another_model_or_version_is_not_mixed_in(cut, monkeypatch):
    monkeypatch.setattr(of_runs, "PLAN_VERSION", 99)
    with pytest.raises(DeltapatchError, match=r"different version of the plan: \d+ there, 99 here"):
        sweep(cut, resume=True)
    monkeypatch.undo()
    monkeypatch.setattr(deltapatch.Model, "fingerprint", lambda self: "00ff")
    with pytest.raises(DeltapatchError, match=r"different model \(fingerprint\): .* there, 00ff here"):
        sweep(cut, resume=True)


def test_an_interrupt_keeps_what_is_done(tmp_path, whole):
    said = cut_off(tmp_path / "run", 2, KeyboardInterrupt)
    assert said.startswith("Interrupted; 2 of 6 passes are kept in")
    assert "--resume" in said
    sweep(tmp_path / "run", resume=True)
    assert same(tmp_path / "run", whole)
    cut_off(tmp_path / "nothing", 0, KeyboardInterrupt)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", ["effects.safetensors", "pairs.jsonl", "run.json"])
def test_a_kill_while_the_folder_is_finished(cut, whole, name, monkeypatch):
    replace = os.replace

    def stop(source, target):
        if Path(target) == cut / name:
            raise Stop
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(Stop):
        sweep(cut, resume=True)
    monkeypatch.undo()
    sweep(cut, resume=True)
    assert same(cut, whole)


def test_a_kill_while_the_shards_are_removed(cut, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "clean", lambda path: None)
        sweep(cut, resume=True)
    assert (cut / "unfinished").exists()
    deltapatch.load_effects(cut)
    sweep(cut, resume=True)
    assert same(cut, whole)


@given(data=st.data())
@HYPOTHESIS
def test_damaged_shards_are_computed_again(begun, whole, data, tmp_path_factory):
    run = Path(shutil.copytree(begun, tmp_path_factory.mktemp("damaged") / "run"))
    shard = run / "unfinished" / f"{data.draw(st.integers(0, 3))}.safetensors"
    content = bytearray(shard.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    shard.write_bytes(content)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sweep(run, resume=True)
    assert all("is damaged: its pass is computed again" in str(w.message) for w in said)
    assert same(run, whole)


def test_shards_of_another_run_or_pass_do_not_count(cut, whole, tmp_path):
    cut_off(tmp_path / "other", 1, direction="noise")
    here, there = cut / "unfinished", tmp_path / "other" / "unfinished"
    shutil.copy(there / "0.safetensors", here / "0.safetensors")
    shutil.copy(here / "1.safetensors", here / "2.safetensors")
    with pytest.warns(UserWarning, match="is damaged"):
        sweep(cut, resume=True)
    assert same(cut, whole)


def damage(content, data):
    """Bytes changed, cut or doubled, or a value of the JSON replaced, with a right checksum."""
    kind = data.draw(st.sampled_from(["bytes", "cut", "value"]))
    if kind == "cut":
        return content[: data.draw(st.integers(0, len(content) - 1))]
    if kind == "bytes":
        at = data.draw(st.integers(0, len(content) - 1))
        return content[:at] + bytes([data.draw(st.integers(0, 255))]) + content[at + 1 :]
    body = json.loads(content)
    body.pop("sha256")
    inside = data.draw(st.sampled_from([body, body["settings"], body["settings"]["sites"][0], body["truth"]]))
    key = data.draw(st.sampled_from(sorted(inside)))
    numbers = st.integers(-(2**70), 2**70) | st.floats() | st.integers(-2, 9)
    leaf = st.none() | st.booleans() | numbers | st.sampled_from(["../../x", "z", "", "fp64", "\ud800"])
    inside[key] = data.draw(leaf | st.lists(leaf, max_size=4) | st.dictionaries(st.text(max_size=3), leaf))
    return json.dumps(body | {"sha256": manifests._digest(body)}).encode()


@given(data=st.data())
@HYPOTHESIS
def test_a_broken_manifest_is_one_sentence_or_harmless(parts, whole, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    run = Path(shutil.copytree(parts, folder / "run"))
    path = run / "unfinished" / "manifest.json"
    path.write_bytes(damage(path.read_bytes(), data))
    for act in (merge, lambda run: sweep(run, resume=True)):
        if not (run / "run.json").exists():
            with warnings.catch_warnings(), suppress(DeltapatchError):
                warnings.simplefilter("ignore")
                act(run)
    if (run / "run.json").exists():
        assert (run / "effects.safetensors").read_bytes() == (whole / "effects.safetensors").read_bytes()
    assert os.listdir(folder) == ["run"]


def kills(run, whole, tries, seed):
    """Kill at random moments until it is done, then compare."""
    drawn = random.Random(seed)
    for _ in range(tries):
        survivor = process(run, pause=0.02)
        time.sleep(drawn.uniform(0, 0.4))
        survivor.send_signal(signal.SIGKILL)
        survivor.communicate(timeout=60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a kill damages nothing
        sweep(run, resume=True)
    assert same(run, whole)


def test_kill_9(tmp_path, whole):
    kills(tmp_path / "run", whole, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_kill_9_again_and_again(tmp_path, whole, seed):
    kills(tmp_path / "run", whole, 5, seed)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs to mount a small disk")
def test_a_full_disk_can_be_freed(tmp_path, whole):
    small = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(tmp_path)]
    if subprocess.run(small, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        run = tmp_path / "run"
        with pytest.raises(DeltapatchError, match=r"no space left on the disk .*[1-6] of 6 passes are kept"):
            sweep(run)
        with pytest.raises(DeltapatchError, match="no space left on the disk"):
            sweep(run, resume=True)
        subprocess.run(["mount", "-o", "remount,size=1m", str(tmp_path)], check=True)
        sweep(run, resume=True)
        assert same(run, whole)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_the_number_of_threads_is_taken_from_the_run(cut, whole, monkeypatch):
    import torch

    seen = []
    carry = deltapatch.engine.passes.carry
    monkeypatch.setattr(
        deltapatch.engine.passes, "carry", lambda *a: seen.append(torch.get_num_threads()) or carry(*a)
    )
    model = make_model()
    with threads(2):
        deltapatch.sweep(model, make_pairs(), out=cut, resume=True, progress=False, **OPTIONS)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    assert same(cut, whole)
