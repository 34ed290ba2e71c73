"""The end of a pass: the final norm and the read-out of its rows and of the pairs' unpatched runs."""

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.layout import Block, PairShapes, how_many_blocks, lay_out
from deltapatch.engine.products import taken_in
from deltapatch.engine.sources import Prompts
from deltapatch.engine.workers import Map
from deltapatch.kernels.backend import Backend
from deltapatch.kernels.device import upload
from deltapatch.kernels.each import Each, in_turn
from deltapatch.kernels.norm import Part
from deltapatch.kernels.product import Operand, Precision, Scaled, Stored, narrow_weight
from deltapatch.kernels.readout import BaseReadout, vocabulary_pieces
from deltapatch.kernels.readout_tail import Tail, make_tail, worth_a_tail
from deltapatch.kernels.segments import Segment, last_segments
from deltapatch.models.forward import normalise
from deltapatch.models.model import Model
from deltapatch.models.weights import EndWeights, map_tensors

_PIECE, _PIECE_ON_CPU = 1 << 26, 1 << 22  # entries of the unembedding that base runs take at a time
_HELD, _HELD_ON_CPU = 1 << 30, 1 << 27  # bytes of output distributions that are held at a time
_PAIRS = 4  # whose output distributions a thread looks at together
_BLOCKS = 4  # from which on cores have a block each


def pairs_held(d_vocab: int, size: int, on_cpu: bool) -> int:
    """How many pairs' output distributions are held at a time, in numbers of so many bytes."""
    return max(1, (_HELD_ON_CPU if on_cpu else _HELD) // (d_vocab * (2 * size + 8)))


def distribution_bytes(d_vocab: int, d_model: int, size: int, on_cpu: bool) -> int:
    """Of a pair: logits, the source run's change of them, probabilities, and what their mean is made of."""
    return d_vocab * (2 * size + 8) + -(-d_vocab // _piece(d_vocab, d_model, on_cpu)) * d_model * size


def workspace(d_vocab: int, d_model: int, size: int, on_cpu: bool) -> int:
    """Bytes that making some distributions takes, for each thread."""
    piece = _piece(d_vocab, d_model, on_cpu)
    product = piece * (d_model + 2 * pairs_held(d_vocab, size, on_cpu)) * size
    return max(product, _PAIRS * d_vocab * 2 * (2 * size + 24))


def _piece(d_vocab: int, d_model: int, on_cpu: bool) -> int:
    """Tokens whose part of the unembedding is taken at a time."""
    most = max(1024, (_PIECE_ON_CPU if on_cpu else _PIECE) // d_model)
    return vocabulary_pieces(d_vocab, most)[0].stop


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
        self.on_cpu = model.device.type == "cpu"

    def read(
        self, ends: EndWeights, x: Tensor, dx: Tensor, rows: Tensor, pair: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Measure every row and the unpatched runs. Here the host waits for the device, once a pass.

        Output distributions are large: they are made for some pairs, read by the rows of these, and dropped.

        Args:
            ends: final norm and unembedding as they are stored.
            x, dx: [base token, d_model] and [source token, d_model], the unpatched runs after the last layer.
            rows: [row, d_model], the rows' differences there, ordered by pair.
            pair: [row], the pair of each row.

        Returns:
            [measured, row]; and of the pairs' runs [pair, (base, source), (logits of the two answers, their
            log-probabilities, the likeliest token)], float64.
        """
        ends = ends._replace(norm=map_tensors(ends.norm, lambda t: t.to(x.dtype)))
        stored = ends.unembedding.weight
        weight = self._as_products_take_it(stored, taken_in(self.precision, len(rows), self.model.device))
        n_pairs = len(self.shapes.length)
        found = rows.new_empty(len(self.measured), len(rows))
        told = torch.empty(n_pairs, 2, 5, dtype=torch.float64, device=rows.device)
        step = pairs_held(len(stored), x.element_size(), self.on_cpu)
        for pairs in (slice(i, min(i + step, n_pairs)) for i in range(0, n_pairs, step)):
            mine = slice(*np.searchsorted(pair, [pairs.start, pairs.stop]).tolist())
            number = pair[mine] - pairs.start
            base, told[pairs] = self._unpatched(ends, x, dx, pairs)
            tails = self._tails(base, stored, weight, np.bincount(number, minlength=len(base.p)))
            base = base._replace(tails=tails)
            self._read_some(ends, x, rows[mine], number, pairs, base, weight, found[:, mine])
        return found.cpu().numpy(), told.cpu().numpy()

    def _as_products_take_it(self, stored: Tensor, precision: Precision) -> Operand | Stored:
        """The unembedding of a model in memory is narrowed once, that of a larger one piece by piece."""
        return Stored(stored, precision) if self.model.stream else narrow_weight(stored, precision)

    def _read_some(
        self,
        ends: EndWeights,
        x: Tensor,
        rows: Tensor,
        pair: np.ndarray,
        pairs: slice,
        base: BaseReadout,
        weight: Operand | Stored,
        found: Tensor,
    ) -> None:
        """Measure the rows of some pairs, which are counted from the first of these: [measured, row]."""
        shapes = PairShapes(self.shapes.length[pairs], self.shapes.base[pairs])
        n_blocks = how_many_blocks(len(rows), self.ops.block_tokens, spread=False)
        layout = lay_out(np.arange(len(rows)), pair, shapes.length[pair] - 1, shapes, n_blocks)

        def take(block: Block, each: Each = in_turn) -> None:
            dn = self._normed(ends, x, rows[block.tokens], block.segments)
            values = self.ops.readout(
                dn,
                ends.unembedding.weight,
                weight,
                weight.precision,
                base,
                block.first_pairs,
                block.segments,
                self.measured,
                each,
            )
            for i, name in enumerate(self.measured):
                found[i, block.rows] = values[name]

        # Cores share the vocabulary where there are few rows: a product of few rows does little but read it.
        if len(layout.blocks) < _BLOCKS:
            for block in layout.blocks:
                take(block, self.each)
        else:
            self.each(take, layout.blocks)

    def _unpatched(self, ends: EndWeights, x: Tensor, dx: Tensor, pairs: slice) -> tuple[BaseReadout, Tensor]:
        """The base runs' distributions of some pairs, and what is told of both runs of each."""
        prompts, device = self.prompts, self.model.device
        stored, bias = ends.unembedding
        length, first = self.shapes.length[pairs], self.shapes.base[pairs]
        at = first + length - 1
        last = x[upload(at, device)]
        n, d_vocab = len(last), len(stored)
        # The source run is a row of its own.
        segments = last_segments(PairShapes(length, first).segments(1))
        dn = self._normed(ends, x, dx[upload(at * prompts.n_sources, device)], segments)
        both = torch.cat([normalise(last, ends.norm, self.model.spec), dn])
        out = x.new_empty(2 * n, d_vocab)
        pieces = vocabulary_pieces(d_vocab, _piece(d_vocab, stored.shape[1], self.on_cpu))

        def multiply(piece: slice) -> None:
            out[:, piece] = both @ stored[piece].to(x.dtype).T

        self.each(multiply, pieces)
        logits, change = out[:n], out[n:]  # [pair, d_vocab]
        if bias is not None:
            logits += bias.to(x.dtype)
        answers = upload(prompts.answers[pairs], device)
        told = torch.empty(n, 2, 5, dtype=torch.float64, device=device)
        p = torch.empty(n, d_vocab, dtype=torch.float64, device=device)

        def tell(some: slice) -> None:
            runs = torch.stack([logits[some], logits[some] + change[some]], 1).double()
            places = answers[some].unsqueeze(1).expand(-1, 2, -1)  # [pair, run, answer]
            told[some, :, 0:2] = runs.gather(-1, places)
            told[some, :, 4] = runs.argmax(-1).double()
            logp = runs.log_softmax(-1)
            told[some, :, 2:4] = logp.gather(-1, places)
            torch.exp(logp[:, 0], out=p[some])

        self.each(tell, [slice(i, i + _PAIRS) for i in range(0, n, _PAIRS)])
        parts = x.new_empty(len(pieces), n, stored.shape[1])

        def average(i: int) -> None:
            torch.mm(p[:, pieces[i]].to(x.dtype), stored[pieces[i]].to(x.dtype), out=parts[i])

        self.each(average, range(len(pieces)))
        return BaseReadout(logits, p, parts.sum(0), answers), told

    def _tails(
        self, base: BaseReadout, stored: Tensor, weight: Operand | Stored, n_rows: np.ndarray
    ) -> dict[int, Tail]:
        """Expansions for the pairs that have very many rows; see readout_tail.py."""
        if not self.ops.expands:
            return {}
        return {
            i: make_tail(base.p[i], base.mean[i], stored, weight, self.each)
            for i, n in enumerate(n_rows.tolist())
            if worth_a_tail(n, len(stored), stored.shape[1], weight.precision, self.measured)
        }

    def _normed(self, ends: EndWeights, x: Tensor, d: Tensor, segments: list[Segment]) -> Tensor:
        """Difference of the final norm's output, for differences d of its input."""
        spec = self.model.spec
        parts = [Part(Scaled(d, None), [])]
        (normed,) = self.ops.add_norm(
            parts, [], x, [ends.norm.weight], spec.norm_eps, spec.norm == "layer", segments, self.exact
        )
        return normed.values
