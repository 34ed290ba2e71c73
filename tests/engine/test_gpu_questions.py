"""Every kind of question on a GPU, against the same in float64 on a CPU: run with -m gpu.

What runs beside the kernels (edits, edges, gradients, features) is PyTorch's on either device; a tensor that
was made on the wrong one shows nowhere else.
"""

import copy
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_saes import made, written
from engine_tiny import build, hf_model, pairs, prompt_pairs, random_pair, true_model, with_long_answers

import deltapatch as dp
from deltapatch import AnyOf, Circuit, Intervention, Patch
from deltapatch.interventions.nodes import Nodes

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("DELTAPATCH_TEST_DEVICE", "cuda")
VARIANTS = ("gpt2", "llama-grouped", "gemma2", "gptj")
PRECISE = {"precision": "fp32", "progress": False, "noise_sample": 0}
EXACT = PRECISE | {"precision": "fp64"}


def given(variant):
    """Three pairs: plain, with answers of several tokens, and with any of two tokens as an answer."""
    true = true_model(variant)
    first, second, third = pairs(true, (6, 5, 6))
    out = prompt_pairs([first, with_long_answers(true, second, (2, 3), 1, seed=2), third])
    out[2] = dp.PromptPair(out[2].clean, out[2].corrupted, AnyOf([7, 9]), out[2].corrupted_answer)
    return out


def sae_of(folder, spec, site, kind="standard", **more):
    width = spec.n_heads * spec.d_head if site == "z" else spec.d_model
    hook = "attn.hook_z" if site == "z" else f"hook_{site}"
    more = {"reshape_activations": "hook_z"} if site == "z" else more
    home = Path(tempfile.mkdtemp(dir=folder)) / kind
    return dp.load_sae(written(home, made(kind, width), kind, hook=f"blocks.1.{hook}", **more))


def effects(found, *metrics):
    return [found.values(metric) for metric in metrics or ("logit_diff", "kl", "dlogp_clean")]


# What is asked: of a model, its pairs and a folder; gives arrays. ---------------------------------------


def answers(model, given, folder, options):
    found = dp.sweep(model, given, sites=["mlp_out", "z", "mlp_post"], positions=[1, -1], **options)
    return [found.values(m, site) for site in found.sites for m in ("logit_diff", "kl", "entropy")]


def own_metric(model, given, folder, options):
    def spread(logits, base, pair):
        return logits.std(-1)

    return [dp.sweep(model, given[:1], sites="attn_out", metrics=[spread], **options).values("spread")]


def patterns(model, given, folder, options):
    return effects(dp.sweep(model, given, sites="pattern", positions=[-1], **options))


def together(model, given, folder, options):
    return effects(dp.sweep(model, given, sites="z", positions="together", **options))


def from_other_sources(model, given, folder, options):
    out = []
    for source in ("zero", "noise", "mean", "resample"):
        out += effects(dp.sweep(model, given[:1] + given[2:], sites="k", source=source, **options))
    return out


def joint(model, given, folder, options):
    spec, rng = model.spec, np.random.default_rng(0)
    sae = sae_of(folder, spec, "resid_post")
    read = [Patch("resid_post", 1, -1, feature=(sae, j)) for j in range(4)]
    asked = [
        Intervention(0, [Patch("z", 0, 1, 0), Patch("mlp_post", 1, -1, 3), Patch("k", 1, 2, 0)]),
        Intervention(0, [Patch("resid_post", 1, -1, along=rng.normal(size=(2, spec.d_model)))]),
        Intervention(1, [Patch("mlp_out", 0, 1, add=rng.normal(size=spec.d_model)), Patch("attn_out", 1, 2)]),
        Intervention(2, [Patch("mlp_out", 0, -1), *read]),
    ]
    wired = [Intervention(2, [Patch("mlp_out", 0, 1, into="m1"), Patch("z", 0, -1, 1, into="logits")])]
    return effects(dp.run(model, given, asked, **options)) + effects(dp.run(model, given, wired, **options))


def directions(model, given, folder, options):
    axis = np.random.default_rng(1).normal(size=model.spec.d_model)
    swapped = dp.sweep_directions(model, given, {"resid_post": axis}, **options)
    added = dp.sweep_directions(model, given, {"resid_post": axis}, strengths=[0.1, 2], **options)
    return effects(swapped) + effects(added)


def features(model, given, folder, options):
    read = [("resid_post", "jumprelu"), ("mlp_out", "topk"), ("z", "standard")]
    saes = [sae_of(folder, model.spec, site, kind, k=4) for site, kind in read]
    return [out for sae in saes for out in effects(dp.sweep_features(model, given, sae, **options))]


def edges(model, given, folder, options):
    found = dp.sweep_edges(model, given, effect="both", **options)
    return [found.values("logit_diff", effect) for effect in ("total", "direct")]


def screened(model, given, folder, options):
    asked = {"screen": "attribution", "top": 12, "screen_sample": 10, "seed": 3, **options}
    found = dp.sweep(model, given, sites=["mlp_post", "z"], positions=[-1], **asked)
    return [of(site=site) for site in found.sites for of in (found.estimate, partial(found.values, "kl"))]


def screened_by_paths(model, given, folder, options):
    out = []
    for screen in ("ig-inputs", "ig-activations"):
        found = dp.sweep(model, given[:1], sites="mlp_out", screen=screen, top=4, screen_steps=3, **options)
        out += [found.estimate(), found.values("logit_diff")]
    return out


def screened_edges(model, given, folder, options):
    found = dp.sweep_edges(model, given, screen="attribution", top=20, screen_sample=10, **options)
    return [found.estimate(), found.values("logit_diff")]


def screened_features(model, given, folder, options):
    sae = sae_of(folder, model.spec, "resid_post")
    found = dp.sweep_features(model, given, sae, screen="attribution", top=6, screen_sample=4, **options)
    return [found.estimate(), found.values("logit_diff")]


def circuits(model, given, folder, options):
    nodes = Nodes.of(model.spec)
    scores = np.random.default_rng(2).normal(size=(len(nodes.senders), len(nodes.receivers)))
    found = dp.faithfulness(model, given[:1], Circuit.of_scores(nodes, scores, 16, 40), progress=False)
    paths = [("input", "m0", "m1", "logits"), ("a0.h1", "m1", "logits")]
    return [found.raw, found.empty, dp.path_effects(model, given[:1], paths, progress=False)]


def interactions(model, given, folder, options):
    parts = [("z", 0, -1, 1), ("mlp_post", 1, -1, 5), ("mlp_out", 1, 1), ("resid_post.dim", 0, -1, 3)]
    return [dp.interactions(model, given[:1], parts, **options).values("logit_diff")]


def unequal(model, given, folder, options):
    one, other = random_pair(5, seed=4), random_pair(7, seed=5)
    pair = dp.PromptPair(one.clean, other.corrupted, *one[2:4], align=[[0, 0], [2, 3], [-1, -1]])
    return effects(dp.sweep(model, [pair], sites="z", **options))


QUESTIONS = (
    answers,
    own_metric,
    patterns,
    together,
    from_other_sources,
    joint,
    directions,
    features,
    edges,
    screened,
    screened_by_paths,
    screened_edges,
    screened_features,
    circuits,
    interactions,
    unequal,
)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ask", QUESTIONS, ids=lambda ask: ask.__name__)
def test_a_gpu_answers_as_float64_does(ask, variant, tmp_path):
    there = dp.from_transformers(copy.deepcopy(hf_model(variant, torch.float32)).to(DEVICE))
    here = dp.from_transformers(hf_model(variant, torch.float64))
    got, want = ask(there, given(variant), tmp_path, PRECISE), ask(here, given(variant), tmp_path, EXACT)
    assert len(got) == len(want) > 0
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert np.array_equal(np.isnan(a), np.isnan(b)), i
        a, b = np.nan_to_num(a), np.nan_to_num(b)
        assert np.linalg.norm(b) > 0, i
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b), i


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_checkpoint_that_is_streamed_gives_the_bits_of_one_in_memory(precision, tmp_path):
    build("llama-grouped").save_pretrained(tmp_path)
    kept, streamed = (
        dp.sweep(
            dp.load_model(tmp_path, device=DEVICE, stream=stream),
            given("llama-grouped"),
            sites=["mlp_out", "z", "mlp_post"],
            precision=precision,
            progress=False,
        )
        for stream in (False, True)
    )
    assert streamed.meta["stream"]
    for site in kept.sites:
        a, b = (found.values("logit_diff", site) for found in (kept, streamed))
        assert np.array_equal(a, b, equal_nan=True)
