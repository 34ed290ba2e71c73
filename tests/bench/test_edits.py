"""Edits by deltapatch and by other tools: what is counted, that all do the same, and what a file holds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import deltapatch as dp
from deltapatch.bench import markdown
from deltapatch.bench.edit_work import cells_of, make_work
from deltapatch.bench.edits import BESIDE, PEERS, compare, main, measure
from deltapatch.bench.peers.registry import ONLY_EDITS, make_peer
from deltapatch.bench.random_models import ARCHITECTURES, Shape
from deltapatch.bench.results import read, stamp, write
from deltapatch.bench.setup import all_names, side_maker
from deltapatch.bench.sides.cells import ALONG, Cells
from deltapatch.bench.sides.job import Options
from deltapatch.bench.sides.oracle import oracle_values

HOOKS = tuple(name for name in PEERS if name.startswith("hooks"))
OURS = {"deltapatch-fp64": 1e-8, "deltapatch-fp32": 1e-5}


@pytest.fixture(scope="module")
def edit_work_of(tmp_path_factory):
    """What edits are compared on, on a tiny model of an architecture."""
    made = {}

    def work(architecture):
        if architecture not in made:
            shape = Shape(architecture, layers=3, d_model=32, d_mlp=40, heads=4, vocab=61, context=64)
            made[architecture] = make_work(shape, 6, tmp_path_factory.mktemp("edits"))
        return made[architecture]

    return work


def apart(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def measured(peer, cells):
    peer.batch = 7
    peer.start(cells.site)
    values = np.full((len(cells), len(peer.work.columns)), np.nan)
    for batch in peer.batches(cells):
        values[batch] = peer.measure(cells if len(batch) == len(cells) else cells[batch])
    return values


def by_definition(true, work, cells):
    """Changes of both answers' log-probabilities, [n, 2]: edits by hand in a forward that shares no code."""
    weights = {
        k: v.double().numpy() for k, v in load_file(f"{work.autoencoder}/sae_weights.safetensors").items()
    }
    u = np.array(work.direction)

    def feature(x, j):
        return max(0.0, (x - weights["b_dec"]) @ weights["W_enc"][:, j] + weights["b_enc"][j])

    def logp(logits, pair):
        shifted = logits[-1] - logits[-1].max()
        return (shifted - np.log(np.exp(shifted).sum()))[work.answers[pair]]

    out = []
    rows = zip(cells.pair, cells.layer[:, 0], cells.position[:, 0], cells.index[:, 0], strict=True)
    for pair, layer, position, index in rows:
        base, theirs = work.corrupted[pair], true.activations(work.clean[pair])["resid_post", layer][position]

        def visit(site, l, value, layer=layer, position=position, index=index, theirs=theirs):
            if (site, l) != ("resid_post", layer):
                return value
            value = value.copy()
            here = value[0, position]
            if cells.site == ALONG:
                here += ((theirs - here) @ u) * u
            else:
                here += (feature(theirs, index) - feature(here, index)) * weights["W_dec"][index]
            return value

        out.append(logp(true.forward(base, 1, visit)[0], pair) - logp(true.logits(base), pair))
    return np.array(out)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_oracle_is_the_definition_and_we_are_the_oracle(true_oracle, edit_work_of, architecture):
    work = edit_work_of(architecture)
    model = dp.load_model(work.folder)
    true = true_oracle.TrueModel(AutoModelForCausalLM.from_pretrained(work.folder))
    for name, cells in cells_of(work):
        want = by_definition(true, work, cells)
        assert (np.abs(want).max(1) > 0).all(), name  # nothing is asked for that cannot have an effect
        assert apart(oracle_values(model, work, cells), want) < 1e-9
        for side, bound in OURS.items():
            peer = make_peer(side)
            peer.prepare(work, model.spec)
            assert apart(measured(peer, cells), want) < bound, (name, side)
            some = cells[np.arange(0, len(cells), 3)]  # given interventions, no sweep
            assert apart(peer.measure(some), want[::3]) < bound, (name, side)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_do_the_same(edit_work_of, name, architecture):
    work = edit_work_of(architecture)
    model = dp.load_model(work.folder)
    peer = make_peer(name)
    peer.dtype = torch.float64  # in float32 what they subtract leaves fewer digits than are asked for
    peer.prepare(work, model.spec)
    for swept, cells in cells_of(work):
        assert apart(measured(peer, cells), oracle_values(model, work, cells)) < 1e-5, swept


@pytest.mark.filterwarnings("default")  # libraries of others warn about one another
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
@pytest.mark.parametrize("name", ["pyvene", "pyvene-batched", "sae-lens"])
def test_libraries_do_the_same(peer_of, edit_work_of, name, architecture):
    peer = peer_of(name)
    work = edit_work_of(architecture)
    model = dp.load_model(work.folder)
    peer.prepare(work, model.spec)
    for _, cells in cells_of(work):
        if not peer.lacks(architecture, cells.site, 1):
            assert apart(measured(peer, cells), oracle_values(model, work, cells)) < 1e-4


def test_what_is_compared(edit_work_of, tmp_path: Path):
    work = edit_work_of("llama")
    directions, features = (cells for _, cells in cells_of(work))
    assert len(directions) == 2 * 5  # neither the last layer nor the position where the prompts agree
    assert 0 < len(features) <= 40  # those that change
    features.save(tmp_path / "cells.npz")
    assert Cells.load(tmp_path / "cells.npz").grid == features.grid
    spec = dp.load_model(work.folder).spec
    alike = directions.necessary_flops(spec, 6), Cells("resid_post", *(
        getattr(directions, axis) for axis in ("pair", "layer", "position", "index")
    )).necessary_flops(spec, 6)  # fmt: skip
    assert alike[0] == alike[1] > 0
    assert features.necessary_flops(spec, 6) > 0
    assert set(ONLY_EDITS) <= set(PEERS)
    assert not set(ONLY_EDITS) & set(all_names())  # which an ordinary comparison starts
    assert make_peer("sae-lens").lacks("llama", ALONG, 1) == "no resid_post.along"
    assert make_peer("pyvene").lacks("llama", features.site, 1) == "no feature"


def test_rates_ratios_and_a_table(edit_work_of, tmp_path: Path):
    work = edit_work_of("gpt_neox")
    found = measure(work, 2, "fp32")
    assert found["rows"]["neurons"] == 40
    assert 0 < found["rows"]["features"] <= 40
    assert found["rows"]["directions"] == found["rows"]["whole vectors"] == 3 * 6
    for name, other in BESIDE.items():
        assert len(found["rates"][name]) == len(found["rates"][other]) == 2
        assert found["ratios"][name] > 0
    options = Options(rounds=1, limit=0.2, sample=0.1, check=4)
    sides = side_maker(False, None, print)
    found["peers"] = compare(work, ["hooks-batched", "deltapatch-fp32"], sides, options, lambda text: None)
    for swept in found["peers"]["sweeps"]:
        assert {column["status"] for column in swept["columns"].values()} == {"measured"}
    write(tmp_path / "edits.json", stamp("edits", found))
    result = read(tmp_path / "edits.json")
    assert result["rows"] == found["rows"]
    rows = markdown.table(result).splitlines()
    assert any(row.startswith("| hooks in batches | ") for row in rows)
    assert sum(row.startswith("| **deltapatch, fp32** | ") for row in rows) == 1


def test_an_unknown_peer_is_one_sentence():
    done = CliRunner().invoke(main, ["--peers", "hooks,magic"])
    assert done.exit_code == 2
    assert "unknown peer 'magic': choose from hooks, hooks-batched" in " ".join(done.output.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pyvene-batched", "sae-lens"])
def test_a_library_in_an_environment_of_its_own(edit_work_of, name):
    work = edit_work_of("gpt_neox")
    options = Options(rounds=1, limit=0.2, sample=0.1, check=4)
    found = compare(work, [name], side_maker(True, None, print), options, print)
    if missing := found["sides"][name]["missing"]:
        pytest.skip(missing)
    told = [swept["columns"][name]["status"] for swept in found["sweeps"]]
    assert sorted(told) == ["lacks", "measured"]
