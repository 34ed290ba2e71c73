"""Threads share blocks, or each operation: what is found is the same."""

import numpy as np
import pytest
import torch
from engine_tiny import model_of, pairs, prompt_pairs, true_model

import deltapatch
from deltapatch.engine.wavefront import pool as pools
from deltapatch.engine.wavefront.pool import Pool, shared, threads, workers
from deltapatch.interventions.nodes import Nodes

VARIANTS = ("neox-parallel", "llama-grouped", "gemma2")
OPTIONS = {"precision": "fp64", "progress": False, "noise_sample": 0}


def answers(variant):
    model, drawn = model_of(variant, "fp64"), prompt_pairs(pairs(true_model(variant), (6, 4, 6)))
    swept = deltapatch.sweep(model, drawn, sites=["mlp_out", "z", "mlp_post"], **OPTIONS)
    edges = deltapatch.sweep_edges(model, drawn[:1], effect="both", **OPTIONS)
    lines = {"screen": "ig-activations", "screen_steps": 3, "top": 5, "screen_sample": 0}
    screened = deltapatch.sweep(model, drawn, sites="mlp_out", **lines, **OPTIONS)
    nodes = Nodes.of(model.spec)
    scores = np.random.default_rng(0).normal(size=(len(nodes.senders), len(nodes.receivers)))
    circuits = [deltapatch.Circuit.of_scores(nodes, scores, 16, n) for n in (10, 40)]
    return [
        *(swept.values("logit_diff", site) for site in swept.sites),
        edges.values("kl", "direct"),
        screened.estimate(),
        deltapatch.faithfulness(model, drawn, circuits, progress=False).raw,
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("blocks", [False, True], ids=["operations", "blocks"])
def test_two_threads_find_what_one_finds(variant, blocks, monkeypatch):
    want = answers(variant)
    monkeypatch.setattr(pools, "shared", lambda n, threads: blocks)
    with threads(2):
        got = answers(variant)
        assert torch.get_num_threads() == 2
    for a, b in zip(got, want, strict=True):
        assert np.array_equal(np.isnan(a), np.isnan(b))
        assert np.linalg.norm(np.nan_to_num(a - b)) <= 1e-11 * np.linalg.norm(np.nan_to_num(b))


def test_few_blocks_are_done_in_turn_by_all_threads():
    seen = []
    with threads(2), workers(torch.device("cpu")) as pool:
        pool(lambda i: seen.append(torch.get_num_threads()), range(4))
        pool.of_blocks(4)(lambda i: seen.append(torch.get_num_threads()), range(2))
        assert pool.of_blocks(10**4) is pool
        assert pool.of_blocks(4).count == 1
    assert seen == [1, 1, 1, 1, 2, 2]
    assert Pool().of_blocks(3).count == 1


def test_how_many_blocks_are_shared():
    assert shared(1, 1)
    for n in (2, 4, 16, 64, 200):
        assert not shared(n, n)
        assert shared(2 * n + 120, n)
