"""Features beside neurons and directions beside whole vectors: what is counted, and what a file holds."""

from pathlib import Path

from deltapatch.bench.edits import BESIDE, measure
from deltapatch.bench.random_models import Shape
from deltapatch.bench.results import read, stamp, write


def test_rates_and_ratios_of_a_small_model(tmp_path: Path):
    shape = Shape("gpt_neox", layers=2, d_model=32, d_mlp=64, heads=4, vocab=100)
    found = measure(shape, 6, 2, "fp32")
    assert found["rows"]["neurons"] == 64
    assert 0 < found["rows"]["features"] <= 64  # those that change
    assert found["rows"]["directions"] == found["rows"]["whole vectors"] == 2 * 6
    for name, other in BESIDE.items():
        assert len(found["rates"][name]) == len(found["rates"][other]) == 2
        assert found["ratios"][name] > 0
    write(tmp_path / "edits.json", stamp("edits", found))
    assert read(tmp_path / "edits.json")["rows"] == found["rows"]
