"""Patches along directions and steering, against the oracle: alone, jointly, at whole sites and heads."""

import numpy as np
import pytest
import torch
from engine_oracle import METRICS, both, continuations, metrics_of_answers
from engine_tiny import model_of, pairs, true_model, with_long_answers

import deltapatch
from deltapatch import DeltapatchError, Intervention, Patch

VARIANTS = pytest.mark.parametrize("variant", ["neox-parallel", "llama-grouped", "gemma2", "olmo2", "gpt2"])
WHOLE = ("resid_pre", "resid_post", "attn_out", "mlp_out", "resid_mid")
HEADS = ("q", "k", "v", "z")


def as_pair(pair):
    return deltapatch.PromptPair(**pair._asdict())


def truth(true, pair, patches):
    """Every metric of one intervention, its patches carried out one after the other by hand."""
    values = true.activations(pair.clean)

    def visit(site, layer, value):
        value = value.copy()
        mine = [p for p in patches if (p.site, p.layer) == (site, layer)]
        for kind in ("swap", "along", "add"):  # in the order in which they are carried out
            for p in mine:
                own = "along" if p.along is not None else "add" if p.add is not None else "swap"
                if own != kind:
                    continue
                at = (0, p.position) if p.index is None else (0, p.position, p.index)
                new = values[site, layer][at[1:]]
                if kind == "swap":
                    value[at] = new
                elif kind == "add":
                    value[at] = value[at] + p.add
                else:
                    u = np.linalg.qr(np.atleast_2d(p.along).T)[0].T
                    value[at] = value[at] + (new - value[at]) @ u.T @ u
        return value

    after = continuations(pair)
    runs = both(
        after, lambda more: true.forward([*pair.corrupted, *more], 1, visit)[:, len(pair.clean) - 1 :]
    )
    clean, corrupted = (
        both(after, lambda more, p=p: true.logits([*p, *more])[len(p) - 1 :])
        for p in (pair.clean, pair.corrupted)
    )
    return metrics_of_answers(corrupted, runs, clean, corrupted, pair, "denoise")


def drawn(true, rng, length, n):
    """Patches of every kind anywhere."""
    out = []
    while len(out) < n:
        site = str(rng.choice([s for s in (*WHOLE, *HEADS) if s in true.sites()]))
        size = true.n_indices(site)
        width = true.shape.d_head if size else true.embedding.shape[1]
        index = int(rng.integers(size)) if size else None
        at = (site, int(rng.integers(true.n_layers)), int(rng.integers(length)), index)
        kind = rng.choice(["swap", "along", "subspace", "add"])
        if kind == "swap":
            out.append(Patch(*at))
        elif kind == "add":
            out.append(Patch(*at, add=0.3 * rng.normal(size=width)))
        else:
            k = 1 if kind == "along" else 3
            out.append(Patch(*at, along=rng.normal(size=(k, width)) if k > 1 else rng.normal(size=width)))
    places = [(p.site, p.layer, p.position, p.index, p.add is None, p.along is None) for p in out]
    return [p for i, p in enumerate(out) if places[i] not in places[:i]]


@VARIANTS
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_any_of_them_alone_and_jointly(variant, precision):
    true, rng = true_model(variant), np.random.default_rng(len(variant))
    chosen = pairs(true, (5, 4), seed=1)
    interventions, want = [], []
    for i in range(24):
        pair = i % 2
        patches = drawn(true, rng, len(chosen[pair].clean), 1 if i < 14 else 4)
        interventions.append(Intervention(pair, patches))
        want.append(truth(true, chosen[pair], patches))
    found = deltapatch.run(
        model_of(variant, precision), [as_pair(p) for p in chosen], interventions, precision=precision,
        progress=False,
    )  # fmt: skip
    for name in METRICS:
        a, b = found.values(name), np.array([w[name][0] for w in want])
        error, scale = np.linalg.norm(a - b), np.linalg.norm(b)
        allowed = {"fp32": 2e-5, "fp64": 2e-8}[precision] * max(scale, 1e-9)
        assert error <= allowed, f"{name}: {error / scale:.1e}"


def test_long_answers():
    true = true_model("llama-grouped")
    pair = with_long_answers(true, pairs(true, (4,), seed=2)[0], (2, 3), 0, seed=3)
    patches = drawn(true, np.random.default_rng(4), 4, 5)
    found = deltapatch.run(
        model_of("llama-grouped", "fp64"), as_pair(pair), Intervention(0, patches), progress=False
    )
    assert found.values("logit_diff")[0] == pytest.approx(
        truth(true, pair, patches)["logit_diff"][0], rel=1e-8
    )


@VARIANTS
def test_identities(variant):
    """A subspace of full rank is the whole swap; nothing added changes nothing, bit for bit."""
    true, rng = true_model(variant), np.random.default_rng(0)
    pair, model = as_pair(pairs(true, (5,), seed=3)[0]), model_of(variant, "fp64")
    width = true.embedding.shape[1]
    full = rng.normal(size=(width, width))
    twice = rng.normal(size=width)
    rows = [
        [Patch("mlp_out", 0, 2)],
        [Patch("mlp_out", 0, 2, along=full)],
        [Patch("mlp_out", 0, 2, add=np.zeros(width))],
        [Patch("mlp_out", 0, 2, along=twice)],
        [Patch("mlp_out", 0, 2, along=-3 * torch.tensor(twice))],
        [Patch("z", 1, 3, 1, add=[0.0] * true.shape.d_head)],
    ]
    found = deltapatch.run(model, pair, [Intervention(0, r) for r in rows], progress=False)
    values = found.values("logit_diff")
    assert values[1] == pytest.approx(values[0], rel=1e-9)
    assert values[2] == values[5] == 0
    assert values[3] == pytest.approx(values[4], rel=1e-9)


def test_a_run_folder_keeps_the_vectors(tmp_path):
    true, rng = true_model("llama"), np.random.default_rng(6)
    given = [as_pair(p) for p in pairs(true, (5, 4), seed=7)]
    model = model_of("llama", "fp32")
    interventions = [Intervention(i % 2, drawn(true, rng, 4, 3)) for i in range(6)]
    options = {"progress": False, "precision": "fp32"}
    plain = deltapatch.run(model, given, interventions, **options)
    for part in (1, 2):
        deltapatch.run(model, given, interventions, out=tmp_path / "run", shard=(part, 2), **options)
    from deltapatch.results.merge import merge

    assert merge(tmp_path / "run")
    again = deltapatch.load_outcome(tmp_path / "run")
    assert again.values("kl").tolist() == plain.values("kl").tolist()
    assert len(again.interventions.vectors) == len(plain.interventions.vectors) > 0
    other = [Intervention(0, [Patch("mlp_out", 0, 1, add=np.ones(16))])]
    with pytest.raises(DeltapatchError, match="list of interventions"):
        deltapatch.run(model, given, other, out=tmp_path / "run", resume=True, **options)


def test_directions_that_nearly_depend_are_told():
    near = np.eye(16)[:2]
    near[1] = near[0] + 1e-4 * near[1]
    pair = as_pair(pairs(true_model("llama"), (4,))[0])
    with pytest.warns(UserWarning, match="nearly dependent"):
        deltapatch.run(
            model_of("llama", "fp64"),
            pair,
            Intervention(0, [Patch("mlp_out", 0, 1, along=near)]),
            progress=False,
        )


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (Patch("mlp_out", 0, 1, along=np.ones(3)), "vectors of 16 numbers, not of shape"),
        (Patch("z", 0, 1, 0, along=np.ones(16)), "vectors of 4 numbers"),
        (Patch("mlp_out", 0, 1, along=np.zeros(16)), "zero or depend"),
        (Patch("mlp_out", 0, 1, along=np.ones((2, 16))), "zero or depend"),
        (Patch("mlp_out", 0, 1, along=np.full(16, np.nan)), "not finite"),
        (Patch("mlp_out", 0, 1, along="north"), "must be a vector"),
        (Patch("mlp_out", 0, 1, add=np.ones((2, 16))), "takes one vector"),
        (Patch("mlp_out", 0, 1, along=np.ones(16), add=np.ones(16)), "two patches"),
        (Patch("mlp_post", 0, 1, 3, add=np.ones(1)), "is no vector"),
        (Patch("mlp_out.dim", 0, 1, 3, along=np.ones(1)), "is no vector"),
        (Patch("pattern", 0, 1, 0, add=np.ones(4)), "is no vector"),
        (Patch("z", 0, 1, along=np.ones(4)), "needs an index"),
        (Patch("mlp_out", 0, 1, along=np.ones(16), into="logits"), "leave out along"),
    ],
)
def test_what_is_refused(patch, said):
    pair = as_pair(pairs(true_model("llama"), (4,))[0])
    with pytest.raises(DeltapatchError, match=said):
        deltapatch.run(model_of("llama", "fp64"), pair, Intervention(0, [patch]), progress=False)
