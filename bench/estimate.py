"""What every kernel of a layer should take on an H100, and a whole sweep: arithmetic, no measurement.

    python -m deltapatch.bench.estimate

Bytes are those of the calls that `python -m deltapatch.bench.gpu` times (cases.py), at the shapes of real
models, so that what is measured may stand beside. A kernel takes as long as the slowest of three: what it
reads and writes at the rate of a large copy, its products at the rate of their precision, and, where it
computes much for every number, its instructions.
"""

from collections.abc import Iterator
from typing import NamedTuple

import click
import torch

from deltapatch.bench.cases import Cases
from deltapatch.bench.markdown import as_table
from deltapatch.bench.true_shapes import CONFIGS
from deltapatch.engine.planning.costs import flops
from deltapatch.kernels.backend import TRITON
from deltapatch.kernels.product import PRECISIONS, Precision
from deltapatch.models.config import Config
from deltapatch.models.registry import read_config
from deltapatch.models.spec import ModelSpec

MODELS = ("gptj-6b", "llama-7b", "pythia-2.8b")
SHOWN = ("fp16", "bf16", "fp8")
COPY = 3.0e12  # bytes a second, read and written
PRODUCTS = {"bf16": 680e12, "fp16": 680e12, "fp8": 1200e12}  # FLOP/s with float32 results
INSTRUCTIONS = 28.8e12  # a second: 132 multiprocessors, 4 of 32 lanes each at 1.7 GHz
OF_A_NEURON = {"gelu_tanh": 80, "gelu": 110, "silu": 80, "relu": 30}  # instructions, as compiled for sm_90
ROWS = TRITON.block_tokens


class Line(NamedTuple):
    """One kernel or product for a block of rows.

    Attributes:
        name: as in cases.py, or "product ...".
        times: how often a row meets it in a layer; 0 where that is not once a layer.
        n_bytes: read and written.
        n_flops: of products.
        n_instructions: counted where they matter.
    """

    name: str
    times: float
    n_bytes: float
    n_flops: float = 0.0
    n_instructions: float = 0.0

    def seconds(self, precision: Precision) -> float:
        """What it should take."""
        return max(
            self.n_bytes / COPY, self.n_flops / PRODUCTS[precision.name], self.n_instructions / INSTRUCTIONS
        )


def spec_of(model: str) -> ModelSpec:
    """The shapes of one of CONFIGS."""
    return read_config(Config(CONFIGS[model], model))[1]


def lines(spec: ModelSpec, precision: Precision) -> Iterator[Line]:
    """What a block of rows at the last position meets in a layer, and at the ends of its way."""
    d, narrow = spec.d_model, precision.operand.itemsize
    # On "meta" tensors have shapes and no numbers, and nothing is called.
    bytes_of = {
        case.name: case.n_bytes for case in Cases(TRITON, spec, precision, ROWS, torch.device("meta"))
    }

    def product(name: str, n_in: int, n_out: int, times: float = 1.0) -> Line:
        moved = narrow * (ROWS + n_out) * n_in + 4 * ROWS * n_out
        return Line(f"product {name}", times, moved, 2.0 * ROWS * n_in * n_out)

    yield Line("norm", 1, bytes_of["norm"])
    yield product("q, k, v", d, (spec.n_heads + 2 * spec.n_kv_heads) * spec.d_head)
    yield Line("attention", 1, bytes_of["attention"])
    yield product("out", spec.n_heads * spec.d_head, d)
    if not spec.parallel:
        yield Line("add and norm", 1, bytes_of["add and norm"])
    yield product("up and gate" if spec.gated else "up", d, spec.d_mlp * (1 + spec.gated))
    instructions = OF_A_NEURON[spec.activation] * ROWS * spec.d_mlp
    yield Line("activation", 1, bytes_of["activation"], 0, instructions)
    yield product("down", spec.d_mlp, d)
    # After the middle of a sequential block two parts are added up instead of three.
    yield Line("add", 1, bytes_of["add"] * (1 if spec.parallel else 12 / 16))
    yield Line("columns", 0, bytes_of["columns"])
    yield product("unembedding", d, spec.d_vocab, 0)
    yield Line("read-out, its product apart", 0, bytes_of["read-out"] - 4 * ROWS * spec.d_vocab)


class Prediction(NamedTuple):
    """A sweep of all hidden neurons of all layers at the last position of one pair, in seconds."""

    rows: int
    products: float
    kernels: float
    ends: float  # where rows enter and where they are read out
    floor: float  # its necessary FLOPs at the rate of products

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.products + self.kernels + self.ends


def predict(spec: ModelSpec, precision: Precision) -> Prediction:
    """From the lines: a neuron's row passes the layers after its own."""
    rows = spec.n_layers * spec.d_mlp
    row_layers = spec.d_mlp * spec.n_layers * (spec.n_layers - 1) // 2
    took = {"product": 0.0, "kernel": 0.0, "end": 0.0}
    for line in lines(spec, precision):
        what = "end" if not line.times else "product" if line.n_flops else "kernel"
        count = line.times * row_layers if line.times else rows
        took[what] += line.seconds(precision) / ROWS * count
    floor = flops(spec, row_layers, rows) / PRODUCTS[precision.name]
    return Prediction(rows, took["product"], took["kernel"], took["end"], floor)


def table(model: str) -> str:
    """A model's kernels, for a block of rows."""
    spec, precisions = spec_of(model), [PRECISIONS[name] for name in SHOWN]
    found = [list(lines(spec, precision)) for precision in precisions]
    rows = [["", "MB", "GFLOP", *(f"µs in {name}" for name in SHOWN)]]
    for same in zip(*found, strict=True):
        first = same[0]
        times = [f"{line.seconds(p) * 1e6:,.0f}" for line, p in zip(same, precisions, strict=True)]
        gflop = f"{first.n_flops / 1e9:,.0f}" if first.n_flops else ""
        rows.append([first.name, f"{first.n_bytes / 1e6:,.0f}", gflop, *times])
    return as_table(rows)


def sweeps() -> str:
    """Whole sweeps of all models."""
    rows = [["", "rows", "", "products s", "kernels s", "ends s", "all s", "floor s"]]
    for model in MODELS:
        for name in SHOWN:
            p = predict(spec_of(model), PRECISIONS[name])
            times = (p.products, p.kernels, p.ends, p.seconds, p.floor)
            rows.append([model, f"{p.rows:,}", name, *(f"{t:.2f}" for t in times)])
    return as_table(rows)


def page() -> str:
    """All tables."""
    parts = [f"{model}, {ROWS:,} rows; MB in {SHOWN[0]}:\n\n{table(model)}" for model in MODELS]
    return "\n\n".join([*parts, f"All hidden neurons of all layers, last position, one pair:\n\n{sweeps()}"])


@click.command()
def main() -> None:
    """Print what every kernel and whole sweeps should take on an H100."""
    click.echo(page())


if __name__ == "__main__":
    main()
