"""Gradients along lines: the mean over runs in which a vector is moved step by step to its source value.

Of a vector that is moved alone, the gradient times the change is then its exact effect, in the limit of many
steps. Every line takes forwards and gradients of its own, which makes it dearer than exact effects are.
"""

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.screening.gradients import log_probabilities
from deltapatch.engine.wavefront.prompts import Prompts
from deltapatch.engine.wavefront.reads import Reads
from deltapatch.engine.wavefront.setup import Setup
from deltapatch.kernels.device import upload
from deltapatch.models.patched import changed_logits

_TOKENS = 4096  # that go through the model together


class Lines:
    """The lines of one pair, whose answers are single tokens.

    Args:
        setup, prompts: of the pass.
        pair: its number among the pairs of the pass.
        answers: as of `Backward.of_logits`.
        steps: of each line; gradients are taken in the middle of each step.
    """

    def __init__(
        self, setup: Setup, prompts: Prompts, pair: int, answers: tuple[float, float], steps: int
    ) -> None:
        self.model, self.pool, self.answers, self.steps = setup.model, setup.pool, answers, steps
        self.base, self.length = int(prompts.shapes.base[pair]), int(prompts.shapes.length[pair])
        self.targets = Reads(prompts.shapes, prompts.targets).any[[pair]]  # [1, answer, token]
        self.tokens = torch.from_numpy(prompts.tokens[self.base : self.base + self.length])

    def slopes(self, place: tuple[str, int], token: np.ndarray, change: Tensor, *, together: bool) -> Tensor:
        """The mean gradients in what is at a place.

        Args:
            place: and the layer; -1 is the embedding.
            token: [spot], base tokens.
            change: [spot, ...], how far each is moved.
            together: all spots at once; else each has a line of its own.

        Returns:
            [spot, ...].
        """
        line = np.zeros(len(token), np.int64) if together else np.arange(len(token))
        most = len(token) if together else at_once(self.length, self.steps)
        out = torch.empty_like(change)

        def take(piece: slice) -> None:
            out[piece] = self._piece(place, token[piece], line[piece] - line[piece.start], change[piece])

        pieces = [slice(a, a + most) for a in range(0, len(token), most)]
        self.pool.of_blocks(len(pieces))(take, pieces)
        return out

    def _piece(self, place: tuple[str, int], token: np.ndarray, line: np.ndarray, change: Tensor) -> Tensor:
        """The lines of some spots; those of one number move together."""
        site, layer = place if place[1] >= 0 else ("resid_pre", 0)
        device, n_lines = change.device, int(line[-1]) + 1
        share = (torch.arange(self.steps, device=device, dtype=change.dtype) + 0.5) / self.steps
        moved = (share.view(-1, *(1,) * change.dim()) * change).requires_grad_()  # [step, spot, ...]
        run = upload(np.arange(self.steps)[:, None] * n_lines + line, device)  # [step, spot]
        at = upload(token - self.base, device).expand_as(run)

        def visit(name: str, number: int, value: Tensor) -> None:
            if (name, number) == (site, layer):
                value.index_put_((run, at), moved, accumulate=True)

        n = self.steps * n_lines
        ids = self.tokens.to(device).expand(n, -1)
        with torch.enable_grad():
            logits = changed_logits(self.model, ids, visit, (-1,), change.dtype)[:, 0]
            said = log_probabilities(logits, upload(self.targets, device).expand(n, -1, -1))
            (slope,) = torch.autograd.grad((said @ said.new_tensor(self.answers)).sum(), moved)
        return slope.mean(0)


def at_once(length: int, steps: int) -> int:
    """How many lines of a run of so many tokens go through the model together."""
    return max(1, _TOKENS // (length * steps))
