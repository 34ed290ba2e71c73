"""The end of a pass: the final norm and the read-out of its rows and of the pairs' unpatched runs."""

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.layout import Block
from deltapatch.engine.metrics import Reference
from deltapatch.engine.products import taken_in
from deltapatch.engine.reads import Reads, RowReads
from deltapatch.engine.sources import Prompts
from deltapatch.engine.workers import Map
from deltapatch.kernels.backend import Backend
from deltapatch.kernels.device import upload
from deltapatch.kernels.each import Each, in_turn
from deltapatch.kernels.norm import Part
from deltapatch.kernels.product import Operand, Precision, Scaled, narrow_weight
from deltapatch.kernels.readout import BaseReadout, vocabulary_pieces
from deltapatch.kernels.readout_tail import Tail, make_tail, worth_a_tail
from deltapatch.kernels.segments import Segment, keep_reads, read_segments
from deltapatch.models.forward import normalise
from deltapatch.models.model import Model
from deltapatch.models.weights import EndWeights

_READS = 16  # whose output distributions are looked at together
_BLOCKS = 4  # from which on cores have a block each


class ReadOut:
    """Reads what the rows of a pass did to the output distributions. Arguments are those of `Wavefront`."""

    def __init__(
        self,
        model: Model,
        prompts: Prompts,
        precision: Precision,
        backend: Backend,
        each: Map,
    ) -> None:
        self.model, self.prompts = model, prompts
        self.precision, self.ops, self.each = precision, backend, each
        self.exact = precision.exact

    def read(
        self, ends: EndWeights, x: Tensor, dx: Tensor, rows: Tensor, row_reads: RowReads
    ) -> tuple[np.ndarray, Reference]:
        """Measure every row and the unpatched runs. Here the host waits for the device, once a pass.

        Args:
            ends: final norm and unembedding in the base dtype.
            x, dx: [base token, d_model] and [source token, d_model], the unpatched runs after the last layer.
            rows: [read of a row, d_model], the rows' differences there, packed as
            row_reads: says.

        Returns:
            [measured, row]; and what the base and source runs say.
        """
        exact, reads = ends.unembedding.weight, row_reads.reads
        at = x[upload(reads.token, x.device)]  # [read, d_model]
        base, told = self._unpatched(ends, x, dx, at, reads)
        precision = taken_in(self.precision, row_reads.n_tokens, self.model.device)
        stored = ends if precision is self.exact else self.model.ends(None)
        weight = narrow_weight(stored.unembedding.weight, precision)
        base = base._replace(tails=self._tails(base, exact, weight, row_reads))
        found = [x.new_empty(len(part.asked.names), part.layout.n_tokens) for part in row_reads.parts]

        def take(work: tuple[int, Block], each: Each = in_turn) -> None:
            i, block = work
            part, names = row_reads.parts[i], row_reads.parts[i].asked.names
            dn = self._normed(ends, at, rows[part.lines][block.tokens], block.segments)
            values = self.ops.readout(
                dn, exact, weight, precision, base, block.first_pairs, block.segments, names, each
            )
            for j, name in enumerate(names):
                found[i][j, block.rows] = values[name]

        blocks = [
            (i, block)
            for i, part in enumerate(row_reads.parts)
            if part.asked.names
            for block in part.layout.blocks
        ]
        # Cores share the vocabulary where there are few rows: a product of few rows does little but read it.
        if len(blocks) < _BLOCKS:
            for work in blocks:
                take(work, self.each)
        else:
            self.each(take, blocks)
        flat = torch.cat([values.flatten() for values in found]).cpu().numpy()
        edges = np.cumsum([0, *(values.numel() for values in found)])
        by_part = [flat[a:b].reshape(f.shape) for a, b, f in zip(edges[:-1], edges[1:], found, strict=True)]
        return row_reads.together(by_part), reads.reference(told.cpu().numpy())

    def _unpatched(
        self, ends: EndWeights, x: Tensor, dx: Tensor, at: Tensor, reads: Reads
    ) -> tuple[BaseReadout, Tensor]:
        """The base runs' distributions, and what both runs of each pair say: see `Reads.reference`.

        Args:
            at: [read, d_model], of x.
        """
        prompts, device = self.prompts, self.model.device
        exact, bias = ends.unembedding
        # The source run is a row of its own.
        segments = prompts.shapes.segments(prompts.n_sources)
        dn = self._normed(ends, x, keep_reads(dx, segments), read_segments(segments))[:: prompts.n_sources]
        n, pieces = len(at), self._vocabulary(len(exact))
        ends_of_runs = torch.cat([normalise(at, ends.norm, self.model.spec), dn])
        both = ends_of_runs.new_empty(2 * n, len(exact))

        def multiply(piece: slice) -> None:
            both[:, piece] = ends_of_runs @ exact[piece].T

        self.each(multiply, pieces)
        logits, change = both[:n], both[n:]  # [read, d_vocab]
        if bias is not None:
            logits = logits + bias
        answers = upload(reads.tokens, device)
        told = torch.empty(n, 2, 5, dtype=torch.float64, device=device)
        for some in (slice(i, i + _READS) for i in range(0, n, _READS)):
            runs = torch.stack([logits[some], logits[some] + change[some]], 1).double()
            which = answers[some].unsqueeze(1).expand(-1, 2, -1)  # [read, run, answer]
            told[some, :, 0:2] = runs.gather(-1, which)
            told[some, :, 2:4] = runs.log_softmax(-1).gather(-1, which)
            told[some, :, 4] = runs.argmax(-1).double()
        p = logits.double().softmax(-1)
        means = x.new_empty(len(pieces), n, x.shape[1])

        def average(i: int) -> None:
            torch.mm(p[:, pieces[i]].to(exact.dtype), exact[pieces[i]], out=means[i])

        self.each(average, range(len(pieces)))
        return BaseReadout(logits, p, means.sum(0), answers), told

    def _vocabulary(self, d_vocab: int) -> list[slice]:
        """The vocabulary in pieces for the cores of a CPU; whole on a GPU."""
        if self.model.device.type != "cpu":
            return [slice(0, d_vocab)]
        return vocabulary_pieces(d_vocab, d_vocab)

    def _tails(
        self, base: BaseReadout, exact: Tensor, weight: Operand, row_reads: RowReads
    ) -> dict[int, Tail]:
        """Expansions for the reads that very many rows have; see readout_tail.py."""
        if not self.ops.expands:
            return {}
        n_rows = np.bincount(row_reads.read, minlength=len(base.p))
        return {
            i: make_tail(base.p[i], base.mean[i], exact, weight, self.each)
            for part in row_reads.parts
            for i in part.asked.reads.tolist()
            if worth_a_tail(n_rows[i], len(exact), exact.shape[1], weight.precision, part.asked.names)
        }

    def _normed(self, ends: EndWeights, x: Tensor, d: Tensor, segments: list[Segment]) -> Tensor:
        """Difference of the final norm's output, for differences d of its input."""
        spec = self.model.spec
        parts = [Part(Scaled(d, None), [])]
        (normed,) = self.ops.add_norm(
            parts, [], x, [ends.norm.weight], spec.norm_eps, spec.norm == "layer", segments, self.exact
        )
        return normed.values
