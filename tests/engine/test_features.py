"""Features of sparse autoencoders against the oracle: encoder and decoder by hand, the model in float64."""

import json
import re

import numpy as np
import pytest
import torch
from engine_oracle import METRICS, metrics_of_answers
from engine_saes import KINDS, NORMS, TOLERANCE, encoded, made, written
from engine_tiny import model_of, pairs, prompt_pairs, true_model

import deltapatch as dp
from deltapatch.errors import DeltapatchError


def truth(true, pair, column, rows, weights, scale, site, zero=False):
    """Every metric of one feature: its multiple of a decoder row is added by hand."""
    layer, position, feature = (int(column[name]) for name in ("layer", "position", "feature"))
    add = (column["after"] - column["before"]) * scale * rows[feature]

    def visit(name, l, value):
        if (name, l) == (site, layer):
            value = value.copy()
            value[0, position] += add.reshape(value[0, position].shape)
        return value

    run = true.forward(pair.corrupted, 1, visit)[:, -1:]
    clean, corrupted = ([true.logits(p)[-1:]] * 2 for p in (pair.clean, pair.corrupted))
    return metrics_of_answers(corrupted, [run] * 2, clean, corrupted, pair, "denoise")


def assert_agrees(outcome, drawn, true, weights, site, tolerance, rows=None, source="counterpart", **how):
    columns = outcome.columns(METRICS)
    rows = weights["W_dec"].double().numpy() if rows is None else rows
    want = {m: [] for m in METRICS}
    expected = set()
    for i, pair in enumerate(drawn):
        base, other = (true.activations(p) for p in (pair.corrupted, pair.clean))
        layer = int(columns["layer"][0])
        before, scale = encoded(base[site, layer].reshape(len(pair.clean), -1), weights, **how)
        after = encoded(other[site, layer].reshape(len(pair.clean), -1), weights, **how)[0]
        after = np.zeros_like(after) if source == "zero" else after
        same = len(before) if pair.clean == pair.corrupted else 1  # prompts differ from the second token on
        if source != "zero":
            after[:same] = before[:same]
        expected |= {(i, int(t), int(j)) for t, j in zip(*np.nonzero(before != after), strict=True)}
        for row in np.flatnonzero(columns["pair"] == i):
            mine = {name: columns[name][row] for name in ("layer", "position", "feature", "before", "after")}
            t, j = int(mine["position"]), int(mine["feature"])
            np.testing.assert_allclose(
                [mine["before"], mine["after"]], [before[t, j], after[t, j]], 1e-9, 1e-12
            )
            for m, value in truth(true, pair, mine, rows, weights, scale[t], site).items():
                want[m].append(value[0])
    assert {*zip(*(columns[n].tolist() for n in ("pair", "position", "feature")), strict=True)} == expected
    for m in METRICS:
        right = np.array(want[m])
        error, size = (np.linalg.norm(np.nan_to_num(x)) for x in (columns[m] - right, right))
        exact = m in ("flip", "says_clean", "says_corrupted")
        assert error <= (0 if exact else 2 * tolerance * size), f"{m}: {error / size}"


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(tmp_path, kind, norm, precision):
    true = true_model("llama-grouped")
    weights = made(kind, true.embedding.shape[1])
    folder = written(tmp_path / "sae", weights, kind, normalize_activations=norm, k=5)
    drawn = pairs(true, (5, 4))
    sae = dp.load_sae(folder)
    outcome = dp.sweep_features(
        model_of("llama-grouped", precision), prompt_pairs(drawn), sae, precision=precision
    )
    assert_agrees(outcome, drawn, true, weights, "resid_post", TOLERANCE[precision], kind=kind, norm=norm)


@pytest.mark.parametrize("variant", ["neox-parallel", "gptj", "gpt2", "gemma2", "olmo2", "llama-grouped"])
def test_every_site_of_families(tmp_path, variant):
    true = true_model(variant)
    drawn = pairs(true, (5, 4))
    hooks = {"resid_pre": "hook_resid_pre", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}
    for site, hook in (*hooks.items(), ("z", "attn.hook_z")):
        width = true.n_indices("z") * true.shape.d_head if site == "z" else true.embedding.shape[1]
        weights = made("standard", width, seed=len(site))
        more = {"reshape_activations": "hook_z"} if site == "z" else {"apply_b_dec_to_input": False}
        folder = written(tmp_path / site, weights, hook=f"blocks.1.{hook}", **more)
        outcome = dp.sweep_features(
            model_of(variant, "fp64"), prompt_pairs(drawn), dp.load_sae(folder), precision="fp64"
        )
        how = {"kind": "standard", "subtracts": site == "z"}
        assert_agrees(outcome, drawn, true, weights, site, 1e-8, **how)


def test_scaled_by_the_decoder_and_taken_out(tmp_path):
    true = true_model("llama-grouped")
    weights = made("topk", true.embedding.shape[1])
    more = {"k": 5, "rescale_acts_by_decoder_norm": True}
    folder = written(tmp_path / "sae", weights, "topk", hook="blocks.0.hook_mlp_out", **more)
    drawn = pairs(true, (5, 4))
    rows = weights["W_dec"].double().numpy()
    rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    for source in ("counterpart", "zero"):
        outcome = dp.sweep_features(
            model_of("llama-grouped", "fp64"),
            prompt_pairs(drawn),
            dp.load_sae(folder),
            precision="fp64",
            source=source,
        )
        how = {"kind": "topk", "by_norm": True, "source": source}
        assert_agrees(outcome, drawn, true, weights, "mlp_out", 1e-8, rows, **how)


def test_an_autoencoder_that_is_the_identity_gives_the_coordinates(tmp_path):
    """Features x and -x of each coordinate: patched together they are the coordinate's swap."""
    engine = model_of("llama-grouped", "fp64")
    width = engine.spec.d_model
    one = torch.eye(width)
    weights = {
        "W_enc": torch.cat([one, -one], 1),
        "W_dec": torch.cat([one, -one]),
        "b_dec": torch.zeros(width),
    }
    weights["b_enc"] = torch.zeros(2 * width)
    sae = dp.load_sae(written(tmp_path / "sae", weights, hook="blocks.0.hook_resid_post"))
    (pair,) = prompt_pairs(pairs(true_model("llama-grouped"), (4,)))
    outcome = dp.sweep_features(engine, pair, sae, precision="fp64", positions=[2])
    want = dp.sweep(engine, pair, sites="resid_post.dim", layers=[0], positions=[2], precision="fp64")
    columns = outcome.columns("logit_diff")
    alone = want.values("logit_diff")[0, 0, 0]
    counted = np.bincount(columns["feature"] % width, minlength=width)
    for row in np.flatnonzero(counted[columns["feature"] % width] == 1):  # of one sign in both runs
        np.testing.assert_allclose(
            columns["logit_diff"][row], alone[columns["feature"][row] % width], rtol=1e-9
        )
    assert (counted == 1).sum() > 5


def test_runs_are_kept_resumed_and_told(tmp_path):
    true = true_model("llama-grouped")
    saes = [
        dp.load_sae(written(tmp_path / f"sae{l}", made("standard", true.embedding.shape[1], seed=l)), layer=l)
        for l in (0, 1)
    ]
    engine, drawn = model_of("llama-grouped", "fp32"), prompt_pairs(pairs(true, (5, 4)))
    options = {"positions": [-1, "subject"], "least": 0.05, "precision": "fp32"}
    outcome = dp.sweep_features(engine, drawn, saes, out=tmp_path / "run", **options)
    columns = outcome.columns()
    assert set(columns["sae"]) == {0, 1}
    assert (columns["sae"] == columns["layer"]).all()
    assert (np.abs(columns["after"] - columns["before"]) > 0.05).all()
    back = dp.load_outcome(tmp_path / "run").columns()
    for name, values in columns.items():
        np.testing.assert_array_equal(back[name], values)
    again = dp.sweep_features(engine, drawn, saes, out=tmp_path / "run", resume=True, **options)
    np.testing.assert_array_equal(again.values("ie"), outcome.values("ie"))
    with pytest.raises(DeltapatchError, match="interventions"):
        dp.sweep_features(engine, drawn, saes[:1], out=tmp_path / "run", resume=True, **options)
    parts = tmp_path / "parts"
    for i in (1, 2):
        dp.sweep_features(engine, drawn, saes, out=parts, shard=(i, 2), **options)


def test_gemma_scope(tmp_path):
    true = true_model("gemma2")
    weights = made("jumprelu", true.embedding.shape[1])
    folder = tmp_path / "layer_1" / "width_24" / "average_l0_5"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: t.numpy() for name, t in weights.items()})
    drawn = pairs(true, (5, 4))
    for path in (folder, folder / "params.npz"):
        sae = dp.load_sae(path, site="resid_post", layer=1)
        assert sae.name == "layer_1/width_24/average_l0_5"
    outcome = dp.sweep_features(model_of("gemma2", "fp64"), prompt_pairs(drawn), sae, precision="fp64")
    assert_agrees(outcome, drawn, true, weights, "resid_post", 1e-8, kind="jumprelu", subtracts=False)
    with pytest.raises(DeltapatchError, match="does not say where it reads"):
        dp.sweep_features(model_of("gemma2", "fp64"), prompt_pairs(drawn), dp.load_sae(folder))


def test_what_does_not_change_is_exactly_nothing(tmp_path):
    engine = model_of("llama-grouped", "fp64")
    sae = dp.load_sae(written(tmp_path / "sae", made("standard", engine.spec.d_model)))
    same = dp.PromptPair([1, 2, 3], [1, 2, 3], 4, 5)
    with pytest.raises(DeltapatchError, match="no feature changes"):
        dp.sweep_features(engine, same, sae)
    with pytest.raises(DeltapatchError, match="no feature changes"):
        dp.sweep_features(engine, dp.PromptPair([1, 2, 3], [1, 9, 3], 4, 5), sae, positions=[0])
    assert len(dp.sweep_features(engine, same, sae, source="zero")) > 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "matching_pursuit"}, "is of the kind 'matching_pursuit'"),
        ({"architecture": None}, "is of the kind None"),
        ({"normalize_activations": "expected_average_only_in"}, "which is not known"),
        ({"hook_head_index": 3}, "has hook_head_index 3"),
        ({"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu'"),
        ({"architecture": "topk"}, "k is None"),
        ({"architecture": "topk", "k": 99}, "k is 99"),
        ({"architecture": "jumprelu"}, "it has no threshold"),
        ({"architecture": "gated"}, "it has no b_gate"),
    ],
)
def test_configs_that_are_refused(tmp_path, config, message):
    weights = made("standard", 16)
    folder = written(tmp_path / "sae", weights)
    about = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(about | config))
    with pytest.raises(DeltapatchError, match=re.escape(message)) as error:
        dp.load_sae(folder)
    assert ("cannot be read" in str(error.value)) == message.startswith(("k is", "it has no"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b_enc": torch.zeros(3)}, "b_enc has shape [3]"),
        ({"W_dec": torch.zeros(24, 3)}, "w_dec has shape"),
        ({"b_dec": torch.full((16,), torch.nan)}, "not finite"),
        ({"W_skip": torch.zeros(16, 16)}, "a tensor 'w_skip'"),
        ({"scaling_factor": torch.full((24,), 2.0)}, "scaling factor"),
        ({"W_enc": torch.zeros(16, 24, dtype=torch.int32)}, "w_enc has shape"),
    ],
)
def test_weights_that_are_refused(tmp_path, change, message):
    folder = written(tmp_path / "sae", made("standard", 16) | change)
    with pytest.raises(DeltapatchError, match=re.escape(message)):
        dp.load_sae(folder)


def test_what_is_no_autoencoder(tmp_path):
    with pytest.raises(DeltapatchError, match="is no sparse autoencoder"):
        dp.load_sae(tmp_path)
    with pytest.raises(DeltapatchError, match="is no sparse autoencoder"):
        dp.load_sae(tmp_path / "nothing")
    (tmp_path / "params.npz").write_bytes(b"no archive")
    with pytest.raises(DeltapatchError, match="cannot be read"):
        dp.load_sae(tmp_path)
    folder = written(tmp_path / "sae", made("standard", 16))
    for name in ("cfg.json", "sae_weights.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DeltapatchError, match="cannot be read"):
            dp.load_sae(folder)
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize(
    ("saes", "options", "message"),
    [
        ([], {}, "no autoencoders were given"),
        (["path"], {}, "must be what load_sae reads"),
        (None, {"source": "mean"}, "features have the sources"),
        (None, {"least": -1}, "least must be"),
        (None, {"positions": "together"}, "one position at a time"),
        ({"layer": 9}, {}, "is of layer 9"),
        ({"site": "mlp.hook_post"}, {}, "an autoencoder reads one of"),
        ({"site": "ln2.hook_normalized"}, {}, "unknown site"),
        ({"site": "z"}, {}, "reads 99 numbers, and z of this model has"),
    ],
)
def test_sweeps_that_are_refused(tmp_path, saes, options, message):
    engine = model_of("llama-grouped", "fp64")
    if not isinstance(saes, list):
        weights = made("standard", 99 if saes == {"site": "z"} else engine.spec.d_model)
        saes = dp.load_sae(written(tmp_path / "sae", weights), **(saes or {}))
    with pytest.raises(DeltapatchError, match=re.escape(message)):
        dp.sweep_features(engine, dp.PromptPair([1, 2, 3], [1, 9, 3], 4, 5), saes, **options)
