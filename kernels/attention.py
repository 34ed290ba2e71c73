"""Attention difference: the change of z, from the changes of q, k and v, in one pass over the keys.

With base weights p over keys i and logit change
    D_i = ((dq)·k_i + (q + dq)·dk_i) * scale            (dk_i = 0 for keys before the row's first position)
whose mean Σ p_i D_i is taken out, since a softmax does not see it, the weights change by
    w_i = p_i (expm1(D_i) - A) / (1 + A),   A = Σ p_i expm1(D_i)
and the difference is Σ w_i v_i + Σ (p_i + w_i) dv_i. A is never negative, since expm1(D) >= D, so nothing
cancels. Where D is huge expm1 would overflow: there the patched softmax is taken directly.

Changes of q and k come as the products give them, before rotary; it is linear, so it turns them like vectors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from deltapatch.kernels.edits import Edit, Swap, apply_edits, swaps_of
from deltapatch.kernels.product import Precision, Scaled, narrow
from deltapatch.kernels.segments import (
    Segment,
    base_of_tokens,
    gather,
    read_segments,
    span,
    unseen,
)
from deltapatch.kernels.softcap import cap_difference, softcap

HUGE = 60.0  # exp(60) is safe in float32, and p_i that float32 rounds to 0 cannot matter below it
CELLS = 1 << 19  # logit changes held at a time, where one query has no more: few enough for the cache
_BY_ROW = (0, 2, 3, 1, 4)  # [pair, position, row, head, ...] as [pair, row, head, position, ...]


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding: pairs of coordinates are turned by angles that grow with the position.

    Attributes:
        cos, sin: [base token, pair of coordinates], of the angles.
        interleaved: coordinates 2i and 2i + 1 are a pair; else i and i + the number of pairs. Those that are
            in no pair stay.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def turn(self, d: Tensor, segment: Segment) -> Tensor:
        """Changes of queries or keys, [pair, position, row, head, d_head], at a segment's last positions."""
        cos, sin = (segment.own(t)[:, -d.shape[1] :].unsqueeze(3) for t in (self.cos, self.sin))
        return self._turned(d, cos, sin)

    def turn_lines(self, d: Tensor, segment: Segment, at: Tensor) -> Tensor:
        """The same, [pair, line, head, d_head], of lines at positions `at`, [line], of a segment's runs."""
        cos, sin = (segment.run(t).index_select(1, at).unsqueeze(2) for t in (self.cos, self.sin))
        return self._turned(d, cos, sin)

    def _turned(self, d: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[..., head, d_head] by [..., 1, pair of coordinates]."""
        n = cos.shape[-1]
        if self.interleaved:
            first, second = slice(0, 2 * n, 2), slice(1, 2 * n, 2)
        else:
            first, second = slice(0, n), slice(n, 2 * n)
        a, b = d[..., first], d[..., second]
        out = torch.empty(d.shape, dtype=d.dtype, device=d.device)
        torch.mul(a, cos, out=out[..., first]).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out[..., second]).addcmul_(a, sin)
        out[..., 2 * n :] = d[..., 2 * n :]
        return out


class QKV(NamedTuple):
    """The rows' differences of queries, keys and values, up to their scale and before rotary.

    Attributes:
        q: [token, head, d_head].
        k, v: [token, kv head, d_head].
        scale: [token], times which the three are the differences; None: all ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: Tensor | None


class AttentionBase(NamedTuple):
    """The attention's inputs in the base runs.

    Attributes:
        q: [base token, head, d_head], rotated.
        k: [base token, kv head, d_head], rotated.
        v: [base token, kv head, d_head].
        rotary: for every base token.
        logit_scale: of the products of queries and keys.
        softcap: c of c tanh(logit / c), which comes next; None: nothing does.
        window: how many positions a query sees, its own the last; None: all up to its own.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rotary: Rotary
    logit_scale: float
    softcap: float | None = None
    window: int | None = None


def attention_difference(
    changes: QKV,
    base: AttentionBase,
    segments: list[Segment],
    swaps: Mapping[str, Sequence[Edit]],
    precision: Precision,
    *,
    reads_only: bool,
    pattern: Tensor | None = None,
) -> Scaled:
    """Difference of the attention's output before the output projection.

    Args:
        changes: of the rows. They are only read, and may be one line that stands for all tokens.
        base: of the runs that the rows change.
        segments: where the rows lie and what their base is.
        swaps: of heads, at "q", "k" and "v" (before rotary), "pattern" and "z"; tokens of the last two count
            lines of the result.
        precision: of the products; what reads the result.
        reads_only: only the positions that are read out are wanted (the last layer).
        pattern: [line of the result, head, key of the run], receives the changes of attention probabilities.

    Returns:
        [token, head * d_head]; with reads_only packed as `read_segments` says.
    """
    n_heads, d_head = changes.q.shape[1:]
    d = [
        edited_heads(d, changes.scale, swaps.get(place, []))
        for d, place in zip(changes[:3], "qkv", strict=True)
    ]
    wanted = read_segments(segments) if reads_only else segments
    out = d[0].new_empty(sum(s.n_tokens for s in wanted), n_heads, d_head)
    of_pattern = swaps_of(swaps.get("pattern", []))
    # No segment is small where there is a pattern: these take what is seen of it.
    cells = CELLS if of_pattern or pattern is not None else n_heads
    for group in gather(wanted, lambda s: s.n_tokens * s.length * cells, CELLS, _of_the_same_runs):
        if group.stop - group.start > 1:
            _together(d, base, segments[group], wanted[group], out)
        else:
            _by_itself(d, base, segments[group.start], wanted[group.start], _Into(out, pattern, of_pattern))
    apply_edits(out, swaps.get("z", []))
    return narrow(out.flatten(1), precision)


def edited_heads(d: Tensor, scale: Tensor | None, edits: Sequence[Edit]) -> Tensor:
    """A difference, [token, head, d_head], with its scale and its edits; itself where there are none."""
    if scale is not None:
        d = d * scale.view(-1, 1, 1)
    elif edits:
        d = d.clone(memory_format=torch.contiguous_format)
    apply_edits(d, edits)
    return d


def _of_the_same_runs(a: Segment, b: Segment) -> bool:
    return (a.base, a.pairs) == (b.base, b.pairs)


class _Into(NamedTuple):
    """What receives results of `attention_difference`, and what is swapped in them on the way."""

    out: Tensor  # [line, head, d_head]
    pattern: Tensor | None  # [line, head, key of the run]
    swaps: list[Swap]


class _Scores(NamedTuple):
    """The base runs' attention of some queries, [..., key]."""

    before: Tensor | None  # logits before a soft cap, where there is one
    logp: Tensor
    p: Tensor
    hidden: Tensor | None  # bool, what queries do not see; None: they see all

    def laid_out(self, lay: Callable[[Tensor], Tensor], hidden: Tensor | None) -> "_Scores":
        """The same in another layout, with what is hidden there."""
        before = None if self.before is None else lay(self.before)
        return _Scores(before, lay(self.logp), lay(self.p), hidden)


def _by_itself(d: list[Tensor], base: AttentionBase, segment: Segment, queries: Segment, into: _Into) -> None:
    """The attention of one segment's rows, some queries and heads at a time.

    Args:
        d: changes of q, k and v, [token, head, d_head], before rotary.
        queries: those that are wanted, as lines of
        into: says.
    """
    (q, k, v), n_heads = base[:3], into.out.shape[1]
    group = n_heads // k.shape[1]  # query heads that share keys and values
    heads = max(1, CELLS // (queries.n_tokens * segment.length))
    step = max(1, CELLS // (segment.pairs * segment.rows * segment.length))  # positions of queries
    rows_q, rows_k, rows_v = (segment.tokens(each) for each in d)
    rows_q = rows_q[:, segment.positions - queries.positions :]
    rows_q, rows_k = (base.rotary.turn(each, segment) for each in (rows_q, rows_k))
    n_queries, n_own = queries.positions, segment.positions
    for first in range(0, n_queries, step):
        some = slice(first, min(first + step, n_queries))
        hidden = unseen(queries, some, rows_q.device, base.window)
        # Queries see no key after the last of them.
        keys, own = (slice(n - n_queries + some.stop) for n in (segment.length, n_own))
        for h in range(0, n_heads, heads):
            head = slice(h, h + heads)
            shared = head if group == 1 else [i // group for i in range(h, min(h + heads, n_heads))]
            p, w = _probabilities(
                rows_q[:, some, :, head],
                rows_k[:, own, :, shared],
                segment.run(q)[:, keys, head],
                segment.run(k)[:, keys, shared],
                hidden,
                base,
            )
            # [pair, query, row, head, key]
            here = w.permute(0, 2, 3, 1, 4)
            for swap in into.swaps:
                _swap_pattern(here, swap, queries, some, head)
            if into.pattern is not None:
                queries.tokens(into.pattern)[:, some, :, head, : w.shape[-1]] = here
            queries.tokens(into.out)[:, some, :, head] = _mixed(
                p, w, segment.run(v)[:, keys, shared], rows_v[:, own, :, shared]
            )


def _together(
    d: list[Tensor], base: AttentionBase, segments: list[Segment], queries: list[Segment], out: Tensor
) -> None:
    """The attention of segments of the same runs, all but the rows' own keys and values as one.

    Rows that start at many positions are many small segments: their operations would take longer to start
    than to do.

    Args:
        d, queries, out: as of `_by_itself`, here of all segments.
    """
    first, longest = segments[0], max(segment.positions for segment in queries)
    dq = _lines(d[0], segments, queries)  # [pair, line, head, d_head]
    dk, dv = (_lines(each, segments, segments) for each in d[1:])
    at, own_at = (_positions(some, out.device) for some in (queries, segments))
    dq, dk = (base.rotary.turn_lines(dq, first, at), base.rotary.turn_lines(dk, first, own_at))
    group = dq.shape[2] // dk.shape[2]
    if group > 1:
        dk, dv = (each.repeat_interleave(group, 2) for each in (dk, dv))
    q, k, v = (first.run(each).transpose(1, 2) for each in base[:3])  # [pair, head, position, d_head]
    k, v = (each.repeat_interleave(group, 1) if group > 1 else each for each in (k, v))
    asked = replace(queries[0], positions=longest, rows=1)
    hidden = unseen(asked, slice(0, longest), out.device, base.window)
    scores = _scores(q[:, :, first.length - longest :], k, hidden, base)  # [pair, head, query, key]
    asked_at = at - (first.length - longest)
    hidden = None if hidden is None else hidden.index_select(0, asked_at).unsqueeze(1)
    scores = scores.laid_out(
        lambda each: each.transpose(1, 2).contiguous().index_select(1, asked_at), hidden
    )  # [pair, line, head, key]

    change = torch.matmul(dq.transpose(1, 2), k.transpose(2, 3)).transpose(1, 2).contiguous()
    with_base = dq.add_(first.run(base.q).index_select(1, at))
    pieces = [
        (_part(of, segments), _part(to, queries), to.tokens(out).permute(_BY_ROW), slice(-of.positions, None))
        for of, to in zip(segments, queries, strict=True)
    ]
    for of, to, _, own in pieces:
        mine = to(change)[..., own]
        mine += to(with_base) @ of(dk).transpose(3, 4)
    w = _changed(change.mul_(base.logit_scale), scores, base)
    of_base = torch.matmul(w.transpose(1, 2), v).transpose(1, 2)
    w += scores.p
    for of, to, place, own in pieces:
        torch.add(to(of_base), to(w)[..., own] @ of(dv), out=place)


def _lines(packed: Tensor, segments: list[Segment], queries: list[Segment]) -> Tensor:
    """Tokens of segments at the positions of queries, of [token, ...]: [pair, line, ...]."""
    if segments[0].pairs == 1 and segments == queries:
        return packed[span(segments)].unsqueeze(0)
    parts = [
        of.tokens(packed)[:, of.positions - to.positions :].flatten(1, 2)
        for of, to in zip(segments, queries, strict=True)
    ]
    return torch.cat(parts, 1)


def _positions(segments: list[Segment], device: torch.device) -> Tensor:
    """[line], where in their runs the lines of `_lines` are."""
    return base_of_tokens([replace(segment, pairs=1, base=0) for segment in segments], device)


def _part(segment: Segment, segments: list[Segment]) -> Callable[[Tensor], Tensor]:
    """What takes a segment's part of [pair, line, head, ...], as [pair, row, head, position, ...]."""
    first = (segment.token - segments[0].token) // segment.pairs
    lines, shape = slice(first, first + segment.n_tokens // segment.pairs), (segment.positions, segment.rows)
    return lambda whole: whole[:, lines].unflatten(1, shape).permute(_BY_ROW)


def _scores(q: Tensor, k: Tensor, hidden: Tensor | None, base: AttentionBase) -> _Scores:
    """The base's attention, [..., query, key], of queries and keys [..., position, d_head]."""
    logits = torch.matmul(q, k.transpose(-1, -2)).mul_(base.logit_scale)
    logp = softcap(logits, base.softcap)
    if hidden is not None:
        logp.masked_fill_(hidden, -torch.inf)
    logp = logp.log_softmax(-1)
    return _Scores(None if base.softcap is None else logits, logp, logp.exp(), hidden)


def _probabilities(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, hidden: Tensor | None, base: AttentionBase
) -> tuple[Tensor, Tensor]:
    """Attention probabilities of some heads of a segment, and their changes.

    Args:
        dq, dk: [pair, position, row, head, d_head].
        q, k: of the base run, [pair, position, head, d_head].
        hidden: what queries do not see, [query, key]; None: they see all.
        base: says how logits are scaled and capped.

    Returns:
        [pair, head, query, 1, key] and [pair, head, query, row, key].
    """
    m, n, length = dq.shape[1], dk.shape[1], q.shape[1]  # queries, own positions, run
    own = slice(length - n, length)
    q = q[:, length - m :]  # [pair, query, head, d_head]
    k = k.transpose(1, 2)  # [pair, head, key, d_head]
    scores = _scores(q.transpose(1, 2), k, hidden, base)  # [pair, head, query, key]
    hidden = None if hidden is None else hidden.unsqueeze(1)
    scores = scores.laid_out(lambda each: each.unsqueeze(3), hidden)

    flat = dq.permute(0, 3, 1, 2, 4)  # [pair, head, query, row, d_head]
    shape = flat.shape
    change = torch.matmul(flat.flatten(2, 3), k.transpose(2, 3)).unflatten(2, shape[2:4])  # [..., row, key]
    change[..., own] += _own_logits(q.unsqueeze(2) + dq, dk)
    return scores.p, _changed(change.mul_(base.logit_scale), scores, base)


def _changed(change: Tensor, scores: _Scores, base: AttentionBase) -> Tensor:
    """How attention probabilities change with their logits, [..., key]; the change itself is overwritten."""
    if base.softcap is not None and scores.before is not None:
        change = cap_difference(scores.before, change, base.softcap)
    if scores.hidden is not None:
        change.masked_fill_(scores.hidden, 0)
    p = scores.p
    change -= (p * change).sum(-1, keepdim=True)
    direct = change.amax(-1, keepdim=True) > HUGE  # [..., 1]
    w = torch.expm1(change)
    a = (p * w).sum(-1, keepdim=True)
    w.sub_(a).mul_(p).div_(1 + a)
    if direct.device.type != "cpu" or bool(direct.any()):  # for a GPU the host does not wait to find out
        w = torch.where(direct, (scores.logp + change).softmax(-1) - p, w)
    return w


def _swap_pattern(w: Tensor, swap: Swap, queries: Segment, some: slice, head: slice) -> None:
    """The swaps of attention probabilities that fall into some queries and heads.

    Args:
        w: [pair, query, row, head, key], changes of these probabilities.
        swap: of heads.
        queries: the segment of all queries.
        some, head: which of its positions, and which heads, `w` holds.
    """
    assert swap.at is not None
    at = swap.token - queries.token
    row, at_position = at % queries.rows, at // queries.rows
    position, pair = at_position % queries.positions, at_position // queries.positions
    mine = (at >= 0) & (at < queries.n_tokens) & (some.start <= position) & (position < some.stop)
    mine &= (head.start <= swap.at) & (swap.at < head.stop)
    delta = swap.delta[swap.source[mine], swap.at[mine], : w.shape[-1]]
    w[pair[mine], position[mine] - some.start, row[mine], swap.at[mine] - head.start] = delta


def _mixed(p: Tensor, w: Tensor, v: Tensor, dv: Tensor) -> Tensor:
    """The change of z: Σ w_i v_i + Σ (p_i + w_i) dv_i, [pair, query, row, head, d_head].

    Args:
        p, w: as `_probabilities` gives them.
        v: of the base run, [pair, key, head, d_head].
        dv: [pair, own key, row, head, d_head].
    """
    own = slice(w.shape[-1] - dv.shape[1], None)
    out = torch.matmul(w.flatten(2, 3), v.transpose(1, 2)).unflatten(2, w.shape[2:4])
    out += _own_values(w[..., own] + p[..., own], dv)
    return out.permute(0, 2, 3, 1, 4)


def _own_logits(q: Tensor, dk: Tensor) -> Tensor:
    """q·dk over own keys: both [pair, position, row, head, d_head] -> [pair, head, query, row, key]."""
    if dk.shape[1] == 1:
        return (q * dk).sum(-1).permute(0, 3, 1, 2).unsqueeze(-1)
    logits = torch.matmul(
        q.permute(0, 3, 2, 1, 4), dk.permute(0, 3, 2, 4, 1)
    )  # [pair, head, row, query, key]
    return logits.transpose(2, 3)


def _own_values(w: Tensor, dv: Tensor) -> Tensor:
    """Sum over own keys of w [pair, head, query, row, key] and dv [pair, key, row, head, d_head]."""
    if dv.shape[1] == 1:
        return w * dv.permute(0, 3, 1, 2, 4)
    return torch.matmul(w.transpose(2, 3), dv.permute(0, 3, 2, 1, 4)).transpose(2, 3)
