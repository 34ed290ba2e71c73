"""Edges: how their rows enter, of what senders say (messages.py), which is kept until the last layer.

At each layer (1) the senders before it are normed and multiplied with the query-key-value weights, once for
all receivers there; (2) queries, keys or values alone change with each, of all heads at once, since no head
hears another: a row takes the part of its head. (3) A message to the MLP, or to the logits, is itself what
its row brings.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from deltapatch.engine.wavefront.block import BlockStep, Layer
from deltapatch.engine.wavefront.layout import Block, Layout, adjoining, how_many_blocks
from deltapatch.engine.wavefront.messages import Messages
from deltapatch.engine.wavefront.prompts import Prompts
from deltapatch.engine.wavefront.rows import DIRECT, HEADS, LOGITS, MLP, Rows
from deltapatch.engine.wavefront.setup import Setup
from deltapatch.interventions import nodes as of
from deltapatch.interventions.edges import decode
from deltapatch.interventions.nodes import Nodes
from deltapatch.interventions.table import PLACE, is_together
from deltapatch.kernels.segments import Segment

# What the heads of a layer hear: (what they read, pair) -> [position, sender, n_heads * d_head].
Heard = dict[tuple[int, int], Tensor]


@dataclass(frozen=True)
class EdgeRows:
    """The edges that the rows of a pass carry, all [row].

    Attributes:
        sender, layer, reads, head: see `Nodes`; the layer is the receiver's.
        stage: HEADS, MLP or LOGITS, of direct effects too.
        direct: whether what the receiver says goes to the logits alone.
        together: whether the sender speaks at all positions of the prompt from the row's first one on.
    """

    sender: np.ndarray
    layer: np.ndarray
    reads: np.ndarray
    head: np.ndarray
    stage: np.ndarray
    direct: np.ndarray
    together: np.ndarray

    @classmethod
    def of(cls, rows: Rows, nodes: Nodes) -> "EdgeRows":
        """Those of rows that have an edge each."""
        sender, layer, head = decode(nodes, rows.edges.index)
        reads = rows.edges.place - PLACE[of.READS[0]]
        stage = np.select([reads == of.MLP, reads == of.LOGITS], [MLP, LOGITS], HEADS)
        together = is_together(rows.edges.edit)
        return cls(sender, layer, reads, head, stage, rows.stage == DIRECT, together)


class Edges:
    """The edges of a pass.

    Args:
        setup: what it is carried out with.
        prompts: the pairs.
        rows: that carry the edges.
        nodes: of the model.
    """

    def __init__(self, setup: Setup, prompts: Prompts, rows: Rows, nodes: Nodes) -> None:
        self.setup, self.spec, self.prompts, self.nodes = setup, setup.model.spec, prompts, nodes
        self.shapes, self.rows, self.of_row = prompts.shapes, rows, EdgeRows.of(rows, nodes)
        self.senders = np.unique(self.of_row.sender)  # [slot], those that rows are about
        self.messages = Messages(setup, prompts, nodes, self.senders)

    def message(self, pair: int, row: int, positions: int, slots: slice) -> Tensor:
        """What some senders say to a row, [position, sender, d_model], at the last positions of its run."""
        run, base = self.shapes.runs[pair], int(self.shapes.base[pair])
        length, prompt = run.length, run.prompt
        start, first = int(self.rows.start[row]), length - positions
        end = prompt if self.of_row.together[row] else start + 1
        said = self.messages.said[base : base + length, slots]
        out = said.new_zeros(positions, *said.shape[1:])
        if max(start, first) < end:
            out[max(start, first) - first : end - first] = said[max(start, first) : end]
        return out

    # How rows enter ---------------------------------------------------------------------------------------

    def entering(self, layer: int) -> Iterator[np.ndarray]:
        """Ids of the rows whose receiver is in a layer: those that start at one position together."""
        ids = np.flatnonzero(self.of_row.layer == layer)
        length = self.shapes.length[self.rows.pair[ids]]
        cuts = np.flatnonzero((np.diff(self.rows.start[ids]) != 0) | (np.diff(length) != 0)) + 1
        return (some for some in np.split(ids, cuts) if len(some))

    def heard(self, layer: Layer, ids: np.ndarray) -> Heard:
        """What the heads of a layer hear of the senders before it, for rows that start at one position."""
        mine = ids[self.of_row.stage[ids] == HEADS]
        if not len(mine):
            return {}
        number = int(self.of_row.layer[mine[0]])
        n = self.messages.before(number)
        by = np.unique(self.of_row.reads[mine]).tolist()
        pairs, first = np.unique(self.rows.pair[mine], return_index=True)
        z: Heard = {}
        work: list[tuple[int, int, slice]] = []
        for pair, row in zip(pairs.tolist(), mine[first].tolist(), strict=True):
            positions = int(self.shapes.length[pair] - self.rows.start[row])
            seen = int(self.shapes.reads[pair]) if layer.last else positions
            for reads in by:
                z[reads, pair] = self.messages.said.new_empty(seen, n, self.spec.n_heads * self.spec.d_head)
            ops, tokens = self.setup.ops, n * positions
            count = min(n, how_many_blocks(tokens, ops.block_tokens, self.setup.pool.count))
            edges = np.linspace(0, n, count + 1).astype(int).tolist()
            work += [(pair, row, slice(a, b)) for a, b in pairwise(edges)]

        def listen(item: tuple[int, int, slice]) -> None:
            pair, row, slots = item
            run = self.shapes.runs[pair]
            positions = run.length - int(self.rows.start[row])
            message = self.message(pair, row, positions, slots)
            segment = Segment(0, 1, positions, message.shape[1], int(self.shapes.base[pair]), run.length,
                              run.reads, run.fork)  # fmt: skip
            found = BlockStep(layer, [segment], {}).heard(message.flatten(0, 1), by)
            for reads, d in zip(by, found, strict=True):
                there = z[reads, pair]
                there[:, slots] = d[: len(there) * message.shape[1]].view(len(there), message.shape[1], -1)

        self.setup.pool(listen, work)
        return z

    def brought(self, layout: Layout, block: Block, heard: Heard, *, reads_only: bool) -> Tensor:
        """What the rows of a block bring where they enter, [token, width].

        It is the difference of z, of what the MLP reads, or of what the logits read: one of these for all.

        Args:
            heard: in their layer.
            reads_only: just at the positions that are read.
        """
        ids, rows = layout.rows[block.rows], self.of_row
        heads = bool(rows.stage[ids[0]] == HEADS)
        width = self.spec.n_heads * self.spec.d_head if heads else self.spec.d_model
        segments = [s.read(0) if reads_only else s for s in block.segments]
        out = self.messages.said.new_zeros(sum(s.n_tokens for s in segments), width)
        token, done = 0, 0
        for segment, pair in zip(segments, block.first_pairs, strict=True):
            there = out[token : token + segment.n_tokens].view(
                segment.pairs, segment.positions, segment.rows, width
            )
            token += segment.n_tokens
            for i in range(segment.pairs):
                mine = ids[done : done + segment.rows]
                done += segment.rows
                for a, b in _alike(rows.reads[mine], rows.head[mine]):
                    slots = np.searchsorted(self.senders, rows.sender[mine[a:b]])
                    which = adjoining(slots)
                    if not heads:
                        lo, hi = int(slots.min()), int(slots.max()) + 1
                        said = self.message(pair + i, int(mine[a]), segment.positions, slice(lo, hi))
                        there[i, :, a:b] = said if isinstance(which, slice) else said[:, slots - lo]
                        continue
                    reads, head = int(rows.reads[mine[a]]), int(rows.head[mine[a]])
                    group = self.nodes.group(reads, head)
                    columns = slice(group.start * self.spec.d_head, group.stop * self.spec.d_head)
                    z = heard[reads, pair + i][-segment.positions :]
                    there[i, :, a:b, columns] = z[:, which, columns]
        return out


def _alike(reads: np.ndarray, head: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of rows whose receiver is the same."""
    edges = [0, *(np.flatnonzero((np.diff(reads) != 0) | (np.diff(head) != 0)) + 1).tolist(), len(reads)]
    return pairwise(edges)
