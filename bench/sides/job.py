"""What a measured side is told before it starts, in files that its process reads."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from deltapatch.bench.sides.cells import Cells
from deltapatch.bench.sides.workload import Workload
from deltapatch.errors import DeltapatchError


@dataclass(frozen=True)
class Options:
    """How a comparison is measured.

    Attributes:
        rounds: repeats of every side, in turn.
        runs: how often all of it is done, each time in new processes.
        limit: seconds; a side that would take longer for a sweep is measured on a sample of it.
        sample: seconds that such a sample takes.
        check: cells that every side is judged by, whatever it was measured on.
        reference: the most cells whose exact effects are computed, beside those that are checked.
        seed: of the cells that are checked.
        processor: seconds are the processor's, which others may be using too, and not the clock's; for sides
            of one thread.
    """

    rounds: int = 5
    runs: int = 1
    limit: float = 60.0
    sample: float = 10.0
    check: int = 64
    reference: int = 20_000
    seed: int = 0
    processor: bool = False

    def __post_init__(self) -> None:
        """Check them."""
        if min(self.rounds, self.runs, self.check) < 1 or min(self.limit, self.sample) <= 0:
            raise DeltapatchError(
                "rounds, check, limit and sample must be at least 1 and more than 0, and so must runs"
            )


@dataclass(frozen=True)
class Job:
    """All sweeps of a comparison, the same for every side."""

    folder: str  # of the cells, and of the effects that sides find
    work: Workload
    options: Options
    checked: list[list[int]] = field(default_factory=list)  # [sweep][check], the cells that all are judged by

    def add(self, cells: Cells, checked: np.ndarray) -> None:
        """One more sweep."""
        cells.save(self._file(f"cells-{len(self.checked)}.npz"))
        self.checked.append(checked.tolist())

    def cells(self, sweep: int) -> Cells:
        """Of a sweep, by its number."""
        return Cells.load(self._file(f"cells-{sweep}.npz"))

    def effects(self, side: str, sweep: int) -> Path:
        """The file of what a side found: `checked` [check, column] and `timed` [n, column], NaN elsewhere."""
        return self._file(f"{side}-{sweep}.npz")

    def save(self) -> Path:
        """Write a JSON file."""
        path = self._file("job.json")
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @staticmethod
    def load(path: Path) -> "Job":
        """Read what `save` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        return Job(found["folder"], Workload(**found["work"]), Options(**found["options"]), found["checked"])

    def _file(self, name: str) -> Path:
        return Path(self.folder) / name
