"""What the README shows must run: its Python as one script, its shell lines one after the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deltapatch.bench import markdown
from deltapatch.bench.results import read
from deltapatch.engine.metrics import NOTATION, definitions

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def run(command: list[str], folder: Path, **environment: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PATH": path, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path):
    (code,) = blocks("python")
    said = run([sys.executable, "-W", "error", "-c", code], tmp_path)
    assert "(2, 4, 2, 4)" in said  # heads: [pair, layer, position, head]


@pytest.mark.slow
def test_the_shell_lines_of_the_readme_run(tmp_path):
    (lines,) = blocks("bash")
    for line in lines.splitlines():
        run(["bash", "-c", line], tmp_path)
    assert (tmp_path / "run" / "plots").is_dir()


@pytest.mark.slow
def test_the_slurm_script_runs(tmp_path):
    (script,) = blocks("bash", ROOT / "docs" / "clusters.md")
    (tasks,) = re.findall(r"--array=1-(\d+)", script)
    model = "builtin:gpt-neox-arithmetic"
    run(
        [
            "deltapatch",
            "pairs",
            "--model",
            model,
            "--shots",
            "0",
            "--per-template",
            "1",
            "--out",
            "pairs.jsonl",
        ],
        tmp_path,
    )
    for i in range(int(tasks), 0, -1):
        run(["bash", "-c", script], tmp_path, MODEL=model, SLURM_ARRAY_TASK_ID=str(i))
    assert run(["deltapatch", "merge", "RUN"], tmp_path) == "RUN\n"
    assert (tmp_path / "RUN" / "run.json").is_file()


@pytest.mark.parametrize(
    ("file", "page"),
    [
        ("compare_cpu.json", "README.md"),
        ("compare_cpu_bf16.json", "docs/benchmarks.md"),
        ("growth_cpu.json", "docs/benchmarks.md"),
        ("growth_length_cpu.json", "docs/benchmarks.md"),
        ("precision_cpu.json", "docs/benchmarks.md"),
        ("stream_gptj_cpu.json", "docs/large.md"),
        ("stream_pairs_cpu.json", "docs/large.md"),
        ("stream_length_cpu.json", "docs/large.md"),
    ],
)
def test_tables_are_those_of_the_result_files(file, page):
    result = read(ROOT / "bench" / "results" / file)
    table = markdown.table(result)
    assert table in (ROOT / page).read_text(encoding="utf-8"), f"python -m deltapatch.bench.markdown {file}"


def test_the_readme_defines_every_metric_as_the_code_does():
    text = README.read_text(encoding="utf-8")
    header, *rows = definitions()
    rows = [header, ["---"] * len(header), *([f"`{row[0]}`", *row[1:]] for row in rows)]
    table = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
    assert table in text
    assert NOTATION in " ".join(text.split())


def test_the_readme_names_the_two_commands():
    text = README.read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
