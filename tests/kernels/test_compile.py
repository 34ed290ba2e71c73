"""What the kernels compile to for GPUs that are not here, at the shapes of real models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from deltapatch.bench import compile_kernels
from deltapatch.bench.compile_kernels import (
    COMPILED,
    CONFIGS,
    PRECISIONS_OF,
    SHARED_LIMIT,
    TOKENS,
    Compiled,
    read,
    write,
)
from deltapatch.kernels.lang import HAS_TRITON

RESULT = Path(compile_kernels.__file__).parent / "results" / "compile_sm90.json"
KERNELS = (
    "_add_norm_kernel",
    "_activation_kernel",
    "_attention_kernel",
    "_gather_kernel",
    "_narrow_kernel",
    "_dots_kernel",
    "_take_in_kernel",
)


def compiled(*arguments):
    """The table, checked. A process of its own, where no test has touched memory or Triton."""
    run = subprocess.run(
        [sys.executable, "-m", "deltapatch.bench.compile_kernels", *arguments], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def missing(table, models, archs):
    """Kernels that the table lacks."""
    seen = {(line.split()[0], line.split()[1], line.split()[4]) for line in table.splitlines()}
    return sorted({(m, a, k) for m in models for a in archs for k in KERNELS} - seen)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")
def test_kernels_fit_a_gpu():
    table = compiled("--model", "gptj-6b", "--arch", "90", "--precision", "fp16", "--tokens", "16")
    assert missing(table, ["gptj-6b"], ["90"]) == []


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")
def test_kernels_fit_every_gpu():
    """Shortest and longest prompts in one precision; the committed result has the others."""
    table = compiled("--precision", "fp16", "--tokens", "16", "--tokens", "128")
    assert missing(table, CONFIGS, [str(arch) for arch in SHARED_LIMIT]) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spilled": 4}, "spills 4 bytes"),
        ({"shared": 227 * 1024 + 1}, "of 232448"),
        ({"serialised": True}, "waits after each wgmma"),
        ({"tensor": 0}, "without tensor cores"),
    ],
    ids=["spill", "shared", "wgmma", "tensor"],
)
def test_what_must_not_be(change, problem):
    good = Compiled("m", 90, "fp16", 16, "_attention_kernel", "", 128, 0, 1024, 100, 8, False)
    assert good.problems() == []
    assert [problem in said for said in good._replace(**change).problems()] == [True]


def test_kernels_without_products_need_no_tensor_cores():
    kernel = Compiled("m", 80, "fp16", 16, "_add_norm_kernel", "", 128, 0, 1024, 100, 0, False)
    assert kernel.problems() == []


def test_the_committed_result_covers_everything_and_has_no_problem():
    """Of the Triton that PyTorch 2.11 brings and of a newer one."""
    reports = read(RESULT)
    assert reports[0][0]["triton"] == "3.6.0"
    assert len(reports) == 2
    for report, kernels in reports:
        assert report["versions"]["torch"]
        assert report["date"]
        assert [problem for kernel in kernels for problem in kernel.problems()] == []
        seen = {(c.model, c.kernel) for c in kernels}
        assert {(m, k) for m in CONFIGS for k in KERNELS} <= seen
        # What compiles to the same is there once, for the first of the precisions that have it.
        attention = [c for c in kernels if c.kernel == "_attention_kernel"]
        assert {(c.model, c.tokens) for c in attention} == {(m, n) for m in CONFIGS for n in TOKENS}
        assert {c.precision for c in kernels} >= {"fp32", "bf16", "fp16", "fp8"}
        assert {c.arch for c in kernels} == {90}
    assert set(PRECISIONS_OF[90]) == {"fp32", "tf32", "bf16", "fp16", "fp8"}


def test_the_committed_result_of_later_families_has_no_problem():
    """Each model for both GPUs, with the norms of heads and the capped logits of those that have them."""
    by = {
        report["triton"]: [kernel for kernel in kernels if kernel.problems()]
        for report, kernels in read(RESULT.with_name("compile_families.json"))
    }
    (older,) = by.pop("3.6.0")
    assert (older.model, older.arch, older.spilled) == ("qwen2.5-0.5b", 80, 8), "docs/gpu.md says so"
    assert list(by.values()) == [[]]
    kernels = read(RESULT.with_name("compile_families.json"))[-1][1]
    later = set(COMPILED) - set(CONFIGS)
    of_every_call = set(KERNELS) - {"_narrow_kernel"}  # what compiles to the same is there once
    seen = {(c.model, c.arch, c.kernel) for c in kernels}
    assert {(m, arch, k) for m in later for arch in SHARED_LIMIT for k in of_every_call} <= seen
    attention = {(c.model, c.arch, c.tokens) for c in kernels if c.kernel == "_attention_kernel"}
    assert attention == {(m, arch, n) for m in later for arch in SHARED_LIMIT for n in (16, 128)}
    of_heads = {c.model for c in kernels if "heads=True" in c.variant}
    assert of_heads == {"qwen3-8b", "gemma-3-4b"}
    capped = {c.model for c in kernels if c.kernel == "_take_in_kernel" and "cap=True" in c.variant}
    assert capped == {"gemma-2-2b", "gemma-2-9b"}


def test_a_kernel_whose_registers_are_capped_may_spill_two():
    few = Compiled("m", 90, "fp16", 16, "_activation_kernel", "", 64, 8, 0, 100, 0, False)
    assert few.problems() == []
    assert few._replace(spilled=12).problems() == ["spills 12 bytes of registers"]


def test_what_spills_is_on_the_page():
    page = " ".join((Path(compile_kernels.__file__).parents[1] / "docs" / "gpu.md").read_text().split())
    few = {
        (report["triton"], c.model, c.precision, c.spilled)
        for name in ("compile_sm90.json", "compile_families.json")
        for report, kernels in read(RESULT.with_name(name))
        for c in kernels
        if c.spilled
    }
    assert few == {
        ("3.9.0", "gptj-6b", "fp16", 8),
        ("3.9.0", "gptj-6b", "fp8", 8),
        ("3.6.0", "qwen2.5-0.5b", "fp16", 8),
    }
    for said in (
        "By Triton 3.9.0 that of GPT-J spills 8 bytes in fp16 and fp8",
        "the attention of Qwen2.5-0.5B on A100 for 16 tokens with swaps, by 8 bytes",
    ):
        assert said in page


def test_another_triton_compiles_in_an_environment_of_its_own(tmp_path, monkeypatch):
    """The command there gets the same options; what it finds is told, kept, and decides the exit code."""
    spilled = Compiled("gptj-6b", 90, "fp16", 16, "_add_norm_kernel", "norms=1", 64, 8, 0, 100, 0, False)
    asked = []

    def fake(command):
        asked.append(command)
        write(Path(command[command.index("--out") + 1]), [{"triton": "3.6.0", "kernels": [spilled]}])
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(compile_kernels, "python_with", lambda package, cache, say: f"python with {package}")
    monkeypatch.setattr(compile_kernels.subprocess, "run", fake)
    out = tmp_path / "out.json"
    options = ["--model", "gptj-6b", "--arch", "90", "--tokens", "16", "--triton", "3.6.0", "--out", str(out)]
    run = CliRunner().invoke(compile_kernels.main, options)
    assert run.exit_code == 1
    assert "Triton 3.6.0: _add_norm_kernel norms=1 in fp16 at 16 tokens for gptj-6b on sm_90" in run.stderr
    assert [(report["triton"], kernels) for report, kernels in read(out)] == [("3.6.0", [spilled])]
    assert asked[0][:3] == ["python with triton==3.6.0", "-m", "deltapatch.bench.compile_kernels"]
    assert asked[0][3:9] == options[:6]


def test_another_triton_that_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_kernels, "python_with", lambda package, cache, say: "false")
    run = CliRunner().invoke(compile_kernels.main, ["--triton", "0.1"])
    assert "the kernels cannot be compiled by Triton 0.1: exit code 1" in run.output


def test_a_report_has_a_kernel_a_line(tmp_path):
    kernel = Compiled("m", 90, "fp16", 16, "_add_norm_kernel", "norms=1", 64, 0, 0, 100, 0, False)
    write(tmp_path / "file", [{"triton": "1", "kernels": [kernel, kernel]}])
    assert len((tmp_path / "file").read_text().splitlines()) == 4
    (report,) = json.loads((tmp_path / "file").read_text())
    assert dict(zip(report["columns"], report["kernels"][0], strict=True)) == kernel._asdict()
