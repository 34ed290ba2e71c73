"""Every peer that is installed computes what the oracle computes; what it lacks, it says."""

import numpy as np
import pytest

import deltapatch as dp
from deltapatch.bench.peers.registry import PEERS, make_peer, ours
from deltapatch.bench.random_models import ARCHITECTURES, Shape, make_model, make_pairs
from deltapatch.bench.setup import EXTRAS
from deltapatch.bench.sides.agreement import compare, disagreement
from deltapatch.bench.sides.cells import SWEEPS, make_cells
from deltapatch.bench.sides.oracle import oracle_values
from deltapatch.bench.sides.workload import Workload, one_length
from deltapatch.errors import DeltapatchError

pytestmark = pytest.mark.filterwarnings("default")  # libraries of others warn about one another


def measured(peer, work, spec, cells):
    peer.prepare(work, spec)
    peer.batch = 5
    peer.start(cells.site)
    values = np.full((len(cells), len(work.columns)), np.nan)
    for batch in peer.batches(cells):
        assert np.isnan(values[batch]).all()  # no cell twice
        values[batch] = peer.measure(cells if len(batch) == len(cells) else cells[batch])
    return values


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", [*PEERS, "deltapatch-fp32", "deltapatch-bf16"])
def test_effects_are_the_oracle_s(peer_of, work_of, name, architecture):
    peer = peer_of(name)
    for metric in ("ie", "logit_diff"):
        work = work_of(architecture, metric)
        model = dp.load_model(work.folder)
        for sweep in SWEEPS:
            cells = make_cells(sweep, model.spec, len(work.clean), work.length)
            if not name.startswith("deltapatch"):  # which does whole sweeps in a way of their own
                cells = cells[np.arange(0, len(cells), 5)]
            if peer.lacks(architecture, cells.site, cells.patches):
                continue
            found = compare(work, measured(peer, work, model.spec, cells), oracle_values(model, work, cells))
            if peer.exact:
                assert disagreement(found, peer.precision, peer.difference_form) is None, (sweep, found)
            else:
                assert found["rank_correlation"] > 0.5, (sweep, found)


def test_a_tied_model_of_grouped_queries(tmp_path):
    shape = Shape(
        "llama", layers=2, d_model=12, d_mlp=20, heads=3, vocab=61, context=64, kv_heads=1, tied=True
    )
    model = dp.load_model(make_model(shape, tmp_path / "model"))
    assert model.spec.tied_embeddings
    assert (model.spec.n_heads, model.spec.n_kv_heads) == (3, 1)
    work = Workload(str(tmp_path / "model"), *one_length(make_pairs(model, 1, 4)))
    for sweep in ("z", "neurons-layer"):
        cells = make_cells(sweep, model.spec, 1, 4)
        for name in ("hooks-batched", "hooks-prefix", "deltapatch-fp32"):
            peer = make_peer(name)
            found = compare(work, measured(peer, work, model.spec, cells), oracle_values(model, work, cells))
            assert disagreement(found, peer.precision, peer.difference_form) is None, (sweep, found)


def test_logits_are_of_a_realistic_scale_tied_or_not(tmp_path):
    for tied in (False, True):
        shape = Shape("llama", layers=2, d_model=64, d_mlp=96, heads=2, vocab=500, context=64, tied=tied)
        model = dp.load_model(make_model(shape, tmp_path / str(tied)))
        assert 1.5 < model.logits(list(range(9))).std().item() < 4


def test_shapes_that_cannot_be(tmp_path):
    with pytest.raises(DeltapatchError, match="only llama has --kv-heads and --tied, and this is gptj"):
        make_model(Shape("gptj", tied=True), tmp_path)
    with pytest.raises(DeltapatchError, match="8 heads cannot share 3 key-value heads equally"):
        make_model(Shape("llama", kv_heads=3), tmp_path)


def test_attribution_is_exact_to_first_order(peer_of, work_of):
    # neurons of the last layer act on the read-out through one norm only: small effects are all but linear
    work = work_of(metric="logit_diff")
    model = dp.load_model(work.folder)
    cells = make_cells("neurons", model.spec, len(work.clean), work.length)
    exact = oracle_values(model, work, cells)[:, 0]
    small = np.argsort(np.abs(exact))[: len(exact) // 4]
    got = measured(peer_of("attribution"), work, model.spec, cells)[:, 0]
    assert np.abs(got - exact)[small].max() < 0.2 * np.abs(exact).max()


def test_what_is_lacking_is_said():
    assert make_peer("paper").lacks("gpt_neox", "z", 1) == "no z"
    assert make_peer("paper").lacks("gpt_neox", "mlp_post", 3) == "no joint patches"
    assert make_peer("hooks").lacks("mamba", "mlp_out", 1) == "no mamba"
    assert make_peer("hooks").lacks("gptj", "mlp_post", 9) is None
    assert make_peer("pyvene").lacks("llama", "mlp_post", 1) == "no mlp_post behind a gate"


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'deltapatch[pyvene]'" in make_peer("pyvene").missing()


def test_names():
    assert {"deltapatch-fp32", "deltapatch-bf16"} <= set(ours())
    assert set(EXTRAS) < set(PEERS)
    for name, extra in EXTRAS.items():
        assert make_peer(name).extra == extra
    with pytest.raises(DeltapatchError, match="unknown peer 'magic'"):
        make_peer("magic")
    with pytest.raises(DeltapatchError, match="unknown peer 'deltapatch-int2'"):
        make_peer("deltapatch-int2")
