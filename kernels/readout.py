"""Read-out: what each row did to the output distribution, without ever storing rows x vocabulary.

With base probabilities p, logit change D and its mean m = Σ_j p_j D_j (which no probability depends on):
    change of log P(i) = (D_i - m) - log1p(Σ_j p_j expm1(D_j - m))
The sum is never negative, since expm1(x) >= x, so nothing cancels. The mean needs no logits: it is the row's
product with Σ_j p_j W_j, one vector a read. Where logits are capped m is the mean of the linear parts of D,
each token's slope of the cap times its product: what it leaves, Σ_j p_j (D_j - m), is of second order.

The entropy H of the distribution: with x_j = D_j - m, Z = Σ_j p_j e^(x_j) and the base logits L_j,
    change of H = log Z - Σ_j p_j e^(x_j) (l_j + x_j) / Z,   l_j = L_j - Σ_i p_i L_i.
As Σ_j p_j l_j = 0, the sum is Σ_j p_j expm1(x_j) (l_j + x_j) + Σ_j p_j x_j: H itself never enters. What is of
first order in D is there once, with l; log Z and the rest are of second order, the rest being twice as large.

A read is a position of a pair whose output distribution is looked at: one of each pair, or several where the
answers have several tokens. Here every read stands for itself, in segments as in a batch: what it says is put
together by who asks (engine/wavefront/reads.py).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltapatch.kernels.answers import Answers, CappedLogits, Moved, answer_change, with_beyond
from deltapatch.kernels.pieces import ForEach, in_turn, vocabulary_pieces
from deltapatch.kernels.product import NarrowedByPiece, Operand, Scaled, narrow, product
from deltapatch.kernels.readout_tail import TOLERANCE, Tail, expand
from deltapatch.kernels.segments import Segment
from deltapatch.kernels.softcap import cap_difference, cap_slope

CELLS = 1 << 18  # logit changes held at a time: few enough to stay in the cache, in float64 too
# Of a row's likeliest token: whether it is not the base's, whether it is the clean or the corrupted answer's.
_SAID = ("flip", "says_clean", "says_corrupted")
OFF = -1.0  # where Σ_j p_j (D_j - m) is below it, few digits of 1 + Σ_j p_j expm1(D_j - m) are left
_HUGE = 60.0  # above it exp overflows float32 too soon; below it nothing that float32 rounds to 0 matters


class BaseReadout(NamedTuple):
    """The base runs' output distributions, read by read."""

    logits: Tensor  # [read, d_vocab]
    p: Tensor  # [read, d_vocab], float64
    mean: Tensor  # [read, d_model], Σ_j p_j W_j; of capped logits each times its slope
    answers: Tensor  # [read, 2] int64: the next token of the clean answer, and of the corrupted one
    tails: Mapping[int, Tail] = {}  # of the reads that have one; the others take every token as it is
    cap: float | None = None  # c of c tanh(x / c), where logits are capped
    uncapped: Tensor | None = None  # [read, d_vocab], what the cap is put on
    others: Tensor | None = None  # [read, 2, other] int64, tokens that count as an answer too, -1 for none

    def answer_change(self, dn: Tensor, read: int, unembedding: Tensor) -> tuple[Tensor, Moved | None]:
        """How a read's answers' logits change for some rows; see `answers.answer_change`."""
        tokens = Answers(self.answers, self.others).all[read]
        capped = None
        if self.cap is not None and self.uncapped is not None:
            capped = CappedLogits(self.cap, self.uncapped[read])
        return answer_change(dn, unembedding, tokens, self.logits[read], capped)

    def capped(self, read: int | Tensor, tokens: slice | Tensor, change: Tensor) -> Tensor:
        """Changes of logits behind the cap, [row, token], for those before it; the same without one."""
        if self.cap is None or self.uncapped is None:
            return change
        return cap_difference(self.uncapped[read][..., tokens].to(change.dtype), change, self.cap)

    @property
    def beyond_columns(self) -> bool:
        """Whether the answers' logits change by more than products with columns."""
        return self.cap is not None or self.others is not None

    def slopes(self) -> Tensor:
        """How the answers' capped logits change with those before the cap, [read, 2] float64."""
        assert self.uncapped is not None
        assert self.cap is not None
        return cap_slope(self.uncapped.gather(1, self.answers).double(), self.cap)

    def behind_cap(self, change: Tensor, read: Tensor) -> Moved:
        """How the answers' capped logits change, for [row, 2] those before the cap; read: [row]."""
        assert self.uncapped is not None
        assert self.cap is not None
        wide, own = change.double(), self.uncapped.gather(1, self.answers)[read].double()
        return Moved(self.slopes()[read] * wide, cap_difference(own, wide, self.cap))


class Unembedding(NamedTuple):
    """The unembedding: as it is stored, and as the sweep's products take it."""

    exact: Tensor  # [d_vocab, d_model]; the answers' logits are taken with it
    weight: Operand | NarrowedByPiece  # [d_vocab, d_model], or to be narrowed to that piece by piece


class ReadRows(NamedTuple):
    """Rows to be read out, and which reads they are of.

    Attributes:
        dn: [row, d_model], difference of the final norm's output at a row's read.
        segments: one position a row, covering all rows in order; their pairs are reads.
        first_reads: for each segment, its first read.
    """

    dn: Tensor
    segments: list[Segment]
    first_reads: list[int]

    def spans(self) -> list[tuple[slice, int]]:
        """(rows, their read), in order."""
        return [
            (slice(s.token + i * s.rows, s.token + (i + 1) * s.rows), first + i)
            for s, first in zip(self.segments, self.first_reads, strict=True)
            for i in range(s.pairs)
        ]


def readout(
    rows: ReadRows,
    unembedding: Unembedding,
    base: BaseReadout,
    *,
    measured: Sequence[str],
    pool: ForEach = in_turn,
) -> dict[str, Tensor]:
    """The measured numbers of each row.

    Args:
        rows: differences, in float32 or float64.
        unembedding: what they are multiplied with, in the precision of its weight.
        base: of every read in the pass.
        measured: which of `results.metrics.MEASURED` to return.
        pool: does pieces of the vocabulary, perhaps side by side.

    Returns:
        name -> [row], in the rows' dtype.
    """
    dn, spans = rows.dn, rows.spans()
    out = {name: dn.new_empty(len(dn)) for name in measured}
    mean, answer = dn.new_empty(len(dn)), dn.new_empty(len(dn), 2)
    apart = out.get("logit_diff", mean)  # where it is not asked for it is made of nothing
    beyond = None
    if base.beyond_columns:
        beyond = Moved(*(dn.new_empty(len(dn), 2, dtype=torch.float64) for _ in range(2)))
    for some, read in spans:
        if beyond is None:
            columns = unembedding.exact[base.answers[read]].to(dn.dtype)  # [2, d_model]
        else:
            columns, moved = base.answer_change(dn[some], read, unembedding.exact)
            assert moved is not None
            beyond.linear[some], beyond.whole[some] = moved
        mean[some] = dn[some] @ base.mean[read]
        answer[some] = dn[some] @ (columns - base.mean[read]).T
        # One product with the difference of the columns: their common part never enters.
        if "logit_diff" in out:
            apart[some] = dn[some] @ (columns[0] - columns[1])
    if beyond is not None:
        mean, answer, apart = with_beyond(mean, answer, apart, beyond, base.cap)
        if "logit_diff" in out:
            out["logit_diff"].copy_(apart)
    if any(name != "logit_diff" for name in measured):
        weight = unembedding.weight
        changes = _Changes(narrow(dn, weight.precision), mean.unsqueeze(1), answer, spans)
        left = _expanded(dn, changes, base, TOLERANCE.get(weight.precision.name, 0.0), out)
        if left is None:
            _distribution(changes, weight, base, out, pool)
        elif len(left):
            few = {name: values.new_empty(len(left)) for name, values in out.items() if name != "logit_diff"}
            _distribution(changes.some(left), weight, base, few, pool)
            for name, values in few.items():
                out[name][left] = values
    return out


def _read_of(spans: list[tuple[slice, int]], device: torch.device) -> Tensor:
    """[row], which read each is of."""
    reads, counts = (torch.tensor(x) for x in zip(*((r, s.stop - s.start) for s, r in spans), strict=True))
    return torch.repeat_interleave(reads, counts).to(device)


class _Changes(NamedTuple):
    """What is known of rows before any token but the answers is looked at."""

    dn: Scaled  # [row, d_model], as products take it
    mean: Tensor  # [row, 1], of the logit changes
    answer: Tensor  # [row, 2], the answers' logit changes less the mean
    spans: list[tuple[slice, int]]  # (rows, their read)

    def some(self, which: Tensor) -> "_Changes":
        """Those of some rows, which ascend, when these stand alone."""
        edges = torch.tensor([[rows.start, rows.stop] for rows, _ in self.spans])
        found = torch.searchsorted(which, edges).tolist()
        spans = [(slice(a, b), read) for (a, b), (_, read) in zip(found, self.spans, strict=True) if b > a]
        return _Changes(_rows(self.dn, which), self.mean[which], self.answer[which], spans)


def _rows(d: Scaled, which: Tensor | slice) -> Scaled:
    return Scaled(d.values[which], None if d.scale is None else d.scale[which])


def _expanded(
    dn: Tensor, changes: _Changes, base: BaseReadout, tolerance: float, out: dict[str, Tensor]
) -> Tensor | None:
    """Take rows of reads with a tail by its expansion; returns the rows still to be done, None for all."""
    if not any(read in base.tails for _, read in changes.spans):
        return None
    done = torch.zeros(len(dn), dtype=torch.bool)
    for rows, read in changes.spans:
        if read not in base.tails:
            continue
        some = _rows(changes.dn, rows)
        lse, bound, spread = expand(dn[rows], some, changes.mean[rows], base.tails[read])
        done[rows] = True
        for i, name in enumerate(("dlogp_clean", "dlogp_corrupted")):
            if name in out:
                torch.sub(changes.answer[rows, i], lse, out=out[name][rows])
                done[rows] &= bound <= tolerance * out[name][rows].abs().maximum(spread)
    return (~done).nonzero().squeeze(1)


def _distribution(
    changes: _Changes,
    weight: Operand | NarrowedByPiece,
    base: BaseReadout,
    out: dict[str, Tensor],
    pool: ForEach,
) -> None:
    """The numbers that need every token."""
    dn, mean, answer, spans = changes
    n_rows, d_vocab = len(mean), len(weight.values)
    pieces = vocabulary_pieces(d_vocab, max(1024, CELLS // n_rows))
    # KL is of second order in D. float64 carries it through the cancellation of its first-order part; so it
    # does with the entropy, whose first-order part is none where all tokens are alike.
    second_order = "kl" in out or "entropy" in out
    wide = torch.float64 if second_order else mean.dtype
    mass = mean.new_zeros(len(pieces), n_rows, dtype=wide)  # Σ_j p_j expm1(D_j - m), of each piece
    rest = torch.zeros_like(mass)  # Σ_j p_j (D_j - m): not quite zero, since products are rounded
    turned = torch.zeros_like(mass)  # Σ_j p_j expm1(D_j - m) (l_j + D_j - m)
    # Σ_j p_j L_j of each read
    logit = {r: base.p[r] @ base.logits[r].double() for _, r in spans} if "entropy" in out else {}
    highest = mean.new_full(mass.shape, -torch.inf)
    likeliest = _Likeliest(base, spans, out, pieces, highest)

    def take(i: int) -> None:
        change = product(dn, weight.rows(pieces[i])).plain()  # [row, piece]
        for rows, read in spans if base.cap is not None else ():
            change[rows] = base.capped(read, pieces[i], change[rows])
        change.sub_(mean)
        highest[i] = change.amax(-1)
        for rows, read in spans:
            likeliest.take(i, change[rows], rows, read)
        linear = second_order or base.cap is not None
        change_wide = change.to(wide)
        # In place where nobody needs the changes any more: what is written anew pushes others from the cache.
        grown = torch.expm1(change_wide) if linear else change_wide.expm1_()
        for rows, read in spans:
            p = base.p[read, pieces[i]].to(wide)
            mass[i, rows] = grown[rows] @ p
            if linear:
                rest[i, rows] = change_wide[rows] @ p
            if read in logit:
                own = base.logits[read, pieces[i]].double() - logit[read]
                turned[i, rows] = grown[rows].mul_(change_wide[rows].add_(own)) @ p

    pool(take, range(len(pieces)))
    mass, rest = mass.sum(0), rest.sum(0)
    lse = torch.log1p(mass)
    kl = lse - rest
    entropy = lse - (turned.sum(0) + rest) / (1 + mass)

    read_of = _read_of(spans, mean.device)
    # With a cap the mean of large changes is not that of their linear parts, and the sum may be all but -1.
    direct = ((highest.amax(0) > _HUGE) | (rest < OFF)).nonzero().squeeze(1)
    for some in direct.split(max(1, max(CELLS, 1024 * n_rows) // d_vocab)):  # what the pieces may hold
        # log p + D: its exponential cannot overflow once the largest is taken out, and no term is negative.
        few = _rows(dn, some)
        parts = [product(few, weight.rows(piece)).plain() for piece in pieces]
        far = base.capped(read_of[some], slice(None), torch.cat(parts, 1))  # [row, d_vocab]
        far = far.double() - mean[some].double()
        before = base.logits[read_of[some]].double()
        lse[some] = ((before + far).logsumexp(-1) - before.logsumexp(-1)).to(wide)
        if "entropy" in out:
            entropy[some] = _entropy(before + far) - _entropy(before)
        kl[some] = lse[some] - (far * base.p[read_of[some]]).sum(-1).to(wide)

    likeliest.tell(out)
    if "kl" in out:
        out["kl"].copy_(kl.clamp_(min=0))
    if "entropy" in out:
        out["entropy"].copy_(entropy)
    for i, name in enumerate(("dlogp_clean", "dlogp_corrupted")):
        if name in out:
            torch.sub(answer[:, i], lse.to(mean.dtype), out=out[name])


def _entropy(logits: Tensor) -> Tensor:
    """[..., d_vocab] -> [...], nats."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


class _Likeliest:
    """Whether a row's likeliest token, of equal ones the first, is the base's, or one of an answer's.

    Args:
        base: of all reads.
        spans: (rows, their read).
        out: what is asked for, name -> [row].
        pieces: of the vocabulary.
        lowest: [piece, row], minus infinity.
    """

    def __init__(
        self,
        base: BaseReadout,
        spans: list[tuple[slice, int]],
        out: dict[str, Tensor],
        pieces: list[slice],
        lowest: Tensor,
    ) -> None:
        self.logits, self.pieces = base.logits, pieces
        tokens = Answers(base.answers, base.others).all.flatten(1)  # [read, clean tokens and corrupted ones]
        each = tokens.shape[1] // 2
        self.of = [_SAID[0], *[_SAID[1]] * each, *[_SAID[2]] * each]  # what is said of each token looked at
        self.asked = [i for i, name in enumerate(self.of) if name in out]
        if not self.asked:
            return
        self.tokens = {r: [int(base.logits[r].argmax()), *tokens[r].tolist()] for _, r in spans}
        # Of base logit - base's top logit + D - m: the highest of each piece; that of each token asked for,
        # the highest before it in its piece, and which piece that is.
        self.best = lowest.clone()
        self.own, self.before = (lowest[:1].expand(len(self.of), -1).clone() for _ in range(2))
        self.piece = torch.zeros(self.own.shape, dtype=torch.int64, device=lowest.device)

    def take(self, i: int, change: Tensor, rows: slice, read: int) -> None:
        """Take in a piece of the vocabulary, [row, piece], of some rows of a read."""
        if not self.asked:
            return
        piece, logits, tokens = self.pieces[i], self.logits[read], self.tokens[read]
        moved = change + (logits[piece] - logits[tokens[0]])
        self.best[i, rows] = moved.amax(-1)
        for j in self.asked:
            at = tokens[j] - piece.start
            if 0 <= at < piece.stop - piece.start:
                self.own[j, rows], self.piece[j, rows] = moved[:, at], i
                self.before[j, rows] = moved[:, :at].amax(-1) if at else -torch.inf

    def tell(self, out: dict[str, Tensor]) -> None:
        """Write down what is asked for, once all pieces are in."""
        if not self.asked:
            return
        so_far = self.best.cummax(0).values  # [piece, row]
        earlier = torch.cat([torch.full_like(so_far[:1], -torch.inf), so_far[:-1]])
        found: dict[str, Tensor] = {}
        for j in self.asked:
            before = torch.maximum(earlier.gather(0, self.piece[j : j + 1])[0], self.before[j])
            is_it = (self.own[j] > before) & (self.own[j] >= so_far[-1])
            name = self.of[j]
            found[name] = found[name] | is_it if name in found else is_it
        for name, is_it in found.items():
            out[name].copy_(~is_it if name == "flip" else is_it)
