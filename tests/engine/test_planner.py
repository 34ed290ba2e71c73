"""Passes: every intervention in one of them, none over budget, and the same results however they are cut."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_tiny import hf_model, pairs, random_pair, true_model
from hypothesis import given, settings
from hypothesis import strategies as st

import deltapatch
from deltapatch import DeltapatchError
from deltapatch.arguments import n_bytes
from deltapatch.engine.planning import limit as limits
from deltapatch.engine.planning.limit import Limit
from deltapatch.engine.planning.memory import Costs
from deltapatch.engine.planning.planner import cut
from deltapatch.engine.question import default_budget
from deltapatch.engine.wavefront.loop import Wavefront
from deltapatch.interventions.runs import RunShape
from deltapatch.interventions.table import PatchTable, first_layers, row_tokens, take
from deltapatch.models.memory import fits
from deltapatch.results.metrics import MEASURED

LIMIT = Limit(most=100, layer=1, readout=2, n_layers=3, runs=2)
COSTS = Costs(fixed=1000, read=50, base_token=10, row_token=7, row=3)


@st.composite
def jobs(draw):
    """Tables of some pairs, ordered by their shapes: interventions of one or two patches."""
    sizes = draw(
        st.lists(st.tuples(st.integers(1, 6), st.sampled_from([0, 0, 1, 3])), min_size=1, max_size=5)
    )
    runs = [RunShape(prompt, prompt + after) for prompt, after in sizes]
    tables, n = [], 0
    for pair in sorted(range(len(runs)), key=lambda pair: runs[pair].order):
        n_rows = draw(st.integers(0, 12))
        row = np.sort(
            np.concatenate([np.arange(n_rows), draw(st.permutations(range(n_rows)))[: n_rows // 2]])
        )
        row = row.astype(np.int64)
        spots = [draw(st.integers(0, runs[pair].prompt - 1)) for _ in row]
        columns = [
            np.arange(len(row)) % 3,
            np.arange(len(row)) % 5,
            np.array(spots, dtype=np.int64),
            row % 2,
            row % 4,
        ]
        table = PatchTable(n_rows, np.zeros(n_rows, dtype=np.int64), row, *columns)
        tables.append((pair, table, np.arange(n, n + n_rows)))
        n += n_rows
    return runs, tables, n


def patches_of(table, row):
    mine = table.row == row
    return sorted(
        zip(table.layer[mine], table.place[mine], table.position[mine], table.index[mine], strict=True)
    )


@settings(max_examples=150, deadline=None)
@given(jobs(), st.integers(1000, 2500), st.booleans(), st.none() | st.integers(1, 200), st.booleans())
def test_passes_hold_every_intervention_once_and_keep_the_budget(job, budget, share_lengths, most, few):
    runs, tables, n = job
    limit = None if most is None else replace(LIMIT, most=most)
    try:
        passes = list(cut(tables, runs, COSTS, budget, share_lengths, limit, few))
    except DeltapatchError:
        # Only where some pair, with those it needs beside it, leaves no room for a row of its length
        tokens, reads = max(run.length for run in runs), max(run.reads for run in runs)
        all_reads = sum(run.reads for run in runs)
        everyone = COSTS.total(all_reads, sum(run.length for run in runs), tokens, reads)
        alone = COSTS.total(reads, tokens, tokens, reads)
        assert budget < (everyone if share_lengths else alone)
        return
    assert sorted(np.concatenate([p.out for p in passes])) == list(range(n))
    assert {pair for p in passes for pair in p.pairs} == set(range(len(runs)))
    where = {int(o): (pair, table, r) for pair, table, out in tables for r, o in enumerate(out)}
    for part in passes:
        own = [runs[pair] for pair in part.pairs]
        assert own == sorted(own, key=lambda run: run.order)
        assert len(set(part.pairs)) == len(part.pairs)
        if share_lengths:
            prompts = {run.prompt for run in own}
            assert sorted(part.pairs) == [i for i, run in enumerate(runs) if run.prompt in prompts]
        assert (np.diff(part.table.row) >= 0).all()
        for row, out in enumerate(part.out):
            pair, table, r = where[int(out)]
            assert part.pairs[part.table.pair[row]] == pair
            assert patches_of(part.table, row) == patches_of(table, r)
        first = [
            min(position for _, _, position, _ in patches_of(part.table, r)) for r in range(len(part.out))
        ]
        tokens = sum(own[p].length - f for p, f in zip(part.table.pair, first, strict=True))
        read = [sum(own[p].reads for p in pairs) for pairs in (range(len(own)), part.table.pair)]
        total = COSTS.total(read[0], sum(run.length for run in own), tokens, read[1])
        assert total <= budget
        if limit is not None:
            unpatched = limit.of_unpatched(read[0], sum(run.length for run in own))
            layer = first_layers(part.table)
            work = sum(
                limit.of_rows(own[p].length - f, layer[r], own[p].reads)
                for r, (p, f) in enumerate(zip(part.table.pair, first, strict=True))
            )
            alone = len(part.pairs) == 1 or share_lengths
            assert work <= limit.most - unpatched or (alone and work <= max(most - unpatched, 8 * unpatched))


def test_a_rows_tokens_go_to_the_end_of_its_run():
    columns = np.zeros((5, 3), dtype=np.int64)
    columns[2] = [0, 4, 5]  # positions: the first, the last of the prompt, behind the read-out
    table = PatchTable(3, np.zeros(3, dtype=np.int64), np.arange(3), *columns)
    assert row_tokens(table, RunShape(5, 7)).tolist() == [7, 3, 0]
    assert row_tokens(table, RunShape(5, 5)).tolist() == [5, 1, 0]


@settings(max_examples=100, deadline=None)
@given(jobs(), st.integers(1400, 2500))
def test_few_passes_are_no_more_and_all_but_full(job, budget):
    runs, tables, _ = job
    passes = list(cut(tables, runs, COSTS, budget, False, few=True))
    assert len(passes) <= len(list(cut(tables, runs, COSTS, budget, False)))
    longest, most = max(run.length for run in runs), max(run.reads for run in runs)
    for part in passes[:-1]:
        # Neither a row of the last pair nor another pair would have fitted.
        own = [runs[pair] for pair in part.pairs]
        tokens = sum(int(row_tokens(take(part.table, np.array([i])), own[p]).sum())
                     for i, p in enumerate(part.table.pair))  # fmt: skip
        reads = sum(own[p].reads for p in part.table.pair)
        base = sum(run.length for run in own)
        total = COSTS.total(sum(run.reads for run in own), base, tokens, reads)
        spare = most * (COSTS.read + COSTS.row) + longest * (COSTS.base_token + COSTS.row_token)
        assert total > budget - spare


def test_a_larger_budget_takes_fewer_passes():
    table = PatchTable(
        100, np.zeros(100, dtype=np.int64), np.arange(100), *np.zeros((5, 100), dtype=np.int64)
    )
    counts = [
        len(list(cut([(0, table, np.arange(100))], [RunShape(5, 5)], COSTS, budget, False)))
        for budget in (1200, 1500, 3000, 10_000)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[-1] == 1


def test_a_budget_that_holds_no_intervention_says_what_is_needed():
    table = PatchTable(
        1, np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), *np.zeros((5, 1), dtype=int)
    )
    costs = Costs(*(int(1e6 * c) for c in (1000, 50, 10, 7, 3)))
    least = costs.total(1, 5, 5, 1)
    job = [(0, table, np.arange(1))]
    assert len(list(cut(job, [RunShape(5, 5)], costs, least, False))) == 1
    message = "a memory budget of 1.137 GB is too small: .* at least 1.138 GB; raise the budget"
    with pytest.raises(DeltapatchError, match=message):
        list(cut(job, [RunShape(5, 5)], costs, least - 10**6, False))


def test_the_default_budget_is_sensible(monkeypatch):
    assert 1 << 20 < default_budget() <= 4 << 30
    assert 1 << 20 < default_budget(torch.device("cpu")) <= 4 << 30
    a_gpu(monkeypatch, allocated=20, reserved=20)
    assert default_budget(torch.device("cuda:1")) == 30 << 30


def a_gpu(monkeypatch, allocated, reserved, gib=80):
    """A stand-in for the figures of a GPU's memory: in tensors, and what PyTorch has taken for them."""
    figures = {"memory_allocated": allocated, "memory_reserved": reserved}
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, figure=figure: figure << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((gib - reserved) << 30, gib << 30))


def test_a_second_sweep_and_a_second_model_have_the_memory_of_the_first(monkeypatch):
    gpu = torch.device("cuda:0")
    found = []
    # A model of 12 GiB before its first sweep; after it PyTorch keeps what the sweep had.
    for reserved in (12, 75):
        a_gpu(monkeypatch, allocated=12, reserved=reserved)
        found.append((default_budget(gpu), default_budget(gpu, stream=True), fits(50 << 30, gpu)))
    assert found[0] == found[1] == (34 << 30, 34 << 30, True)
    a_gpu(monkeypatch, allocated=30, reserved=75)
    assert not fits(50 << 30, gpu)  # what is in use is not free


def test_rows_have_the_same_two_places_in_every_layer(monkeypatch):
    places, sizes = set(), []
    advance = Wavefront._advance

    def watched(self, ready, l, parts, rows, after, out):
        advance(self, ready, l, parts, rows, after, out)
        sizes.append((len(rows), len(out)))
        places.update(t.untyped_storage().data_ptr() for t in (rows, out))

    monkeypatch.setattr(Wavefront, "_advance", watched)
    pair = deltapatch.PromptPair(*random_pair(6, seed=1))
    model = deltapatch.from_transformers(hf_model("llama-grouped"))
    deltapatch.sweep(model, [pair], sites="mlp_post", precision="fp32", noise_sample=0, progress=False)
    n = 24 * (5 + 4 + 3 + 2 + 1)  # the prompts begin in the same token, at which a patch brings nothing
    assert sizes == [(0, n), (n, 2 * n), (2 * n, 2 * 24 * 5 + 24)]  # in the last layer one neuron's position
    assert len(places) == 2


# ------------------------------------------------------------------------- the same effects however cut


def least_budget(model, prompt_pairs, **options):
    with pytest.raises(DeltapatchError, match="at least") as caught:
        deltapatch.sweep(model, prompt_pairs, memory_budget=1, progress=False, **options)
    return n_bytes(str(caught.value).split("at least ")[1].split(";")[0], "the least budget")


@pytest.fixture
def tight(monkeypatch):
    """A tiny model's workspace is a thousand times its rows: count the rows alone, and dearly."""
    monkeypatch.setattr(Costs, "of", classmethod(lambda cls, *args, **named: Costs(0, 0, 0, 10, 10)))


@pytest.fixture
def few_flop(monkeypatch):
    """Passes end when their rows take as much as an unpatched run."""
    monkeypatch.setattr(limits, "_MOST", {"cpu": 1})
    monkeypatch.setattr(limits, "_TOKENS", {"cpu": 1})
    monkeypatch.setattr(limits, "_OF_UNPATCHED", 1)


@pytest.mark.parametrize("source", ["counterpart", "mean"])
def test_a_limit_of_the_work_of_a_pass(source, request):
    model = deltapatch.from_transformers(hf_model("llama"))
    drawn = [deltapatch.PromptPair(**p._asdict()) for p in pairs(true_model("llama"), (5, 3, 5))]
    options = {"sites": "mlp_post", "source": source, "progress": False}
    one = deltapatch.sweep(model, drawn, **options)
    request.getfixturevalue("few_flop")
    many = deltapatch.sweep(model, drawn, **options)
    assert (one.meta["passes"], many.meta["rows"]) == (1, one.meta["rows"])
    assert many.meta["passes"] > 5
    a, b = (e.values("logit_diff") for e in (one, many))
    assert np.nanmax(np.abs(a - b)) <= 1e-5 * np.nanmax(np.abs(a))


def test_a_pass_of_a_large_model_takes_minutes():
    """At 50 GFLOP/s a thread, or 200 TFLOP/s of a GPU."""
    sizes = {"d_model": 4096, "n_layers": 28, "n_heads": 16, "n_kv_heads": 16, "d_head": 256, "d_mlp": 16384}
    for device, threads, rate in (("cpu", 2, 1e11), ("cpu", 64, 3.2e12), ("cuda", 1, 2e14)):
        spec = SimpleNamespace(**sizes, gated=False, d_vocab=50400)
        model = SimpleNamespace(spec=spec, device=torch.device(device))
        assert 60 < Limit.of(model, threads, 2).most / rate < 300


@pytest.mark.parametrize("source", ["counterpart", "zero", "mean", "resample", "noise"])
@pytest.mark.parametrize("variant", ["neox-parallel", "llama-grouped"])
def test_many_passes_give_what_one_gives(variant, source, tight):
    model = deltapatch.from_transformers(hf_model(variant))
    drawn = [deltapatch.PromptPair(**p._asdict()) for p in pairs(true_model(variant), (5, 3, 5, 3, 5))]
    options = {"sites": ["mlp_out", "k", "resid_pre", "mlp_post"], "source": source, "seed": 3}
    one = deltapatch.sweep(model, drawn, progress=False, **options)
    many = deltapatch.sweep(model, drawn, progress=False, memory_budget=1500, **options)
    assert one.meta["passes"] == 1
    assert many.meta["passes"] > 10
    assert many.meta["rows"] == one.meta["rows"]
    for site in one.sites:
        for name in MEASURED:
            a, b = (e.values(name, site=site) for e in (one, many))
            scale = np.nanmax(np.abs(a))
            assert np.array_equal(np.isnan(a), np.isnan(b))
            assert np.nanmax(np.abs(a - b)) <= 1e-5 * scale, (site, name)
    for name, array in one.reference.arrays().items():
        assert np.allclose(array, getattr(many.reference, name), atol=1e-5)


def test_a_sweep_with_the_least_budget_that_its_error_names():
    model = deltapatch.from_transformers(hf_model("llama"))
    drawn = [deltapatch.PromptPair(**p._asdict()) for p in pairs(true_model("llama"), (5, 3))]
    least = least_budget(model, drawn, sites="mlp_post")
    effects = deltapatch.sweep(model, drawn, sites="mlp_post", memory_budget=least, progress=False)
    assert np.isfinite(effects.values("ie")[0]).all()
