"""deltapatch, in float32."""

from collections.abc import Sequence

import numpy as np

from deltapatch.bench.edge_peers.base import EdgePeer, Job, Names


class Ours(EdgePeer):
    """`sweep_edges` of all edges; a few of them are not what it is for, so there is nothing to try."""

    name = "deltapatch-fp32"
    what = "deltapatch, fp32"

    def prepare(self, job: Job) -> None:
        """Load the model."""
        from deltapatch.models.load import load_model

        self.job = job
        self.model = load_model(job.folder, device="cpu")

    def effects(self, edges: Sequence[Names], batch: int | None) -> np.ndarray:
        """All edges, whichever are asked for."""
        from deltapatch.engine.sweep import sweep_edges

        found = sweep_edges(
            self.model, self.job.pairs, direction="noise", precision="fp32", metrics="logit_diff",
            progress=False, noise_sample=0,
        )  # fmt: skip
        assert found.edges == list(edges)
        return found.flat("logit_diff")
