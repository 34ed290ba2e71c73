"""The end of a pass: the final norm and the read-out of its rows and of the pairs' unpatched runs."""

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.layout import Block, Layout, PairShapes
from deltapatch.engine.products import taken_in
from deltapatch.engine.sources import Prompts
from deltapatch.engine.workers import Map
from deltapatch.kernels.backend import Backend
from deltapatch.kernels.device import upload
from deltapatch.kernels.each import Each, in_turn
from deltapatch.kernels.norm import Part
from deltapatch.kernels.product import Operand, Precision, Scaled, narrow_weight
from deltapatch.kernels.readout import BaseReadout, vocabulary_pieces
from deltapatch.kernels.readout_tail import Tail, make_tail, worth_a_tail
from deltapatch.kernels.segments import Segment, keep_last, last_segments
from deltapatch.models.forward import normalise
from deltapatch.models.model import Model
from deltapatch.models.weights import EndWeights

_PAIRS = 16  # whose output distributions are looked at together
_BLOCKS = 4  # from which on cores have a block each


class ReadOut:
    """Reads what the rows of a pass did to the output distributions. Arguments are those of `Wavefront`."""

    def __init__(
        self,
        model: Model,
        prompts: Prompts,
        shapes: PairShapes,
        measured: tuple[str, ...],
        precision: Precision,
        backend: Backend,
        each: Map,
    ) -> None:
        self.model, self.prompts, self.shapes, self.measured = model, prompts, shapes, measured
        self.precision, self.ops, self.each = precision, backend, each
        self.exact = precision.exact

    def read(
        self, ends: EndWeights, x: Tensor, dx: Tensor, rows: Tensor, layout: Layout, pair: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Measure every row and the unpatched runs. Here the host waits for the device, once a pass.

        Args:
            ends: final norm and unembedding in the base dtype.
            x, dx: [base token, d_model] and [source token, d_model], the unpatched runs after the last layer.
            rows: [row, d_model], the rows' differences there, packed as
            layout: says.
            pair: [row id], the pair of each row.

        Returns:
            [measured, row], rows in the order of the layout; and of the pairs' runs [pair, (base, source),
            (logits of the two answers, their log-probabilities, the likeliest token)], float64.
        """
        exact = ends.unembedding.weight
        base, unpatched = self._unpatched(ends, x, dx)
        precision = taken_in(self.precision, layout.n_tokens, self.model.device)
        stored = ends if precision is self.exact else self.model.ends(None)
        weight = narrow_weight(stored.unembedding.weight, precision)
        tails = self._tails(base, exact, weight, np.bincount(pair, minlength=len(base.p)))
        base = base._replace(tails=tails)
        found = x.new_empty(len(self.measured), layout.n_tokens)

        def take(block: Block, each: Each = in_turn) -> None:
            dn = self._normed(ends, x, rows[block.tokens], block.segments)
            values = self.ops.readout(
                dn, exact, weight, precision, base, block.first_pairs, block.segments, self.measured, each
            )
            for i, name in enumerate(self.measured):
                found[i, block.rows] = values[name]

        # Cores share the vocabulary where there are few rows: a product of few rows does little but read it.
        if len(layout.blocks) < _BLOCKS:
            for block in layout.blocks:
                take(block, self.each)
        else:
            self.each(take, layout.blocks)
        return found.cpu().numpy(), unpatched.cpu().numpy()

    def _unpatched(self, ends: EndWeights, x: Tensor, dx: Tensor) -> tuple[BaseReadout, Tensor]:
        """The base runs' distributions, and what is told of both runs of each pair."""
        prompts, device = self.prompts, self.model.device
        exact, bias = ends.unembedding
        # The source run is a row of its own.
        segments = self.shapes.segments(prompts.n_sources)
        dn = self._normed(ends, x, keep_last(dx, segments), last_segments(segments))[:: prompts.n_sources]
        last = x[upload(prompts.base + prompts.length - 1, device)]
        n, pieces = len(last), self._vocabulary(len(exact))
        ends_of_runs = torch.cat([normalise(last, ends.norm, self.model.spec), dn])
        both = ends_of_runs.new_empty(2 * n, len(exact))

        def multiply(piece: slice) -> None:
            both[:, piece] = ends_of_runs @ exact[piece].T

        self.each(multiply, pieces)
        logits, change = both[:n], both[n:]  # [pair, d_vocab]
        if bias is not None:
            logits = logits + bias
        answers = upload(prompts.answers, device)
        told = torch.empty(n, 2, 5, dtype=torch.float64, device=device)
        for some in (slice(i, i + _PAIRS) for i in range(0, n, _PAIRS)):
            runs = torch.stack([logits[some], logits[some] + change[some]], 1).double()
            at = answers[some].unsqueeze(1).expand(-1, 2, -1)  # [pair, run, answer]
            told[some, :, 0:2] = runs.gather(-1, at)
            told[some, :, 2:4] = runs.log_softmax(-1).gather(-1, at)
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
        self, base: BaseReadout, exact: Tensor, weight: Operand, n_rows: np.ndarray
    ) -> dict[int, Tail]:
        """Expansions for the pairs that have very many rows; see readout_tail.py."""
        if not self.ops.expands:
            return {}
        return {
            i: make_tail(base.p[i], base.mean[i], exact, weight, self.each)
            for i, n in enumerate(n_rows.tolist())
            if worth_a_tail(n, len(exact), exact.shape[1], weight.precision, self.measured)
        }

    def _normed(self, ends: EndWeights, x: Tensor, d: Tensor, segments: list[Segment]) -> Tensor:
        """Difference of the final norm's output, for differences d of its input."""
        spec = self.model.spec
        parts = [Part(Scaled(d, None), [])]
        (normed,) = self.ops.add_norm(
            parts, [], x, [ends.norm.weight], spec.norm_eps, spec.norm == "layer", segments, self.exact
        )
        return normed.values
