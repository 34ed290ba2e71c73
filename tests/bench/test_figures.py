"""Result files and the figures and tables that are made of them."""

import json

import numpy as np
import pytest

import deltapatch as dp
from deltapatch.bench.precision import precision
from deltapatch.bench.report import precision as table
from deltapatch.bench.results import read, stamp, write


def column(rate):
    return {"status": "measured", "rate": rate, "spread": [rate / 2, rate * 2], "seconds": [1 / rate]}


SIDES = {"hooks": {}, "deltapatch-fp32": {}, "pyvene": {}}
COLUMNS = {
    "hooks": column(10.0),
    "deltapatch-fp32": column(200.0),
    "pyvene": {"status": "missing", "reason": "not installed"},
}
COMPARE = {"sides": SIDES, "sweeps": [{"name": "z", "columns": COLUMNS}] * 2}
GROWTH = {
    "sides": SIDES,
    "axes": {"rows": [{"value": v, "interventions": v, "columns": COLUMNS} for v in (4, 8)]},
}


@pytest.fixture(scope="module")
def measured(work_of):
    return precision(work_of(), layer=1)


def test_the_precision_experiment(measured):
    methods = measured["methods"]
    assert methods["deltapatch, fp32"]["error"] < 1e-5
    assert methods["deltapatch, fp32"]["rank_correlation"] > 0.9999
    assert methods["deltapatch, bf16"]["error"] < methods["hooks, bfloat16"]["error"]
    assert methods["hooks, float32"]["top_worst"] == 1
    assert len(measured["exact"]) == len(methods["hooks, float32"]["effects"])
    assert "deltapatch, bf16" in table(measured)


def test_a_layer_that_is_not_there(work_of):
    with pytest.raises(dp.DeltapatchError, match="layer 3 does not exist"):
        precision(work_of(), layer=3)


def test_figures_are_drawn_from_files(tmp_path, command, measured):
    for kind, found in (("compare", COMPARE), ("growth", GROWTH), ("precision", measured)):
        write(tmp_path / f"{kind}.json", stamp(kind, found))
    for kind in ("edges", "edge-peers", "stream"):  # of which there are tables, and no figures
        write(tmp_path / f"{kind}.json", stamp(kind, {}))
    (tmp_path / "other.json").write_text("{}")
    done = command("bench", "figures", tmp_path, "--out", tmp_path / "figures", "--json")
    assert done.code == 0, done.err
    paths = json.loads(done.out)["figures"]
    assert {path.rsplit("/", 1)[1] for path in paths} == {
        f"bench_{kind}.{end}" for kind in ("compare", "growth", "precision") for end in ("png", "pdf")
    }
    before = (tmp_path / "figures" / "bench_growth.png").read_bytes()
    command("bench", "figures", tmp_path / "growth.json", "--out", tmp_path / "figures")
    assert (tmp_path / "figures" / "bench_growth.png").read_bytes() == before


def test_a_result_survives_its_file(tmp_path, measured):
    write(tmp_path / "p.json", stamp("precision", measured))
    again = read(tmp_path / "p.json")
    np.testing.assert_array_equal(again["exact"], measured["exact"])


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"format": "deltapatch bench", "kind": "x"}'])
def test_other_files_are_refused(tmp_path, command, text):
    (tmp_path / "r.json").write_text(text)
    done = command("bench", "figures", tmp_path / "r.json", "--out", tmp_path / "figures")
    assert done.code == 2
    assert "is not a result of deltapatch bench" in done.err
    assert len(done.err.splitlines()) == 1


def test_a_folder_without_results_is_refused(tmp_path, command):
    done = command("bench", "figures", tmp_path, "--out", tmp_path / "figures")
    assert done.code == 2
    assert "no results in" in done.err
