"""What carrying out a pass finds."""

from dataclasses import dataclass

import numpy as np

from deltapatch.results.metrics import Direction, Reference


@dataclass(frozen=True)
class PassResult:
    """What a pass measured, and the pairs' unpatched runs."""

    measured: dict[str, np.ndarray]  # name -> [intervention]
    unpatched: Reference  # its runs are base and source

    def reference(self, direction: Direction) -> Reference:
        """The unpatched runs as a reader of the results knows them: clean and corrupted."""
        return self.unpatched.runs([1, 0] if direction == "denoise" else [0, 1])
