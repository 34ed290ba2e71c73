"""Every later family against the oracle: logits, all sites, joint patches, long answers, both backends."""

import numpy as np
import pytest
import torch
from engine_oracle import METRICS, Patch, hf_hooks_logits
from engine_tiny import (
    FAMILIES,
    build,
    hf_model,
    model_of,
    pairs,
    true_model,
    with_long_answers,
    without_overlaps,
)

import deltapatch

TOLERANCE = {"fp32": 1e-5, "fp64": 1e-8}
FAMILY = pytest.mark.parametrize("family", FAMILIES)
PRECISION = pytest.mark.parametrize("precision", TOLERANCE)


def assert_close(got, want, precision, where):
    """All metrics of the same cells, relative to the norm of each."""
    for metric in METRICS:
        a, b = got(metric), want[metric]
        assert np.array_equal(np.isnan(a), np.isnan(b)), (where, metric)
        error, scale = (np.linalg.norm(np.nan_to_num(x)) for x in (a - b, b))
        # Relative metrics are exponentials of log-probabilities.
        allowed = 2 * TOLERANCE[precision] * (scale if scale > 1e-9 else 1)
        assert error <= allowed, f"{where}, {metric}: relative error {error / scale:.1e}"


@FAMILY
def test_logits(family):
    """Of prompts shorter and longer than windows and original contexts."""
    for length in (1, 3, 4, 5, 11):
        tokens = pairs(true_model(family), [length])[0].clean
        want = true_model(family).logits(tokens)
        for precision, dtype in (("fp32", np.float32), ("fp64", np.float64)):
            got = model_of(family, precision).logits(tokens).numpy()
            assert got.dtype == dtype
            assert np.linalg.norm(got - want) <= TOLERANCE[precision] * np.linalg.norm(want)


@FAMILY
def test_logits_are_those_of_transformers(family):
    """transformers casts to float32 in norms, rotary tables and softmax, whatever its model is in."""
    for length in (2, 11):
        tokens = pairs(true_model(family), [length])[0].clean
        with torch.no_grad():
            theirs = hf_model(family, torch.float64)(torch.tensor([tokens])).logits[0].numpy()
        assert np.linalg.norm(true_model(family).logits(tokens) - theirs) <= 2e-6 * np.linalg.norm(theirs)


# In turn: joint patches, below, are of each precision in each direction.
@pytest.mark.parametrize(
    ("family", "precision", "direction", "source"),
    [
        (family, precision, *how)
        for i, family in enumerate(FAMILIES)
        for precision, how in zip(
            ("fp32", "fp64") if i % 2 else ("fp64", "fp32"),
            (("denoise", "counterpart"), ("noise", "zero")),
            strict=True,
        )
    ],
)
def test_all_sites(family, precision, direction, source):
    true, drawn = true_model(family), pairs(true_model(family), (6, 4), seed=3)
    sites = true.sites()
    if source == "zero" and true.shape.rms:
        # The norm of a stream of zeros is rounding divided by the root of eps (see is_singular).
        sites = [site for site in sites if site not in ("resid_pre", "resid_mid", "resid_post")]
    options = {"direction": direction, "source": source, "precision": precision, "metrics": "all"}
    given = [deltapatch.PromptPair(**pair._asdict()) for pair in drawn]
    effects = deltapatch.sweep(model_of(family, precision), given, sites=sites, progress=False, **options)
    for site in sites:
        want = true.sweep(drawn, site, direction=direction, source=source)
        assert_close(lambda metric, site=site: effects.values(metric, site=site), want, precision, site)


def drawn_patch(true, rng, length, site):
    """A patch of a site, anywhere."""
    size = true.n_indices(site)
    index = int(rng.integers(size)) if size else None
    return Patch(site, int(rng.integers(true.n_layers)), int(rng.integers(length)), index)


def joint(true, rng, length, n):
    """Interventions of up to five patches anywhere."""
    out = []
    for _ in range(n):
        patches = []
        for _ in range(rng.integers(1, 6)):
            patches.append(drawn_patch(true, rng, length, str(rng.choice(true.sites()))))
        out.append(without_overlaps(patches))
    return out


@FAMILY
@pytest.mark.parametrize("n", [1, 4], ids=["single", "joint"])
def test_the_oracle_patches_as_hooks_do(family, n):
    """Of every site that modules put out; transformers is in float64 but for what it casts to float32."""
    true, rng = true_model(family), np.random.default_rng(n)
    pair = pairs(true, [6], seed=7)[0]
    sites = [site for site in true.sites() if site != "resid_mid"]  # which no module puts out
    drawn = [(first, *rng.choice(sites, n - 1)) for first in sites]
    rows = [without_overlaps([drawn_patch(true, rng, 6, str(site)) for site in some]) for some in drawn]
    got = true.patched(pair.corrupted, true.activations(pair.clean), rows)
    theirs = hf_model(family, torch.float64)
    want = np.stack([hf_hooks_logits(theirs, pair.corrupted, pair.clean, row) for row in rows])
    for row, a, b in zip(rows, got, want, strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b), row


def run(family, precision, pair, rows, **options):
    asked = [
        deltapatch.Intervention(0, [deltapatch.Patch(p.site, p.layer, p.position, p.index) for p in row])
        for row in rows
    ]
    given = deltapatch.PromptPair(**pair._asdict())
    return deltapatch.run(
        model_of(family, precision),
        given,
        asked,
        precision=precision,
        metrics="all",
        progress=False,
        **options,
    )


@FAMILY
@PRECISION
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_joint_patches_and_long_answers(family, precision, direction):
    true, rng = true_model(family), np.random.default_rng(4)
    pair = pairs(true, [7], seed=5)[0]
    pair = with_long_answers(true, pair, (2, 3), shared=1, seed=6)
    rows = joint(true, rng, 7, 24)
    outcome = run(family, precision, pair, rows, direction=direction)
    want = true.effects(pair, rows, direction)
    assert_close(outcome.values, want, precision, "joint")


@FAMILY
def test_a_saved_model_in_bfloat16_loads_streams_and_is_the_same(family, tmp_path):
    build(family).to(torch.bfloat16).save_pretrained(tmp_path)  # not the one that other tests have
    kept, streamed = (deltapatch.load_model(tmp_path, stream=stream) for stream in (False, True))
    tokens = pairs(true_model(family), [9])[0].clean
    assert torch.equal(kept.logits(tokens), streamed.logits(tokens))
    assert kept.fingerprint() == streamed.fingerprint()
    pair = pairs(true_model(family), [5])[0]
    given = deltapatch.PromptPair(**pair._asdict())
    sites = ["attn_out", "z"]
    a, b = (
        deltapatch.sweep(model, given, sites=sites, precision="fp32", progress=False)
        for model in (kept, streamed)
    )
    for site in sites:
        assert np.array_equal(a.values("logit_diff", site=site), b.values("logit_diff", site=site))
