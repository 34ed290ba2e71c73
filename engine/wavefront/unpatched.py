"""The unpatched runs through a layer: base runs in full, source runs as differences from them."""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from deltapatch.engine.wavefront.block import BlockStep, Layer
from deltapatch.engine.wavefront.prompts import Prompts
from deltapatch.engine.wavefront.rows import WHOLE
from deltapatch.engine.wavefront.setup import Setup
from deltapatch.kernels.attention import Rotary
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
        kept = {"resid_pre": x} | {
            name: self._room(x, name)
            for name in {*met(self.spec), *(places if self.prompts.kind in ("zero", "mean") else ())}
            if name in self.widths and name != "resid_pre"
        }

        def advance(segment: Segment) -> None:
            first, n = segment.base, segment.pairs * segment.length

            def keep(part: forward.Attended | forward.Hidden, at: int, count: int) -> None:
                for name, value in part._asdict().items():
                    if name not in kept:
                        continue
                    here = kept[name][at : at + count]
                    if name == "pattern":  # as many keys as its own run has tokens
                        here = here[..., : value.shape[-1]]
                    here.copy_(value.reshape(here.shape))

            tables = segment.run(rotary.cos)[0], segment.run(rotary.sin)[0]  # those of all its pairs
            rope = self.spec.rope_of(number)
            context = forward.LayerContext(self.spec, self.spec.scores(number), rope, tables, segment.fork)
            attended = forward.attention(segment.run(x), layer, context, pattern="pattern" in kept)
            keep(attended, first, n)
            attn_out = attended.attn_out.flatten(0, 1)
            del attended
            for a in range(0, n, self.block_tokens):  # hidden neurons are many: those of some tokens
                some = slice(a, min(a + self.block_tokens, n))
                here = slice(first + some.start, first + some.stop)
                hidden = forward.mlp(x[here], attn_out[some], layer, self.spec)
                keep(hidden, here.start, some.stop - some.start)
                mid = x[here] + attn_out[some]
                if "resid_mid" in kept:
                    kept["resid_mid"][here] = mid
                torch.add(mid, hidden.mlp_out, out=kept["resid_post"][here])

        self.pool(advance, self.shapes.segments(1, self.block_tokens))
        return forward.Activations(**{name: kept.get(name) for name in forward.Activations._fields})  # type: ignore[arg-type]

    def sources(self, dx: Tensor, here: Layer, places: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The source runs, carried as differences like any row.

        Args:
            dx: [source token, d_model], before the layer.
            here: the layer.
            places: that are patched here.

        Returns:
            The same after the layer, and the differences at these places: [source token, ...].
        """
        after = torch.empty_like(dx)
        found = {name: self._room(dx, name) for name in places if name != "resid_post"}

        def advance(segment: Segment) -> None:
            mine = slice(segment.token, segment.token + segment.n_tokens)
            if not self.prompts.carries(segment):
                for whole in (after, *found.values()):
                    whole[mine] = 0
                return
            capture = {name: whole[mine] for name, whole in found.items()}
            step = BlockStep(here, [replace(segment, token=0)], {}, capture)
            step.run(dx[mine], WHOLE, after[mine], None)

        self.pool(advance, self.shapes.segments(self.prompts.n_sources, self.block_tokens))
        return after, found | {"resid_post": after}

    def _room(self, like: Tensor, name: str) -> Tensor:
        """Memory for an activation of every token, [token, ...]; keys that a run does not have stay 0."""
        shape = (len(like), *self.widths[name])
        return like.new_zeros(shape) if name == "pattern" else like.new_empty(shape)
