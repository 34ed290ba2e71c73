"""How much work a pass may be: what a kill can cost, and what a worker of a cluster takes at a time."""

from dataclasses import dataclass

import numpy as np

from deltapatch.engine.planning.costs import layer_parameters
from deltapatch.models.model import Model
from deltapatch.models.spec import ModelSpec

# FLOP of a pass: a minute or a few of a thread at 50 GFLOP/s, or of a GPU at 200 TFLOP/s.
_MOST = {"cpu": 6e12, "cuda": 2e16}
# What costs time in a layer without being a product, for each of a token's d_model numbers.
_BESIDE = 4000
# Tokens that pass through all layers, at least: beside them, converting or streaming the weights is little.
_TOKENS = {"cpu": 2**11, "cuda": 2**19}
# So many times the unpatched runs of its pairs may the rows of a pass be, whatever else: to cut a pair's rows
# costs these runs once more.
_OF_UNPATCHED = 8


@dataclass(frozen=True)
class Limit:
    """The limit of a pass. All are FLOP.

    Attributes:
        most: of a pass.
        layer: of a token in a layer.
        readout: of a position that a row is read at.
        n_layers: of the model.
        runs: unpatched, of every pair.
    """

    most: float
    layer: float
    readout: float
    n_layers: int
    runs: int

    @classmethod
    def of(cls, model: Model, threads: int, runs: int) -> "Limit":
        """Of a sweep of this model by so many threads."""
        spec, kind = model.spec, "cuda" if model.device.type == "cuda" else "cpu"
        layer = _layer(spec)
        most = max(_MOST[kind] * threads, _TOKENS[kind] * spec.n_layers * layer)
        return cls(most, layer, 2.0 * spec.d_vocab * spec.d_model, spec.n_layers, runs)

    def of_rows(self, tokens: np.ndarray, first_layer: np.ndarray, reads: int) -> np.ndarray:
        """[row], what rows of so many tokens from so many layers on take, read at so many positions."""
        found: np.ndarray = tokens * (self.n_layers - first_layer) * self.layer + reads * self.readout
        return found

    def of_unpatched(self, reads: int, tokens: int) -> float:
        """What unpatched runs of so many tokens together take, read at so many positions."""
        return self.runs * (tokens * self.n_layers * self.layer + reads * self.readout)

    def most_beside(self, unpatched: float) -> float:
        """What rows may take in a pass whose unpatched runs take so much and would have to be repeated."""
        return max(self.most - unpatched, _OF_UNPATCHED * unpatched)


def _layer(spec: ModelSpec) -> float:
    return 2.0 * layer_parameters(spec) + _BESIDE * spec.d_model
