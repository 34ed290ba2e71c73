"""One layer for one block of rows: where the swaps sit, and which products rows that enter here can skip."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from deltapatch.engine.wavefront.products import ProductWeights
from deltapatch.engine.wavefront.rows import HEADS, MIDDLE, MLP, WHOLE
from deltapatch.kernels.activation import Neurons
from deltapatch.kernels.attention import QKV, AttentionBase, Rotary, edited_heads
from deltapatch.kernels.backend import Backend
from deltapatch.kernels.edits import Edit, Transcode, apply_edits, within
from deltapatch.kernels.norm import Norms, Part
from deltapatch.kernels.product import Operand, Precision, Scaled, narrow, product
from deltapatch.kernels.segments import Segment, cut_segments, keep_reads, read_segments
from deltapatch.models import forward
from deltapatch.models.spec import ModelSpec, RopeSpec, Scores
from deltapatch.models.weights import LayerWeights

Edits = Mapping[str, Sequence[Edit]]  # place -> the patches there


class BlockNorms(NamedTuple):
    """What the norms of a block multiply by, as `LayerWeights` has them; None where there is none."""

    norm1: Tensor | None
    norm2: Tensor | None
    post1: Tensor | None
    post2: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None


def block_norms(layer: LayerWeights, spec: ModelSpec) -> BlockNorms:
    """Those of a layer."""
    norms = [getattr(layer, name) for name in BlockNorms._fields]
    return BlockNorms(*(None if norm is None else forward.norm_scale(norm, spec) for norm in norms))


@dataclass(frozen=True)
class Layer:
    """What every block of rows meets in one layer.

    Attributes:
        spec, ops: the model and the operations.
        rope: the layer's rotary embedding.
        scores: how scores become probabilities.
        precision: of the products of differences.
        weights: the matrices of these products, in that precision.
        norms: what they multiply by, in the dtype of the base runs.
        down: [d_model, d_mlp] in that dtype, for neurons that enter here; None where none do.
        base: activations of the base runs, [base token, ...].
        rotary: for every base token.
        last: after this layer's attention only the positions that are read go on.
    """

    spec: ModelSpec
    ops: Backend
    rope: RopeSpec
    scores: Scores
    precision: Precision
    weights: ProductWeights
    norms: BlockNorms
    down: Tensor | None
    base: forward.Activations
    rotary: Rotary
    last: bool


T = TypeVar("T")
# What asks for its products: it yields a difference and a matrix, and is sent their product.
Steps = Generator[tuple[Scaled, Operand], Scaled, T]


class BlockStep:
    """One block of rows on its way through one layer.

    A difference that is zero in all rows is None: rows that enter at a later stage skip the products before.

    Args:
        layer: what it meets.
        segments: where its rows lie.
        swaps: its patches in this layer. In the last layer, those after the attention count what goes on.
        capture: place -> what receives the difference there, [token, ...]; there are no swaps then.
    """

    def __init__(
        self,
        layer: Layer,
        segments: list[Segment],
        swaps: Edits,
        capture: dict[str, Tensor] | None = None,
    ) -> None:
        self.layer, self.segments, self.swaps, self.capture = layer, segments, swaps, capture

    def run(self, dx: Tensor | None, stage: int, out: Tensor, to: Tensor | None) -> None:
        """`steps`, each product by itself."""
        forward.carry_out(self.steps(dx, stage, out, to), product)

    def steps(self, dx: Tensor | None, stage: int, out: Tensor, to: Tensor | None) -> Steps[None]:
        """Write the rows' difference after the layer, [token, d_model]; after the last one where it is read.

        Args:
            dx: [token, d_model], the difference before the layer; None for rows that enter in it. Those of
                edges bring that of z, [token, n_heads * d_head], or of what the MLP reads: in the last layer
                where it is read.
            stage: where they enter; WHOLE for rows that are in flight.
            out: [any, d_model], receives the difference at
            to: [token] int64, these lines; None: the first ones, in order.
        """
        layer = self.layer
        # What adds up to the residual stream.
        stream = [Part(Scaled(dx, None), [])] if dx is not None and stage == WHOLE else []
        normed: Scaled | None = None  # what attention reads
        mlp_input: Scaled | None = None
        if stage == WHOLE:
            assert dx is not None
            second = layer.norms.norm2 if layer.spec.parallel else None
            normed, *other = self._read_by_attention(stream, dx, second)
            mlp_input = other[0] if other else normed
        z: Scaled | None = None
        if stage < HEADS:
            z = yield from self._attention(normed)
        elif stage == HEADS:
            assert dx is not None
            z = narrow(dx, layer.precision)
        if layer.last and stage <= MLP:
            stream = [Part(self._keep_reads(part.d), []) for part in stream]
            mlp_input = self._keep_reads(mlp_input)
            self.segments = read_segments(self.segments)
        before_mlp = stream[0] if stream else None  # of parallel blocks what the MLP reads, before its norm
        attn_out = None if z is None else (yield from self._said_by_attention(z))
        stream.append(self._part("attn_out", attn_out))

        through_mlp = stage in (WHOLE, MLP)
        if stage == MLP:
            assert dx is not None
            mlp_input = self._read_by_mlp(dx)
        elif not layer.spec.parallel:
            through_mlp = stage <= MIDDLE
            if through_mlp:
                mid = torch.empty(self._n_tokens, layer.spec.d_model, dtype=out.dtype, device=out.device)
                normed_mid = self._add_norm(
                    stream, "resid_mid", layer.base.resid_mid, [layer.norms.norm2], mid
                )
                mlp_input = normed_mid[0] if normed_mid else narrow(mid, layer.precision)
                self._note("resid_mid", mid)
                stream = [Part(Scaled(mid, None), [])]
                before_mlp = stream[0]
        said = (yield from self._mlp(mlp_input)) if through_mlp else self._neurons()
        self._hear(before_mlp)
        stream.append(self._part("mlp_out", self.spoken("mlp_out", said)))
        self._add_norm(stream, "resid_post", None, [], out, to)

    def heard(self, message: Tensor, by: Sequence[int]) -> list[Tensor]:
        """Differences of z, [token, n_heads * d_head], where heads hear a message, in one thing they read.

        Args:
            message: [token, d_model], what is added to what they read.
            by: 0 for their queries, 1 for keys, 2 for values: one result each, of all heads, none of which
                hears what another does. In the last layer where it is read.
        """
        normed = self._read_by_attention([Part(Scaled(message, None), [])], message, None)[0]
        changes, _ = forward.carry_out(self._changes(normed), product)
        out = []
        for which in by:
            q, k, v = (d if i == which else self._zeros(d) for i, d in enumerate(changes[:3]))
            out.append(self._attend(QKV(q, k, v, changes.scale), {}).plain())
        return out

    def said(self, dx: Tensor, stage: int) -> Tensor:
        """What a receiver adds to the residual stream at what is read, [token, d_model].

        Args:
            dx: that rows of edges bring, as `run` takes it in the last layer.
            stage: HEADS or MLP.
        """
        self.segments = read_segments(self.segments)
        if stage != HEADS:
            return self.said_by_mlp(dx)
        found = forward.carry_out(self._said_by_attention(narrow(dx, self.layer.precision)), product)
        assert found is not None
        return found.plain()

    def said_by_mlp(self, dx: Tensor) -> Tensor:
        """What the MLP adds to the residual stream, [token, d_model], where it alone reads dx, likewise."""
        found = self.spoken("mlp_out", forward.carry_out(self._mlp(self._read_by_mlp(dx)), product))
        assert found is not None
        return found.plain()

    def read_by_attention(self, dx: Tensor) -> Tensor:
        """Difference behind the norm of what attention reads, [token, d_model]."""
        return self._read_by_attention([Part(Scaled(dx, None), [])], dx, None)[0].plain()

    def before_rotary(self, place: str, d: Tensor, heads: Tensor | None = None) -> Tensor:
        """Difference of queries or keys as they turn, [token, head, d_head], from that of their projection.

        Args:
            place: "q" or "k".
            heads: [head], which of the base run's each belongs to; by default as there.
        """
        base, weight = getattr(self.layer.base, place), getattr(self.layer.norms, f"{place}_norm")
        if base is not None and heads is not None:
            base = base[:, heads]
            weight = weight[heads] if self.layer.spec.qk_norm == "each" else weight
        return self._before_rotary(place, d, None, base, weight)

    def _read_by_attention(self, stream: list[Part], dx: Tensor, second: Tensor | None) -> list[Scaled]:
        """Differences behind the norm of what attention reads, dx, and behind a second norm of it."""
        layer = self.layer
        if layer.norms.norm1 is None:
            return [narrow(dx, layer.precision)]
        return self._add_norm(stream, "", layer.base.resid_pre, [layer.norms.norm1, second])

    def _read_by_mlp(self, dx: Tensor) -> Scaled:
        """Difference behind the norm of what the MLP alone reads."""
        layer, norms = self.layer, self.layer.norms
        norm = norms.norm1 if layer.spec.shared_norm else norms.norm2
        if norm is None:
            return narrow(dx, layer.precision)
        base = layer.base.resid_pre if layer.spec.parallel else layer.base.resid_mid
        (normed,) = self._add_norm([Part(Scaled(dx, None), [])], "", base, [norm])
        return normed

    def _said_by_attention(self, z: Scaled) -> Steps[Scaled | None]:
        """Difference of attn_out, [token, d_model], from that of z."""
        return self.spoken("attn_out", (yield z, self.layer.weights.out))

    @property
    def _n_tokens(self) -> int:
        return sum(s.n_tokens for s in self.segments)

    def _attention(self, normed: Scaled | None) -> Steps[Scaled]:
        """Difference of z, [token, n_heads * d_head], from that of the attention's input, if there is one."""
        if normed is None and not self.swaps.keys() & {"q", "k", "v", "pattern"}:
            return self._heads()
        changes, places = yield from self._changes(normed)
        z = self._attend(changes, {place: self.swaps[place] for place in places if place in self.swaps})
        self._note("z", z.values.unflatten(-1, (self.layer.spec.n_heads, self.layer.spec.d_head)))
        return z

    def _heads(self) -> Scaled:
        """The same for rows whose attention reads no change and whose heads are patched: no scores."""
        layer = self.layer
        segments = read_segments(self.segments) if layer.last else self.segments
        shape = sum(s.n_tokens for s in segments), layer.spec.n_heads, layer.spec.d_head
        z = layer.base.q_rotated.new_zeros(shape)
        apply_edits(z, self.swaps.get("z", []))
        return narrow(z.flatten(1), layer.precision)

    def _changes(self, normed: Scaled | None) -> Steps[tuple[QKV, list[str]]]:
        """What attention takes, from its input's change, if there is one, and which edits it does itself."""
        layer, base, spec = self.layer, self.layer.base, self.layer.spec
        scale = None
        if normed is not None:
            parts: list[Scaled] = []
            for weight in layer.weights.qkv:
                parts.append((yield normed, weight))
            q, k, v = forward.split_qkv([part.values for part in parts], spec)
            scale = parts[0].scale
        else:
            q, k, v = (self._zeros(b) for b in (base.q_rotated, base.k_rotated, base.v))
        for place, d in (("q", q), ("k", k), ("v", v)):
            self._note(place, d)
        places = ["q", "k", "v", "pattern", "z"]
        if spec.qk_norm != "none" or layer.rope.attention_factor != 1:
            # What happens to them before they turn. The operation does all else, their edits too.
            q = self._before_rotary("q", q, scale, base.q, layer.norms.q_norm)
            k = self._before_rotary("k", k, scale, base.k, layer.norms.k_norm)
            v = edited_heads(v, scale, [])
            places, scale = places[2:], None
        return QKV(q, k, v, scale), places

    def _attend(self, changes: QKV, edits: Edits) -> Scaled:
        """Difference of z, [token, n_heads * d_head]."""
        layer, base = self.layer, self.layer.base
        return layer.ops.attention_difference(
            changes,
            AttentionBase(base.q_rotated, base.k_rotated, base.v, layer.rotary, *layer.scores),
            self.segments,
            edits,
            layer.precision,
            reads_only=layer.last,
            pattern=None if self.capture is None else self.capture.get("pattern"),
        )

    def _before_rotary(
        self, place: str, d: Tensor, scale: Tensor | None, base: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        """Difference of queries or keys behind norm and attention factor, from that of the projection.

        Edits are carried out.

        Args:
            place: "q" or "k".
            d: [token, head, d_head]; one line may stand for all tokens, where nothing has changed yet.
            scale: [token], times which it is the difference; None: all ones.
            base: [base token, head, d_head], before the norm; None where there is none.
            weight: [d_head], [head, d_head] or [head * d_head] (see `ModelSpec.qk_norm`); None where there
                is no norm.
        """
        if scale is None and not d.stride(0) and place not in self.swaps:
            return d
        edits, layer, rope = self.swaps.get(place, []), self.layer, self.layer.rope
        if weight is None or base is None:
            d = edited_heads(d, scale, edits)
        else:
            if layer.spec.qk_norm == "width":  # a patch of a head moves all of them
                if edits:
                    d, scale, edits = edited_heads(d, scale, edits), None, []
                d, base = d.flatten(1), base.flatten(1)
            norms = Norms(base, [weight], layer.spec.norm_eps, layer.spec.norm == "layer")
            part = [Part(Scaled(d, scale), edits)]
            (normed,) = layer.ops.add_norm(part, [], norms, self.segments, layer.precision.exact)
            d = normed.values.view(len(normed.values), -1, layer.spec.d_head)
        if rope.attention_factor == 1:
            return d
        return torch.cat([d[..., : rope.dim] * rope.attention_factor, d[..., rope.dim :]], -1)

    def spoken(self, place: str, d: Scaled | None) -> Scaled | None:
        """Difference of what attention or MLP add, [token, d_model], from that of their last product."""
        layer, spec = self.layer, self.layer.spec
        if d is None or (not spec.post_norm and spec.residual_scale == 1):
            return d
        if spec.post_norm:
            base, norms = layer.base, layer.norms
            raw, post = (base.attn_raw, norms.post1) if place == "attn_out" else (base.mlp_raw, norms.post2)
            assert raw is not None
            assert post is not None
            behind = Norms(raw, [post], spec.norm_eps, spec.norm == "layer")
            (d,) = layer.ops.add_norm([Part(d, [])], [], behind, self.segments, layer.precision.exact)
        return d if spec.residual_scale == 1 else Scaled(d.plain() * spec.residual_scale, None)

    def _mlp(self, normed: Scaled | None) -> Steps[Scaled]:
        """Difference of mlp_out, [token, d_model], from that of the MLP's input."""
        assert normed is not None
        n, most = self._n_tokens, self.layer.ops.block_tokens
        swaps = self.swaps.get("mlp_post", [])
        captured = None if self.capture is None else self.capture.get("mlp_post")
        if n <= 2 * most:
            return (yield from self._hidden(normed, self.segments, swaps, captured))
        # Hidden neurons are many, and rows of long prompts are long: some of their tokens at a time.
        out, scale = None, None
        for tokens, segments in cut_segments(self.segments, most):
            some = Scaled(normed.values[tokens], None if normed.scale is None else normed.scale[tokens])
            there = None if captured is None else captured[tokens]
            part = yield from self._hidden(some, segments, within(swaps, tokens), there)
            if out is None:
                out = part.values.new_empty(n, part.values.shape[1])
                scale = None if part.scale is None else part.scale.new_empty(n)
            out[tokens] = part.values
            if scale is not None and part.scale is not None:
                scale[tokens] = part.scale
        assert out is not None
        return Scaled(out, scale)

    def _hidden(
        self, normed: Scaled, segments: list[Segment], swaps: Sequence[Edit], captured: Tensor | None
    ) -> Steps[Scaled]:
        """The same for tokens whose hidden neurons are all held."""
        layer, base = self.layer, self.layer.base
        weights = layer.weights
        up = Neurons((yield normed, weights.up), base.up)
        gate = None
        if weights.gate is not None and base.gate is not None:
            gate = Neurons((yield normed, weights.gate), base.gate)
        post = layer.ops.activation_difference(
            forward.activation(layer.spec.activation),
            up,
            gate,
            segments,
            swaps,
            layer.precision,
        )
        if captured is not None:
            captured.copy_(post.values)
        return (yield post, weights.down)

    def _neurons(self) -> Scaled | None:
        """The same for rows whose MLP input is unchanged and whose neurons are patched: no matrix product."""
        if "mlp_post" not in self.swaps:
            return None
        assert self.layer.down is not None
        columns = self.layer.ops.gather_columns(self.swaps["mlp_post"], self.layer.down, self._n_tokens)
        return Scaled(columns, None)

    def _hear(self, before_mlp: Part | None) -> None:
        """Let transcoders' patches see what arrived before the MLP, [token, d_model], if anything did."""
        edits = self.swaps.get("mlp_out", [])
        if any(isinstance(edit, Transcode) for edit in edits):
            d = before_mlp.d.plain() if before_mlp is not None and before_mlp.d is not None else None
            heard = [e.where(d) if isinstance(e, Transcode) else e for e in edits]
            self.swaps = {**self.swaps, "mlp_out": heard}

    def _part(self, place: str, d: Scaled | None) -> Part:
        """What a place adds to the residual stream."""
        if d is not None:
            self._note(place, d.values)
        return Part(d, self.swaps.get(place, []))

    def _add_norm(
        self,
        stream: list[Part],
        place: str,
        x: Tensor | None,
        norms: list[Tensor | None],
        out: Tensor | None = None,
        to: Tensor | None = None,
    ) -> list[Scaled]:
        """Add up the residual stream, swap at its place, and normalise it."""
        layer = self.layer
        spec, norms_of_it = layer.spec, None
        if x is not None:
            weights = [norm for norm in norms if norm is not None]
            norms_of_it = Norms(x, weights, spec.norm_eps, spec.norm == "layer")
        swaps = self.swaps.get(place, [])
        return layer.ops.add_norm(
            stream,
            swaps,
            norms_of_it,
            self.segments,
            layer.precision,
            out=out,
            to=to,
        )

    def _note(self, place: str, d: Tensor) -> None:
        # Differences are kept for their places in source runs only, which are carried without scales.
        if self.capture is not None and place in self.capture:
            self.capture[place].copy_(d)

    def _keep_reads(self, d: Scaled | None) -> Scaled | None:
        if d is None:
            return None
        scale = None if d.scale is None else keep_reads(d.scale, self.segments)
        return Scaled(keep_reads(d.values, self.segments), scale)

    def _zeros(self, like: Tensor) -> Tensor:
        """A zero difference, [token, ...] with the trailing shape of base activations: one line, repeated."""
        zero = torch.zeros(1, *like.shape[1:], dtype=like.dtype, device=like.device)
        return zero.expand(self._n_tokens, *like.shape[1:])
