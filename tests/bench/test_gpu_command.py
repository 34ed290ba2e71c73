"""The command for a GPU, without one: it ends in its time, and nothing that was found is lost."""

import io
import json
import os
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from deltapatch.bench import gpu, gpu_parts
from deltapatch.bench.gpu import Part, failures, main, measure, table

# A process that says what it finds, as a part does.
SAYS = """
import json, sys, time
print(json.dumps({"machine": {"device": "made up"}}), flush=True)
for i in range(%d):
    print(json.dumps({"step": f"step {i}", "found": {"value": i}}), flush=True)
    time.sleep(%f)
%s
"""


def part(steps=2, pause=0.0, end="", limit=60.0):
    return Part([sys.executable, "-c", SAYS % (steps, pause, end)], limit)


def measured(parts, tmp_path, seconds=60.0):
    out = tmp_path / "gpu.json"
    report = measure(parts, out, seconds, lambda text: None, os.environ)
    assert json.loads(out.read_text()) == report
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.json"]
    return report


def test_parts_follow_each_other_and_what_they_find_is_kept(tmp_path):
    report = measured({"one": part(), "two": part(3)}, tmp_path)
    assert report["machine"] == {"device": "made up"}
    assert [p["ended"] for p in report["parts"].values()] == ["done", "done"]
    assert list(report["parts"]["two"]["steps"]) == ["step 0", "step 1", "step 2"]
    assert failures(report) == []


def test_a_part_that_dies_hangs_or_is_slow_costs_no_other(tmp_path):
    parts = {
        "dies": part(end="import os; os.kill(os.getpid(), 11)"),
        "raises": part(end="raise ValueError('no such kernel')"),
        "hangs": part(end="time.sleep(3600)", limit=2.0),
        "goes on": part(),
    }
    report = measured(parts, tmp_path)
    ended = {name: p["ended"] for name, p in report["parts"].items()}
    assert ended == {
        "dies": "failed with exit code -11",
        "raises": "failed with exit code 1",
        "hangs": "stopped after 2 s",
        "goes on": "done",
    }
    assert all(len(p["steps"]) == 2 for p in report["parts"].values())
    assert "no such kernel" in report["parts"]["raises"]["said"]
    assert failures(report) == [f"{name}: {how}" for name, how in ended.items() if how != "done"]


def test_nothing_runs_beyond_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_LEAST", 0.1)
    began = time.monotonic()
    report = measured({"long": part(1000, 0.05, limit=900), "late": part()}, tmp_path, seconds=2.0)
    assert time.monotonic() - began < 60  # not the 50 s and more that the first would take
    assert report["parts"]["long"]["ended"].startswith("stopped after 2 s")
    assert report["parts"]["long"]["steps"]
    assert report["parts"]["late"]["ended"] == "not begun: no time was left"


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_what_was_measured_before_a_kill_is_there(tmp_path, steps):
    """Killed after so many numbers: the file holds them, whole."""
    out = tmp_path / "gpu.json"
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from deltapatch.bench.gpu import Part, measure\n"
        f"part = Part([sys.executable, '-c', {SAYS % (1000, 0.02, '')!r}], 600)\n"
        f"measure({{'one': part}}, Path({str(out)!r}), 600, lambda text: print(text, flush=True), os.environ)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    said = 0
    for line in process.stdout:
        said += "step" in line
        if said == steps:
            process.kill()
            break
    process.wait()
    process.stdout.close()
    report = json.loads(out.read_text())
    assert len(report["parts"]["one"]["steps"]) >= steps - 1  # the last one may be on its way


def test_a_step_that_fails_is_an_entry_and_the_next_ones_go_on():
    class CompilationError(Exception):  # Triton's is neither a RuntimeError nor one of ours
        pass

    def broken():
        raise CompilationError("no such instruction")

    lines = io.StringIO()
    gpu_parts.carry_out(iter([("fp8", broken), ("fp16", lambda: {"seconds": 1})]), lines)
    first, second = (json.loads(line) for line in lines.getvalue().splitlines())
    assert first["found"]["failed"] == "CompilationError: no such instruction"
    assert "broken" in first["found"]["traceback"]
    assert second == {"step": "fp16", "found": {"seconds": 1}}


def test_what_was_compiled_while_it_was_timed_is_told():
    found = {"compiled_meanwhile": ["_norm_kernel"]}
    report = {"parts": {"gptj": {"ended": "done", "steps": {"neurons fp16": found}}}}
    assert failures(report) == ["gptj, neurons fp16: compiled _norm_kernel while it was timed"]


def test_the_tests_show_warnings_and_use_all_cores():
    sweeps, _ = gpu.test_commands(7)["sweeps"]
    assert sweeps[sweeps.index("-m", 3) + 1] == "gpu"
    for command, _ in gpu.test_commands(7).values():
        assert command[command.index("-o") + 1] == "filterwarnings=default"
        assert command[command.index("--numprocesses") + 1] == "7"


def test_the_tests_of_kernels_run_on_the_gpu():
    command, env = gpu.test_commands(1)["kernels"]
    assert env == {"TRITON_INTERPRET": "0", "DELTAPATCH_TEST_DEVICE": "cuda"}
    home = gpu.Path(gpu.__file__).parents[1]
    assert all((home / name).exists() for name in command if name.endswith(".py"))


@pytest.mark.slow
def test_the_interpreters_tests_are_none_of_the_gpus():
    """Triton 3.6's interpreter breaks with newer versions of numpy."""
    command, _ = gpu.test_commands(1)["sweeps"]
    asked = [*command, "--numprocesses", "0", "--collect-only", "tests/kernels", "tests/engine/test_gpu.py"]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=gpu.Path(gpu.__file__).parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_a_gpu_finds_what_float64_finds" in done.stdout
    assert "interpreter" not in done.stdout


FILE = """
import pytest
def test_right(): pass
def test_wrong(): assert 0
def test_left(): pytest.skip()
"""


def test_what_the_tests_gave_is_counted_and_kept(tmp_path):
    file, out = tmp_path / "test_some.py", tmp_path / "tests.json"
    file.write_text(FILE)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        str(tmp_path / "none.ini"),
    ]
    (tmp_path / "none.ini").write_text("[pytest]")
    few = {"some": ([*command, str(file)], {}), "right": ([*command, str(file), "-k", "right"], {})}
    assert not gpu.run_tests(few, out)
    report = json.loads(out.read_text())
    some = report["tests"]["some"]
    assert (some["passed"], some["skipped"], some["failed"]) == (1, 1, ["test_some::test_wrong"])
    assert report["tests"]["right"]["failed"] == []
    assert report["machine"]["versions"]["torch"]
    assert gpu.run_tests({"right": few["right"]}, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "memes"], "unknown part 'memes': choose from smoke, gptj"),
        (["--out", "nowhere/gpu.json"], "the folder of --out nowhere/gpu.json is not there"),
    ],
)
def test_wrong_options(options, message):
    done = CliRunner().invoke(main, ["--tiny", *options])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_the_page_says_what_the_parts_are():
    page = (gpu.Path(gpu.__file__).parents[1] / "docs" / "gpu.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert {row[0].strip("| `"): row[1] for row in rows} == {k: f"{v} s" for k, v in gpu.LIMITS.items()}


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "deltapatch.bench.gpu", "--tiny", "--seconds", "1500", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    report = json.loads(out.read_text())
    assert list(report["parts"]) == list(gpu.LIMITS)
    assert report["machine"]["device"] == "CPU"
    assert report["machine"]["versions"]["triton"]
    steps = {name: p["steps"] for name, p in report["parts"].items()}
    assert steps["smoke"]["small sweep fp16"]["error"]["mlp_out"] < 1e-2
    sweep = steps["gptj"]["neurons fp16"]
    assert sweep["rows"] == 4 * 4
    assert sweep["compiled_meanwhile"] == []  # nothing is compiled in the interpreter
    assert sweep["noise_floor"]["recomputed"] == sweep["rows"]
    for part in ("gptj", "llama", "pythia"):
        kinds = ["whole model", "from the patched layer on", "from the patched layer and position on"]
        assert list(steps[part]["hooks"]) == kinds
        assert all(hooks["rows_s"] > 0 for hooks in steps[part]["hooks"].values())
    kernels = {case for name, found in steps["kernels"].items() if " " in name for case in found}
    assert {"norm", "add, swaps", "activation, swaps", "attention, swaps", "columns", "read-out"} <= kernels
    errors = steps["precision"]["gptj"]
    assert errors["deltapatch, fp16"]["error"] < 1e-2 < errors["hooks, bfloat16"]["error"]
    *lines, last = run.stdout.splitlines()
    assert last == f"everything is in {out}"
    assert lines == table(report)
    assert any("hooks, from the patched layer on" in line for line in lines)
