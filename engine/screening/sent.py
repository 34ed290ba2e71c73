"""Edges of a grid: what senders say, which gradients in what receivers read are multiplied with."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.question import Question
from deltapatch.engine.wavefront.block import Layer
from deltapatch.engine.wavefront.messages import Messages
from deltapatch.engine.wavefront.prompts import Prompts
from deltapatch.engine.wavefront.setup import Setup
from deltapatch.interventions.edges import EdgeGrid
from deltapatch.interventions.nodes import LOGITS, MLP
from deltapatch.kernels.device import upload

_NUMBERS = 1 << 24  # of messages, and of their products, that are worked through together


class Sent:
    """The edges of some pairs.

    Args:
        question: of a sweep of edges.
        found: [effect], where estimates go.
        numbers: of the pairs.
        prompts: of these.
        setup: what messages are made with.
    """

    def __init__(
        self,
        question: Question,
        found: np.ndarray,
        numbers: Sequence[int],
        prompts: Prompts,
        setup: Setup,
    ) -> None:
        grid = question.interventions
        assert isinstance(grid, EdgeGrid)
        self.grid, self.found = grid, found.reshape(grid.shape)  # [pair, effect, position, edge]
        self.numbers, self.shapes, self.pool = numbers, prompts.shapes, setup.pool
        self.messages = Messages(setup, prompts, grid.nodes, np.array(grid.senders))
        self.starts = [grid.starts(question.pairs[number]) for number in numbers]
        for number, (which, _) in zip(numbers, self.starts, strict=True):
            self.found[number][:, which] = 0
        receivers = [grid.nodes.receivers[name] for name in grid.receivers]
        self.reads = np.array([r.reads for r in receivers])  # [receiver]
        # Behind the last layer the logits are read.
        self.layer = np.array([r.layer + (r.reads == LOGITS) for r in receivers])

    def sources(self, l: int) -> list[str]:
        """What of a layer's source runs is looked at."""
        return self.messages.places(l)

    def places(self, l: int) -> list[str]:
        """Where in a layer gradients are wanted, for those in what is read there."""
        reads = self.reads[self.layer == l]
        if (reads == LOGITS).any():
            return ["resid_post"]
        return [
            *(["attn_out"] if (reads < MLP).any() else []),
            *(["mlp_out"] if (reads == MLP).any() else []),
        ]

    def keep(self, l: int, deltas: dict[str, Tensor], layer: Layer | None) -> None:
        """Keep what the senders of a layer say; -1 is the embedding, which has none."""
        if layer is None:
            self.messages.hear_embedding(deltas["resid_post"])
        else:
            self.messages.hear(l, layer, deltas)

    def put(self, l: int, slopes: Mapping[str, Tensor]) -> None:
        """What the edges into a layer are estimated to do.

        Args:
            slopes: effect -> [base token, receiver, d_model], the gradients in what each receiver reads.
                Behind the last layer just "resid_post", [base token, d_model].
        """
        receivers = np.flatnonzero(self.layer == l)
        edges = np.flatnonzero(np.isin(self.grid.edges[:, 1], receivers))
        slot = np.searchsorted(self.grid.senders, self.grid.edges[edges, 0])
        column = np.searchsorted(receivers, self.grid.edges[edges, 1])
        if not len(edges):
            return
        n = int(slot.max()) + 1
        # The logits hear a message whichever effect is meant.
        end = slopes["resid_post"].unsqueeze(1) if "resid_post" in slopes else None
        by_effect = [slopes[effect] if end is None else end for effect in self.grid.effects]
        step = max(1, _NUMBERS // (n * max(len(receivers), self.messages.spec.d_model)))  # positions

        def multiply(i: int) -> None:
            which, start = self.starts[i]
            prompt, base = int(self.shapes.prompt[i]), int(self.shapes.base[i])
            token = np.arange(start[0], prompt) if self.grid.together else start[start < prompt]
            to = which if self.grid.together else which[start < prompt]
            for a in range(0, len(token), step):
                at = upload(base + token[a : a + step], self.messages.said.device)
                said = self.messages.said[at, :n]  # [position, slot, d_model]
                for number, slope in enumerate(by_effect):
                    product = torch.bmm(said, slope[at].transpose(1, 2))  # [position, slot, receiver]
                    product = product.sum(0, keepdim=True) if self.grid.together else product
                    here = np.ix_(to if self.grid.together else to[a : a + step], edges)
                    self.found[self.numbers[i], number][here] += product.cpu().numpy()[:, slot, column]

        self.pool(multiply, range(len(self.numbers)))
