"""The end of a pass: the final norm and the read-out of its rows and of the pairs' unpatched runs."""

from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.wavefront.layout import Block, PairShapes, how_many_blocks, lay_out
from deltapatch.engine.wavefront.prompts import Prompts
from deltapatch.engine.wavefront.reads import Reads, RowReads
from deltapatch.engine.wavefront.setup import Setup
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.runs import RunShape
from deltapatch.kernels.answers import Answers
from deltapatch.kernels.device import upload
from deltapatch.kernels.norm import Norms, Part
from deltapatch.kernels.pieces import ForEach, in_turn, vocabulary_pieces
from deltapatch.kernels.product import NarrowedByPiece, Operand, Precision, Scaled, narrow_weight
from deltapatch.kernels.readout import BaseReadout, ReadRows, Unembedding
from deltapatch.kernels.readout_tail import make_tail, tail_bytes, worth_a_tail
from deltapatch.kernels.segments import Segment
from deltapatch.kernels.softcap import CAP_NUMBERS, cap_difference, cap_slope, softcap
from deltapatch.models.forward import norm_scale, read_norm
from deltapatch.models.weights import EndWeights, map_tensors
from deltapatch.results.metrics import WEIGHTED, Function, Reference

_PIECE, _PIECE_ON_CPU = 1 << 26, 1 << 22  # entries of the unembedding that base runs take at a time
_HELD, _HELD_ON_CPU = 1 << 30, 1 << 27  # bytes of output distributions that are held at a time
_READS = 4  # whose output distributions a thread looks at together
_CELLS, _CELLS_ON_CPU = 1 << 25, 1 << 22  # logits that metrics of users are given at a time
_ONE_AT_A_TIME = Lock()
_BLOCKS = 4  # from which on cores have a block each


def reads_held(d_vocab: int, size: int, on_cpu: bool, tail: int = 0, capped: bool = False) -> int:
    """How many reads' output distributions are held at a time, in numbers of so many bytes.

    Args:
        d_vocab, size, on_cpu: of the model, its numbers, and whether they are in a CPU's memory.
        tail: bytes that a read's expansion takes, if it has one.
        capped: whether there is a soft cap of logits.
    """
    return max(1, (_HELD_ON_CPU if on_cpu else _HELD) // (_token_bytes(size, capped) * d_vocab + tail))


def distribution_bytes(d_vocab: int, d_model: int, size: int, on_cpu: bool, capped: bool = False) -> int:
    """Of a read: the numbers of each token, and what the mean of the unembedding is made of."""
    parts = -(-d_vocab // _piece(d_vocab, d_model, on_cpu))
    return d_vocab * _token_bytes(size, capped) + parts * d_model * size


def _token_bytes(size: int, capped: bool) -> int:
    """Logit, before a cap too, the source run's change of it, probability."""
    return (2 + capped) * size + 8


def workspace(d_vocab: int, d_model: int, size: int, on_cpu: bool, capped: bool = False) -> int:
    """Bytes that making some distributions takes, for each thread."""
    piece = _piece(d_vocab, d_model, on_cpu)
    held = reads_held(d_vocab, size, on_cpu, 0, capped)
    product = piece * (d_model + (3 + CAP_NUMBERS * capped) * held) * size
    return max(product, _READS * d_vocab * 2 * (2 * size + 24))


def _piece(d_vocab: int, d_model: int, on_cpu: bool) -> int:
    """Tokens whose part of the unembedding is taken at a time."""
    most = max(1024, (_PIECE_ON_CPU if on_cpu else _PIECE) // d_model)
    return vocabulary_pieces(d_vocab, most)[0].stop


def said_by(function: Function, name: str, logits: Tensor, base: Tensor, pair: EncodedPair) -> Tensor:
    """What a metric that a user brings says of some rows, [row].

    Raises:
        DeltapatchError: it is of another shape, or not finite.
    """
    with _ONE_AT_A_TIME:  # rows are read on several threads
        found = torch.as_tensor(function(logits, base, pair), device=logits.device)
    if found.shape != logits.shape[:1] or found.is_complex():
        raise DeltapatchError(
            f"metric {name} gave {found.dtype} of shape {list(found.shape)} for logits "
            f"{list(logits.shape)}: it must give a number for each row"
        )
    found = found.to(logits.dtype)
    if not found.isfinite().all():
        raise DeltapatchError(f"metric {name} gave a number that is not finite")
    return found


class Said(NamedTuple):
    """What the unpatched runs, base and source, say at reads."""

    logit: Tensor  # [read, run, answer] float64
    logp: Tensor  # [read, run, answer] float64, log-probabilities
    prediction: Tensor  # [read, run] int64, the likeliest token

    @classmethod
    def empty(cls, n_reads: int, device: torch.device) -> "Said":
        """Room for so many reads."""
        logit, logp = (torch.empty(n_reads, 2, 2, dtype=torch.float64, device=device) for _ in range(2))
        return cls(logit, logp, torch.empty(n_reads, 2, dtype=torch.int64, device=device))


class _SomeReads(NamedTuple):
    """Reads whose output distributions are held together."""

    some: slice  # of all
    at: Tensor  # [read, d_model], the base runs there
    shapes: PairShapes
    base: BaseReadout  # their distributions


class ReadOut:
    """Reads what the rows of a pass did to the output distributions. See `Wavefront`."""

    def __init__(self, setup: Setup, prompts: Prompts) -> None:
        self.setup, self.model, self.prompts, self.on_cpu = setup, setup.model, prompts, setup.on_cpu
        self.precision, self.ops, self.pool = setup.precision, setup.ops, setup.pool
        self.exact = setup.precision.exact
        # What the metrics that users bring say of the base runs themselves, [pair].
        self.unmoved = {name: np.zeros(len(prompts.shapes.runs)) for name in setup.functions}

    def read(
        self, ends: EndWeights, x: Tensor, dx: Tensor, rows: Tensor, row_reads: RowReads
    ) -> tuple[np.ndarray, Reference]:
        """Measure every row and the unpatched runs. Here the host waits for the device, once a pass.

        Output distributions are large: they are made for some reads, looked at by the rows, and dropped.

        Args:
            ends: final norm and unembedding as they are stored.
            x, dx: [base token, d_model] and [source token, d_model], the unpatched runs after the last layer.
            rows: [read of a row, d_model], the rows' differences there, packed as
            row_reads: says.

        Returns:
            [measured, row]; and what the base and source runs say.
        """
        ends = ends._replace(norm=map_tensors(ends.norm, lambda t: t.to(x.dtype)))
        stored, reads = ends.unembedding.weight, row_reads.reads
        precision = self.setup.taken_in(row_reads.n_tokens)
        weight = self._as_products_take_it(stored, precision)
        found = [rows.new_empty(len(part.asked.names), len(part.rows)) for part in row_reads.parts]
        n_reads, (d_vocab, d_model) = len(reads.token), stored.shape
        said = Said.empty(n_reads, rows.device)
        expanded = self._expanded(row_reads, d_vocab, d_model, precision)
        tail = tail_bytes(d_vocab, d_model, x.element_size(), precision) if expanded.any() else 0
        capped = self.model.spec.logit_softcap is not None
        step = reads_held(d_vocab, x.element_size(), self.on_cpu, tail, capped)
        for some in (slice(i, min(i + step, n_reads)) for i in range(0, n_reads, step)):
            token = reads.token[some]
            at = x[upload(token, x.device)]  # [read, d_model]
            change = dx[upload(token * self.prompts.n_sources, dx.device)]
            shapes = PairShapes([RunShape(1, 1)] * len(at))  # a read is a run of its own here, of one token
            base, said_here = self._unpatched(ends, at, change, shapes, reads.tokens[some])
            for whole, part in zip(said, said_here, strict=True):
                whole[some] = part
            tails = {
                i: make_tail(base.p[i], base.mean[i], stored, weight, self.pool)
                for i in np.flatnonzero(expanded[some]).tolist()
            }
            base = base._replace(tails=tails)
            here = _SomeReads(some, at, shapes, base)
            self._read_some(here, Unembedding(stored, weight), ends, rows, row_reads, found)
            if self.setup.functions:
                self._say_of_base_runs(reads, some, base)
        flat = torch.cat([values.flatten() for values in found]).cpu().numpy()
        edges = np.cumsum([0, *(values.numel() for values in found)])
        by_part = [flat[a:b].reshape(f.shape) for a, b, f in zip(edges[:-1], edges[1:], found, strict=True)]
        return row_reads.together(by_part), reads.reference(*(array.cpu().numpy() for array in said))

    def _as_products_take_it(self, stored: Tensor, precision: Precision) -> Operand | NarrowedByPiece:
        """The unembedding of a model in memory is narrowed once, that of a larger one piece by piece."""
        return NarrowedByPiece(stored, precision) if self.model.stream else narrow_weight(stored, precision)

    def _read_some(
        self,
        here: _SomeReads,
        unembedding: Unembedding,
        ends: EndWeights,
        rows: Tensor,
        row_reads: RowReads,
        found: list[Tensor],
    ) -> None:
        """Measure the rows at some reads, into `found`, [measured, read of a row] of each part."""
        some, at, shapes, base = here
        blocks: list[tuple[Tensor, Tensor, tuple[str, ...], Block]] = []
        for part, values in zip(row_reads.parts, found, strict=True):
            if not part.asked.names:
                continue
            of = row_reads.read[part.rows]
            mine = slice(*np.searchsorted(of, [some.start, some.stop]).tolist())
            number = of[mine] - some.start
            n_blocks = how_many_blocks(len(number), self.ops.block_tokens)
            layout = lay_out(np.arange(len(number)), number, np.zeros_like(number), shapes, n_blocks)
            d = rows[part.lines][mine]
            blocks += [(d[b.tokens], values[:, mine][:, b.rows], part.asked.names, b) for b in layout.blocks]

        def take(work: tuple[Tensor, Tensor, tuple[str, ...], Block], pool: ForEach = in_turn) -> None:
            d, out, asked, block = work
            dn = self._normed(ends, at, d, block.segments)
            of_reads = ReadRows(dn, block.segments, block.first_pairs)
            values: dict[str, Tensor] = {}
            if ours := self._fused(asked):
                values = self.ops.readout(of_reads, unembedding, base, measured=ours, pool=pool)
            if theirs := [name for name in asked if name in self.setup.functions]:
                pair = row_reads.reads.pair[some]
                values |= self._by_functions(theirs, of_reads, ends.unembedding.weight, base, pair)
            if WEIGHTED in asked:
                pair = row_reads.reads.pair[some]
                values[WEIGHTED] = self._by_weights(of_reads, ends.unembedding.weight, base, pair)
            for i, name in enumerate(asked):
                out[i] = values[name]

        # Cores share the vocabulary where there are few rows: a product of few rows does little but read it.
        if len(blocks) < _BLOCKS:
            for work in blocks:
                take(work, self.pool)
        else:
            self.pool(take, blocks)

    def _say_of_base_runs(self, reads: Reads, some: slice, base: BaseReadout) -> None:
        """What the metrics that users bring say of the base runs that end at some reads."""
        for pair in np.flatnonzero((reads.first >= some.start) & (reads.first < some.stop)).tolist():
            own = base.logits[int(reads.first[pair]) - some.start]
            for name, function in self.setup.functions.items():
                found = said_by(function, name, own[None], own, self.prompts.pairs[pair])
                self.unmoved[name][pair] = float(found[0])

    def _by_functions(
        self, names: list[str], rows: ReadRows, unembedding: Tensor, base: BaseReadout, pair: np.ndarray
    ) -> dict[str, Tensor]:
        """What the metrics that users bring say of some rows: name -> [row].

        Args:
            unembedding: [d_vocab, d_model], as it is stored.
            pair: [read], the number of each read's pair in the pass.
        """
        dn, (d_vocab, d_model) = rows.dn, unembedding.shape
        out = {name: dn.new_empty(len(dn)) for name in names}
        most = max(1, (_CELLS_ON_CPU if self.on_cpu else _CELLS) // d_vocab)
        pieces = vocabulary_pieces(d_vocab, _piece(d_vocab, d_model, self.on_cpu))
        for of_read, read in rows.spans():
            of = self.prompts.pairs[pair[read]]
            for first in range(of_read.start, of_read.stop, most):
                some = slice(first, min(first + most, of_read.stop))
                logits = base.logits[read].expand(some.stop - some.start, -1).clone()
                for piece in pieces:
                    change = dn[some] @ unembedding[piece].to(dn.dtype).T
                    logits[:, piece] += base.capped(read, piece, change)
                for name in names:
                    out[name][some] = said_by(self.setup.functions[name], name, logits, base.logits[read], of)
        return out

    def _fused(self, names: Sequence[str]) -> list[str]:
        """Those of some measured numbers that the read-out operation gives."""
        return [name for name in names if name not in self.setup.functions and name != WEIGHTED]

    def _by_weights(self, rows: ReadRows, unembedding: Tensor, base: BaseReadout, pair: np.ndarray) -> Tensor:
        """How far some rows move the weighted sums of logits of their pairs: [row].

        Products with the weighted tokens' columns alone; args as of `_by_functions`.
        """
        dn = rows.dn
        out = dn.new_empty(len(dn))
        for some, read in rows.spans():
            # The columns are few: in float64, where what they have in common cancels.
            tokens, weights = zip(*(self.prompts.pairs[pair[read]].weights or []), strict=True)
            token = torch.tensor(tokens, device=dn.device)
            weight = torch.tensor(weights, dtype=torch.float64, device=dn.device)
            columns = unembedding[token].double()  # [token, d_model]
            if base.cap is None:
                out[some] = dn[some] @ (weight @ columns).to(dn.dtype)
            else:
                out[some] = (base.capped(read, token, dn[some].double() @ columns.T) @ weight).to(dn.dtype)
        return out

    def _unpatched(
        self, ends: EndWeights, at: Tensor, change: Tensor, shapes: PairShapes, tokens: np.ndarray
    ) -> tuple[BaseReadout, Said]:
        """The base runs' distributions at some reads, and what both runs say there.

        Args:
            at, change: [read, d_model], the base run there, and the source run's difference.
            shapes: of these reads.
            tokens: [read, 2, token], those of the answers; NONE where an answer has fewer.
        """
        device = self.model.device
        stored, bias = ends.unembedding
        n, d_vocab = len(at), len(stored)
        # The source run is a row of its own.
        dn = self._normed(ends, at, change, shapes.segments(1))
        both = torch.cat([read_norm(at, ends.norm, self.model.spec), dn])
        out = at.new_empty(2 * n, d_vocab)
        pieces = vocabulary_pieces(d_vocab, _piece(d_vocab, stored.shape[1], self.on_cpu))

        logits, changed = out[:n], out[n:]  # [read, d_vocab]
        cap = self.model.spec.logit_softcap
        uncapped = None if cap is None else torch.empty_like(logits)
        # Of each piece: its highest logit, Σ exp(logit - that), and the unembedding's rows added up likewise.
        top, mass = (torch.empty(len(pieces), n, 1, dtype=torch.float64, device=device) for _ in range(2))
        parts = at.new_empty(len(pieces), n, stored.shape[1])

        def multiply(i: int) -> None:
            piece = pieces[i]
            weight = stored[piece].to(at.dtype)
            # A CPU multiplies the two rows of one read faster as they are, and more with the outputs first.
            out[:, piece] = both @ weight.T if n == 1 else (weight @ both.T).T
            own = logits[:, piece]
            if bias is not None:
                own += bias[piece].to(at.dtype)
            slope = None
            if cap is not None and uncapped is not None:
                uncapped[:, piece] = own
                slope = cap_slope(own, cap)
                changed[:, piece] = cap_difference(own, changed[:, piece], cap)
                own.copy_(softcap(own, cap))
            top[i] = own.amax(1, keepdim=True)
            grown = (own - top[i].to(at.dtype)).exp_()
            mass[i] = grown.sum(1, keepdim=True, dtype=torch.float64)
            torch.mm(grown if slope is None else grown * slope, weight, out=parts[i])

        self.pool(multiply, range(len(pieces)))
        answers = Answers.of(upload(tokens, device))
        said = Said.empty(n, device)
        p = torch.empty(n, d_vocab, dtype=torch.float64, device=device)

        def tell(some: slice) -> None:
            runs = torch.stack([logits[some], logits[some] + changed[some]], 1).double()
            said.logit[some] = answers.total(runs, some)
            said.prediction[some] = runs.argmax(-1)
            logp = runs.log_softmax(-1)
            said.logp[some] = answers.total(logp, some)
            torch.exp(logp[:, 0], out=p[some])

        self.pool(tell, [slice(i, i + _READS) for i in range(0, n, _READS)])
        share = (top - top.amax(0)).exp_()
        share /= (share * mass).sum(0)
        mean = parts.mul_(share.to(at.dtype)).sum(0)
        base = BaseReadout(logits, p, mean, answers.first, cap=cap, uncapped=uncapped, others=answers.others)
        return base, said

    def _expanded(self, row_reads: RowReads, d_vocab: int, d_model: int, precision: Precision) -> np.ndarray:
        """[read], whether its rows take an expansion; see readout_tail.py."""
        out = np.zeros(len(row_reads.reads.token), dtype=bool)
        expands = self.ops.expands and self.model.spec.logit_softcap is None
        for part in row_reads.parts if expands else []:
            number, n_rows = np.unique(row_reads.read[part.rows], return_counts=True)
            names = part.asked.names
            ours = self._fused(names)
            out[number] = [worth_a_tail(n, d_vocab, d_model, precision, ours) for n in n_rows.tolist()]
        return out

    def _normed(self, ends: EndWeights, x: Tensor, d: Tensor, segments: list[Segment]) -> Tensor:
        """Difference of the final norm's output, for differences d of its input."""
        spec = self.model.spec
        parts = [Part(Scaled(d, None), [])]
        weight = norm_scale(ends.norm, spec)
        weight = weight if spec.logit_scale == 1 else weight * spec.logit_scale
        norms = Norms(x, [weight], spec.norm_eps, spec.norm == "layer")
        (normed,) = self.ops.add_norm(parts, [], norms, segments, self.exact)
        return normed.values
