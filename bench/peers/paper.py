"""As the paper's code works: two full forwards for each intervention, with the logits of all positions."""

import numpy as np
import torch
from torch import Tensor

from deltapatch.bench.peers.base import chunks
from deltapatch.bench.peers.hooks import Hooks
from deltapatch.bench.sides.cells import Cells


class Paper(Hooks):
    """Every intervention runs the unpatched prompt again; neurons of one layer go in batches of 200."""

    name = "paper"
    what = "as the paper's code: two full forwards each"
    sites = ("mlp_out", "attn_out", "mlp_post")
    joint = False

    def batches(self, cells: Cells) -> list[np.ndarray]:
        """Whole vectors one by one."""
        order = np.lexsort((cells.index[:, 0], cells.position[:, 0], cells.pair, cells.layer[:, 0]))
        groups = cells.layer[order, 0] * (cells.pair.max() + 1) + cells.pair[order]
        return chunks(order, groups, 200 if cells.site == "mlp_post" else 1)

    @torch.no_grad()
    def measure(self, cells: Cells) -> np.ndarray:
        """The unpatched rows, then the patched ones."""
        pair = torch.from_numpy(cells.pair).to(self.work.device)
        ids, answers = self.corrupted[pair], self.answers[pair]
        before = self._all_logits(ids)
        with self.hooked(cells.site, np.unique(cells.layer).tolist(), self.swap(cells)):
            after = self._all_logits(ids)
        a, b = (x[:, -1].log_softmax(-1).gather(1, answers.cpu()).double().numpy() for x in (after, before))
        change: np.ndarray = a - b
        # the change of log P apart is the change of the logits apart: the normaliser is the same for both
        return change[:, :1] - change[:, 1:] if self.work.metric == "logit_diff" else change

    def _all_logits(self, ids: Tensor) -> Tensor:
        """[row, T, vocab], on the host."""
        return self.model(ids, use_cache=False).logits.float().cpu()
