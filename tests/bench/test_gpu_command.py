"""The command for a GPU, on toy shapes and without one: that every part of it runs."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "deltapatch.bench.gpu", "--device", "cpu", "--tiny", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report == json.loads(out.read_text())
    assert list(report["limits"]["products_tflop_s"]) == ["fp32", "tf32", "bf16", "fp16", "fp8"]
    kernels = {name.split(maxsplit=2)[2] for name in report["kernels"] if " fp16 " in name}
    assert {"norm", "add, swaps", "activation, swaps", "attention, swaps", "columns", "read-out"} <= kernels
    assert len(report["sweeps"]) == 7 + 1  # three models, two precisions, the pairs at once; the time it took
    assert all(found["rows_s"] > 0 for found in report["hooks"].values() if isinstance(found, dict))
    methods = report["precision"]["builtin:gpt-neox-arithmetic"]
    assert methods["deltapatch, fp16"]["error"] < 1e-2 < methods["hooks, bfloat16"]["error"]


def test_what_fails_is_told_and_the_rest_goes_on(monkeypatch, tmp_path):
    from click.testing import CliRunner

    from deltapatch.bench import gpu

    def broken(self):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu.Bench, "hooks", broken)
    monkeypatch.setattr(gpu.Bench, "precision", lambda self: {"fine": 1})
    out = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--tiny", "--only", "hooks,precision", "--out", str(out)]
    done = CliRunner().invoke(gpu.main, options)
    assert done.exit_code == 1
    report = json.loads(out.read_text())
    assert "no such kernel" in report["hooks"]["failed"]
    assert report["precision"]["fine"] == 1


def test_a_part_that_is_not_there():
    from click.testing import CliRunner

    from deltapatch.bench import gpu

    done = CliRunner().invoke(gpu.main, ["--device", "cpu", "--only", "memes"])
    assert done.exit_code == 2
    assert "unknown part 'memes'" in done.output
