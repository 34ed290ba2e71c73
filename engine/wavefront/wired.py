"""Wired runs: rows in which every receiver reads a stream of its own, added up from what its edges carry.

A row keeps the difference that each sender adds, (own - base), and meets that which the source brings. At
each layer (1) every head's queries, keys and values, and then the MLP, read the sum of what their edges
carry; (2) what they say then is kept for those behind them. Where there is a norm behind attention, the
heads of a layer are added up before it: once for each distinct set of them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.wavefront.block import BlockStep, Layer
from deltapatch.engine.wavefront.layers import Layers
from deltapatch.engine.wavefront.prompts import EMBEDDING, Prompts
from deltapatch.engine.wavefront.readout import ReadOut
from deltapatch.engine.wavefront.reads import Reads, RowReads
from deltapatch.engine.wavefront.setup import PassResult, Setup
from deltapatch.engine.wavefront.unpatched import Unpatched
from deltapatch.interventions.table import PatchTable
from deltapatch.interventions.wirings import Wirings
from deltapatch.kernels.attention import QKV, AttentionBase
from deltapatch.kernels.device import upload
from deltapatch.kernels.norm import Norms, norm_difference
from deltapatch.kernels.product import Precision
from deltapatch.kernels.segments import Segment
from deltapatch.models import forward
from deltapatch.models.model_weights import PassWeights

_CELLS = 1 << 22  # numbers of the streams that receivers of some rows read, at a time


def wired_workspace(precision: Precision) -> int:
    """Bytes that the rows of a thread take while their receivers read."""
    return 6 * _CELLS * precision.base.itemsize


class _Behind(NamedTuple):
    """The norm behind a layer's attention: what it reads in the base runs, and what it multiplies by."""

    raw: Tensor  # [base token, d_model]
    weight: Tensor  # [d_model]


class _Run(NamedTuple):
    """The rows of one pair."""

    pair: int
    rows: np.ndarray  # their numbers
    start: int  # the first position that can change
    own: Tensor  # [position, row, sender, d_model]


class WiredPass:
    """One pass of wired runs.

    Args:
        setup: what it is carried out with; all is computed in the dtype of the base runs.
        prompts: base and source prompts of the pairs in the pass.
        table: the runs, with pairs counted within the pass.
        wirings: what `index` of the table counts.
        measured: which of `metrics.MEASURED` to return.
        tick: called with the row-layers done.
    """

    def __init__(
        self,
        setup: Setup,
        prompts: Prompts,
        table: PatchTable,
        wirings: Wirings,
        measured: tuple[str, ...],
        tick: Callable[[int], None] = lambda n: None,
    ) -> None:
        pool = setup.pool.of_blocks(len(np.unique(table.pair)))  # which takes the rows of a pair together
        self.setup = replace(setup, precision=setup.precision.exact, pool=pool)
        self.model, self.spec = setup.model, setup.model.spec
        self.prompts, self.table, self.measured, self.tick = prompts, table, measured, tick
        self.shapes, self.wirings, self.nodes = prompts.shapes, wirings.wirings, wirings.nodes
        self.row_reads = RowReads(Reads(self.shapes, prompts.targets), table.pair, measured)
        self.exact, self.dtype = setup.precision.exact, setup.precision.base
        self.behind: list[_Behind] = []

    @torch.no_grad()
    def run(self) -> PassResult:
        """Carry every run from the embedding to the read-out."""
        with self.model.reading() as read:
            x, dx, rows = self._through_layers(read)
            ends = read.ends()
        by_row, unpatched = ReadOut(self.setup, self.prompts).read(ends, x, dx, rows, self.row_reads)
        return PassResult(dict(zip(self.measured, by_row, strict=True)), unpatched)

    def _through_layers(self, read: PassWeights) -> tuple[Tensor, Tensor, Tensor]:
        """After the last layer: the unpatched runs, x and dx, and the rows' differences where read."""
        embed = partial(self.model.embed, dtype=self.dtype)
        x = self.prompts.embed(embed, with_positions=self.spec.learned_positions)
        dx = self.prompts.embed_source_difference(embed)
        source = x.new_zeros(self.shapes.n_tokens, self.nodes.n_senders, self.spec.d_model)
        at = upload(self.prompts.source_token(np.arange(self.shapes.n_tokens)), x.device)
        source[:, 0] = self.prompts.delta(x, dx, EMBEDDING)[at]
        runs = self._runs(x)

        layers = Layers(self.setup, self.prompts, Unpatched(self.setup, self.prompts))
        every = layers.of(read, x, dx, lambda l: ["z", "mlp_out"], lambda l: 0)
        for l in range(self.spec.n_layers):
            ready = next(every)
            x, dx, here = ready.x, ready.dx, ready.here
            first, mlp = self.nodes.attention(l), self.nodes.mlp(l)
            source[:, first:mlp] = self._said_by_heads(ready.deltas["z"][at], here)
            source[:, mlp] = ready.deltas["mlp_out"][at]
            if self.spec.post_norm:
                assert here.base.attn_raw is not None
                assert here.norms.post1 is not None
                self.behind.append(_Behind(here.base.attn_raw, here.norms.post1))
            # In the last layer too all positions are carried.
            here = replace(here, last=False)
            self.setup.pool(partial(self._layer, l=l, layer=here, source=source), runs)
            del ready
        end = x.new_empty(self.row_reads.n_tokens, self.spec.d_model)
        logits = slice(len(self.nodes.receivers) - 1, len(self.nodes.receivers))
        for run in runs:
            reads = int(self.shapes.reads[run.pair])
            read_by = self._streams(run, source, logits, self.nodes.n_senders)[-reads:, :, 0]
            lines = self.row_reads.first[run.rows] + np.arange(reads)[:, None]  # [read, row]
            end[upload(self.row_reads.place[lines].ravel(), end.device)] = read_by.flatten(0, 1)
        return x, dx, end

    def _runs(self, like: Tensor) -> list[_Run]:
        """The rows of each pair, some at a time, with room for what their senders say."""
        out = []
        for pair in np.unique(self.table.pair).tolist():
            rows = np.flatnonzero(self.table.pair == pair)
            start = int(self.table.position[rows[0]])
            positions = int(self.shapes.length[pair]) - start
            widest = positions * 3 * self.spec.n_heads * self.spec.d_model
            for some in np.array_split(rows, -(-len(rows) * widest // _CELLS)):
                own = like.new_zeros(positions, len(some), self.nodes.n_senders, self.spec.d_model)
                out.append(_Run(pair, some, start, own))
        return out

    def _layer(self, run: _Run, l: int, layer: Layer, source: Tensor) -> None:
        """Take the rows of a pair through a layer."""
        heads = self.spec.n_heads
        first, mlp = self.nodes.attention(l), self.nodes.mlp(l)
        receiver = l * (3 * heads + 1)
        n_positions, n_rows = run.own.shape[:2]
        streams = self._streams(run, source, slice(receiver, receiver + 3 * heads), first)
        z = self._heard(run, layer, streams)  # [position, row, head, d_head]
        run.own[:, :, first:mlp] = self._said_by_heads(z.flatten(0, 1), layer).view(
            n_positions, n_rows, heads, -1
        )
        before = self.nodes.before(self.nodes.receivers[f"m{l}"])
        stream = self._streams(run, source, slice(receiver + 3 * heads, receiver + 3 * heads + 1), before)
        step = self._step(run, layer, n_rows)
        run.own[:, :, mlp] = step.said_by_mlp(stream.flatten(0, 2)).view(n_positions, n_rows, -1)
        self.tick(n_positions * n_rows if l else 0)

    def _step(self, run: _Run, layer: Layer, rows: int) -> BlockStep:
        """For as many rows of a run's pair."""
        shape = self.shapes.runs[run.pair]
        base, positions = int(self.shapes.base[run.pair]), shape.length - run.start
        whole = Segment(0, 1, positions, rows, base, shape.length, shape.reads, shape.fork)
        return BlockStep(layer, [whole], {})

    def _streams(self, run: _Run, source: Tensor, receivers: slice, senders: int) -> Tensor:
        """What some receivers read, [position, row, receiver, d_model], of the first so many senders."""
        base, length = int(self.shapes.base[run.pair]), int(self.shapes.length[run.pair])
        positions, prompt = range(run.start, length), int(self.shapes.prompt[run.pair])
        numbers = self.table.index[run.rows].tolist()
        weights = np.stack(
            [self.wirings[i].weights(receivers, senders, positions, prompt) for i in numbers], 2
        )  # [2, position, row, receiver, sender]
        theirs = source[base + run.start : base + length, :senders]  # [position, sender, d_model]
        own = run.own[:, :, :senders]
        if not self.spec.post_norm:
            return self._sums(weights, own, theirs)
        # Heads are added up layer by layer, before the norm behind them; all else as it is.
        heads = np.zeros(senders, dtype=bool)
        total: Tensor | None = None
        for l, behind in enumerate(self.behind):
            some = slice(self.nodes.attention(l), self.nodes.mlp(l))
            if some.start >= senders:
                break
            heads[some] = True
            said = self._behind(run, weights[..., some], own[:, :, some], theirs[:, some], behind)
            total = said if total is None else total.add_(said)
        rest = np.flatnonzero(~heads)
        at = upload(rest, own.device)
        other = self._sums(weights[..., rest], own[:, :, at], theirs[:, at])
        return other if total is None else total.add_(other)

    def _sums(self, weights: np.ndarray, own: Tensor, theirs: Tensor) -> Tensor:
        """What edges carry, added up: [position, row, receiver, d_model]."""
        carry = upload(weights, own.device).to(own.dtype)
        out = torch.matmul(carry[0], own)
        positions, rows, receivers, senders = carry.shape[1:]
        if weights[1].any():
            flat = carry[1].reshape(positions, rows * receivers, senders)
            out += torch.bmm(flat, theirs).view_as(out)
        return out

    def _behind(self, run: _Run, weights: np.ndarray, own: Tensor, theirs: Tensor, behind: _Behind) -> Tensor:
        """The same of the heads of one layer, behind the norm of what they say together."""
        kinds, positions, rows, receivers, heads = weights.shape
        each = weights.transpose(2, 3, 0, 1, 4).reshape(rows, receivers, -1)
        distinct, which = np.unique(each.reshape(rows * receivers, -1), axis=0, return_inverse=True)
        which = which.reshape(rows, receivers)
        n = len(distinct)
        sets = distinct.reshape(n, kinds, positions, heads).transpose(1, 2, 0, 3)  # [2, position, set, head]
        wide = np.broadcast_to(sets[:, :, None], (kinds, positions, rows, n, heads))
        raw = self._sums(np.ascontiguousarray(wide), own, theirs)  # [position, row, set, d_model]
        norms = Norms(behind.raw, [behind.weight], self.spec.norm_eps, self.spec.norm == "layer")
        shape = self.shapes.runs[run.pair]
        segment = Segment(
            0, 1, positions, rows * n, int(self.shapes.base[run.pair]), shape.length, shape.reads, shape.fork
        )
        normed = norm_difference(raw.flatten(0, 2), norms, [segment])[0].view_as(raw)
        if self.spec.residual_scale != 1:
            normed *= self.spec.residual_scale
        place = upload(np.arange(rows)[:, None], raw.device), upload(which, raw.device)
        return normed[:, place[0], place[1]]

    def _heard(self, run: _Run, layer: Layer, streams: Tensor) -> Tensor:
        """Difference of z, [position, row, head, d_head], of heads that each read streams of their own.

        Args:
            streams: [position, row, (q of every head, k, v), d_model].
        """
        spec, base = self.spec, layer.base
        positions, rows, heads = *streams.shape[:2], spec.n_heads
        group = heads // spec.n_kv_heads
        kv = torch.arange(heads, device=streams.device) // group  # [head], its key-value head
        normed = self._step(run, layer, rows * 3 * heads).read_by_attention(streams.flatten(0, 2))
        q_in, k_in, v_in = normed.view(positions, rows, 3, heads, -1).unbind(2)
        weights = forward.split_qkv(
            [part.values.T for part in layer.weights.qkv], spec
        )  # [d_model, head, ...]
        q_weight, k_weight, v_weight = (w if w.shape[1] == heads else w[:, kv] for w in weights)
        if spec.qk_norm == "width":
            # Every head norms a whole projection of its own, and takes its part.
            step = self._step(run, layer, rows * heads)
            d = []
            for place, read, weight, of in (("q", q_in, weights[0], None), ("k", k_in, weights[1], kv)):
                whole = torch.einsum("prhd,dgc->prhgc", read, weight)
                behind = step.before_rotary(place, whole.flatten(0, 2)).view_as(whole)
                at = torch.arange(heads, device=streams.device)
                d.append(behind[:, :, at, at if of is None else of])
            dq, dk = (part.flatten(0, 1) for part in d)
        else:
            step = self._step(run, layer, rows)
            dq, dk = (
                step.before_rotary(place, torch.einsum("prhd,dhc->prhc", read, weight).flatten(0, 1), index)
                for place, read, weight, index in (("q", q_in, q_weight, None), ("k", k_in, k_weight, kv))
            )
        dv = torch.einsum("prhd,dhc->prhc", v_in, v_weight).flatten(0, 1)
        z = layer.ops.attention_difference(
            QKV(dq, dk, dv, None),
            AttentionBase(base.q_rotated, base.k_rotated[:, kv], base.v[:, kv], layer.rotary, *layer.scores),
            self._step(run, layer, rows).segments,
            {},
            self.exact,
            reads_only=False,
        )
        return z.plain().view(positions, rows, heads, -1)

    def _said_by_heads(self, z: Tensor, layer: Layer) -> Tensor:
        """What each head adds, before the norm behind attention: z [token, head, d_head]."""
        out = layer.weights.out.values.unflatten(1, (-1, self.spec.d_head))  # [d_model, head, d_head]
        raw = torch.einsum("thc,dhc->thd", z, out)
        scaled = self.spec.residual_scale != 1 and not self.spec.post_norm
        return raw * self.spec.residual_scale if scaled else raw
