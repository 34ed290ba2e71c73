"""Options of sweep and run: read-out, metrics, hook names, threads, run folders, and what errors say."""

import numpy as np
import pytest
import torch
from engine_tiny import build, hf_model, pairs, true_model

import deltapatch
from deltapatch import DeltapatchError, Intervention, Patch, PromptPair
from deltapatch.engine.wavefront.pool import threads
from deltapatch.results.metrics import MEASURED, METRICS

VARIANT = "llama-grouped"  # 3 layers, 4 heads of which keys and values have 2, 24 neurons
EVERY = "all"


@pytest.fixture(scope="module")
def model():
    return deltapatch.from_transformers(hf_model(VARIANT))


@pytest.fixture(scope="module")
def prompts():
    return [PromptPair(**p._asdict()) for p in pairs(true_model(VARIANT), (6, 4, 6))]


def sweep(model, prompts, sites="mlp_out", **options):
    return deltapatch.sweep(model, prompts, sites=sites, progress=False, **options)


def run(model, prompts, interventions, **options):
    return deltapatch.run(model, prompts, interventions, progress=False, **options)


def same(a, b, tolerance=1e-5):
    assert np.array_equal(np.isnan(a), np.isnan(b))
    assert np.linalg.norm(np.nan_to_num(a - b)) <= tolerance * np.linalg.norm(np.nan_to_num(b))


# ---------------------------------------------------------------------------------------------- read-out

SITES = ["mlp_out", "k", "z", "resid_pre", "mlp_post"]


def truncated(pair, length):
    return PromptPair(pair.clean[:length], pair.corrupted[:length], pair.clean_answer, pair.corrupted_answer)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("readout", [2, -2, "subject", 0])
def test_reading_out_earlier_is_a_sweep_over_shorter_prompts(model, prompts, readout, direction):
    effects = sweep(model, prompts, SITES, readout=readout, direction=direction)
    for i, pair in enumerate(prompts):
        n = len(pair.clean)
        at = pair.labels[readout] if isinstance(readout, str) else readout % n
        alone = sweep(model, [truncated(pair, at + 1)], SITES, direction=direction)
        for site in SITES:
            for name in MEASURED:
                values = effects.values(name, site=site)[i]
                same(values[:, : at + 1], alone.values(name, site=site)[0])
                behind = 0  # nothing there is seen by the read-out
                if name.startswith("says_"):
                    unpatched = effects.reference.says[i, 1 if direction == "denoise" else 0]
                    behind = unpatched[["says_clean", "says_corrupted"].index(name)]
                assert (values[:, at + 1 : n] == behind).all()
                assert np.isnan(values[:, n:]).all()
        assert np.allclose(effects.reference.logp[i], alone.reference.logp[0], atol=1e-5)


def test_an_earlier_readout_of_a_run(model, prompts):
    patches = [Patch("mlp_post", 0, 1, 3), Patch("z", 1, 2, 0), Patch("mlp_out", 0, 4)]
    before, after = [Intervention(0, patches[:2])], [Intervention(0, patches[2:]), Intervention(0, patches)]
    want = run(model, [truncated(prompts[0], 4)], before).values("ie")
    assert want != 0
    found = run(model, prompts, [*before, *after], readout=3).values("ie")
    same(found, np.array([want[0], 0, want[0]]))


def test_positions_that_only_some_pairs_have(model, prompts):
    """The others are NaN, and yet their unpatched runs are part of the result."""
    everywhere, some = sweep(model, prompts), sweep(model, prompts, positions=[5])
    assert np.isnan(some.values("ie")[1]).all()
    same(some.values("ie")[::2], everywhere.values("ie")[::2, :, 5:])
    assert np.allclose(some.reference.logit, everywhere.reference.logit, atol=1e-5)
    assert np.array_equal(some.reference.prediction, everywhere.reference.prediction)


# ----------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    "asked",
    [
        "ie",
        "logit_diff,recovered",
        ["kl"],
        ["entropy"],
        ["flip", "dp_clean"],
        "dlogp_corrupted",
        "says_clean",
        ["dp_corrupted"],
    ],
)
def test_metrics_that_are_asked_for_alone_are_what_they_are_among_all(model, prompts, asked):
    few, every = (sweep(model, prompts, "z", metrics=m) for m in (asked, EVERY))
    names = asked.split(",") if isinstance(asked, str) else asked
    for name in names:
        same(few.values(name), every.values(name), 1e-6)
    assert set(names) <= set(few.metrics) < set(every.metrics)
    for name in set(METRICS) - set(few.metrics):
        with pytest.raises(DeltapatchError, match="did not measure what metric"):
            few.values(name)
    assert set(every.metrics) == set(METRICS)


# --------------------------------------------------------------------------------- hook names and indices


def test_hook_names_of_transformer_lens(model, prompts):
    hooks = sweep(model, prompts, ["blocks.1.mlp.hook_post", "blocks.0.hook_attn_out", "attn.hook_z"])
    plain = sweep(model, prompts, ["mlp_post", "attn_out", "z"])
    same(hooks.values("ie", site="mlp_post"), plain.values("ie", site="mlp_post")[:, [1]])
    same(hooks.values("ie", site="blocks.0.hook_attn_out"), plain.values("ie", site="attn_out")[:, [0]])
    same(hooks.values("ie", site="z"), plain.values("ie", site="z"))
    assert hooks.layers_of("mlp_post").tolist() == [1]
    one = run(model, prompts, [Intervention(0, [Patch("blocks.1.attn.hook_z", 1, -1, 2)])])
    same(one.values("ie"), plain.values("ie", site="z")[0, 1, [5], 2])


def test_a_run_is_the_sweep_of_its_patches(model, prompts):
    effects = sweep(model, prompts, ["k", "mlp_out.dim", "resid_post"], positions=[1, "subject", -1])
    cells = [("k", 2, -1, 1), ("mlp_out.dim", 0, "subject", 7), ("resid_post", 1, 1, None), ("k", 0, 1, 0)]
    asked = [Intervention(i, [Patch(*cell)]) for i in (2, 0, 1) for cell in cells]
    outcome = run(model, prompts, asked)
    column = {1: 0, "subject": 1, -1: 2}
    for metric in METRICS:
        want = [
            effects.values(metric, site=s)[(i, l, column[p]) + (() if n is None else (n,))]
            for i in (2, 0, 1)
            for s, l, p, n in cells
        ]
        same(outcome.values(metric), np.array(want))


# ------------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_the_number_of_threads_changes_no_bit(model, prompts, precision):
    many = prompts * 5
    found = []
    for n in (1, 2):
        with threads(n):
            effects = sweep(model, many, ["mlp_post", "mlp_out", "resid_pre", "k"], precision=precision)
            assert torch.get_num_threads() == n
        found.append({(s, m): effects.values(m, site=s) for s in effects.sites for m in MEASURED})
    for key, values in found[0].items():
        assert np.array_equal(values, found[1][key], equal_nan=True), key


def test_an_error_leaves_the_number_of_threads_as_it_was(prompts):
    with threads(2):
        with pytest.raises(DeltapatchError, match="not finite"):
            sweep(overflowing(), prompts)
        assert torch.get_num_threads() == 2


# --------------------------------------------------------------------------------------------- run folders


def test_out_writes_a_run_folder_that_loads_again(model, prompts, tmp_path):
    effects = sweep(model, prompts, ["mlp_out", "z"], out=tmp_path / "run", seed=3, source="noise")
    loaded = deltapatch.load_effects(tmp_path / "run")
    assert loaded.meta["seed"] == 3
    assert loaded.meta["source"] == "noise"
    for site in ("mlp_out", "z"):
        for metric in METRICS:
            a, b = (e.values(metric, site=site) for e in (effects, loaded))
            assert np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_path_that_is_taken_is_refused_before_anything_is_computed(
    model, prompts, tmp_path, kind, monkeypatch
):
    taken = tmp_path / "run"
    if kind == "file":
        taken.write_text("mine")
    else:
        taken.mkdir()
        (taken / "mine").write_text("mine")
    monkeypatch.setattr("deltapatch.engine.passes.Wavefront", None)  # computing would fail
    with pytest.raises(DeltapatchError, match="is taken"):
        sweep(model, prompts, out=taken)
    assert (taken if kind == "file" else taken / "mine").read_text() == "mine"


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "forward"}, "unknown direction 'forward': choose denoise or noise"),
        (
            {"source": "median"},
            "unknown source 'median': choose from counterpart, zero, mean, resample, noise",
        ),
        (
            {"precision": "fp4"},
            "unknown precision 'fp4': choose from auto, fp64, fp32, tf32, bf16, fp16, fp8",
        ),
        ({"backend": "cuda"}, "unknown backend 'cuda': choose from auto, reference"),
        ({"metrics": "ie,effect"}, "unknown metric 'effect': choose from ie, "),
        ({"memory_budget": -1}, "the memory budget must be positive, not -1"),
        ({"memory_budget": 0}, "the memory budget must be positive, not 0"),
        ({"memory_budget": 1000}, "a memory budget of 1 kB is too small"),
        ({"readout": 4}, "pair 1 has no position 4 to read the effect at"),
        ({"readout": "verb"}, "pair 0 has no position 'verb' to read the effect at"),
    ],
    ids=str,
)
def test_what_options_of_both_say(model, prompts, options, message):
    for call in (
        lambda: sweep(model, prompts, **options),
        lambda: run(model, prompts, [Intervention(0, [Patch("mlp_out", 0, 0)])], **options),
    ):
        with pytest.raises(DeltapatchError) as caught:
            call()
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "mlp"}, "unknown site 'mlp'"),
        ({"layers": [3]}, "layer 3 does not exist: this model has layers 0 to 2"),
        ({"positions": [6]}, "position 6 does not exist"),
        ({"positions": ["verb"]}, "no pair has a position labelled 'verb'"),
    ],
    ids=str,
)
def test_what_a_sweep_says(model, prompts, options, message):
    with pytest.raises(DeltapatchError) as caught:
        sweep(model, prompts, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("pair", "patches", "message"),
    [
        (3, [Patch("mlp_out", 0, 0)], "intervention 1 names pair 3, but there are 0 to 2"),
        (-1, [Patch("mlp_out", 0, 0)], "intervention 1 names pair -1"),
        (0, [], "intervention 1 has no patches"),
        (0, [Patch("mlp", 0, 0)], "unknown site 'mlp'"),
        (0, [Patch("mlp_out", 3, 0)], "intervention 1: layer 3 does not exist: this model has 0 to 2"),
        (0, [Patch("blocks.7.hook_mlp_out", 7, 0)], "intervention 1: layer 7 does not exist"),
        (1, [Patch("mlp_out", 0, 4)], "intervention 1: its pair has no position 4; the prompt has 4 tokens"),
        (0, [Patch("mlp_out", 0, "verb")], "intervention 1: its pair has no position 'verb'"),
        (0, [Patch("mlp_out", 0, 0, 2)], "intervention 1: site mlp_out takes no index, but 2 was given"),
        (0, [Patch("mlp_post", 0, 0)], "intervention 1: site mlp_post needs an index from 0 to 23, not None"),
        (0, [Patch("mlp_post", 0, 0, 24)], "site mlp_post needs an index from 0 to 23, not 24"),
        (0, [Patch("k", 0, 0, 2)], "site k needs an index from 0 to 1, not 2"),
        (0, [Patch("z", 0, 0, -1)], "site z needs an index from 0 to 3, not -1"),
        (0, [Patch("z", 0, 5, 1), Patch("z", 0, -1, 1)], "intervention 1 patches the same activation twice"),
    ],
)
def test_what_a_run_says(model, prompts, pair, patches, message):
    good = Intervention(0, [Patch("mlp_out", 0, 0)])
    with pytest.raises(DeltapatchError) as caught:
        run(model, prompts, [good, Intervention(pair, patches)])
    assert message in str(caught.value)


def test_nothing_to_run(model, prompts):
    with pytest.raises(DeltapatchError, match="there are no interventions"):
        run(model, prompts, [])
    with pytest.raises(DeltapatchError, match="no prompt pairs"):
        sweep(model, [])


def overflowing():
    """A model whose weights are finite and whose activations are not."""
    hf = build("neox-parallel")
    with torch.no_grad():
        hf.gpt_neox.layers[-1].mlp.dense_4h_to_h.weight[3] = 3e38
    return deltapatch.from_transformers(hf)


def test_logits_that_are_not_finite(prompts):
    with pytest.raises(DeltapatchError, match="logits are not finite for pair 0: its weights overflow"):
        sweep(overflowing(), prompts[:1])


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(prompts, weight):
    hf = build("neox-parallel")
    with torch.no_grad():
        hf.gpt_neox.layers[1].mlp.dense_4h_to_h.weight[3, 5] = weight
    with pytest.raises(
        DeltapatchError, match=r"layers\.1\.mlp\.dense_4h_to_h\.weight' holds NaN or infinity"
    ):
        sweep(deltapatch.from_transformers(hf), prompts)


def test_an_effect_that_is_not_finite_is_named_with_its_coordinates(model, prompts, monkeypatch):
    carry = deltapatch.engine.passes.Wavefront.run

    def spoilt(self):
        result = carry(self)
        result.measured["kl"][-1] = np.inf
        return result

    monkeypatch.setattr("deltapatch.engine.passes.Wavefront.run", spoilt)
    where = r"the first: pair 0, z, layer 2, position -1, index 3; try precision='fp64'"
    with pytest.raises(DeltapatchError, match=rf"kl is not finite for 1 intervention\(s\), {where}"):
        sweep(model, prompts[:1], ["mlp_out", "z"], positions=[0, -1])
