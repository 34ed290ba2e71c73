"""What the README shows must run: its Python as one script, its shell lines one after the other."""

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from deltapatch.bench import markdown
from deltapatch.bench.results import cases, read
from deltapatch.cli.main import cli
from deltapatch.results.metrics import NOTATION, definitions

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
@pytest.mark.parametrize("page", ["howto.md", "coming.md"])
def test_what_the_pages_of_jobs_show_runs(page, tmp_path):
    """Their Python as one script, their shell lines as another."""
    code, lines = ("\n".join(blocks(kind, ROOT / "docs" / page)) for kind in ("python", "bash"))
    assert code
    run([sys.executable, "-c", code], tmp_path)
    run(["bash", "-ec", lines], tmp_path)


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


def named() -> list[tuple[str, str]]:
    """Every `deltapatch ...` that the code's strings or a page name: where, and the line."""
    found = []
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("models/builtin/*/*.md")]:
        found += [(path.name, text) for text in _lines(path.read_text(encoding="utf-8"))]
    for part in (
        "analysis",
        "bench",
        "cli",
        "engine",
        "explore",
        "kernels",
        "models",
        "scripts",
        "study",
        "tasks",
    ):
        for path in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found += [(path.name, text) for text in _lines(node.value)]
                elif isinstance(node, ast.JoinedStr):  # what is filled in is one word
                    parts = [v.value if isinstance(v, ast.Constant) else "X" for v in node.values]
                    found += [(path.name, text) for text in _lines("".join(map(str, parts)))]
    return sorted(set(found))


def _lines(text: str) -> list[str]:
    text = text.replace("\\\n", " ")
    marked = re.findall(r"`+(deltapatch[^`]*)`", re.sub(r"\s*\n\s*", " ", text))
    own = [line.strip() for line in text.split("\n") if re.match(r" *deltapatch [a-z]+( |$)", line)]
    own = [line for line in own if line.split()[1] in cli.commands and "`" not in line]
    return [line.strip() for line in marked + own]


def test_every_command_that_is_named_can_be_parsed():
    """A name alone only has to exist; with anything after it, it is to be a whole command."""
    everything = named()
    assert len(everything) > 80
    for where, line in everything:
        words = shlex.split(re.split(r" (?:>|\||&&|;) ", line)[0], comments=True)[1:]
        group: click.Command = cli
        while isinstance(group, click.Group) and words and not words[0].startswith("-"):
            assert words[0] in group.commands, f"{where}: {line}"
            group = group.commands[words.pop(0)]
        if words and words != ["--help"]:
            try:
                group.make_context("deltapatch", words)
            except click.exceptions.Exit:  # it only says something: --list
                pass
            except click.UsageError as error:
                raise AssertionError(f"{where} names `{line}`: {error.format_message()}") from error


@pytest.mark.parametrize(
    ("file", "page"),
    [
        ("compare_cpu.json", "docs/benchmarks.md"),
        ("compare_slow_cpu.json", "docs/benchmarks.md"),
        ("compare_threads_cpu.json", "docs/benchmarks.md"),
        ("compare_real_cpu.json", "docs/real.md"),
        ("edits_cpu.json", "docs/features.md"),
        ("growth_cpu.json", "docs/benchmarks.md"),
        ("growth_length_cpu.json", "docs/benchmarks.md"),
        ("precision_cpu.json", "docs/benchmarks.md"),
        ("edges_gpt2_cpu.json", "docs/benchmarks.md"),
        ("edge_peers_cpu.json", "docs/edges.md"),
        ("screen_attribution_cpu.json", "docs/screening.md"),
        ("stream_gptj_cpu.json", "docs/large.md"),
        ("stream_screen_cpu.json", "docs/large.md"),
        ("stream_pairs_cpu.json", "docs/large.md"),
        ("stream_length_cpu.json", "docs/large.md"),
    ],
)
def test_tables_are_those_of_the_result_files(file, page):
    result = read(ROOT / "bench" / "results" / file)
    table = markdown.table(result)
    assert table in (ROOT / page).read_text(encoding="utf-8"), f"python -m deltapatch.bench.markdown {file}"


def test_the_readme_says_the_worst_ratios_of_its_result():
    found = cases(read(ROOT / "bench" / "results" / "compare_cpu.json"))
    text = " ".join(README.read_text(encoding="utf-8").split())

    def worst(sweep, side):
        ratios = [
            min(own["columns"][f"deltapatch-{side}"]["times_as_fast"])
            for case in found
            for own in case["sweeps"]
            if own["name"] == sweep
        ]
        assert len(ratios) == 2  # of both shapes
        return ratios

    small = {
        side: [x for name in ("mlp_out", "attn_out", "z") for x in worst(name, side)]
        for side in ("fp32", "bf16")
    }
    for side, said in (("fp32", "in float32"), ("bf16", "in bf16")):
        assert f"{min(small[side]):.1f} to {max(small[side]):.1f} times" in text, said
    for name, side in (("neurons-layer", "fp32"), ("neurons-layer", "bf16"), ("joint", "fp32")):
        assert "{:.2f} and {:.2f} times".format(*worst(name, side)) in text


def test_the_table_of_screens_is_that_of_its_result():
    code = runpy.run_path(str(ROOT / "scripts" / "screening_page.py"))
    result = json.loads((ROOT / "bench" / "results" / "screening_builtin.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "screening.md").read_text(encoding="utf-8")
    assert code["table"](result["models"]) in page
    for model in result["models"].values():
        bound = model["mlp_post"]["screens"]["attribution"]["bound"]
        assert bound["holds"] == 1
        assert f"{bound['at_most']:.0f}" in page
        assert f"{bound['missed']:.0f} were" in page


def test_the_table_of_screens_of_edges_is_that_of_its_result():
    code = runpy.run_path(str(ROOT / "scripts" / "screened_edges_page.py"))
    file = ROOT / "bench" / "results" / "screened_edges_builtin.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert code["page_table"](rows) in (ROOT / "docs" / "edges.md").read_text(encoding="utf-8")


def test_the_docs_define_every_metric_as_the_code_does():
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    header, *rows = definitions()
    rows = [header, ["---"] * len(header), *([f"`{row[0]}`", *row[1:]] for row in rows)]
    table = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
    assert table in text
    assert NOTATION in " ".join(text.split())


@pytest.mark.parametrize("page", [README, *sorted(ROOT.glob("docs/*.md"))], ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_readme_says_what_the_result_of_its_picture_says():
    result = json.loads((ROOT / "bench" / "results" / "real_capitals_cpu.json").read_text(encoding="utf-8"))
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"{result['interventions']:,} interventions, none estimated, in {result['seconds']:.0f} s" in text
    assert f"recovers {result['recovered']['attn_out']['mean'][23][-1]:.2f} of the answer" in text
    assert f"mean of {len(result['pairs'])} pairs" in text


def test_the_page_of_a_real_model_says_what_its_result_says():
    result = json.loads((ROOT / "bench" / "results" / "real_parts_cpu.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "real.md").read_text(encoding="utf-8")
    capitals, drinks = (result[f"{name}, heads"]["largest"]["z"] for name in ("capitals", "drinks"))
    rows = [(capitals, 6, ""), (drinks, 7, "| {position} ")]
    for heads, shown, at in rows:
        for head in heads[:shown]:
            row = "| layer {layer}, head {index} " + at + "| {recovered:.3f} | {stderr:.3f} |"
            assert row.format_map(head) in text
    curve = result["neurons together"]
    together = dict(zip(curve["size"], curve["recovered"], strict=True))
    assert (
        f"strongest 64 recover {together[64]:.2f}, the strongest 4,096 recover {together[4096]:.2f}" in text
    )
    assert f"recover {result['all MLPs at the last position']:.2f}." in text
    for name in ("capitals", "drinks"):
        assert f"| {result[f'{name}, heads']['accuracy']:.0%} |" in text
    assert f"head 4, recovers {capitals[0]['recovered']:.2f}" in README.read_text(encoding="utf-8")


def test_the_readme_names_the_two_commands():
    text = README.read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
