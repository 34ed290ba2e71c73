"""Segments in groups of few tokens: the same tokens, each over its own base token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_packing import drawer, pack, packings, random_swaps, seeds

from deltapatch.kernels.edits import Swap, apply_edits, within
from deltapatch.kernels.segments import base_lines, base_of_tokens, cut_segments, gather


@settings(max_examples=100, deadline=None)
@given(packings(), st.integers(1, 30))
def test_groups_cover_all_tokens_with_their_base(packing, most):
    whole = base_of_tokens(packing.segments, torch.device("cpu")).tolist()
    groups = cut_segments(packing.segments, most)
    assert [t for tokens, _ in groups for t in range(tokens.start, tokens.stop)] == list(range(len(whole)))
    widest = max(s.rows for s in packing.segments)
    for tokens, segments in groups:
        assert base_of_tokens(segments, torch.device("cpu")).tolist() == whole[tokens]
        assert tokens.stop - tokens.start <= max(most, widest)
        assert segments[0].token == 0
        assert all(s.positions <= s.length for s in segments)


@settings(max_examples=100, deadline=None)
@given(packings(), st.integers(1, 300))
def test_segments_are_gathered_while_they_are_small(packing, most):
    segments = packing.segments
    groups = gather(segments, lambda s: s.n_tokens, most, lambda a, b: a.base == b.base)
    assert [i for group in groups for i in range(group.start, group.stop)] == list(range(len(segments)))
    for group in groups:
        some = segments[group]
        assert len({s.base for s in some}) == 1
        if len(some) > 1:
            assert sum(s.n_tokens for s in some) <= most
            assert all(8 * s.n_tokens <= most for s in some)


def test_base_tokens_are_those_that_the_packing_says():
    packing = pack([(5, 2), (3, 2)], [(0, 0, 2, 4, 2), (0, 1, 1, 2, 3), (1, 0, 2, 1, 1)])
    device = torch.device("cpu")
    assert base_of_tokens(packing.segments, device).tolist() == [t.base for t in packing.tokens]
    met, line = base_lines(packing.segments, device)
    assert met[line].tolist() == [t.base for t in packing.tokens]
    assert met.tolist() == sorted({t.base for t in packing.tokens})


@settings(max_examples=50, deadline=None)
@given(packings(), st.integers(1, 30), seeds)
def test_swaps_within_groups_are_the_swaps(packing, most, seed):
    n = len(packing.tokens)
    swaps = random_swaps(seed, torch.float64, n, 5, [True, False, False])
    whole, pieces = (drawer(seed, torch.float64)(n, 5) for _ in range(2))
    apply_edits(whole, swaps)
    for tokens, _ in cut_segments(packing.segments, most):
        apply_edits(pieces[tokens], within(swaps, tokens))
    assert torch.equal(pieces, whole)


def test_swaps_of_a_device_are_cut_without_waiting_for_it():
    """Tensors on "meta" have no values that anybody could wait for."""
    token = np.array([7, 2, 5, 2, 9])
    there = torch.from_numpy(token).to("meta")
    swap = Swap(there, there, there, torch.empty(3, 4, device="meta"), on_host=token)
    (some,) = within([swap, replace(swap, on_host=token + 100)], slice(2, 8))
    assert some.on_host.tolist() == [5, 0, 3, 0]
    assert some.token.shape == some.source.shape == some.at.shape == (4,)
    (fewer,) = within([some], slice(3, 4))
    assert fewer.on_host.tolist() == [0]
    with pytest.raises(NotImplementedError):  # as a device's would be waited for
        within([replace(swap, on_host=None)], slice(2, 8))
