"""The wavefront: one loop over layers that carries every row of a pass as a difference from its base run.

At each layer it (1) advances the base run and, as a difference of its own, the source run of every pair,
(2) lets the rows patched here enter where their site sits, (3) advances the rows already in flight.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.block import BlockStep, Layer, Swaps
from deltapatch.engine.layout import Block, Layout, PairShapes, how_many_blocks, lay_out
from deltapatch.engine.metrics import Direction, Reference
from deltapatch.engine.patches import (
    ATTENTION,
    END,
    MIDDLE,
    PLACE,
    WHOLE,
    PatchedPlaces,
    PatchTable,
    Rows,
    make_rows,
)
from deltapatch.engine.products import narrow_layer, taken_in
from deltapatch.engine.readout import ReadOut
from deltapatch.engine.sources import Prompts, source_differences
from deltapatch.engine.unpatched import Tables, Unpatched
from deltapatch.engine.workers import Map
from deltapatch.kernels.attention import Rotary
from deltapatch.kernels.backend import Backend
from deltapatch.kernels.device import upload
from deltapatch.kernels.norm import Part
from deltapatch.kernels.product import Precision
from deltapatch.kernels.swap import Swap
from deltapatch.models import forward
from deltapatch.models.model import Model
from deltapatch.models.stream import Reader
from deltapatch.models.weights import Converter

_ENTRY_STAGES = (ATTENTION, MIDDLE, END)


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
        self.patched = PatchedPlaces(self.rows.patches)
        self.precision, self.dtype = precision, precision.base
        self.exact = precision.exact
        self.unpatched = Unpatched(self.spec, prompts, self.shapes, backend.block_tokens, each)

    @torch.no_grad()
    def run(self) -> PassResult:
        """Carry every row from its entry to the read-out."""
        with self.model.reading() as read:
            x, dx, rows, layout = self._through_layers(read)
            ends = read.ends()
        by_row, unpatched = self._reader().read(ends, x, dx, rows, self.rows.pair[layout.rows])
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

    def _reader(self) -> ReadOut:
        return ReadOut(
            self.model, self.prompts, self.shapes, self.measured, self.precision, self.ops, self.each
        )

    # The layers ------------------------------------------------------------------------------------------

    def _through_layers(self, read: Reader) -> tuple[Tensor, Tensor, Tensor, Layout]:
        """After the last layer: the unpatched runs, x and dx, and the rows' differences, packed as said."""
        spec, prompts = self.spec, self.prompts
        embed = partial(self.model.embed, dtype=self.dtype)
        x = prompts.embed(embed)  # [base token, d_model]
        dx = prompts.embed_source_difference(embed)  # [source token, d_model]
        tables = {n: self._rope_tables(n) for n in sorted({int(n) for n in prompts.length})}
        rows, layout = self._enter_embedding(x, dx)  # [row token, d_model], the differences in flight
        convert = Converter(self.model.device, self.dtype)
        prepare = partial(
            self._prepare, read=read, tables=tables, rotary=self._rotary(tables), convert=convert
        )
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
            del ready  # before the next layer is asked for: a streamed one takes its place
        return x, dx, rows, layout

    def _prepare(
        self,
        l: int,
        x: Tensor,
        dx: Tensor,
        read: Reader,
        tables: Tables,
        rotary: Rotary,
        convert: Converter,
    ) -> "Ready":
        """Everything that rows meet in a layer: its weights, and the unpatched runs, x and dx before it."""
        stored = read.layer(l)
        exact = convert(stored)
        places = self.patched.places(l)
        base = self.unpatched.base(x, exact, tables, places)
        products = narrow_layer(exact, self.exact)
        down = exact.down.weight if "mlp_post" in places else None
        here = Layer(
            self.spec,
            self.ops,
            self.exact,
            products,
            exact.norm1,
            exact.norm2,
            down,
            base,
            rotary,
            last=False,
        )
        dx, captured = self.unpatched.sources(dx, here, places)
        deltas = source_differences(self.prompts, base, captured, self.shapes)
        precision = taken_in(self.precision, self._n_tokens(l), self.model.device)
        if precision is not self.exact:
            here = replace(here, precision=precision, weights=narrow_layer(stored, precision))
        return Ready(replace(here, last=l == self.spec.n_layers - 1), deltas, base.resid_post, dx)

    def _n_tokens(self, l: int) -> int:
        """How many row tokens pass through a layer, or enter in it."""
        rows = np.flatnonzero(self.rows.layer <= l)
        return int((self.prompts.length[self.rows.pair[rows]] - self.rows.start[rows]).sum())

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
        spread = self.model.device.type == "cpu" and not last
        n_blocks = how_many_blocks(tokens, self.ops.block_tokens, spread)
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
        out: Swaps = {}
        for name, mine in self.patched.at(l):
            a, b = mine.start + np.searchsorted(p.row[mine], [ids[0], ids[-1] + 1])
            row, position, index = p.row[a:b], p.position[a:b], p.index[a:b]
            packed = layout.token[row] >= 0  # rows of other layouts may lie between
            row, position, index = row[packed], position[packed], index[packed]
            if last and PLACE[name] >= PLACE["z"]:
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
