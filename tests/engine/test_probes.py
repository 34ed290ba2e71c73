"""Probes: the residual stream inside the model, read along a direction, against the oracle's own."""

import json

import numpy as np
import pytest
import torch
from engine_oracle import Patch as OraclePatch
from engine_saes import encoded, made, written
from engine_tiny import hf_model, pairs, prompt_pairs, true_model, with_long_answers
from safetensors.torch import save_file

import deltapatch as dp
from deltapatch.errors import DeltapatchError

TOLERANCE = {"fp32": 1e-5, "fp64": 1e-8}


def engine_of(variant, precision="fp32"):
    return dp.from_transformers(hf_model(variant, torch.float64 if precision == "fp64" else torch.float32))


def streams(true, pair, rows):
    """layer -> [row, T, d_model]: the residual stream after each layer, patched minus base."""
    source = true.activations(pair.clean)
    found = {}
    for which, patches in (("patched", rows), ("base", [[]] * len(rows))):
        seen = {}
        keep = true.forward

        def forward(tokens, n_rows, visit, keep=keep, seen=seen):
            def look(site, layer, value):
                value = visit(site, layer, value)
                if site == "resid_post":
                    seen[layer] = value.copy()
                return value

            return keep(tokens, n_rows, look)

        true.forward = forward
        try:
            true.patched(pair.corrupted, source, patches)
        finally:
            true.forward = keep
        found[which] = seen
    return {layer: found["patched"][layer] - found["base"][layer] for layer in found["base"]}


@pytest.mark.parametrize(
    ("variant", "precision"),
    [("gptj", "fp32"), ("neox-parallel", "fp64"), ("llama-grouped", "fp32"), ("gemma2", "fp64")],
)
def test_a_probe_reads_what_the_oracle_has_there(variant, precision):
    true, model = true_model(variant), engine_of(variant, precision)
    drawn = pairs(true, (6, 4, 6))
    d_model, last = model.spec.d_model, model.spec.n_layers - 1
    rng = np.random.default_rng()
    probes = [
        dp.Probe("early", rng.normal(size=d_model), 0, 1),
        dp.Probe("late", rng.normal(size=d_model), last),
        dp.Probe("before_last", rng.normal(size=d_model), last - 1 if last else 0, -1),
    ]
    options = {"precision": precision, "progress": False, "noise_sample": 0}
    for site in ("resid_post", "mlp_out", "z", "mlp_post"):
        effects = dp.sweep(model, prompt_pairs(drawn), sites=site, metrics=[*probes, "logit_diff"], **options)
        for probe in probes:
            got = effects.values(probe, site=site)
            np.testing.assert_array_equal(got, effects.values(probe.name, site=site))
            for i, pair in enumerate(drawn):
                n, indices = len(pair.clean), true.n_indices(site)
                cells = [
                    (l, p, *index)
                    for l in range(true.n_layers)
                    for p in range(n)
                    for index in ([()] if indices is None else [(j,) for j in range(indices)])
                ]
                rows = [[OraclePatch(site, l, p, *index)] for l, p, *index in cells]
                at = n - 1 if probe.position in ("last", -1) else probe.position
                moved = streams(true, pair, rows)[probe.layer][:, at]
                want = moved @ probe.direction
                here = np.array([got[(i, *cell)] for cell in cells])
                # Few cells move it: one of them may be a sum that nearly cancels.
                size = np.linalg.norm(moved) * np.linalg.norm(probe.direction) / d_model**0.5
                assert np.abs(here - want).max() <= TOLERANCE[precision] * max(np.linalg.norm(want), size)
                # Layers and positions behind it move it by exactly nothing.
                behind = [l > probe.layer or p > at for l, p, *_ in cells]
                assert not here[behind].any()


@pytest.mark.parametrize(
    ("kind", "norm", "variant", "precision"),
    [
        ("standard", "none", "gptj", "fp32"),
        ("jumprelu", "layer_norm", "llama-grouped", "fp64"),
        ("topk", "none", "gemma2", "fp64"),
        ("gated", "constant_norm_rescale", "neox-parallel", "fp64"),
    ],
)
def test_a_probe_of_a_feature_reads_its_activation(tmp_path, kind, norm, variant, precision):
    true, model = true_model(variant), engine_of(variant, precision)
    drawn = pairs(true, (6, 4))
    weights = made(kind, model.spec.d_model)
    probes, read = [], {}
    for hook, after in (("blocks.1.hook_resid_post", 1), ("blocks.1.hook_resid_pre", 0)):
        folder = written(tmp_path / str(after), weights, kind, hook, normalize_activations=norm, k=5)
        sae = dp.load_sae(folder)
        for j in (0, 5, 11):
            at = -1 if after == model.spec.n_layers - 1 else -2
            probes.append(dp.Probe(f"f{j}_{after}", feature=(sae, j), position=at))
            read[probes[-1].name] = after, j
    options = {"precision": precision, "progress": False, "noise_sample": 0}
    for site in ("mlp_out", "z"):
        effects = dp.sweep(model, prompt_pairs(drawn), sites=site, metrics=probes, **options)
        wrong = size = 0.0
        for i, pair in enumerate(drawn):
            n, indices = len(pair.clean), true.n_indices(site)
            cells = list(np.ndindex(true.n_layers, n, *([indices] if indices else [])))
            moved = streams(true, pair, [[OraclePatch(site, *cell)] for cell in cells])
            base = true.activations(pair.corrupted)
            for probe in probes:
                layer, j = read[probe.name]
                at = n + probe.position
                x = base["resid_post", layer][at]
                before, after = (
                    encoded(y, weights, kind, norm)[0][:, j] for y in (x[None], x + moved[layer][:, at])
                )
                here = np.array([effects.values(probe, site=site)[(i, *cell)] for cell in cells])
                wrong += np.linalg.norm(here - (after - before)) ** 2
                size += np.linalg.norm(after - before) ** 2
                assert not here[[l > layer or p > at for l, p, *_ in cells]].any()
        assert wrong**0.5 <= 2 * TOLERANCE[precision] * size**0.5
        assert size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature": 3}, "feature must be"),
        ({"feature": ("sae", 3)}, "must be what load_sae reads"),
        ({"number": 24}, "a number from 0 to 23"),
        ({"number": 1, "layer": 2}, "leave out direction and layer"),
        ({"number": 1, "hook": "blocks.1.hook_mlp_out"}, "reads the residual stream after a layer"),
        ({"number": 1, "hook": "blocks.0.hook_resid_pre"}, "reads the residual stream after a layer"),
    ],
)
def test_features_that_no_probe_reads(tmp_path, options, message):
    hook = options.pop("hook", "blocks.1.hook_resid_post")
    sae = dp.load_sae(written(tmp_path / "sae", made("standard", 16), hook=hook))
    if "number" in options:
        options["feature"] = sae, options.pop("number")
    with pytest.raises(DeltapatchError, match=message):
        dp.Probe("p", **options)


def test_joint_patches_several_tokens_and_labels_are_read_too():
    true, model = true_model("llama-grouped"), engine_of("llama-grouped", "fp64")
    drawn = [
        with_long_answers(true, pair, (3, 2), 1, seed=i)._replace(labels={"op": 2})
        for i, pair in enumerate(pairs(true, (6, 5)))
    ]
    probe = dp.Probe("at_op", np.random.default_rng().normal(size=model.spec.d_model), 0, "op")
    patches = [("mlp_out", 0, 1, None), ("z", 0, 2, 1), ("resid_post", 1, 3, None)]
    asked = [dp.Intervention(i, [dp.Patch(*patch) for patch in patches]) for i in (1, 0)]
    outcome = dp.run(model, prompt_pairs(drawn), asked, metrics=[probe], precision="fp64", progress=False)
    for number, i in enumerate((1, 0)):
        want = (
            streams(true, drawn[i], [[OraclePatch(*patch) for patch in patches]])[0][0, 2] @ probe.direction
        )
        assert outcome.values("at_op")[number] == pytest.approx(want, rel=1e-8)


def test_a_run_folder_keeps_it_and_another_direction_is_refused(tmp_path):
    model = engine_of("gptj")
    drawn = prompt_pairs(pairs(true_model("gptj"), (5, 5)))
    direction = torch.randn(model.spec.d_model)
    save_file({"mood@0:1": direction, "ease@0:last": 2 * direction}, tmp_path / "probes.safetensors")
    options = {"sites": "mlp_out", "precision": "fp32", "progress": False}
    file = str(tmp_path / "probes.safetensors")
    run = dp.sweep(model, drawn, metrics=["logit_diff", file], out=tmp_path / "run", **options)
    read = dp.load_effects(tmp_path / "run")
    for name in ("mood", "ease"):
        np.testing.assert_array_equal(read.values(name, site="mlp_out"), run.values(name, site="mlp_out"))
    assert set(json.loads((tmp_path / "run" / "run.json").read_text())["functions"]) == {"mood", "ease"}
    other = [dp.Probe("mood", -direction, 0, 1), dp.Probe("ease", direction, 0)]
    with pytest.raises(DeltapatchError, match="source of a metric"):
        dp.sweep(model, drawn, metrics=["logit_diff", *other], out=tmp_path / "run", resume=True, **options)


def test_a_patch_that_changes_nothing_moves_it_by_exactly_nothing():
    model = engine_of("neox-parallel")
    (pair,) = prompt_pairs(pairs(true_model("neox-parallel"), (5,)))
    same = dp.PromptPair(pair.clean, pair.clean, pair.clean_answer, pair.corrupted_answer)
    probe = dp.Probe("mood", torch.randn(model.spec.d_model), 0)
    assert not dp.sweep(model, [same], metrics=[probe], progress=False).values("mood", site="mlp_out").any()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda d: dp.Probe("my mood", np.ones(d), 0), "letters, digits and _"),
        (lambda d: dp.Probe("mood", np.full(d, np.nan), 0), "finite"),
        (lambda d: dp.Probe("mood", np.ones((2, d)), 0), "one row"),
        (lambda d: dp.Probe("mood", np.ones(d), 0.5), "layer must be a whole number"),
        (lambda d: dp.Probe("kl", np.ones(d), 0), "taken"),
        (lambda d: dp.Probe("mood", np.ones(d + 1), 0), "the residual stream"),
        (lambda d: dp.Probe("mood", np.ones(d), 9), "layers go from 0 to"),
        (lambda d: dp.Probe("mood", np.ones(d), 0, 7), "has no position 7"),
        (lambda d: dp.Probe("mood", np.ones(d), 0, "verb"), "has no position 'verb'"),
        (lambda d: dp.Probe("mood", np.ones(d), 1, 0), "take an earlier layer"),
    ],
)
def test_what_is_no_probe_is_refused(made, said):
    model = engine_of("gptj")
    drawn = prompt_pairs(pairs(true_model("gptj"), (5,)))
    with pytest.raises(DeltapatchError, match=said):
        dp.sweep(model, drawn, metrics=[made(model.spec.d_model)], progress=False)


def test_where_effects_are_read_earlier_and_edges_have_none(tmp_path):
    model = engine_of("gptj")
    drawn = prompt_pairs(pairs(true_model("gptj"), (5,)))
    probe = dp.Probe("mood", np.ones(model.spec.d_model), 0, 4)
    with pytest.raises(DeltapatchError, match="nothing is computed there"):
        dp.sweep(model, drawn, metrics=[probe], readout=2, progress=False)
    with pytest.raises(DeltapatchError, match="edges and circuits have none"):
        dp.sweep_edges(model, drawn, metrics=[probe], progress=False)
    save_file({"mood": torch.ones(model.spec.d_model)}, tmp_path / "probes.safetensors")
    with pytest.raises(DeltapatchError, match="name it like mood@9:last"):
        dp.sweep(model, drawn, metrics=str(tmp_path / "probes.safetensors"), progress=False)
