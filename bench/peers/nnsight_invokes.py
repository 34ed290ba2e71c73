"""nnsight: many interventions in one trace, an invoke for each."""

import numpy as np
import torch

from deltapatch.bench.peers.base import chunks, in_layer_order
from deltapatch.bench.peers.nnsight_loop import NNsightLoop
from deltapatch.bench.sides.cells import Cells


class NNsightInvokes(NNsightLoop):
    """nnsight puts the invokes' prompts into one batch."""

    name = "nnsight-invokes"
    what = "nnsight, batched invokes"
    batched = True

    def batches(self, cells: Cells) -> list[np.ndarray]:
        """As hooks in batches."""
        return chunks(in_layer_order(cells), None, self.batch)

    @torch.no_grad()
    def measure(self, cells: Cells) -> np.ndarray:
        """One trace of all these cells."""
        import nnsight

        pair = torch.from_numpy(cells.pair)
        with self.traced.trace(use_cache=False, logits_to_keep=1) as tracer:
            found = nnsight.save([])
            for row in range(len(cells)):
                with tracer.invoke(self.corrupted[pair[row : row + 1]]):
                    self.patch(cells, row)
                    found.append(self.traced.output.logits[0, -1])
        return self.of_logits(torch.stack(list(found)), pair)
