"""Gradients in what one receiver alone reads: queries, keys or values of a head, or what an MLP reads.

Attention and MLP are each computed again by themselves, from the gradient in what they add to the stream. So
it is the same for total effects, where that gradient is of all that reacts, and for direct ones, where it is
that of the logits.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from deltapatch.engine.screening.gradients import context_of, held_norm, relp_attention, relp_mlp
from deltapatch.engine.wavefront.layout import PairShapes
from deltapatch.engine.wavefront.setup import Setup
from deltapatch.interventions.edges import EdgeGrid
from deltapatch.interventions.nodes import LOGITS, MLP, K, Q, Receiver, V
from deltapatch.kernels.attention import Rotary
from deltapatch.kernels.segments import Segment
from deltapatch.models import forward
from deltapatch.models.weights import LayerWeights, constant


class Hearing:
    """The receivers of a grid, in the base runs of some pairs.

    Args:
        setup: what the pass is carried out with.
        shapes: of the runs.
        grid: the edges.
        relp: as of `Backward`; then nothing is said of queries and keys.
    """

    def __init__(self, setup: Setup, shapes: PairShapes, grid: EdgeGrid, *, relp: bool) -> None:
        self.spec, self.nodes, self.shapes, self.relp = setup.model.spec, grid.nodes, shapes, relp
        self.block_tokens, self.pool = setup.ops.block_tokens, setup.pool
        self.effects = grid.effects
        self.receivers = [self.nodes.receivers[name] for name in grid.receivers]
        self._norm = held_norm if relp else forward.normalise

    def at(self, layer: int) -> list[Receiver]:
        """Those in a layer, in the order of the grid, without the logits."""
        return [r for r in self.receivers if r.layer == layer and r.reads != LOGITS]

    def of_effects(
        self,
        x: Tensor,
        layer: LayerWeights,
        at: tuple[int, Rotary],
        said: Mapping[str, Tensor],
        end: Tensor,
    ) -> dict[str, Tensor]:
        """`slopes` for each effect of the grid.

        Args:
            said: where everything reacts.
            end: [base token, d_model], the gradient in what the last layer leaves: of direct effects it is
                that in what a receiver says.
        """
        by_effect = {"total": said, "direct": dict.fromkeys(said, end)}
        return {effect: self.slopes(x, layer, at, by_effect[effect]) for effect in self.effects}

    def slopes(
        self, x: Tensor, layer: LayerWeights, at: tuple[int, Rotary], said: Mapping[str, Tensor]
    ) -> Tensor:
        """The gradients in what the receivers of a layer read, before its norm.

        Args:
            x: [base token, d_model], before the layer.
            layer: its weights, in x's dtype.
            at: its number, and its rotary embedding for every base token.
            said: "attn_out", "mlp_out", or both: the gradients in these, [base token, d_model].

        Returns:
            [base token, receiver, d_model].
        """
        receivers, held = self.at(at[0]), constant(layer)
        out = x.new_empty(len(x), len(receivers), x.shape[1])

        def back(segment: Segment) -> None:
            mine = slice(segment.base, segment.base + segment.pairs * segment.length)
            context = context_of(self.spec, segment, at)
            slopes = {place: segment.run(slope) for place, slope in said.items()}
            to = out[mine].view(segment.pairs, segment.length, *out.shape[1:])
            self._piece(segment.run(x), held, context, slopes, receivers, to)

        self.pool(back, self.shapes.segments(1, self.block_tokens))
        return out

    def _piece(
        self,
        x: Tensor,
        layer: LayerWeights,
        context: forward.LayerContext,
        said: Mapping[str, Tensor],
        receivers: list[Receiver],
        out: Tensor,
    ) -> None:
        """Those of runs of one length, x [pair, T, d_model], into `out`, [pair, T, receiver, d_model]."""
        attended = forward.attention(x, layer, context, pattern=self.relp)
        heads = [i for i, receiver in enumerate(receivers) if receiver.reads != MLP]
        if heads:
            slopes = self._heads(x, layer, context, attended, said["attn_out"])
            for i in heads:
                out[:, :, i] = slopes(receivers[i])
        if len(heads) < len(receivers):
            out[:, :, -1] = self._mlp(x, layer, attended.attn_out, said["mlp_out"])

    def _heads(
        self,
        x: Tensor,
        layer: LayerWeights,
        context: forward.LayerContext,
        attended: forward.Attended,
        slope: Tensor,
    ) -> Callable[[Receiver], Tensor]:
        """What gives the gradient of one that is a head, [pair, T, d_model]; slope is that in attn_out."""
        spec = self.spec
        read = [part.detach() for part in (attended.q, attended.k, attended.v)]
        weights = forward.split_qkv([part.weight.t() for part in layer.qkv], spec)  # [d_model, head, d_head]
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            normed = self._norm(start, layer.norm1, spec)
            q, k, v = (part.requires_grad_() for part in read)
            turned = [
                *(
                    forward.rotate(
                        forward.normalise_heads(heads, norm, spec), *context.rope_tables, context.rope
                    )
                    for heads, norm in ((q, layer.q_norm), (k, layer.k_norm))
                ),
                v,
            ]
            # What each receiver hears is its own, though heads may share what it is made of.
            heard = [
                part.repeat_interleave(self.nodes.heads(reads) // part.shape[2], 2)
                for reads, part in enumerate(turned)
            ]
            if self.relp:
                assert attended.pattern is not None
                attn_out = relp_attention(attended.pattern, heard[V], layer, spec)[1]
            else:
                z = forward.attend(heard[Q], heard[K], heard[V], context.scores, context.fork)
                attn_out = forward.spoken(forward.linear(z.flatten(-2), layer.out), layer.post1, spec)
            slopes = torch.autograd.grad(attn_out, heard, slope, allow_unused=self.relp)

        def of(receiver: Receiver) -> Tensor:
            reads, head = receiver.reads, receiver.head
            own = head * read[reads].shape[2] // slopes[reads].shape[2]
            alone = torch.zeros_like(turned[reads])
            alone[:, :, own] = slopes[reads][:, :, head]
            (before,) = torch.autograd.grad(turned[reads], read[reads], alone, retain_graph=True)
            # A norm of all heads together moves the others with this one.
            part = slice(None) if spec.qk_norm == "width" and reads != V else slice(own, own + 1)
            behind = before[:, :, part].flatten(2) @ weights[reads][:, part].flatten(1).t()
            (found,) = torch.autograd.grad(normed, start, behind, retain_graph=True)
            return found

        return of

    def _mlp(self, x: Tensor, layer: LayerWeights, attn_out: Tensor, slope: Tensor) -> Tensor:
        """The gradient in what the MLP reads, [pair, T, d_model]; slope is that in mlp_out."""
        spec = self.spec
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            if self.relp:
                out = relp_mlp(start if spec.parallel else start + attn_out, layer, spec)[1]
            else:
                out = forward.mlp(start, attn_out, layer, spec).mlp_out
            (found,) = torch.autograd.grad(out, start, slope)
        return found
