"""The wavefront: one loop over layers that carries every row of a pass as a difference from its base run.

At each layer it (1) advances the base run and, as a difference of its own, the source run of every pair,
(2) lets the rows patched here enter where their site sits, (3) advances the rows already in flight.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.wavefront.block import BlockStep, Edits, Layer
from deltapatch.engine.wavefront.edges import Edges, Heard
from deltapatch.engine.wavefront.layers import Layers, Ready
from deltapatch.engine.wavefront.layout import (
    Block,
    Layout,
    adjoining,
    first_tokens,
    how_many_blocks,
    lay_out,
)
from deltapatch.engine.wavefront.probes import Probed
from deltapatch.engine.wavefront.prompts import Prompts
from deltapatch.engine.wavefront.readout import ReadOut
from deltapatch.engine.wavefront.reads import Reads, RowReads
from deltapatch.engine.wavefront.rows import (
    ATTENTION,
    END,
    HEADS,
    LOGITS,
    MIDDLE,
    MLP,
    WHOLE,
    PatchedPlaces,
    Rows,
    make_rows,
)
from deltapatch.engine.wavefront.setup import PassResult, Setup
from deltapatch.engine.wavefront.unpatched import Unpatched
from deltapatch.interventions.nodes import Nodes
from deltapatch.interventions.table import EDIT, PLACE, PatchTable
from deltapatch.interventions.vectors import Vectors, decode
from deltapatch.kernels.device import upload
from deltapatch.kernels.edits import Add, Along, Edit, SetFeature, Swap, Transcode
from deltapatch.kernels.norm import Part
from deltapatch.kernels.segments import read_segments
from deltapatch.models.model_weights import PassWeights

_ENTRY_STAGES = (ATTENTION, MIDDLE, END)


class Wavefront:
    """One pass over the layers for a set of prompts and interventions.

    Args:
        setup: what it is carried out with.
        prompts: base and source prompts of the pairs in the pass.
        table: the interventions, with pairs counted within the pass.
        measured: which of `metrics.MEASURED` to return.
        nodes: of the model, where the interventions are edges.
        vectors: that patches are given.
        tick: called with the row-layers done, block by block.
    """

    def __init__(
        self,
        setup: Setup,
        prompts: Prompts,
        table: PatchTable,
        measured: tuple[str, ...],
        nodes: Nodes | None = None,
        vectors: Vectors | None = None,
        tick: Callable[[int], None] = lambda n: None,
    ) -> None:
        self.model, self.spec = setup.model, setup.model.spec
        self.prompts, self.measured, self.tick = prompts, measured, tick
        self.table, self.n_interventions = table, table.n_rows
        self.shapes = prompts.shapes
        self.rows: Rows = make_rows(table, self.shapes.prompt, self.spec)
        self.n_most = self._n_tokens(self.rows.before(self.spec.n_layers - 1))  # row tokens of a layer
        blocks = how_many_blocks(self.n_most, setup.ops.block_tokens)
        self.setup = setup = replace(setup, pool=setup.pool.of_blocks(blocks))
        self.ops, self.pool = setup.ops, setup.pool
        self.edges = None if nodes is None else Edges(setup, prompts, self.rows, nodes)
        self.patched = PatchedPlaces(self.rows.patches)
        at_end = tuple(name for name in measured if name not in setup.probes)
        self.row_reads = RowReads(Reads(self.shapes, prompts.targets), self.rows.pair, at_end)
        self.precision, self.dtype = setup.precision, setup.precision.base
        self.exact = setup.precision.exact
        self.vectors = Vectors() if vectors is None else vectors
        self._lines: dict[int, tuple[Tensor, np.ndarray]] = {}  # as of `Vectors.lines`
        self.unpatched = Unpatched(setup, prompts)
        self.probed: Probed | None = None

    @torch.no_grad()
    def run(self) -> PassResult:
        """Carry every row from its entry to the read-out."""
        with self.model.reading() as read:
            x, dx, rows = self._through_layers(read)
            ends = read.ends()
        reader = ReadOut(self.setup, self.prompts)
        by_row, unpatched = reader.read(ends, x, dx, rows, self.row_reads)
        # Interventions that cannot reach the read-out have no row: their effect is exactly zero, and what the
        # base run says they say.
        live = self.rows.id_of >= 0
        measured = np.zeros((len(self.measured), self.n_interventions), by_row.dtype)
        for i, name in enumerate(("says_clean", "says_corrupted")):
            if name in self.measured:
                measured[self.measured.index(name)] = unpatched.says[self.table.pair, 0, i]
        for name, values in reader.unmoved.items():
            measured[self.measured.index(name)] = values[self.table.pair]
        of_rows = dict(zip(self.row_reads.measured, by_row, strict=True))
        of_rows |= {} if self.probed is None else self.probed.numbers()
        for name, values in zip(self.measured, measured, strict=True):
            values[live] = of_rows[name][self.rows.id_of[live]]
        return PassResult(dict(zip(self.measured, measured, strict=True)), unpatched)

    # The layers ------------------------------------------------------------------------------------------

    def _through_layers(self, read: PassWeights) -> tuple[Tensor, Tensor, Tensor]:
        """After the last layer: the unpatched runs, x and dx, and the rows' differences where read."""
        spec, prompts = self.spec, self.prompts
        embed = partial(self.model.embed, dtype=self.dtype)
        x = prompts.embed(embed, with_positions=spec.learned_positions)  # [base token, d_model]
        dx = prompts.embed_source_difference(embed)  # [source token, d_model]
        # What the rows of one layer leave is what the next one meets. Both are made once, as large as ever:
        # memory that grows from layer to layer is reused by no allocator.
        n_most = max(self.n_most, self.row_reads.n_tokens)
        flight = [x.new_empty(n_most, spec.d_model) for _ in range(2)]
        # Rows of direct effects are where they are read before the last layer is reached.
        ends = x.new_empty(self.row_reads.n_tokens, spec.d_model) if self.edges is not None else None
        layers = Layers(self.setup, prompts, self.unpatched)
        delta = layers.at_embedding(x, dx)
        if self.edges is not None:
            self.edges.messages.hear_embedding(delta)
        rows, layout = self._enter_embedding(delta, flight[1])  # [row token, d_model], those in flight
        if self.setup.probes:
            self.probed = Probed(self.setup.probes, prompts, self.rows, x)
        ready_for = layers.of(read, x, dx, self._places, self._passing, self._hear)
        for l in range(spec.n_layers):
            # (1) The unpatched runs after this layer; those of the next one are begun meanwhile.
            ready = next(ready_for)
            x, dx = ready.x, ready.dx
            # (2) Rows in flight, and those that enter here at each stage, go side by side, block by block.
            # After the last layer only what is read goes on, packed as it is read.
            after = None if ready.here.last else self._layout(self.rows.before(l + 1))
            out = flight[l % 2][: (after or self.row_reads).n_tokens]
            if ready.here.last and ends is not None:
                out = ends
            parts = [(WHOLE, layout)]
            parts += [(stage, self._layout(self.rows.entering(l, stage))) for stage in _ENTRY_STAGES]
            self._advance(ready, l, parts, rows, after, out)
            if self.edges is not None and ends is not None:
                self._enter_edges(ready.here, l, self.edges, after, out, ends)
            if self.probed is not None:
                self.probed.look(l, after or self.row_reads, out, x)
            # (3) What this layer leaves is what the next one meets.
            rows, layout = out, after or layout
            del ready  # before the next layer is asked for: a streamed one takes its place
        return x, dx, rows

    def _advance(
        self,
        ready: Ready,
        l: int,
        parts: list[tuple[int, Layout]],
        rows: Tensor,
        after: Layout | None,
        out: Tensor,
    ) -> None:
        """Advance rows through a layer, block by block, into their places in `out`.

        Args:
            parts: stages, and the rows that enter there; those at WHOLE are in flight, in `rows`.
            after: how rows are packed in `out`; None: as they are read.
        """

        def advance(work: tuple[int, Layout, Block]) -> None:
            stage, layout, block = work
            here = ready.here
            ids = layout.rows[block.rows]
            swaps = self._swaps(l, layout, block, ids, ready.deltas, here.last)
            place = adjoining((after or self.row_reads).places(block, ids))
            step = BlockStep(here, block.segments, swaps)
            dx = rows[block.tokens] if stage == WHOLE else None
            if isinstance(place, slice):
                step.run(dx, stage, out[place], None)
            else:
                step.run(dx, stage, out, upload(place, out.device))
            if stage == WHOLE:
                self.tick(block.tokens.stop - block.tokens.start)

        self.pool(advance, [(stage, layout, block) for stage, layout in parts for block in layout.blocks])

    def _enter_edges(
        self, here: Layer, l: int, edges: Edges, after: Layout | None, out: Tensor, ends: Tensor
    ) -> None:
        """Rows of edges whose receiver is in a layer enter, those that start at one position together.

        Args:
            after, out: as of `_advance`.
            ends: [read of a row, d_model], where direct effects go at once.
        """
        for ids in edges.entering(l):
            heard = edges.heard(here, ids)
            of_row, work = edges.of_row, []
            for stage in (HEADS, MLP, LOGITS):
                for direct in (False, True):
                    mine = ids[(of_row.stage[ids] == stage) & (of_row.direct[ids] == direct)]
                    layout = self._layout(mine)
                    work += [(stage, direct, layout, block) for block in layout.blocks]

            def enter(item: tuple[int, bool, Layout, Block], heard: Heard = heard) -> None:
                stage, direct, layout, block = item
                rows = layout.rows[block.rows]
                to_end = direct or stage == LOGITS
                d = edges.brought(layout, block, heard, reads_only=here.last or to_end)
                packed = self.row_reads if to_end else after or self.row_reads
                step, to = BlockStep(here, block.segments, {}), packed.places(block, rows)
                if not to_end:
                    step.run(d, stage, out, upload(to, out.device))
                    return
                ends.index_copy_(0, upload(to, ends.device), d if stage == LOGITS else step.said(d, stage))

            self.pool(enter, work)

    def _places(self, l: int) -> list[str]:
        """What of a layer's source runs is needed."""
        return self.patched.places(l) if self.edges is None else self.edges.messages.places(l)

    def _passing(self, l: int) -> int:
        """Row tokens that pass through a layer, or enter in it."""
        return self._n_tokens(self.rows.before(l + 1))

    def _hear(self, l: int, layer: Layer, deltas: dict[str, Tensor]) -> None:
        if self.edges is not None:
            self.edges.messages.hear(l, layer, deltas)

    # Rows and swaps --------------------------------------------------------------------------------------

    def _n_tokens(self, rows: np.ndarray) -> int:
        return int((self.shapes.length[self.rows.pair[rows]] - self.rows.start[rows]).sum())

    def _layout(self, rows: np.ndarray) -> Layout:
        """Pack rows."""
        n_blocks = how_many_blocks(self._n_tokens(rows), self.ops.block_tokens, self.setup.pool.count)
        return lay_out(rows, self.rows.pair, self.rows.start, self.shapes, n_blocks)

    def _enter_embedding(self, delta: Tensor, room: Tensor) -> tuple[Tensor, Layout]:
        """Rows patched at the embedding enter before the first layer; `room` is where they go."""
        layout = self._layout(self.rows.before(0))
        out = room[: layout.n_tokens].zero_()
        deltas = {"resid_post": delta}
        for block in layout.blocks:
            swaps = self._swaps(-1, layout, block, layout.rows[block.rows], deltas, last=False)
            entry = [Part(None, swaps.get("resid_post", []))]
            here = out[block.tokens]
            self.ops.add_norm(entry, [], None, block.segments, self.exact, out=here)
        return out, layout

    def _swaps(
        self, l: int, layout: Layout, block: Block, ids: np.ndarray, deltas: dict[str, Tensor], last: bool
    ) -> Edits:
        """The patches of a layer that fall into a block."""
        p = self.rows.patches
        out: dict[str, list[Edit]] = {}
        for name, there in self.patched.at(l):
            a, b = there.start + np.searchsorted(p.row[there], [ids[0], ids[-1] + 1])
            packed = a + np.flatnonzero(layout.token[p.row[a:b]] >= 0)  # other layouts' rows may lie between
            row, position, edit, index = (x[packed] for x in (p.row, p.position, p.edit, p.index))
            if last and PLACE[name] >= PLACE["pattern"]:
                token = first_tokens(read_segments(block.segments))[np.searchsorted(ids, row)]
            else:
                token = layout.token[row] + (position - self.rows.start[row]) * layout.stride[row]
                token = token - block.tokens.start
            source = self.prompts.source_token(self.shapes.base[self.rows.pair[row]] + position)
            for kind in np.unique(edit).tolist():
                mine = np.flatnonzero(edit == kind)
                at = token[mine], source[mine], index[mine]
                out.setdefault(name, []).extend(self._edits(name, kind, *at, deltas[name]))
        return out

    def _edits(
        self, place: str, kind: int, token: np.ndarray, source: np.ndarray, index: np.ndarray, delta: Tensor
    ) -> list[Edit]:
        """The edits of one kind at one place."""
        to = self._tensor
        if kind in (EDIT["whole"], EDIT["one"]):
            at = None if kind == EDIT["whole"] else to(index)
            return [Swap(to(token), to(source), at, delta, on_host=token)]
        if kind == EDIT["feature"]:
            return list(self._set_features(token, index))
        heads = {"q": self.spec.n_heads, "z": self.spec.n_heads, "k": self.spec.n_kv_heads}
        heads["v"] = heads["k"]
        number, head = decode(index, heads.get(place, 0))
        if kind == EDIT["add"]:
            array, scale = self.vectors.multiples(number)
            lines, line = self._lines_of(delta.shape[-1])
            rows = lines[to(line[array])]
            if self.vectors.scale is not None:
                rows = rows * upload(scale, rows.device).to(rows.dtype).unsqueeze(1)
            return [Add(to(token), to(head) if place in heads else None, rows, on_host=token)]
        out: list[Edit] = []
        for i in np.unique(number).tolist():
            mine = number == i
            at = to(head[mine]) if place in heads else None
            basis = upload(self.vectors.arrays[i], delta.device).to(self.dtype)
            out.append(Along(to(token[mine]), to(source[mine]), at, delta, basis, on_host=token[mine]))
        return out

    def _set_features(self, token: np.ndarray, index: np.ndarray) -> Iterator[Edit]:
        """Patches that set features, those of one autoencoder together."""
        given = self.vectors.features
        assert given is not None
        device = self.model.device
        for s in np.unique(given.sae[index]).tolist():
            mine = given.sae[index] == s
            of, sae = index[mine], given.saes[s]
            feature = torch.from_numpy(given.feature[of])
            rows = upload(sae.rows(feature).cpu().numpy(), device)
            if sae.activation != "topk":  # where a feature comes about by itself only it is looked at
                which, number = np.unique(given.feature[of], return_inverse=True)
                sae, feature = sae.only(torch.from_numpy(which)), torch.from_numpy(number)
            yield (SetFeature if sae.reads is None else Transcode)(
                token=self._tensor(token[mine]),
                x=given.base[s][given.read[of]].to(device),
                change=upload(given.change[of], device),
                feature=feature.to(device),
                row=rows,
                encode=sae.encode,
                on_host=token[mine],
            )

    def _lines_of(self, width: int) -> tuple[Tensor, np.ndarray]:
        """Given vectors of a width, [line, width], and which line each array is."""
        if width not in self._lines:
            rows, line = self.vectors.lines(width)
            self._lines[width] = upload(rows, self.model.device).to(self.dtype), line
        return self._lines[width]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return upload(np.ascontiguousarray(array, dtype=np.int64), self.model.device)
