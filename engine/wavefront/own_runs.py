"""Source runs of their own: of pairs in which what lines up is at different positions.

Such a run cannot be carried as a difference from the base run. Both are run once more, plainly and in
float64, and differences are taken of what lines up: a token whose counterpart is the same token differs from
it by little in the first layers, and two runs in float32 would leave few digits of that.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.wavefront.prompts import Apart, Prompts
from deltapatch.engine.wavefront.setup import Setup
from deltapatch.interventions.runs import RunShape
from deltapatch.kernels.device import upload
from deltapatch.models import forward
from deltapatch.models.weights import Converter, LayerWeights

_EXACT = torch.float64


@dataclass
class _Alike:
    """Pairs whose runs have the same shapes.

    Attributes:
        pairs: these.
        x: base and source, [pair, T, d_model] float64, before the layer that comes next.
        found: place -> [position that lines up, ...] float64, (source - base) there, pair after pair.
    """

    pairs: list[Apart]
    x: tuple[Tensor, Tensor]
    found: dict[str, Tensor]

    def differences(self, values: tuple[Tensor, Tensor], *, reads: bool = False) -> Tensor:
        """(source - base), pair after pair, of [pair, T, ...]: of what lines up, or of what is read."""
        parts = []
        for i, pair in enumerate(self.pairs):
            at, of = (upload(column, values[0].device) for column in _positions(pair, reads).T)
            parts.append(values[1][i, of] - values[0][i, at])
        return torch.cat(parts)


class OwnRuns:
    """Base and source runs, in float64, of the pairs of a pass whose source is run by itself.

    Args:
        setup: what the pass is carried out with.
        prompts: its pairs.
    """

    def __init__(self, setup: Setup, prompts: Prompts) -> None:
        self.setup, self.spec, self.prompts = setup, setup.model.spec, prompts
        self.device = setup.model.device
        self._convert = Converter(self.device, _EXACT)
        self._alike: list[_Alike] = []
        shapes = sorted(prompts.apart, key=lambda pair: [run.order for run in pair.shapes])
        for _, same in groupby(shapes, lambda pair: pair.shapes):
            pairs = list(same)
            step = max(1, setup.ops.block_tokens // sum(map(len, pairs[0].tokens)))
            for some in (pairs[i : i + step] for i in range(0, len(pairs), step)):
                x = (self._embedded(some, 0), self._embedded(some, 1))
                self._alike.append(_Alike(some, x, {}))
                self._alike[-1].found["resid_post"] = self._alike[-1].differences(x)

    def advance(self, number: int, stored: LayerWeights, places: Collection[str]) -> None:
        """Through a layer; `into` then has its differences.

        Args:
            number: the layer's.
            stored: its weights.
            places: that are patched here.
        """
        if not self._alike:
            return
        weights, rope = self._convert(stored), self.spec.rope_of(number)

        def through(alike: _Alike) -> None:
            runs = []
            for x, shape in zip(alike.x, alike.pairs[0].shapes, strict=True):
                tables = forward.rope_tables(rope, int(shape.positions.max()) + 1, _EXACT, "cpu")
                at = torch.from_numpy(shape.positions)
                cos, sin = (upload(table[at].numpy(), self.device) for table in tables)
                context = forward.LayerContext(
                    self.spec, self.spec.scores(number), rope, (cos, sin), shape.fork
                )
                runs.append(forward.block(x, weights, context))
            base, source = runs
            wanted = {*places, "resid_post"} if self.prompts.kind == "counterpart" else ()
            alike.found = {
                name: alike.differences((getattr(base, name), getattr(source, name))) for name in wanted
            }
            alike.x = base.resid_post, source.resid_post

        self.setup.pool(through, self._alike)

    def into(self, delta: Tensor, place: str) -> Tensor:
        """(source - base) at a place, [source token, ...], with those of these pairs; `delta` stays."""
        if not self._alike or self.prompts.kind != "counterpart":
            return delta
        return self._put(delta, [alike.found[place] for alike in self._alike], reads=False)

    def read_into(self, dx: Tensor) -> Tensor:
        """The same after the last layer, of what is read."""
        if not self._alike:
            return dx
        return self._put(dx, [alike.differences(alike.x, reads=True) for alike in self._alike], reads=True)

    def _put(self, delta: Tensor, found: list[Tensor], *, reads: bool) -> Tensor:
        out = delta.clone()
        pairs = [pair for alike in self._alike for pair in alike.pairs]
        token = np.concatenate([pair.first + _positions(pair, reads)[:, 0] for pair in pairs])
        out[upload(token * self.prompts.n_sources, out.device)] = torch.cat(found).to(out.dtype)
        return out

    def _embedded(self, pairs: list[Apart], which: int) -> Tensor:
        """[pair, T, d_model], of the base runs (0) or the source runs (1)."""
        shape: RunShape = pairs[0].shapes[which]
        positions = torch.from_numpy(shape.positions) if self.spec.learned_positions else None
        tokens = torch.tensor([pair.tokens[which] for pair in pairs])
        return self.setup.model.embed(tokens, _EXACT, positions=positions)


def _positions(pair: Apart, reads: bool) -> np.ndarray:
    """[n, (base, source)], the positions that line up, or those that are read."""
    return pair.reads if reads else pair.lined_up
