"""How cost grows: the same sides with one size after the other made larger."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deltapatch.bench.compare import MakeSide, compare
from deltapatch.bench.random_models import Shape
from deltapatch.bench.setup import RANDOM, make_workload
from deltapatch.bench.sides.cells import Cells, make_cells
from deltapatch.bench.sides.job import Options
from deltapatch.bench.sides.quiet import quiet
from deltapatch.bench.sides.workload import Workload
from deltapatch.errors import DeltapatchError
from deltapatch.models.load import load_model

# axis -> what a reader calls it
AXES = {
    "rows": "interventions in a sweep",
    "layers": "layers",
    "length": "tokens of the prompt",
    "vocab": "vocabulary",
    "pairs": "prompt pairs",
}
VALUES = {
    "rows": (16, 64, 256, 1024, 4096),
    "layers": (2, 4, 8, 16),
    "length": (8, 32, 128, 512, 2048),
    "vocab": (1024, 4096, 16384, 65536),
    "pairs": (1, 8, 64, 512, 4096),
}
# What is swept unless told: of thousands of pairs a few rows each.
SWEEP = {"pairs": "mlp_out-last"}


def growth(
    axes: Sequence[str],
    shape: Shape,
    length: int,
    names: Sequence[str],
    make_side: MakeSide,
    options: Options,
    *,
    sweep: str | None = None,
    values: Sequence[int] | None = None,
    work: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure along each axis, everything else as `shape` and `length` say.

    Args:
        axes: keys of AXES.
        shape: of the random models.
        length: tokens of the prompts.
        names, make_side, options, say: as for `compare`.
        sweep: what is swept (see `make_cells`); neurons unless given, along the pairs one site of each.
        values: of the axes, in place of VALUES.
        work: further options of `make_workload`.
        keep: called with the result so far after every size: all of them take long.

    Raises:
        DeltapatchError: an unknown axis.
    """
    for axis in axes:
        if axis not in AXES:
            raise DeltapatchError(f"unknown axis {axis!r}: choose from {', '.join(AXES)}")
    found: dict[str, list[dict[str, Any]]] = {}
    result: dict[str, Any] = {}
    for axis in axes:
        found[axis] = []
        name = sweep or SWEEP.get(axis, "neurons")
        for value in values or VALUES[axis]:
            say(f"{axis} {value}")
            with tempfile.TemporaryDirectory(prefix="deltapatch-bench-") as folder:
                workload, cells = _point(axis, value, shape, length, name, Path(folder), work or {})
                result = compare(workload, [(name, cells)], names, make_side, options, say)
            (measured,) = result.pop("sweeps")
            found[axis].append({"value": value, **measured})
            result["quiet"] = quiet(point for points in found.values() for point in points)
            keep({**result, "axes": found})
    return {**result, "axes": found}


def _point(
    axis: str, value: int, shape: Shape, length: int, sweep: str, folder: Path, more: dict[str, Any]
) -> tuple[Workload, Cells]:
    if axis == "layers":
        shape = replace(shape, layers=value)
    elif axis == "vocab":
        shape = replace(shape, vocab=value)
    length = value if axis == "length" else length
    n_pairs = value if axis == "pairs" else 1
    work = make_workload(RANDOM, folder, shape=shape, n_pairs=n_pairs, length=length, **more)
    spec = load_model(work.folder, device=work.device).spec
    cells = make_cells(sweep, spec, n_pairs, length)
    if axis == "rows":
        if value > len(cells):
            raise DeltapatchError(
                f"{value} rows of {sweep}: a model of this shape has only {len(cells)}; make it larger"
            )
        cells = cells[np.sort(np.random.default_rng(0).choice(len(cells), value, replace=False))]
    return work, cells
