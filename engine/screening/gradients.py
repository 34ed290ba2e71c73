"""Gradients of what the logits say, layer by layer from the last: each block is computed again.

All that has to be kept of a run is what enters each layer, and weights are needed one layer at a time. The
forward is the plain one of `models/forward.py`, and derivatives are PyTorch's.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from deltapatch.engine.wavefront.layout import PairShapes
from deltapatch.engine.wavefront.reads import Reads
from deltapatch.engine.wavefront.setup import Setup
from deltapatch.interventions.runs import NONE
from deltapatch.kernels.attention import Rotary
from deltapatch.kernels.device import upload
from deltapatch.kernels.segments import Segment
from deltapatch.models import forward
from deltapatch.models.spec import ModelSpec
from deltapatch.models.weights import EndWeights, LayerWeights, Norm, constant, map_tensors

_LOGITS = 1 << 24  # that exist at once
_AFTER = ("mlp_out", "resid_post")  # whose gradient is that of what leaves the block


class Backward:
    """Takes gradients back through the runs of some pairs.

    Args:
        setup: what the pass is carried out with.
        shapes: of the runs.
        relp: take back, in place of derivatives, the coefficients of relevance propagation (RelP, arXiv
            2508.21258): see `relp_block`.
    """

    def __init__(self, setup: Setup, shapes: PairShapes, *, relp: bool = False) -> None:
        self.spec, self.shapes, self.relp = setup.model.spec, shapes, relp
        self.block_tokens, self.pool = setup.ops.block_tokens, setup.pool

    def of_logits(self, x: Tensor, ends: EndWeights, reads: Reads, answers: tuple[float, float]) -> Tensor:
        """The gradient of answers[0] log P(clean answer) + answers[1] log P(corrupted answer) of each pair.

        Args:
            x: [base token, d_model], after the last layer.

        Returns:
            [base token, d_model].
        """
        out = torch.zeros_like(x)
        token, targets = upload(reads.token, x.device), upload(reads.any, x.device)
        weight = torch.tensor(answers, dtype=x.dtype, device=x.device)
        held = constant(ends)
        step = max(1, _LOGITS // len(ends.unembedding.weight))

        def back(piece: slice) -> None:
            with torch.enable_grad():
                here = x[token[piece]].requires_grad_()  # [read, d_model]
                said = log_probabilities(self._logits(here, held), targets[piece])
                (out[token[piece]],) = torch.autograd.grad((said @ weight).sum(), here)

        self.pool(back, [slice(a, a + step) for a in range(0, len(token), step)])
        return out

    def through(
        self,
        x: Tensor,
        slope: Tensor,
        layer: LayerWeights,
        at: tuple[int, Rotary],
        places: Collection[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Back through one layer.

        Args:
            x: [base token, d_model], before it.
            slope: [base token, d_model], the gradient in what is after it.
            layer: its weights, in x's dtype.
            at: its number, and its rotary embedding for every base token.
            places: whose gradients are wanted.

        Returns:
            The gradient in x, and by place: [base token, ...], of attention probabilities
            [base token, head, token].
        """
        before = torch.empty_like(x)
        widths = forward.widths(self.spec, int(self.shapes.length.max()))
        found = {p: slope if p in _AFTER else x.new_zeros(len(x), *widths[p]) for p in places}
        held = constant(layer)

        def back(segment: Segment) -> None:
            mine = slice(segment.base, segment.base + segment.pairs * segment.length)
            slopes = self._piece(segment, x, slope, held, at, places)
            before[mine] = slopes.pop("resid_pre").flatten(0, 1)
            for place, value in slopes.items():
                to = found[place][mine]
                if place == "pattern":  # as many keys as its own run has tokens
                    to = to[..., : value.shape[-1]]
                to.copy_(value.flatten(0, 1))

        self.pool(back, self.shapes.segments(1, self.block_tokens))
        return before, found

    def _piece(
        self,
        segment: Segment,
        x: Tensor,
        slope: Tensor,
        layer: LayerWeights,
        at: tuple[int, Rotary],
        places: Collection[str],
    ) -> dict[str, Tensor]:
        """The gradients in a segment, [pair, T, ...], by place; `resid_pre` is that in x."""
        spec, context = self.spec, context_of(self.spec, segment, at)
        # resid_mid moves as attn_out does; attention probabilities act through z.
        asked = {p: {"resid_mid": "attn_out", "pattern": "z"}.get(p, p) for p in places if p not in _AFTER}
        with torch.enable_grad():
            before = segment.run(x).detach().requires_grad_()
            block = (relp_block if self.relp else forward.block)(before, layer, context)
            names = sorted(set(asked.values()))
            inside = [getattr(block, name) for name in names]
            own, *rest = torch.autograd.grad(block.resid_post, [before, *inside], segment.run(slope))
        by_name = dict(zip(names, rest, strict=True))
        found = {place: by_name[name] for place, name in asked.items()}
        if "pattern" in found:
            values = block.v.detach().repeat_interleave(spec.n_heads // spec.n_kv_heads, 2)
            found["pattern"] = torch.einsum("bthc,bshc->bths", found["pattern"], values)
        return found | {"resid_pre": own}

    def _logits(self, x: Tensor, ends: EndWeights) -> Tensor:
        """[read, d_vocab] of [read, d_model]."""
        if not self.relp:
            return forward.readout(x, ends, self.spec)
        norm = map_tensors(ends.norm, lambda t: t.to(x.dtype))
        return forward.unembed(held_norm(x, norm, self.spec) * self.spec.logit_scale, ends, self.spec)


def log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """What the reads say of both answers, [read, 2]; 0 where an answer does not go on from there.

    Args:
        logits: [read, d_vocab].
        targets: [read, 2, token], the next tokens that count as an answer's, NONE where there are fewer.
    """
    there = targets != NONE
    goes_on = there.any(-1)
    counts = there | ~goes_on.unsqueeze(-1)
    picked = logits.log_softmax(-1).unsqueeze(1).expand(-1, 2, -1).gather(2, targets.clamp(min=0))
    said = picked.masked_fill(~counts, -torch.inf).logsumexp(-1)
    return torch.where(goes_on, said, 0)


def context_of(spec: ModelSpec, segment: Segment, at: tuple[int, Rotary]) -> forward.LayerContext:
    """What the forward of a segment's runs through a layer needs; `at` as of `Backward.through`."""
    number, rotary = at
    tables = segment.run(rotary.cos)[0], segment.run(rotary.sin)[0]  # those of all its pairs
    return forward.LayerContext(spec, spec.scores(number), spec.rope_of(number), tables, segment.fork)


def relp_block(x: Tensor, layer: LayerWeights, context: forward.LayerContext) -> forward.Activations:
    """`forward.block`, of which parts are held constant, so that what it says is shared out linearly.

    Those are the scales of norms, attention probabilities, and of an activation function what it multiplies
    by, act(u) / u. Of a product of gate and neuron each has half.
    """
    spec = context.spec
    plain = forward.attention(x.detach(), layer, context, pattern=True)
    assert plain.pattern is not None
    v = forward.project_qkv(held_norm(x, layer.norm1, spec), layer, spec)[2]
    z, attn_out = relp_attention(plain.pattern, v, layer, spec)
    mlp_post, mlp_out = relp_mlp(x if spec.parallel else x + attn_out, layer, spec)
    found = {"v": v, "z": z, "attn_out": attn_out, "mlp_post": mlp_post, "mlp_out": mlp_out}
    none = dict.fromkeys(forward.Activations._fields)
    return forward.Activations(**none | found | {"resid_post": x + attn_out + mlp_out})  # type: ignore[arg-type]


def relp_attention(pattern: Tensor, v: Tensor, layer: LayerWeights, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """z and attn_out of `relp_block`.

    Args:
        pattern: [B, T, n_heads, T], the attention probabilities.
        v: [B, T, heads, d_head], of key-value heads or of query heads.
    """
    z = torch.einsum("bths,bshc->bthc", pattern, v.repeat_interleave(spec.n_heads // v.shape[2], 2))
    return z, held_norm(forward.linear(z.flatten(-2), layer.out), layer.post1, spec) * spec.residual_scale


def relp_mlp(x: Tensor, layer: LayerWeights, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """mlp_post and mlp_out of `relp_block`, of what the MLP reads, before its norm."""
    normed = held_norm(x, layer.norm1 if spec.shared_norm else layer.norm2, spec)
    up = forward.linear(normed, layer.up)
    if layer.gate is None:
        mlp_post = _held_activation(up, spec)
    else:
        gate = _held_activation(forward.linear(normed, layer.gate), spec)
        mlp_post = (gate * up.detach() + gate.detach() * up) / 2
    out = held_norm(forward.linear(mlp_post, layer.down), layer.post2, spec)
    return mlp_post, out * spec.residual_scale


def _held_activation(u: Tensor, spec: ModelSpec) -> Tensor:
    """The activation function as a linear map: u times act(u) / u, which is constant."""
    held = torch.where(u == 0, 1e-6, u.detach())
    return u * (forward.activation(spec.activation)(held) / held)


def held_norm(x: Tensor, norm: Norm | None, spec: ModelSpec) -> Tensor:
    """`forward.normalise` as a linear map: its scale is that of x, and constant."""
    if norm is None:
        return x
    if spec.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.norm_eps).detach()
    y = x * scale * forward.norm_scale(norm, spec)
    return y if norm.bias is None else y + norm.bias
