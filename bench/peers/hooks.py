"""Hooks on transformers, one forward for each intervention: what most scripts do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltapatch.bench.peers import wiring
from deltapatch.bench.peers.base import SITES, Peer
from deltapatch.bench.peers.edited import Change, change_of
from deltapatch.bench.sides.cells import EDITS, Cells
from deltapatch.bench.sides.workload import Workload
from deltapatch.models.spec import ModelSpec


class Hooks(Peer):
    """One forward for each intervention, logits of its last position only."""

    name = "hooks"
    what = "hooks on transformers, one by one"
    sites: tuple[str, ...] = (*SITES, *EDITS)
    dtype = torch.float32

    model: Any
    base: Tensor  # [pair, column], the unpatched corrupted runs
    source: list[Tensor]  # [layer][pair, T, ...], the site's values in the clean runs
    edits: dict[str, Change]  # site -> what is added there, of those that were started

    def prepare(self, work: Workload, spec: ModelSpec) -> None:
        """Load the model; its weights are not frozen, since transformers' read-out is slower then."""
        self.work, self.spec, self.edits = work, spec, {}
        self.model = wiring.load(work.folder, work.device, self.dtype)
        self.backbone = wiring.backbone(self.model, spec)
        self.blocks = list(wiring.layers(self.model, spec))
        self.head = self.model.get_output_embeddings()
        self.clean, self.corrupted, self.answers = (
            torch.tensor(ids, device=work.device) for ids in (work.clean, work.corrupted, work.answers)
        )

    @torch.no_grad()
    def start(self, site: str) -> None:
        """The clean runs, with the site's values kept, and the corrupted ones."""
        self.source = []
        if site in EDITS and site not in self.edits:
            self.edits[site] = change_of(site, self.work, self.dtype)

        def keep(layer: int, x: Tensor) -> None:
            self.source.append(wiring.indexed(x, self.spec, site).clone())

        with self.hooked(site, range(self.spec.n_layers), keep):
            self.last(self.clean)
        self.base = self.columns(self.last(self.corrupted), self.answers)

    @torch.no_grad()
    def measure(self, cells: Cells) -> np.ndarray:
        """All these cells in one batch."""
        pair = torch.from_numpy(cells.pair).to(self.work.device)
        with self.hooked(cells.site, np.unique(cells.layer).tolist(), self.swap(cells)):
            h = self.last(self.corrupted[pair])
        return self.changes(h, pair)

    def last(self, ids: Tensor) -> Tensor:
        """The last position's final hidden state, [row, d_model]; the read-out needs no other."""
        return self.backbone(ids, use_cache=False).last_hidden_state[:, -1]

    def changes(self, h: Tensor, pair: Tensor) -> np.ndarray:
        """From the base run, [row, column]."""
        change = self.columns(h, self.answers[pair]) - self.base[pair]
        return change.float().cpu().numpy().astype(np.float64)

    def columns(self, h: Tensor, answers: Tensor) -> Tensor:
        """What the metric needs, [row, column]: log-probabilities of the answers, or their logits apart."""
        if self.work.metric == "logit_diff":
            two = (h[:, None] * self.head.weight[answers]).sum(-1)  # [row, 2]
            if self.head.bias is not None:
                two = two + self.head.bias[answers]
            return (two[:, :1] - two[:, 1:]).float()
        return self.head(h).float().log_softmax(-1).gather(1, answers)

    def swap(self, cells: Cells, first: int = 0) -> Callable[[int, Tensor], None]:
        """Writes the clean run's values into the rows patched in a layer; positions start at `first`."""

        def write(layer: int, x: Tensor) -> None:
            row, patch = np.nonzero(cells.layer == layer)
            arrays = (row, cells.pair[row], cells.position[row, patch], cells.index[row, patch])
            rows, pair, position, index = (torch.from_numpy(a).to(x.device) for a in arrays)
            x = wiring.indexed(x, self.spec, cells.site)
            if cells.site in EDITS:
                theirs = self.source[layer][pair, position]
                x[rows, position - first] += self.edits[cells.site](x[rows, position - first], theirs, index)
            elif arrays[3][0] < 0:
                x[rows, position - first] = self.source[layer][pair, position]
            else:
                x[rows, position - first, index] = self.source[layer][pair, position, index]

        return write

    @contextmanager
    def hooked(self, site: str, layers: Any, act: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Within it, `act` is called with every chosen layer and its value of the site, [row, T, width]."""
        handles = []
        for layer in layers:
            module, before = wiring.module(self.blocks[layer], self.spec, site)
            if before:
                handle = module.register_forward_pre_hook(lambda m, args, l=layer: act(l, args[0]))
            else:
                handle = module.register_forward_hook(
                    lambda m, args, out, l=layer: act(l, out[0] if isinstance(out, tuple) else out)
                )
            handles.append(handle)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
