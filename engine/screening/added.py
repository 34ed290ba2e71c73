"""Vectors that are added, such as rows of decoders: what gradients say of each."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.question import Question
from deltapatch.engine.wavefront.block import Layer
from deltapatch.engine.wavefront.prompts import Prompts
from deltapatch.interventions.given import Listed
from deltapatch.interventions.sites import PLACES, SITES
from deltapatch.interventions.table import EDIT
from deltapatch.interventions.vectors import decode
from deltapatch.kernels.device import upload

_NUMBERS = 1 << 24  # of the vectors that are worked through together


class Added:
    """The vectors that are added in some pairs.

    Args:
        question: of interventions that add, and do nothing else.
        found: [intervention], where estimates go.
        numbers: of the pairs.
        prompts: of these.
    """

    def __init__(
        self, question: Question, found: np.ndarray, numbers: Sequence[int], prompts: Prompts
    ) -> None:
        assert isinstance(question.interventions, Listed)
        self.found, self.model = found, question.model
        self.table, self.vectors = question.interventions.table_of_all, question.interventions.vectors
        assert (self.table.edit == EDIT["add"]).all()
        found[np.isin(self.table.pair, numbers)] = 0
        base, prompt = np.zeros((2, len(question.pairs)), dtype=np.int64)
        base[list(numbers)], prompt[list(numbers)] = prompts.shapes.base, prompts.shapes.prompt
        pair = self.table.pair[self.table.row]
        self.here = np.flatnonzero(self.table.position < prompt[pair])  # patches that can matter
        self.token = base[pair] + self.table.position  # [patch]

    def places(self, l: int) -> list[str]:
        """Where a layer is added to; -1 is the embedding."""
        return [PLACES[number] for number in np.unique(self.table.place[self._at(l)])]

    def _at(self, l: int) -> np.ndarray:
        return self.here[self.table.layer[self.here] == l]

    def sources(self, l: int) -> list[str]:
        """What of a layer's source runs is looked at."""
        return self.places(l)

    def keep(self, l: int, deltas: Mapping[str, Tensor], layer: Layer | None) -> None:
        """Nothing: what is added is given."""

    def put(self, l: int, slopes: Mapping[str, Tensor]) -> None:
        """What vectors of a layer are estimated to do: gradients, by place, times these."""
        mine = self._at(l)
        for place in self.places(l):
            patches = mine[self.table.place[mine] == PLACES.index(place)]
            number, head = decode(self.table.index[patches], SITES[place].n_indices(self.model.spec))
            of, scale = self.vectors.multiples(number)
            used, line = np.unique(of, return_inverse=True)
            rows = np.concatenate([self.vectors.arrays[i] for i in used.tolist()])  # [line, width]
            slope = slopes[place].reshape(len(slopes[place]), -1, rows.shape[1])  # [base token, head, width]
            lines = torch.from_numpy(rows).to(slope)
            step = max(1, _NUMBERS // rows.shape[1])
            for a in range(0, len(patches), step):
                piece = slice(a, a + step)
                token, at, which = (upload(i[piece], slope.device) for i in (self.token[patches], head, line))
                product = (slope[token, at] * lines[which]).sum(-1).cpu().numpy()
                np.add.at(self.found, self.table.row[patches[piece]], scale[piece] * product)
