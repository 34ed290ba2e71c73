"""The estimate can be worked out by hand, and the page shows what the command prints."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from deltapatch.bench.estimate import COPY, MODELS, PRODUCTS, ROWS, lines, main, predict, spec_of
from deltapatch.kernels.product import PRECISIONS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"


def test_the_page_shows_what_the_command_prints():
    (shown,) = re.findall(r"<!-- estimate -->\n(.*)<!-- /estimate -->", PAGE.read_text(), re.DOTALL)
    run = CliRunner().invoke(main)
    assert run.exit_code == 0
    assert shown.strip() == run.output.strip()


def test_lines_of_gptj_by_hand():
    fp16 = PRECISIONS["fp16"]
    found = {line.name: line for line in lines(spec_of("gptj-6b"), fp16)}
    assert found["norm"].n_bytes == ROWS * 4096 * (4 + 2)
    assert found["activation"].n_bytes == ROWS * 16384 * (4 + 2)
    assert found["add"].n_bytes == ROWS * 4096 * 16
    up = found["product up"]
    assert up.n_flops == 2 * ROWS * 4096 * 16384
    assert up.n_bytes == 2 * (ROWS + 16384) * 4096 + 4 * ROWS * 16384
    assert up.seconds(fp16) == up.n_flops / PRODUCTS["fp16"]
    assert found["add"].seconds(fp16) == found["add"].n_bytes / COPY


@pytest.mark.parametrize("model", MODELS)
def test_products_of_the_lines_are_the_necessary_flops(model):
    """But for the read-out, which the floor counts too."""
    spec, bf16 = spec_of(model), PRECISIONS["bf16"]
    p = predict(spec, bf16)
    head = 2 * spec.d_model * spec.d_vocab * p.rows / PRODUCTS["bf16"]
    assert p.products + head == pytest.approx(p.floor)
    assert p.seconds > p.floor
