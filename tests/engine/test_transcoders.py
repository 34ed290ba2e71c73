"""Transcoders against the oracle: features that are read before an MLP and written behind it, all by hand."""

import json
import re

import numpy as np
import pytest
import torch
from engine_oracle import METRICS, metrics_of_answers
from engine_saes import TOLERANCE, encoded, made, written
from engine_tiny import model_of, pairs, prompt_pairs, true_model

import deltapatch as dp
from deltapatch import DeltapatchError, Intervention, Patch

KINDS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
HOOKS = {
    "mlp_in": "mlp.hook_in",
    "ln2.hook_normalized": "ln2.hook_normalized",
    "resid_mid": "hook_resid_mid",
}
FLAGS = ("flip", "says_clean", "says_corrupted")


def saved(folder, kind, width, reads="mlp.hook_in", layer=1, seed=0, **more):
    weights = made("jumprelu" if "jumprelu" in kind else "standard", width, seed=seed)
    if "skip" in kind:
        weights["W_skip"] = torch.randn(width, width)
    about = {"hook_name": f"blocks.{layer}.{reads}", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
    written(folder, weights, kind, metadata=about, **{"apply_b_dec_to_input": False, "d_out": width, **more})
    return weights


def heard(true, stream, layer, reads):
    """What the encoder reads, of the residual stream that the MLP reads, [T, d_model]."""
    own = true.blocks[layer]
    norm = own.norm1 if true.shape.parallel and own.norm2 is None else own.norm2
    if reads == "resid_mid" or norm is None:
        return stream
    if reads == "mlp_in" or not true.shape.rms:
        return true._normed(stream, norm)
    return stream / np.sqrt((stream * stream).mean(-1, keepdims=True) + true.shape.eps)


def truth(true, pair, patches, reads, weights, kind, zero=False):
    """Every metric of one intervention, and how far each feature moved."""
    values = true.activations(pair.clean)
    place = "resid_pre" if true.shape.parallel else "resid_mid"
    arrived, moves = {}, []
    how = {"kind": "jumprelu" if "jumprelu" in kind else "standard", "subtracts": False}

    def visit(site, layer, value):
        value = value.copy()
        mine = [p for p in patches if (p.site, p.layer) == (site, layer)]
        for p in mine:
            if p.feature is None:
                at = (0, p.position) if p.index is None else (0, p.position, p.index)
                value[at] = values[site, layer][at[1:]]
        for p in mine:
            if p.feature is not None:
                t, j = p.position, p.feature[1]
                now, then = (
                    encoded(heard(true, x, layer, reads)[None], weights, **how)[0][0, j]
                    for x in (arrived[layer][0, t], values[place, layer][t])
                )
                moves.append((0 if zero else then) - now)
                value[0, t] += moves[-1] * weights["W_dec"].double().numpy()[j]
        if site == place:
            arrived[layer] = value
        return value

    run = true.forward(pair.corrupted, 1, visit)[:, -1:]
    clean, corrupted = ([true.logits(p)[-1:]] * 2 for p in (pair.clean, pair.corrupted))
    return metrics_of_answers(corrupted, [run] * 2, clean, corrupted, pair, "denoise"), moves


def assert_close(found, want, precision):
    for metric in METRICS:
        right = np.array([np.ravel(one[metric])[0] for one in want])
        error = np.linalg.norm(np.nan_to_num(found.values(metric) - right))
        size = 0 if metric in FLAGS else np.linalg.norm(np.nan_to_num(right))
        assert error <= 2 * TOLERANCE[precision] * size, f"{metric}: {error / (size or 1)}"


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize(
    ("variant", "reads", "kind"),
    [
        (variant, reads, KINDS[(i + j) % 4])
        for i, variant in enumerate(
            ("llama-grouped", "gpt2", "neox-parallel", "gptj", "gemma2", "olmo2", "granite")
        )
        for j, reads in enumerate(HOOKS)
        if (variant, reads) not in {("olmo2", "ln2.hook_normalized")}
        and not (variant in ("neox-parallel", "gptj") and reads == "resid_mid")
    ],
)
def test_alone_and_jointly(tmp_path, variant, reads, kind, precision):
    true, rng = true_model(variant), np.random.default_rng(len(variant))
    width, last = true.embedding.shape[1], true.n_layers - 1
    drawn, model = pairs(true, (5, 4)), model_of(variant, precision)
    for layer in {1, last}:
        weights = saved(tmp_path / f"t{layer}", kind, width, HOOKS[reads], layer)
        sae = dp.load_sae(tmp_path / f"t{layer}")
        assert (sae.site, sae.reads) == ("hook_mlp_out", HOOKS[reads])
        for source in ("counterpart", "zero"):
            zero = source == "zero"
            swept = dp.sweep_features(
                model, prompt_pairs(drawn), sae, precision=precision, source=source, positions=[2, -1]
            )
            told = swept.columns()
            ones = [
                Patch("mlp_out", layer, int(t) % len(drawn[i].clean), feature=(sae, int(j)))
                for i, t, j in zip(*(told[n] for n in ("pair", "position", "feature")), strict=True)
            ]
            want = [
                truth(true, drawn[i], [p], reads, weights, kind, zero)
                for i, p in zip(told["pair"], ones, strict=True)
            ]
            assert len(want) > 3 or layer == last
            assert_close(swept, [one[0] for one in want], precision)
            moved = np.array([one[1][0] for one in want])
            np.testing.assert_allclose(told["after"] - told["before"], moved, 1e-8, 1e-12)
            if zero:  # swaps would bring zeros too, which the oracle above does not
                continue
            asked = []
            for i, pair in enumerate(drawn):
                t = len(pair.clean) - 1
                before = [Patch("attn_out", layer, t), Patch("resid_post", 0, t), Patch("mlp_post", 0, 1, 3)]
                for some in ([0], [1], [2], [0, 1], [1, 2]):
                    chosen = rng.choice(sae.d_sae, 4, replace=False).tolist()
                    features = [Patch("mlp_out", layer, t, feature=(sae, j)) for j in chosen]
                    asked.append(Intervention(i, [*features, *(before[k] for k in some)]))
            found = dp.run(model, prompt_pairs(drawn), asked, precision=precision)
            want = [truth(true, drawn[one.pair], one.patches, reads, weights, kind)[0] for one in asked]
            assert_close(found, want, precision)


def test_what_changes_nothing_is_exactly_zero(tmp_path):
    saved(tmp_path / "t", "transcoder", 16)
    sae = dp.load_sae(tmp_path / "t")
    pair = dp.PromptPair([3, 1, 4, 1, 5], [3, 1, 4, 2, 5], 6, 7)
    every = [
        Intervention(0, [Patch("mlp_out", 1, t, feature=(sae, j)) for j in range(sae.d_sae)])
        for t in range(3)
    ]
    for variant in ("llama-grouped", "neox-parallel"):
        assert (dp.run(model_of(variant), [pair], every).values("kl") == 0).all()


def test_runs_are_kept(tmp_path):
    saved(tmp_path / "t", "skip_transcoder", 16)
    sae, drawn = dp.load_sae(tmp_path / "t"), prompt_pairs(pairs(true_model("llama-grouped"), (5, 4)))
    model = model_of("llama-grouped")
    asked = [Intervention(i, [Patch("mlp_out", 1, 2, feature=(sae, j))]) for i in range(2) for j in range(3)]
    first = dp.run(model, drawn, asked, out=tmp_path / "run")
    again = dp.run(model, drawn, asked, out=tmp_path / "run", resume=True)
    np.testing.assert_array_equal(first.values("ie"), again.values("ie"))


def test_an_archive_of_gemma_scope(tmp_path):
    true = true_model("gemma2")
    weights = made("jumprelu", true.embedding.shape[1])
    np.savez(tmp_path / "params.npz", **{name: t.numpy() for name, t in weights.items()})
    reads = "ln2.hook_normalized"
    sae = dp.load_sae(tmp_path / "params.npz", site="mlp_out", layer=1, reads=reads)
    drawn = pairs(true, (4,))
    swept = dp.sweep_features(model_of("gemma2", "fp64"), prompt_pairs(drawn), sae, precision="fp64")
    told = swept.columns()
    want = [
        truth(
            true,
            drawn[0],
            [Patch("mlp_out", 1, int(t) % 4, feature=(sae, int(j)))],
            reads,
            weights,
            "jumprelu",
        )[0]
        for t, j in zip(told["position"], told["feature"], strict=True)
    ]
    assert_close(swept, want, "fp64")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"metadata": {"hook_name": "blocks.1.mlp.hook_in"}}, "does not say where it reads"),
        (
            {
                "metadata": {
                    "hook_name": "blocks.1.mlp.hook_in",
                    "hook_name_out": "blocks.2.hook_mlp_out",
                }
            },
            "both must be of one layer",
        ),
        ({"metadata": {"hook_name_out": "blocks.1.hook_mlp_out"}}, "does not say what it reads"),
        (
            {
                "metadata": {
                    "hook_name": "blocks.1.hook_mlp_in",
                    "hook_name_out": "blocks.1.hook_mlp_out",
                }
            },
            "reads hook_mlp_in, which is not known: load it with reads=mlp_in",
        ),
        (
            {"metadata": {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_attn_out"}},
            "a transcoder writes mlp_out, not attn_out",
        ),
        ({"apply_b_dec_to_input": True}, "has apply_b_dec_to_input True"),
        ({"architecture": "skip_transcoder"}, "it has no W_skip"),
    ],
)
def test_configs_that_are_refused(tmp_path, config, message):
    saved(tmp_path / "t", "transcoder", 16)
    about = json.loads((tmp_path / "t" / "cfg.json").read_text())
    (tmp_path / "t" / "cfg.json").write_text(json.dumps(about | config))
    with pytest.raises(DeltapatchError, match=re.escape(message)):
        dp.sweep_features(
            model_of("llama-grouped"), dp.PromptPair([1, 2], [1, 3], 4, 5), dp.load_sae(tmp_path / "t")
        )


@pytest.mark.parametrize(
    ("variant", "width", "reads", "message"),
    [
        ("neox-parallel", 16, "resid_mid", "this model has none"),
        ("olmo2", 16, "ln2.hook_normalized", "without a norm: load it with reads=mlp_in"),
        ("llama-grouped", 12, "mlp_in", "reads 12 numbers and writes 12, and the MLPs of this model 16"),
        ("llama-grouped", 16, "resid_post", "reads resid_post, which is not known"),
    ],
)
def test_models_that_have_no_such_place(tmp_path, variant, width, reads, message):
    saved(tmp_path / "t", "transcoder", width)
    sae = dp.load_sae(tmp_path / "t", reads=reads)
    with pytest.raises(DeltapatchError, match=re.escape(message)):
        dp.sweep_features(model_of(variant), dp.PromptPair([1, 2], [1, 3], 4, 5), sae)


def test_what_else_is_refused(tmp_path):
    with pytest.raises(DeltapatchError, match="is no transcoder: it reads where it writes"):
        dp.load_sae(written(tmp_path / "sae", made("standard", 16)), reads="mlp_in")
    saved(tmp_path / "t", "transcoder", 16)
    sae, model = dp.load_sae(tmp_path / "t"), model_of("llama-grouped")
    with pytest.raises(DeltapatchError, match=r"transcoder t writes mlp_out of layer 1, not resid_mid"):
        dp.run(
            model,
            dp.PromptPair([1, 2], [1, 3], 4, 5),
            Intervention(0, [Patch("resid_mid", 1, 1, feature=(sae, 0))]),
        )
    with pytest.raises(DeltapatchError, match="reads the residual stream after a layer"):
        dp.Probe("f", feature=(sae, 0))
