"""The wavefront: one loop over layers that carries every row of a pass as a difference from its base run.

At each layer it (1) advances the base run and, as a difference of its own, the source run of every pair,
(2) lets the rows patched here enter where their site sits, (3) advances the rows already in flight.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.block import BlockStep, Layer, Swaps
from deltapatch.engine.layout import Block, Layout, PairShapes, lay_out
from deltapatch.engine.metrics import Direction, Reference
from deltapatch.engine.patches import ATTENTION, END, MIDDLE, PLACE, WHOLE, PatchTable, Rows, make_rows
from deltapatch.engine.products import narrow_layer, taken_in
from deltapatch.engine.readout import ReadOut
from deltapatch.engine.sites import PLACES
from deltapatch.engine.sources import Prompts, source_differences
from deltapatch.engine.workers import Map
from deltapatch.kernels.attention import Rotary
from deltapatch.kernels.backend import Backend
from deltapatch.kernels.device import upload
from deltapatch.kernels.norm import Part
from deltapatch.kernels.product import Precision
from deltapatch.kernels.swap import Swap
from deltapatch.models import forward
from deltapatch.models.model import Model
from deltapatch.models.weights import LayerWeights, cast

_LEAST = 64  # tokens in a block: with fewer, a product does little but read its weights
_SPREAD = 4  # blocks that few tokens are cut into, so that cores share them; not as many as there are cores,
# since effects must not depend on the machine
_ENTRY_STAGES = (ATTENTION, MIDDLE, END)

Tables = dict[int, tuple[Tensor, Tensor]]  # prompt length -> rotary cos and sin, [position, rope.dim // 2]


@dataclass(frozen=True)
class PassResult:
    """What a pass measured, and the pairs' unpatched runs at the read-out position."""

    measured: dict[str, np.ndarray]  # name -> [intervention]
    logit: np.ndarray  # [pair, (base, source), (clean answer, corrupted answer)]
    logp: np.ndarray
    prediction: np.ndarray  # [pair, (base, source)]

    def reference(self, direction: Direction) -> Reference:
        """The unpatched runs as a reader of the results knows them: clean and corrupted."""
        runs = [1, 0] if direction == "denoise" else [0, 1]
        return Reference(self.logit[:, runs], self.logp[:, runs], self.prediction[:, runs])


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


class Wavefront:
    """One pass over the layers for a set of prompts and interventions.

    Args:
        model: the model.
        prompts: base and source prompts of the pairs in the pass, ordered by length.
        table: the interventions, with pairs counted within the pass.
        measured: which of `metrics.MEASURED` to return.
        precision: of the products of differences; base and source runs are carried in its base dtype.
        backend: the operations to use.
        each: does blocks, perhaps side by side (see `workers`).
        tick: called with the row-layers done, block by block.
    """

    def __init__(
        self,
        model: Model,
        prompts: Prompts,
        table: PatchTable,
        measured: tuple[str, ...],
        precision: Precision,
        backend: Backend,
        each: Map,
        tick: Callable[[int], None] = lambda n: None,
    ) -> None:
        self.model, self.spec, self.prompts, self.measured = model, model.spec, prompts, measured
        self.ops, self.each, self.tick = backend, each, tick
        self.n_interventions = table.n_rows
        self.shapes = PairShapes(prompts.length, prompts.base)
        self.rows: Rows = make_rows(table, prompts.length, model.spec)
        self.precision, self.dtype = precision, precision.base
        self.exact = precision.exact

    @torch.no_grad()
    def run(self) -> PassResult:
        """Carry every row from its entry to the read-out."""
        spec, prompts = self.spec, self.prompts
        ends = self.model.ends(self.dtype)
        x = prompts.embed(ends.embedding)  # [base token, d_model]
        dx = prompts.embed_source_difference(ends.embedding, x)  # [source token, d_model]
        tables = {n: self._rope_tables(n) for n in sorted({int(n) for n in prompts.length})}
        rows, layout = self._enter_embedding(x, dx)  # [row token, d_model], the differences in flight
        prepare = partial(self._prepare, tables=tables, rotary=self._rotary(tables))
        ahead = self.each.ahead(partial(prepare, 0, x, dx))
        for l in range(spec.n_layers):
            ready = ahead()
            x, dx = ready.x, ready.dx
            if l + 1 < spec.n_layers:
                ahead = self.each.ahead(partial(prepare, l + 1, x, dx))
            out_layout = self._layout(self.rows.before(l + 1), last=ready.here.last)
            out = x.new_empty(out_layout.n_tokens, spec.d_model)
            parts = [(WHOLE, layout)]
            parts += [(stage, self._layout(self.rows.entering(l, stage))) for stage in _ENTRY_STAGES]
            self._advance(ready, l, parts, rows, out_layout, out)
            rows, layout = out, out_layout
        reader = ReadOut(self.model, prompts, self.shapes, self.measured, self.precision, self.ops, self.each)
        by_row, unpatched = reader.read(ends, x, dx, rows, layout, self.rows.pair)
        # Interventions that cannot reach the read-out have no row: their effect is exactly zero.
        live = self.rows.id_of >= 0
        measured = np.zeros((len(self.measured), self.n_interventions), by_row.dtype)
        measured[:, live] = by_row[:, np.argsort(layout.rows)[self.rows.id_of[live]]]
        return PassResult(
            dict(zip(self.measured, measured, strict=True)),
            unpatched[..., 0:2],
            unpatched[..., 2:4],
            unpatched[..., 4].astype(np.int64),
        )

    # The layers ------------------------------------------------------------------------------------------

    def _prepare(self, l: int, x: Tensor, dx: Tensor, tables: Tables, rotary: Rotary) -> "Ready":
        """Everything that rows meet in a layer: its weights, and the unpatched runs, x and dx before it."""
        stored = self.model.layer(l, None)
        exact = cast(stored, self.model.device, self.dtype)
        base = self._advance_base(x, exact, tables)
        products = narrow_layer(exact, self.exact)
        here = Layer(self.spec, self.ops, self.exact, products, exact, base, rotary, last=False)
        dx, capture = self._advance_sources(dx, here)
        deltas = source_differences(self.prompts, base, capture, self.shapes)
        precision = taken_in(self.precision, self._n_tokens(l), self.model.device)
        if precision is not self.exact:
            here = replace(here, precision=precision, weights=narrow_layer(stored, precision))
        return Ready(replace(here, last=l == self.spec.n_layers - 1), deltas, base.resid_post, dx)

    def _n_tokens(self, l: int) -> int:
        """How many row tokens pass through a layer, or enter in it."""
        rows = np.flatnonzero(self.rows.layer <= l)
        return int((self.prompts.length[self.rows.pair[rows]] - self.rows.start[rows]).sum())

    def _advance_base(self, x: Tensor, layer: LayerWeights, tables: Tables) -> forward.Activations:
        """The plain forward of one block for all pairs: activations [base token, ...]."""
        segments = self.shapes.segments(1, self.ops.block_tokens)
        parts: list[dict[str, Tensor | None]] = [{} for _ in segments]

        def advance(i: int) -> None:
            s = segments[i]
            acts = forward.block(s.prompt(x), layer, self.spec, tables[s.length])
            parts[i] = {name: None if t is None else t.flatten(0, 1) for name, t in acts._asdict().items()}

        self.each(advance, range(len(segments)))
        return forward.Activations(**_join(parts))

    def _advance_sources(self, dx: Tensor, here: Layer) -> tuple[Tensor, dict[str, Tensor]]:
        """The source runs, carried as differences like any row: after the layer, and at every place in it."""
        segments = self.shapes.segments(self.prompts.n_sources, self.ops.block_tokens)
        parts: list[dict[str, Tensor]] = [{} for _ in segments]
        after = torch.empty_like(dx)

        def advance(i: int) -> None:
            s = segments[i]
            mine = slice(s.token, s.token + s.n_tokens)
            BlockStep(here, [replace(s, token=0)], {}, parts[i]).run(dx[mine], WHOLE, after[mine], None)

        self.each(advance, range(len(segments)))
        return after, _join(parts) | {"resid_post": after}

    def _advance(
        self,
        ready: "Ready",
        l: int,
        parts: list[tuple[int, Layout]],
        rows: Tensor,
        out_layout: Layout,
        out: Tensor,
    ) -> None:
        """Advance rows through a layer, block by block, into their places in `out`.

        Args:
            parts: stages, and the rows that enter there; those at WHOLE are in flight, in `rows`.
        """

        def advance(work: tuple[int, Layout, Block]) -> None:
            stage, layout, block = work
            here = ready.here
            ids = layout.rows[block.rows]
            swaps = self._swaps(l, layout, block, ids, ready.deltas, here.last)
            place = _destination(block, ids, out_layout, here.last)
            step = BlockStep(here, block.segments, swaps)
            dx = rows[block.tokens] if stage == WHOLE else None
            if isinstance(place, slice):
                step.run(dx, stage, out[place], None)
            else:
                step.run(dx, stage, out, upload(place, out.device))
            if stage == WHOLE:
                self.tick(block.tokens.stop - block.tokens.start)

        self.each(advance, [(stage, layout, block) for stage, layout in parts for block in layout.blocks])

    # Rows and swaps --------------------------------------------------------------------------------------

    def _layout(self, rows: np.ndarray, last: bool = False) -> Layout:
        """Pack rows; after the last layer each has one token, and those of a pair lie together."""
        start = self.rows.start
        if last:
            start = self.prompts.length[self.rows.pair] - 1
            rows = rows[np.argsort(self.rows.pair[rows], kind="stable")]
        tokens = int((self.prompts.length[self.rows.pair[rows]] - start[rows]).sum())
        # After the last layer the vocabulary is shared among cores instead: see readout.py.
        spread = _SPREAD if self.model.device.type == "cpu" and not last else 1
        n_blocks = max(round(tokens / self.ops.block_tokens), min(spread, tokens // _LEAST), 1)
        return lay_out(rows, self.rows.pair, start, self.shapes, n_blocks)

    def _rope_tables(self, length: int) -> tuple[Tensor, Tensor]:
        cos, sin = forward.rope_tables(self.spec.rope, length, self.dtype, "cpu")
        return upload(cos.numpy(), self.model.device), upload(sin.numpy(), self.model.device)

    def _rotary(self, tables: Tables) -> Rotary:
        """A line of cosines and sines for every base token."""
        parts = [tables[n] for n in self.prompts.length.tolist()]
        cos, sin = (torch.cat([part[i] for part in parts]) for i in range(2))
        return Rotary(cos, sin, self.spec.rope.interleaved)

    def _enter_embedding(self, x: Tensor, dx: Tensor) -> tuple[Tensor, Layout]:
        """Rows patched at the embedding enter before the first layer."""
        layout = self._layout(self.rows.before(0))
        out = x.new_zeros(layout.n_tokens, self.spec.d_model)
        deltas = {"resid_post": self.prompts.delta(x, dx, self.shapes)}
        for block in layout.blocks:
            swaps = self._swaps(-1, layout, block, layout.rows[block.rows], deltas, last=False)
            entry = [Part(None, swaps.get("resid_post", []))]
            here = out[block.tokens]
            self.ops.add_norm(entry, [], None, [], 0.0, False, block.segments, self.exact, here, None)
        return out, layout

    def _swaps(
        self, l: int, layout: Layout, block: Block, ids: np.ndarray, deltas: dict[str, Tensor], last: bool
    ) -> Swaps:
        """The patches of a layer that fall into a block."""
        p = self.rows.patches
        lo, hi = np.searchsorted(p.layer, [l, l + 1])
        out: Swaps = {}
        if lo == hi:
            return out
        for place in np.unique(p.place[lo:hi]):
            a, b = lo + np.searchsorted(p.place[lo:hi], [place, place + 1])
            a, b = a + np.searchsorted(p.row[a:b], [ids[0], ids[-1] + 1])
            row, position, index = p.row[a:b], p.position[a:b], p.index[a:b]
            packed = layout.token[row] >= 0  # rows of other layouts may lie between
            row, position, index = row[packed], position[packed], index[packed]
            name = PLACES[place]
            if last and place >= PLACE["z"]:
                token = np.searchsorted(ids, row)
            else:
                token = layout.token[row] + (position - self.rows.start[row]) * layout.stride[row]
                token = token - block.tokens.start
            source = self.prompts.source_token(self.shapes.base[self.rows.pair[row]] + position)
            for whole in (True, False):
                part = (index < 0) == whole
                if part.any():
                    swap = Swap(
                        self._tensor(token[part]),
                        self._tensor(source[part]),
                        None if whole else self._tensor(index[part]),
                        deltas[name],
                    )
                    out.setdefault(name, []).append(swap)
        return out

    def _tensor(self, array: np.ndarray) -> Tensor:
        return upload(np.ascontiguousarray(array, dtype=np.int64), self.model.device)


def _join(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The pieces of each array, one after the other; what is None in one piece is None in all."""
    return {n: None if t is None else torch.cat([p[n] for p in parts]) for n, t in parts[0].items()}


def _destination(block: Block, ids: np.ndarray, out_layout: Layout, last: bool) -> slice | np.ndarray:
    """Where a block's differences go in the next layer's packing: [token], or a slice where they adjoin."""
    token, stride = out_layout.token[ids], out_layout.stride[ids]
    if last:
        to = token
    else:
        parts, row = [], 0
        for s in block.segments:
            mine = slice(row, row + s.pairs * s.rows)
            first = token[mine].reshape(s.pairs, 1, s.rows)
            step = stride[mine].reshape(s.pairs, 1, s.rows)
            parts.append((first + np.arange(s.positions)[:, None] * step).ravel())
            row = mine.stop
        to = np.concatenate(parts)
    if to[-1] - to[0] == len(to) - 1 and (np.diff(to) == 1).all():
        return slice(int(to[0]), int(to[-1]) + 1)
    return to
