"""The harness's oracle against the one that the engine is judged by, and cells against interventions."""

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import deltapatch as dp
from deltapatch.bench.random_models import ARCHITECTURES
from deltapatch.bench.sides.cells import SWEEPS, Cells, grid_cells, make_cells
from deltapatch.bench.sides.oracle import oracle_values
from deltapatch.engine.planning.costs import necessary_flops
from deltapatch.errors import DeltapatchError


def every_seventh(cells):
    return cells[np.arange(0, len(cells), 7)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SWEEPS)
def test_it_is_what_the_independent_oracle_says(true_oracle, work_of, architecture, name):
    work = work_of(architecture)
    model = dp.load_model(work.folder)
    true = true_oracle.TrueModel(AutoModelForCausalLM.from_pretrained(work.folder))
    cells = every_seventh(make_cells(name, model.spec, len(work.clean), work.length))
    got = oracle_values(model, work, cells)
    for number, (clean, corrupted, answers) in enumerate(
        zip(work.clean, work.corrupted, work.answers, strict=True)
    ):
        own = np.flatnonzero(cells.pair == number)
        rows = [
            [true_oracle.Patch(p.site, p.layer, p.position, p.index) for p in each.patches]
            for each in cells[own].interventions()
        ]
        want = true.effects(true_oracle.Pair(clean, corrupted, *answers), rows)
        columns = np.stack([want[name] for name in work.columns], axis=1)
        np.testing.assert_allclose(got[own], columns, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(work.effect(got[own]), want["ie"], rtol=1e-8, atol=1e-11)


def test_long_prompts_go_a_few_at_a_time(work_of, monkeypatch):
    work = work_of("gptj")
    model = dp.load_model(work.folder)
    cells = every_seventh(make_cells("z", model.spec, len(work.clean), work.length))
    whole = oracle_values(model, work, cells)
    for tokens in (1, 3 * work.length):
        monkeypatch.setattr("deltapatch.bench.sides.oracle._TOKENS", tokens)
        np.testing.assert_allclose(oracle_values(model, work, cells), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "q", "k", "v", "mlp_out.dim"])
def test_it_knows_the_other_sites_too(work_of, site):
    work = work_of("llama", metric="logit_diff")
    model = dp.load_model(work.folder)
    cells = every_seventh(grid_cells(model.spec, site, len(work.clean), (0, 2), (1, work.length - 1)))
    ours = dp.run(model, work.pairs, cells.interventions(), precision="fp64", progress=False)
    got = oracle_values(model, work, cells)[:, 0]
    np.testing.assert_allclose(got, ours.values("logit_diff"), rtol=1e-8, atol=1e-11)


def test_cells_are_in_the_order_of_a_sweep(work_of):
    work = work_of()
    model = dp.load_model(work.folder)
    cells = make_cells("z", model.spec, len(work.clean), work.length)
    effects = dp.sweep(model, work.pairs, sites="z", precision="fp64", progress=False)
    one_by_one = dp.run(model, work.pairs, cells.interventions(), precision="fp64", progress=False)
    np.testing.assert_array_equal(effects.values("ie").ravel(), one_by_one.values("ie"))


@pytest.mark.parametrize("name", SWEEPS)
def test_cells_survive_a_file(tmp_path, work_of, name):
    spec = dp.load_model(work_of().folder).spec
    cells = make_cells(name, spec, 2, 6)
    cells.save(tmp_path / "cells.npz")
    again = Cells.load(tmp_path / "cells.npz")
    assert (again.site, again.grid) == (cells.site, cells.grid)
    for field in ("pair", "layer", "position", "index"):
        np.testing.assert_array_equal(getattr(again, field), getattr(cells, field))


def test_necessary_flops_of_a_whole_sweep_are_those_of_its_cost(work_of):
    spec = dp.load_model(work_of().folder).spec
    for name in ("mlp_out", "z", "neurons"):
        cells = make_cells(name, spec, 2, 6)
        want = 2 * necessary_flops(spec, cells.site, cells.grid.layers, cells.grid.positions, 6)
        assert cells.necessary_flops(spec, 6) == want


def test_an_unknown_sweep_is_one_sentence(work_of):
    with pytest.raises(DeltapatchError, match="unknown sweep 'everything'"):
        make_cells("everything", dp.load_model(work_of().folder).spec, 1, 4)
