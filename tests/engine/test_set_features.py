"""Features of autoencoders that patches set, jointly with others, against the oracle: all by hand."""

import numpy as np
import pytest
from engine_oracle import METRICS, metrics_of_answers
from engine_saes import KINDS, NORMS, TOLERANCE, encoded, made, written
from engine_tiny import model_of, pairs, prompt_pairs, true_model

import deltapatch as dp
from deltapatch import DeltapatchError, Intervention, Patch
from deltapatch.engine.options import Options
from deltapatch.engine.passes import memory_costs
from deltapatch.engine.question import ask
from deltapatch.results.merge import merge

FLAGS = ("flip", "says_clean", "says_corrupted")


def truth(true, pair, patches, weights, how, zero=False):
    """Every metric of one intervention. Features are seen in what arrives, and set all at once."""
    values = true.activations(pair.clean)

    def visit(site, layer, value):
        value = value.copy()
        mine = [p for p in patches if (p.site, p.layer) == (site, layer)]
        for p in mine:
            if p.feature is None and p.add is None:
                at = (0, p.position) if p.index is None else (0, p.position, p.index)
                value[at] = values[site, layer][at[1:]]
        for t in {p.position for p in mine if p.feature is not None}:
            arrived = value[0, t].reshape(1, -1)
            now, scale = encoded(arrived, weights[site], **how[site])
            then = encoded(values[site, layer][t].reshape(1, -1), weights[site], **how[site])[0]
            then = np.zeros_like(then) if zero else then
            rows = weights[site]["W_dec"].double().numpy()
            chosen = [p.feature[1] for p in mine if p.feature is not None and p.position == t]
            step = sum(scale[0, 0] * (then[0, j] - now[0, j]) * rows[j] for j in chosen)
            value[0, t] += step.reshape(value[0, t].shape)
        for p in mine:
            if p.add is not None:
                value[0, p.position] += p.add
        return value

    run = true.forward(pair.corrupted, 1, visit)[:, -1:]
    clean, corrupted = ([true.logits(p)[-1:]] * 2 for p in (pair.clean, pair.corrupted))
    return metrics_of_answers(corrupted, [run] * 2, clean, corrupted, pair, "denoise")


def drawn_patches(rng, saes, true, length, zero):
    """Features of both places, several at one, and patches before them and beside them."""
    width = true.embedding.shape[1]
    out = []
    for site, sae in saes.items():
        for t in rng.choice(np.arange(1, length), 2, replace=False).tolist():
            chosen = rng.choice(sae.d_sae, 3, replace=False).tolist()
            out += [Patch(site, sae.layer, t, feature=(sae, j)) for j in chosen]
    out.append(Patch("mlp_post", 0, 1, int(rng.integers(true.n_indices("mlp_post")))))
    out.append(Patch("attn_out", 1, int(rng.integers(1, length))))
    if not zero:
        out.append(Patch("resid_pre", 0, 1, add=0.3 * rng.normal(size=width)))
    rng.shuffle(out)
    return out[: int(rng.integers(3, len(out) + 1))]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize(
    ("kind", "norm", "variant"),
    [
        (kind, norm, variant)
        for i, kind in enumerate(KINDS)
        for j, norm in enumerate(NORMS)
        for variant in [("neox-parallel", "llama-grouped", "gemma2", "gpt2")[(i + j) % 4]]
    ],
)
def test_features_are_read_in_what_arrives(tmp_path, kind, norm, variant, precision):
    true, rng = true_model(variant), np.random.default_rng(len(kind) + 10 * len(norm))
    drawn = pairs(true, (5, 4))
    saes, weights, how = {}, {}, {}
    for site, layer in (("resid_post", 1), ("z", 2)):
        width = true.activations([1, 2])[site, layer][0].size
        weights[site] = made(kind, width, seed=layer)
        hook = {"resid_post": "hook_resid_post", "z": "attn.hook_z"}[site]
        folder = written(
            tmp_path / site, weights[site], kind, f"blocks.{layer}.{hook}", normalize_activations=norm, k=5
        )
        saes[site], how[site] = dp.load_sae(folder), {"kind": kind, "norm": norm}
    for source in ("counterpart", "zero"):
        zero = source == "zero"
        asked = []
        for i, pair in enumerate(drawn):
            for _ in range(6):
                patches = drawn_patches(rng, saes, true, len(pair.clean), zero)
                if zero:  # swaps would bring zeros too, which the oracle above does not
                    patches = [p for p in patches if p.feature is not None]
                if patches:
                    asked.append(Intervention(i, patches))
        found = dp.run(
            model_of(variant, precision), prompt_pairs(drawn), asked, precision=precision, source=source
        )
        want = [truth(true, drawn[one.pair], one.patches, weights, how, zero) for one in asked]
        for metric in METRICS:
            right = np.array([np.ravel(one[metric])[0] for one in want])
            error = np.linalg.norm(np.nan_to_num(found.values(metric) - right))
            size = 0 if metric in FLAGS else np.linalg.norm(np.nan_to_num(right))
            assert error <= 2 * TOLERANCE[precision] * size, f"{source} {metric}: {error / (size or 1)}"


@pytest.fixture
def sae(tmp_path):
    true = true_model("llama-grouped")
    return dp.load_sae(written(tmp_path / "sae", made("jumprelu", true.embedding.shape[1]), "jumprelu"))


def test_alone_they_are_those_of_a_sweep_of_features(sae):
    drawn = prompt_pairs(pairs(true_model("llama-grouped"), (5, 4)))
    model = model_of("llama-grouped", "fp64")
    swept = dp.sweep_features(model, drawn, sae, precision="fp64")
    at = swept.columns()
    columns = [at[name].tolist() for name in ("pair", "position", "feature")]
    asked = [
        Intervention(i, [Patch("resid_post", 1, t, feature=(sae, j))])
        for i, t, j in zip(*columns, strict=True)
    ]
    got = dp.run(model, drawn, asked, precision="fp64").values("logit_diff")
    want = swept.values("logit_diff")
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.abs(want).max())


def test_what_changes_nothing_is_exactly_zero(sae):
    """A feature that is the same in both runs; and one whose place nothing has reached."""
    pair = dp.PromptPair([3, 1, 4, 1, 5], [3, 1, 4, 2, 5], 6, 7)
    every = [
        Intervention(0, [Patch("resid_post", 1, t, feature=(sae, j)) for j in range(sae.d_sae)])
        for t in range(3)
    ]
    for precision in ("fp32", "fp64"):
        model = model_of("llama-grouped", precision)
        assert (dp.run(model, [pair], every, precision=precision).values("kl") == 0).all()
    joint = Intervention(0, [Patch("mlp_out", 2, 4), Patch("resid_post", 1, 1, feature=(sae, 3))])
    alone = Intervention(0, [Patch("mlp_out", 2, 4)])
    both, one = dp.run(model, [pair], [joint, alone], precision="fp64").values("logit_diff")
    assert both == one


def test_run_folders_keep_which_features_were_set(sae, tmp_path):
    drawn = prompt_pairs(pairs(true_model("llama-grouped"), (5, 4)))
    model, options = model_of("llama-grouped"), {"precision": "fp32", "progress": False}
    asked = [
        Intervention(i, [Patch("resid_post", 1, t, feature=(sae, j)), Patch("mlp_out", 0, 1)])
        for i in range(2)
        for t in (1, 2)
        for j in (0, 5)
    ]
    whole = dp.run(model, drawn, asked, out=tmp_path / "whole", **options)
    for part in (2, 1):
        dp.run(model, drawn, asked, out=tmp_path / "parts", shard=(part, 2), **options)
    merge(tmp_path / "parts")
    for name in ("whole", "parts"):
        np.testing.assert_array_equal(dp.load_outcome(tmp_path / name).values("ie"), whole.values("ie"))
    dp.run(model, drawn, asked, out=tmp_path / "whole", resume=True, **options)
    other = written(tmp_path / "b", made("jumprelu", sae.d_in, seed=9), "jumprelu")
    for changed in (
        [*asked[:-1], Intervention(1, [Patch("resid_post", 1, 2, feature=(sae, 6)), Patch("mlp_out", 0, 1)])],
        [Intervention(a.pair, [Patch("resid_post", 1, 1, feature=(dp.load_sae(other), 0))]) for a in asked],
    ):
        with pytest.raises(DeltapatchError, match="different list of interventions"):
            dp.run(model, drawn, changed, out=tmp_path / "whole", resume=True, **options)


def test_features_that_cannot_be_set(sae):
    drawn = prompt_pairs(pairs(true_model("llama-grouped"), (5, 4)))
    model = model_of("llama-grouped")
    for patch, more, message in (
        (
            Patch("resid_post", 0, 1, feature=(sae, 3)),
            {},
            "reads resid_post of layer 1, not resid_post of layer 0",
        ),
        (Patch("mlp_out", 1, 1, feature=(sae, 3)), {}, "not mlp_out of layer 1"),
        (Patch("resid_post", 1, 1, feature=(sae, 24)), {}, "a number from 0 to 23, not 24"),
        (Patch("resid_post", 1, 1, feature=(sae, 1.5)), {}, "a number from 0 to 23"),
        (Patch("resid_post", 1, 1, feature=sae), {}, r"feature must be \(autoencoder, number\)"),
        (Patch("resid_post", 1, 1, feature=("a", 1)), {}, "must be what load_sae reads"),
        (Patch("resid_post", 1, 1, feature=(sae, 1), add=[1.0] * 16), {}, "leave out index, along and add"),
        (
            Patch("resid_post", 1, 1, feature=(sae, 1)),
            {"source": "mean"},
            "sources counterpart and zero, not 'mean'",
        ),
        (Patch("resid_post", 1, 1, feature=(sae, 1), into="m2"), {}, "receiver"),
    ):
        with pytest.raises(DeltapatchError, match=message):
            dp.run(model, drawn, Intervention(0, [patch]), **more)
    twice = [Patch("resid_post", 1, 1, feature=(sae, 3))] * 2
    with pytest.raises(DeltapatchError, match="patches the same activation twice"):
        dp.run(model, drawn, Intervention(0, twice))


def test_a_pass_counts_what_features_take(sae):
    drawn = prompt_pairs(pairs(true_model("llama-grouped"), (5, 4)))
    model = model_of("llama-grouped")
    fixed = []
    for patch in (Patch("resid_post", 1, 1, feature=(sae, 3)), Patch("resid_post", 1, 1)):
        question = ask(model, drawn, Options(precision="fp32"), [Intervention(0, [patch])])
        fixed.append(memory_costs(question, question.decided(question.precision), 1).fixed)
    assert fixed[0] - fixed[1] == 8 * sae.d_in
