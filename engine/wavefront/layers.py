"""The layers of a pass, one after the other, each with its unpatched runs and ready for rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from deltapatch.engine.wavefront.block import Layer, block_norms
from deltapatch.engine.wavefront.own_runs import OwnRuns
from deltapatch.engine.wavefront.products import narrow_layer
from deltapatch.engine.wavefront.prompts import EMBEDDING, Prompts, source_differences
from deltapatch.engine.wavefront.setup import Setup
from deltapatch.engine.wavefront.unpatched import Unpatched
from deltapatch.interventions.runs import RunShape
from deltapatch.kernels.attention import Rotary
from deltapatch.kernels.device import upload
from deltapatch.models import forward
from deltapatch.models.model_weights import PassWeights
from deltapatch.models.spec import RopeSpec
from deltapatch.models.weights import Converter, LayerWeights


@dataclass(frozen=True)
class Ready:
    """A layer, ready for its rows.

    Attributes:
        here: what they meet.
        deltas: place -> (source - base), [source token, ...].
        x, dx: [base token, d_model] and [source token, d_model], the unpatched runs after the layer.
    """

    here: Layer
    deltas: dict[str, Tensor]
    x: Tensor
    dx: Tensor


class Layers:
    """Prepares layers, one ahead of those who use them.

    Args:
        setup: what the pass is carried out with.
        prompts: the pairs.
        unpatched: advances their runs.
    """

    def __init__(self, setup: Setup, prompts: Prompts, unpatched: Unpatched) -> None:
        self.setup, self.prompts, self.unpatched = setup, prompts, unpatched
        self.own = OwnRuns(setup, prompts)
        self.spec, self.device = setup.model.spec, setup.model.device

    def at_embedding(self, x: Tensor, dx: Tensor) -> Tensor:
        """(source - base) of the embedding, [source token, d_model]; x and dx as of `of`."""
        return self.own.into(self.prompts.delta(x, dx, EMBEDDING), "resid_post")

    def of(
        self,
        read: PassWeights,
        x: Tensor,
        dx: Tensor,
        places: Callable[[int], Sequence[str]],
        passing: Callable[[int], int],
        hear: Callable[[int, Layer, dict[str, Tensor]], None] = lambda l, layer, deltas: None,
    ) -> Iterator[Ready]:
        """Every layer in turn.

        Args:
            read: the weights.
            x, dx: [base token, d_model] and [source token, d_model], the unpatched runs before the first one.
            places: what of a layer's source runs is needed.
            passing: how many row tokens pass through a layer.
            hear: is given each layer, in the precision of the base runs, and its (source - base).
        """
        convert = Converter(self.device, self.setup.precision.base)

        def prepare(l: int, x: Tensor, dx: Tensor) -> Ready:
            stored = read.layer(l)
            ready = self.at(l, convert(stored), x, dx, places(l))
            self.own.advance(l, stored, places(l))
            deltas = {place: self.own.into(delta, place) for place, delta in ready.deltas.items()}
            after = self.own.read_into(ready.dx) if l == self.spec.n_layers - 1 else ready.dx
            ready = replace(ready, deltas=deltas, dx=after)
            hear(l, ready.here, ready.deltas)
            precision, here = self.setup.taken_in(passing(l)), ready.here
            if precision is not here.precision:
                here = replace(here, precision=precision, weights=narrow_layer(stored, precision))
            return replace(ready, here=replace(here, last=l == self.spec.n_layers - 1))

        ahead = self.setup.pool.ahead(partial(prepare, 0, x, dx))
        for l in range(self.spec.n_layers):
            ready = ahead()
            if l + 1 < self.spec.n_layers:
                ahead = self.setup.pool.ahead(partial(prepare, l + 1, ready.x, ready.dx))
            yield ready
            del ready  # before the next layer is asked for: a streamed one takes its place

    def at(self, l: int, exact: LayerWeights, x: Tensor, dx: Tensor, places: Sequence[str]) -> Ready:
        """One layer, in the precision of the base runs, as if it were not the last; no source run by itself.

        Args:
            exact: its weights, in the dtype of the base runs.
            x, dx: before it.
            places: what of its source runs is needed.
        """
        rope = self.spec.rope_of(l)
        here = Layer(
            spec=self.spec,
            rope=rope,
            scores=self.spec.scores(l),
            ops=self.setup.ops,
            precision=self.setup.precision.exact,
            weights=narrow_layer(exact, self.setup.precision.exact),
            norms=block_norms(exact, self.spec),
            down=exact.down.weight if "mlp_post" in places else None,
            base=self.unpatched.room(x, places),
            rotary=self.rotaries[rope],
            last=False,
        )
        dx, captured = self.unpatched.both(dx, exact, l, here, places)
        deltas = source_differences(self.prompts, here.base, captured, l)
        return Ready(here, deltas, here.base.resid_post, dx)

    @cached_property
    def rotaries(self) -> dict[RopeSpec, Rotary]:
        """Of every kind that the model has, a line of cosines and sines for every base token."""
        return {rope: self._rotary(rope) for rope in self.spec.all_ropes()}

    def _rope_tables(self, run: RunShape, rope: RopeSpec) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [token of the run, rope.dim // 2]."""
        position = run.positions
        cos, sin = forward.rope_tables(rope, int(position.max()) + 1, self.setup.precision.base, "cpu")
        cos, sin = (table.numpy()[position] for table in (cos, sin))
        return upload(cos, self.device), upload(sin, self.device)

    def _rotary(self, rope: RopeSpec) -> Rotary:
        tables = {run: self._rope_tables(run, rope) for run in dict.fromkeys(self.prompts.shapes.runs)}
        parts = [tables[run] for run in self.prompts.shapes.runs]
        cos, sin = (torch.cat([part[i] for part in parts]) for i in range(2))
        return Rotary(cos, sin, rope.interleaved)
