"""The oracle itself: against transformers, against hooks, and against itself in 80-bit arithmetic."""

import numpy as np
import pytest
import torch
from engine_oracle import FLAGS, SITES, Patch, TrueModel, hf_hooks_logits, oracle_metrics
from engine_tiny import SEQUENTIAL, VARIANTS, VOCAB, build, hf_model, pairs, random_pair, true_model

# transformers works partly in float32 even in a float64 model: rotary tables, RMSNorm, GPT-J's scores
TOLERANCE = 1e-6


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def some_patches(model, length, seed, n=6):
    """Random patches over sites, layers and positions, all but resid_mid."""
    rng = np.random.default_rng(seed)
    found = []
    for site in rng.permutation([s for s in SITES if s != "resid_mid"])[:n]:
        size = model.n_indices(str(site))
        index = int(rng.integers(size)) if size else None
        found.append(Patch(str(site), int(rng.integers(model.n_layers)), int(rng.integers(length)), index))
    return found


@pytest.mark.parametrize("variant", [*VARIANTS, "one-layer", "llama-dynamic"])
def test_logits_are_those_of_transformers(variant):
    model = hf_model(variant, torch.float64)
    for length in (1, 4, 7):
        tokens = random_pair(length, seed=length, first=0).clean
        with torch.no_grad():
            want = model(torch.tensor([tokens])).logits[0].numpy()
        assert relative(true_model(variant).logits(tokens), want) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("site", [s for s in SITES if s != "resid_mid"])
def test_one_patch_is_what_hooks_do(variant, site):
    model, true, pair = hf_model(variant, torch.float64), true_model(variant), random_pair(4, seed=3)
    indices = [0, true.n_indices(site) - 1] if true.n_indices(site) else [None]
    patches = [Patch(site, l, t, i) for l in range(true.n_layers) for t in (1, 3) for i in indices]
    for zero in (False, True):
        values = true.activations(pair.clean)
        if zero:
            values = {name: np.zeros_like(v) for name, v in values.items()}
        got = true.patched(pair.corrupted, values, [[patch] for patch in patches])
        want = [hf_hooks_logits(model, pair.corrupted, pair.clean, [patch], zero) for patch in patches]
        unpatched = true.logits(pair.corrupted)[-1]
        # of the change, which is a stricter test than of the logits
        assert relative(got - unpatched, np.stack(want) - unpatched) < 10 * TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(4))
def test_joint_patches_are_what_hooks_do(variant, seed):
    model, true, pair = hf_model(variant, torch.float64), true_model(variant), random_pair(5, seed)
    patches = some_patches(true, 5, seed)
    got = true.patched(pair.corrupted, true.activations(pair.clean), [patches])[0]
    want = hf_hooks_logits(model, pair.corrupted, pair.clean, patches)
    assert relative(got, want) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_identical_prompts_change_nothing(variant):
    true, pair = true_model(variant), random_pair(5, seed=1)
    same = pair._replace(corrupted=pair.clean)
    for site in true.sites():
        for name, value in true.sweep([same], site, positions=[0, -1]).items():
            if name != "recovered" and not name.startswith("says_"):
                assert np.abs(value).max() < 1e-13, f"{site}, {name}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stream_at_all_positions_is_the_source_run(variant):
    true, pair = true_model(variant), random_pair(5, seed=2)
    source = true.activations(pair.clean)
    sites = ["resid_pre", "resid_post"] + (["resid_mid"] if variant in SEQUENTIAL else [])
    rows = [[Patch(site, l, t) for t in range(5)] for site in sites for l in range(true.n_layers)]
    got = true.patched(pair.corrupted, source, rows)
    assert np.abs(got - true.logits(pair.clean)[-1]).max() < 1e-12


def test_float64_is_enough_for_effects_of_1e_6():
    """Hold the oracle in float64 against itself in 80 bits, on prompts that hardly differ."""
    for variant in VARIANTS:
        model = build(variant)
        with torch.no_grad():
            embedding = model.get_input_embeddings().weight
            embedding[1] = embedding[0] * (1 + 1e-5 * torch.linspace(-1, 1, embedding.shape[1]))
        pair = random_pair(4, seed=5)._replace(clean=[7, 0, 9, 3], corrupted=[7, 1, 9, 3])
        rows = [[Patch("resid_pre", 0, 1)], [Patch("v", 0, 1, 0)], [Patch("mlp_post", 0, 1, 3)]]
        want = TrueModel(model, np.longdouble).effects(pair, rows)
        got = TrueModel(model).effects(pair, rows)
        assert 1e-8 < np.abs(want["dlogp_clean"]).max() < 1e-4
        for name in want:
            if name not in FLAGS:
                assert relative(got[name], want[name]) < 1e-8, f"{variant}, {name}"


def test_metrics_by_hand():
    base, patched = np.log([0.5, 0.25, 0.25]), np.log([0.2, 0.7, 0.1]) + 3.0
    got = oracle_metrics(base, patched[None], patched, base, 1, 0, "denoise")
    want = {
        "ie": (0.45 / 0.25 + 0.3 / 0.2) / 2,
        "logit_diff": np.log(0.7 / 0.2) - np.log(0.25 / 0.5),
        "recovered": 1.0,
        "dlogp_clean": np.log(0.7 / 0.25),
        "dlogp_corrupted": np.log(0.2 / 0.5),
        "dp_clean": 0.45,
        "dp_corrupted": -0.3,
        "prob_diff": 0.75,
        "kl": 0.5 * np.log(0.5 / 0.2) + 0.25 * np.log(0.25 / 0.7) + 0.25 * np.log(0.25 / 0.1),
        "entropy": 0.2 * np.log(5) - 0.7 * np.log(0.7) + 0.1 * np.log(10) - 1.5 * np.log(2),
        "flip": 1.0,
        "says_clean": 1.0,
        "says_corrupted": 0.0,
    }
    for name, value in want.items():
        assert got[name][0] == pytest.approx(value, rel=1e-14), name


def test_kl_of_a_change_of_1e_8():
    # to second order KL is half the variance of the logit change
    base, change = np.zeros(2), np.array([1e-8, -1e-8])
    got = oracle_metrics(base, (base + change)[None], base + 1, base, 0, 1, "denoise")["kl"]
    assert got[0] == pytest.approx(5e-17, rel=1e-12)


def test_pairs_are_what_their_name_says():
    for pair in pairs(true_model("gptj")):
        assert len(pair.clean) == len(pair.corrupted)
        assert pair.clean[0] == pair.corrupted[0]
        assert pair.clean[1] != pair.corrupted[1]
        assert pair.clean_answer != pair.corrupted_answer
        assert max(*pair.clean, *pair.corrupted) < VOCAB
