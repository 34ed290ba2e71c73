"""The unpatched runs through a layer: base runs in full, source runs as differences from them."""

from collections.abc import Collection
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from deltapatch.engine.wavefront.block import BlockStep, Layer, Steps
from deltapatch.engine.wavefront.prompts import Prompts
from deltapatch.engine.wavefront.rows import WHOLE
from deltapatch.engine.wavefront.setup import Setup
from deltapatch.kernels.attention import Rotary
from deltapatch.kernels.product import Scaled, by_matrix, product
from deltapatch.kernels.segments import Segment
from deltapatch.models import forward
from deltapatch.models.spec import ModelSpec
from deltapatch.models.weights import LayerWeights

# What rows meet of the base runs, whatever they patch.
_MET = (
    "resid_pre", "q_rotated", "k_rotated", "v", "attn_raw", "resid_mid", "gate", "up", "mlp_raw", "resid_post"
)  # fmt: skip


def met(spec: ModelSpec) -> tuple[str, ...]:
    """The activations of the base runs that rows meet in a layer, whatever they patch."""
    return _MET if spec.qk_norm == "none" else ("q", "k", *_MET)


def side_by_side(base: forward.Steps, source: Steps[None]) -> None:
    """Carry out a base run and its source run, which ask for the same products in turn, each product once.

    The source run meets what the base run has had before its next product.
    """
    asked, of_source = next(base, None), next(source, None)
    while asked is not None and of_source is not None:
        (x, part), (d, matrix) = asked, of_source
        assert d.scale is None
        assert matrix.values.shape == part.weight.shape
        n = x.shape[:-1].numel()
        out = by_matrix(torch.cat([x.reshape(n, -1), d.values]), part.weight)
        own = out[:n].view(*x.shape[:-1], -1)
        asked = forward.sent(base, own if part.bias is None else own.add_(part.bias))
        of_source = forward.sent(source, Scaled(out[n:]))
    assert asked is of_source is None


class Unpatched:
    """Advances the base and source runs of a pass.

    Args:
        setup: what it is carried out with. As many tokens as its operations take go through a layer together;
            a run that is longer goes alone.
        prompts: the pairs.
    """

    def __init__(self, setup: Setup, prompts: Prompts) -> None:
        self.spec, self.prompts, self.shapes = setup.model.spec, prompts, prompts.shapes
        self.block_tokens, self.pool = setup.ops.block_tokens, setup.pool
        self.widths = forward.widths(self.spec, max(run.length for run in self.shapes.runs))

    def base(
        self, x: Tensor, layer: LayerWeights, number: int, rotary: Rotary, places: Collection[str]
    ) -> forward.Activations:
        """The plain forward of one block for all pairs.

        Args:
            x: [base token, d_model], before the layer.
            layer: its weights, in x's dtype.
            number: the layer's.
            rotary: for every base token.
            places: that are patched here. What neither `met` nor these name is not kept, and None.

        Returns:
            activations [base token, ...].
        """
        found = self.room(x, places)
        self._advance_base(found, layer, number, rotary)
        return found

    def room(self, x: Tensor, places: Collection[str]) -> forward.Activations:
        """Memory for the activations of the base runs in a layer; args as of `base`."""
        names = {*met(self.spec), *(places if self.prompts.kind in ("zero", "mean") else ())}
        kept = {name: self._room(x, name) for name in names if name in self.widths and name != "resid_pre"}
        kept["resid_pre"] = x
        return forward.Activations(**{name: kept.get(name) for name in forward.Activations._fields})  # type: ignore[arg-type]

    def both(
        self, dx: Tensor, layer: LayerWeights, number: int, here: Layer, places: Collection[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Base and source runs; those of few tokens share their products, each of which reads all weights.

        Args:
            dx: [source token, d_model], before the layer.
            layer, number: as of `base`.
            here: the layer, with the `room` of its base runs, into which these are written.
            places: that are patched here.

        Returns:
            As of `sources`.
        """
        runs = self.prompts.n_sources
        if dx.device.type != "cpu" or len(here.base.resid_pre) + len(dx) > self.block_tokens:
            self._advance_base(here.base, layer, number, here.rotary)
            return self.sources(dx, here, places)
        after, found = self._room_of_sources(dx, places)

        def together(segment: Segment) -> None:
            context = self._context(segment, number, here.rotary)
            base = self._base_steps(segment, here.base, layer, context)
            source = self._source_steps(segment, dx, here, (after, found))
            if source is None:
                forward.carry_out(base, forward.linear)
            else:
                side_by_side(base, source)

        self.pool(together, self.shapes.segments(runs, self.block_tokens))
        return after, found | {"resid_post": after}

    def _advance_base(
        self, found: forward.Activations, layer: LayerWeights, number: int, rotary: Rotary
    ) -> None:
        def advance(segment: Segment) -> None:
            context = self._context(segment, number, rotary)
            forward.carry_out(self._base_steps(segment, found, layer, context), forward.linear)

        self.pool(advance, self.shapes.segments(1, self.block_tokens))

    def _context(self, segment: Segment, number: int, rotary: Rotary) -> forward.LayerContext:
        tables = segment.run(rotary.cos)[0], segment.run(rotary.sin)[0]  # those of all its pairs
        rope = self.spec.rope_of(number)
        return forward.LayerContext(self.spec, self.spec.scores(number), rope, tables, segment.fork)

    def _base_steps(
        self,
        segment: Segment,
        found: forward.Activations,
        layer: LayerWeights,
        context: forward.LayerContext,
    ) -> forward.Steps:
        """The plain forward of one block for a segment's pairs, into what was found of all."""
        x, first, n = found.resid_pre, segment.base, segment.pairs * segment.length
        said: dict[str, Tensor] = {}  # by attention and MLP, which is added up whether it is kept or not

        def keep(at: int, count: int, **seen: Tensor | None) -> None:
            for name, value in seen.items():
                if name in ("attn_out", "mlp_out") and value is not None:
                    said[name] = value
                whole = getattr(found, name)
                if whole is None or value is None:
                    continue
                here = whole[at : at + count]
                if name == "pattern":  # as many keys as its own run has tokens
                    here = here[..., : value.shape[-1]]
                here.copy_(value.reshape(here.shape))

        pattern = found.pattern is not None
        run = segment.run(x)
        yield from forward.attention_steps(run, layer, context, partial(keep, first, n), pattern=pattern)
        attn_out = said["attn_out"].flatten(0, 1)
        for a in range(0, n, self.block_tokens):  # hidden neurons are many: those of some tokens
            some = slice(a, min(a + self.block_tokens, n))
            here = slice(first + some.start, first + some.stop)
            to = partial(keep, here.start, some.stop - some.start)
            mid = x[here] + attn_out[some]
            if found.resid_mid is not None:
                found.resid_mid[here] = mid
            yield from forward.mlp_steps(x[here], attn_out[some], layer, self.spec, to)
            torch.add(mid, said["mlp_out"], out=found.resid_post[here])

    def sources(self, dx: Tensor, here: Layer, places: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The source runs, carried as differences like any row.

        Args:
            dx: [source token, d_model], before the layer.
            here: the layer.
            places: that are patched here.

        Returns:
            The same after the layer, and the differences at these places: [source token, ...].
        """
        room = self._room_of_sources(dx, places)

        def advance(segment: Segment) -> None:
            steps = self._source_steps(segment, dx, here, room)
            if steps is not None:
                forward.carry_out(steps, product)

        self.pool(advance, self.shapes.segments(self.prompts.n_sources, self.block_tokens))
        after, found = room
        return after, found | {"resid_post": after}

    def _room_of_sources(self, dx: Tensor, places: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.empty_like(dx), {name: self._room(dx, name) for name in places if name != "resid_post"}

    def _source_steps(
        self, segment: Segment, dx: Tensor, here: Layer, room: tuple[Tensor, dict[str, Tensor]]
    ) -> Steps[None] | None:
        """Those of a segment's source runs, into `room`; None where none is carried, and all of it is 0."""
        after, found = room
        mine = slice(segment.token, segment.token + segment.n_tokens)
        if not self.prompts.carries(segment):
            for whole in (after, *found.values()):
                whole[mine] = 0
            return None
        capture = {name: whole[mine] for name, whole in found.items()}
        step = BlockStep(here, [replace(segment, token=0)], {}, capture)
        return step.steps(dx[mine], WHOLE, after[mine], None)

    def _room(self, like: Tensor, name: str) -> Tensor:
        """Memory for an activation of every token, [token, ...]; keys that a run does not have stay 0."""
        shape = (len(like), *self.widths[name])
        return like.new_zeros(shape) if name == "pattern" else like.new_empty(shape)
