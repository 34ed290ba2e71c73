"""Layouts hold every row token exactly once, in segments and blocks that say where."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltapatch.engine.wavefront.layout import PairShapes, lay_out
from deltapatch.interventions.runs import RunShape


@st.composite
def run_shapes(draw):
    prompt = draw(st.integers(1, 4))
    after = draw(st.sampled_from([0, 0, 0, 1, 3]))
    fork = (prompt, prompt + 1) if after == 3 and draw(st.booleans()) else None
    return RunShape(prompt, prompt + after, fork)


def plain(*lengths):
    """Pairs whose answers are of one token."""
    return PairShapes([RunShape(n, n) for n in lengths])


@st.composite
def cases(draw):
    """Pairs ordered by shape, rows ordered by (prompt, start, pair), some of them, and a block size."""
    runs = sorted(draw(st.lists(run_shapes(), min_size=1, max_size=5)), key=lambda run: run.order)
    rows = []
    for pair, run in enumerate(runs):
        for start in range(run.prompt):
            rows += [(run.prompt, start, pair)] * draw(st.sampled_from([0, 0, 1, 2, 2, 9]))
    rows.sort()
    pair = np.array([r[2] for r in rows], dtype=np.int64)
    start = np.array([r[1] for r in rows], dtype=np.int64)
    chosen = draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    if draw(st.booleans()):
        chosen = [True] * len(rows)
    return (
        np.flatnonzero(chosen),
        pair,
        start,
        PairShapes(runs),
        draw(st.sampled_from([1, 2, 5, 1000])),
    )


def tokens_of(layout, id_, n):
    return [int(layout.token[id_] + k * layout.stride[id_]) for k in range(n)]


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_row_token_is_packed_exactly_once(case):
    rows, pair, start, shapes, _ = case
    layout = lay_out(*case)
    packed = [t for i in rows for t in tokens_of(layout, i, shapes.length[pair[i]] - start[i])]
    assert sorted(packed) == list(range(layout.n_tokens))
    absent = np.setdiff1d(np.arange(len(pair)), rows)
    assert (layout.token[absent] == -1).all()
    assert (layout.stride[absent] == -1).all()


@settings(max_examples=150, deadline=None)
@given(cases())
def test_segments_say_where_the_tokens_of_their_rows_lie(case):
    _, pair, start, shapes, _ = case
    layout = lay_out(*case)
    for block in layout.blocks:
        ids = layout.rows[block.rows].tolist()
        everything = np.arange(layout.n_tokens)[block.tokens]
        for s, first in zip(block.segments, block.first_pairs, strict=True):
            places = everything[s.token : s.token + s.n_tokens].reshape(s.pairs, s.positions, s.rows)
            for i in range(s.pairs):
                for r in range(s.rows):
                    mine = ids.pop(0)
                    assert pair[mine] == first + i
                    assert s.length == shapes.length[first + i]
                    assert s.positions == s.length - start[mine]
                    assert s.base + i * s.length == shapes.base[first + i]
                    assert (s.reads, s.fork) == (shapes.reads[first + i], shapes.runs[first + i].fork)
                    assert tokens_of(layout, mine, s.positions) == places[i, :, r].tolist()
        assert not ids


@settings(max_examples=150, deadline=None)
@given(cases())
def test_blocks_cover_the_layout_in_equal_shares(case):
    rows, pair, start, shapes, n_blocks = case
    layout = lay_out(*case)
    widest = int((shapes.length[pair] - start)[rows].max(initial=0))
    token = row = 0
    for block in layout.blocks:
        assert (block.tokens.start, block.rows.start) == (token, row)
        token, row = block.tokens.stop, block.rows.stop
        assert token - block.tokens.start == sum(s.n_tokens for s in block.segments)
        assert block.segments[0].token == 0
        assert row - block.rows.start == sum(s.pairs * s.rows for s in block.segments)
        assert token - block.tokens.start < layout.n_tokens / n_blocks + max(1, widest)
    assert (token, row) == (layout.n_tokens, len(rows))
    assert len(layout.blocks) <= n_blocks


def test_no_block_is_small_beside_the_others():
    shapes = plain(16)
    start = np.repeat(np.arange(16), 100)
    layout = lay_out(np.arange(1600), np.zeros(1600, dtype=np.int64), start, shapes, 3)
    sizes = [b.tokens.stop - b.tokens.start for b in layout.blocks]
    assert sum(sizes) == 100 * 16 * 17 // 2
    assert max(sizes) - min(sizes) < 16


def test_rows_of_pairs_with_equal_counts_share_a_segment_and_big_runs_are_cut():
    shapes = plain(3, 3, 3)
    pair, start = np.repeat([0, 1, 2], 4), np.full(12, 2)
    together = lay_out(np.arange(12), pair, start, shapes, 1)
    assert [(s.pairs, s.rows) for b in together.blocks for s in b.segments] == [(3, 4)]
    apart = lay_out(np.arange(12), pair, start, shapes, 6)
    assert [(s.pairs, s.rows) for b in apart.blocks for s in b.segments] == [(1, 2)] * 6


@pytest.mark.parametrize("rows", [1, 2])
def test_segments_of_whole_prompts(rows):
    shapes = plain(2, 2, 5)
    found = [(s.token, s.pairs, s.positions, s.rows, s.base, s.length) for s in shapes.segments(rows)]
    assert found == [(0, 2, 2, rows, 0, 2), (4 * rows, 1, 5, rows, 4, 5)]


def test_only_runs_that_are_alike_share_a_segment():
    runs = [RunShape(3, 3), RunShape(3, 4), RunShape(3, 4), RunShape(3, 6), RunShape(3, 6, (3, 4))]
    shapes = PairShapes(runs)
    assert [(s.pairs, s.length, s.reads, s.fork) for s in shapes.segments(1)] == [
        (1, 3, 1, None),
        (2, 4, 2, None),
        (1, 6, 4, None),
        (1, 6, 4, (3, 4)),
    ]
    (block,) = lay_out(np.arange(5), np.arange(5), np.full(5, 2), shapes, 1).blocks
    assert [(s.pairs, s.positions) for s in block.segments] == [(1, 1), (2, 2), (1, 4), (1, 4)]


def test_the_second_branch_counts_its_positions_from_the_fork():
    assert RunShape(2, 7, (3, 5)).positions.tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert RunShape(2, 4).positions.tolist() == [0, 1, 2, 3]


def test_pairs_with_another_between_them_share_no_segment():
    shapes = plain(3, 3, 3)
    layout = lay_out(np.arange(4), np.repeat([0, 2], 2), np.full(4, 1), shapes, 1)
    (block,) = layout.blocks
    assert [(s.pairs, s.rows, s.base) for s in block.segments] == [(1, 2, 0), (1, 2, 6)]
    assert block.first_pairs == [0, 2]
