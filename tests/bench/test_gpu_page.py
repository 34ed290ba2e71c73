"""docs/gpu.md and the README say what the result files of a GPU have."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from deltapatch.bench.gpu_page import main, tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
FILES = ("gpu_h100.json", "gpu_h100_precision.json")


@pytest.mark.parametrize("file", FILES)
def test_the_page_shows_the_tables(file):
    page = (ROOT / "docs" / "gpu.md").read_text()
    found = tables(json.loads((RESULTS / file).read_text()))
    assert found
    for name, table in found.items():
        (shown,) = re.findall(rf"<!-- {name} -->\n(.*)\n<!-- /{name} -->", page, re.DOTALL)
        assert shown == table
    run = CliRunner().invoke(main, [str(RESULTS / file)])
    assert all(table in run.output for table in found.values())


def test_the_pages_name_the_numbers():
    steps = json.loads((RESULTS / FILES[0]).read_text())["parts"]["gptj"]["steps"]
    neurons, hooks = steps["neurons fp16"], steps["hooks"]
    said = f"all {neurons['rows']:,} hidden neurons of GPT-J-6B's shape take {neurons['seconds']:.1f} s"
    for page in ("README.md", "docs/benchmarks.md"):
        assert said in " ".join((ROOT / page).read_text().split())
    readme = (ROOT / "README.md").read_text()
    for kind in ("whole model", "from the patched layer and position on"):
        assert f"{hooks[kind]['deltapatch_over_it']:.1f} times as fast" in readme
    page = (ROOT / "docs" / "gpu.md").read_text()
    before = json.loads((RESULTS / "gpu_h100_first.json").read_text())["parts"]["gptj"]["steps"]
    activation = before["where the time goes"]["kernels"]["_activation_kernel"]["seconds"]
    assert f"activation took {activation:.3f} s" in " ".join(page.split())
    tests = json.loads((RESULTS / "gpu_h100_tests.json").read_text())["tests"]["sweeps"]
    assert f"{tests['passed']} of them passed" in " ".join(page.split())
