"""Estimates by gradients: slopes of exact effects, by steps of the oracle and small edits of the engine."""

import numpy as np
import pytest
import torch
from engine_oracle import Patch
from engine_tiny import hf_model, nearly_the_same, pairs, random_pair, true_model, with_long_answers

import deltapatch
from deltapatch import DeltapatchError, PromptPair
from deltapatch.engine.options import SCREENS, SweepOptions
from deltapatch.engine.question import ask
from deltapatch.engine.screening.estimates import Estimates, Method, reaching
from deltapatch.engine.screening.gradients import Backward
from deltapatch.engine.wavefront.unpatched import Unpatched

ALL = (
    "resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "pattern", "z", "mlp_post",
    "mlp_out.dim", "attn_out.dim", "resid_pre.dim", "resid_post.dim",
)  # fmt: skip
STEP = 1e-4


def estimated(model, given, method="attribution", by="logit_diff", steps=1, **options):
    """By site, [pair, layer, position, ...]."""
    question = ask(model, given, SweepOptions(progress=False, **({"sites": ALL} | options)))
    found, grid = Estimates(question, Method(method, by, steps)).run(), question.interventions
    shapes = {g.site.name: (g.offset, g.shape(grid.n_pairs)) for g in grid.sites}
    return {name: found[a : a + np.prod(s)].reshape(s) for name, (a, s) in shapes.items()}


def slopes(true, pair, site, change):
    """[layer, position(, index)], by finite steps of the oracle; `change` is site, layer -> [T, ...]."""
    n_indices = true.n_indices(site)
    shape = (true.n_layers, len(pair.clean), *([n_indices] if n_indices else []))
    cells = [Patch(site, *at) for at in np.ndindex(shape)]
    name = site.removesuffix(".dim")
    ends = []
    for step in (STEP, -STEP):

        def visit(where, layer, value, step=step):
            value = value.copy()
            for row, p in enumerate(cells):
                if (where, layer) == (name, p.layer):
                    at = p.position if p.index is None else (p.position, p.index)
                    value[row][at] += step * change[where, layer][at]
            return value

        logits = true.forward(pair.corrupted, len(cells), visit)[:, -1]
        ends.append(logits[:, pair.clean_answer] - logits[:, pair.corrupted_answer])
    return ((ends[0] - ends[1]) / (2 * STEP)).reshape(shape)


@pytest.mark.parametrize(
    ("variant", "source"),
    [("gptj", "counterpart"), ("llama-grouped", "mean"), ("gpt2", "zero"), ("gemma2", "counterpart")],
)
def test_estimates_are_slopes_of_the_oracle(variant, source):
    true, model = true_model(variant), deltapatch.from_transformers(hf_model(variant, torch.float64))
    drawn = pairs(true, (5, 4, 5), seed=4)
    found = estimated(model, [PromptPair(**p._asdict()) for p in drawn], source=source)
    for number in (0, 1):
        pair = drawn[number]
        alike = [p for p in drawn if len(p.clean) == len(pair.clean)]
        runs = [true.activations(tokens) for p in alike for tokens in (p.clean, p.corrupted)]
        base, other = true.activations(pair.corrupted), true.activations(pair.clean)
        bring = {
            "counterpart": lambda at, other=other: other[at],
            "zero": lambda at, base=base: 0 * base[at],
            "mean": lambda at, runs=runs: sum(run[at] for run in runs) / len(runs),
        }[source]
        change = {at: bring(at) - base[at] for at in base if at[0] != "scores"}  # masked ones are -inf
        for site in ("resid_pre", "q", "k", "v", "z", "attn_out", "mlp_post", "resid_post.dim"):
            want = slopes(true, pair, site, change)
            got = found[site][number][:, : want.shape[1]]
            assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max(), site


@pytest.mark.parametrize("variant", ["gptj", "llama-grouped"])
def test_estimates_of_directions_are_slopes_of_the_oracle(variant):
    """A step of the part of the difference along each, up and down, in every layer and position."""
    true, model = true_model(variant), deltapatch.from_transformers(hf_model(variant, torch.float64))
    drawn = pairs(true, (5, 4), seed=4)
    given, directions = [PromptPair(**p._asdict()) for p in drawn], directions_of(model.spec, 1)
    found = estimated(model, given, sites="mlp_out.along", directions={"mlp_out": directions})[
        "mlp_out.along"
    ]
    for number, pair in enumerate(drawn):
        base, other = true.activations(pair.corrupted), true.activations(pair.clean)
        cells = list(np.ndindex(true.n_layers, len(pair.clean), 3))
        ends = []
        for step in (STEP, -STEP):

            def visit(where, layer, value, step=step, cells=cells, base=base, other=other):
                value = value.copy()
                for row, (l, at, which) in enumerate(cells):
                    if (where, layer) == ("mlp_out", l):
                        d, u = (other[where, l] - base[where, l])[at], directions[l][which]
                        value[row, at] += step * (d @ u) / (u @ u) * u
                return value

            logits = true.forward(pair.corrupted, len(cells), visit)[:, -1]
            ends.append(logits[:, pair.clean_answer] - logits[:, pair.corrupted_answer])
        want = ((ends[0] - ends[1]) / (2 * STEP)).reshape(true.n_layers, len(pair.clean), 3)
        got = found[number][:, : len(pair.clean)]
        assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


def directions_of(spec, seed):
    """Three by layer, of other lengths than one, and not orthogonal."""
    draw = np.random.default_rng(seed)
    return {layer: draw.normal(size=(3, spec.d_model)) for layer in range(spec.n_layers)}


@pytest.mark.parametrize(
    ("variant", "by"),
    [
        ("gptj", "logit_diff"),
        ("llama-grouped", "dlogp_corrupted"),
        ("gpt2", "dlogp_clean"),
        ("gemma2", "logit_diff"),
        ("olmo2", "logit_diff"),
    ],
)
def test_of_small_edits_they_are_the_exact_effects(variant, by):
    """Attention probabilities too, directions, several tokens, any of several, all positions at once."""
    model, given = nearly_the_same(variant)
    whole = [
        "resid_pre",
        "attn_out",
        "mlp_out",
        "resid_post",
        *([] if model.spec.parallel else ["resid_mid"]),
    ]
    directions = {site: directions_of(model.spec, seed) for seed, site in enumerate(whole)}
    sites = [*ALL, *whole[4:], *(f"{site}.along" for site in whole)]
    for positions in ("all", "together"):
        options = {"sites": sites, "directions": directions, "positions": positions, "precision": "fp64"}
        exact = deltapatch.sweep(model, given, progress=False, noise_sample=0, **options)
        for site, got in estimated(model, given, by=by, **options).items():
            want = exact.values(by, site=site)
            assert np.array_equal(np.isnan(got), np.isnan(want))
            assert np.nanmax(np.abs(got - want)) <= 1e-4 * np.nanmax(np.abs(want)), site


@pytest.mark.parametrize("positions", ["all", "together"])
@pytest.mark.parametrize("variant", ["gptj", "gemma2"])
def test_gradients_along_the_line_of_a_vector_become_its_exact_effect(variant, positions):
    model = deltapatch.from_transformers(hf_model(variant, torch.float64))
    given = [PromptPair(**p._asdict()) for p in pairs(true_model(variant), (5, 3), seed=3)]
    options = {"positions": positions, "sites": ["resid_pre", "attn_out", "mlp_out"], "precision": "fp64"}
    exact = deltapatch.sweep(model, given, progress=False, noise_sample=0, **options)
    last = np.inf
    for steps in (8, 64):
        found = estimated(model, given, "ig-activations", steps=steps, **options)
        off = max(np.nanmax(np.abs(got - exact.values("logit_diff", site=s))) for s, got in found.items())
        assert off < last / 20  # an eighth of a step: a 64th of the error
        last = off
    assert off < 1e-2
    # Of heads, the estimates of all add up to what all of them together do.
    heads = estimated(model, given, "ig-activations", steps=64, **(options | {"sites": ["z"]}))["z"].sum(-1)
    at = [(0, layer, place) for layer in range(model.spec.n_layers) for place in (-1, 2)]
    joint = [
        deltapatch.Intervention(
            pair,
            [
                deltapatch.Patch("z", layer, p, head)
                for head in range(model.spec.n_heads)
                for p in (range(5) if positions == "together" else [place])
            ],
        )
        for pair, layer, place in at
    ]
    want = deltapatch.run(model, given, joint, precision="fp64", progress=False).values("logit_diff")
    got = np.array([heads[p, l, 0 if positions == "together" else place] for p, l, place in at])
    assert np.allclose(got, want, rtol=1e-2, atol=1e-2 * np.abs(want).max())


@pytest.mark.parametrize("method", SCREENS)
def test_directions_of_a_basis_share_out_what_their_vector_has(method):
    """In any orthonormal basis; along the axes each is its coordinate."""
    model = deltapatch.from_transformers(hf_model("gpt2", torch.float64))
    given = [PromptPair(*pair) for pair in pairs(true_model("gpt2"), (5, 4))]
    width = model.spec.d_model
    basis = np.linalg.qr(np.random.default_rng(7).normal(size=(width, width)))[0]
    directions = {"resid_mid": 3 * basis, "mlp_out": np.eye(width)}
    sites = ["resid_mid", "resid_mid.along", "mlp_out.dim", "mlp_out.along"]
    found = estimated(model, given, method, steps=2, sites=sites, directions=directions)
    close = {"rtol": 1e-9, "atol": 1e-12, "equal_nan": True}
    np.testing.assert_allclose(found["resid_mid.along"].sum(-1), found["resid_mid"], **close)
    np.testing.assert_allclose(found["mlp_out.along"], found["mlp_out.dim"], **close)


@pytest.mark.parametrize("method", ["attribution", "ig-inputs", "relp"])
def test_streamed_or_in_chunks_they_are_the_same(method, tmp_path):
    hf_model("llama-grouped").save_pretrained(tmp_path)
    drawn = [PromptPair(*random_pair(n, seed=n)[:4]) for n in (6, 4, 5)]
    sites = ["resid_pre", "z", "mlp_post", "mlp_out"]
    found = []
    for stream, budget in ((False, None), (True, 8_000), (True, None)):
        model = deltapatch.load_model(tmp_path, device="cpu", stream=stream)
        options = {"sites": sites, "memory_budget": budget, "layers": [1, 2]}
        question = ask(model, drawn, SweepOptions(**options))
        chunks = list(Estimates(question, Method(method, "logit_diff", 2)).chunks())
        assert len(chunks) == (3 if budget else 1)
        found.append(estimated(model, drawn, method, steps=2, **options))
    for site, right in found[0].items():
        close = {"rtol": 1e-4, "atol": 1e-6 * np.nanmax(np.abs(right)), "equal_nan": True}
        assert all(np.allclose(other[site], right, **close) for other in found[1:])


def test_integrated_inputs_take_the_mean_of_gradients_between_the_prompts():
    """One step: the gradients of the source run, so the negative of the estimates the other way round."""
    model = deltapatch.from_transformers(hf_model("llama", torch.float64))
    (pair,) = pairs(true_model("llama"), (5,), seed=3)
    given = [PromptPair(**pair._asdict())]
    sites = ["mlp_out", "z", "mlp_post"]
    one = estimated(model, given, "ig-inputs", sites=sites)
    there = estimated(model, given, "attribution", sites=sites, direction="noise")
    many = estimated(model, given, "ig-inputs", steps=8, sites=sites)
    for site in sites:
        assert np.allclose(one[site], -there[site])
        assert not np.allclose(many[site], one[site])


def test_relevance_in_one_layer_by_hand():
    """Norms' scales, attention probabilities and act(u) / u are those of the base run, and constant."""
    true, model = true_model("one-layer"), deltapatch.from_transformers(hf_model("one-layer", torch.float64))
    (pair,) = pairs(true, (5,), seed=3)
    found = estimated(
        model,
        [PromptPair(**pair._asdict())],
        "relp",
        sites=["mlp_out", "attn_out", "z", "v", "mlp_post", "resid_pre"],
    )
    base, source = true.activations(pair.corrupted), true.activations(pair.clean)
    change = {site: source[site, 0] - base[site, 0] for site in found}
    x, unembedding = base["resid_post", 0][-1], true.unembedding.weight
    reads = true.norm.weight * (unembedding[pair.clean_answer] - unembedding[pair.corrupted_answer])
    slope = (reads - reads.mean()) / np.sqrt(x.var() + 1e-5)  # in the last token's residual stream
    for site in ("mlp_out", "attn_out"):
        assert np.allclose(found[site][0, 0, -1], change[site][-1] @ slope)
        assert not found[site][0, 0, :-1].any()
    heads = (true.blocks[0].out.weight.T @ slope).reshape(change["z"].shape[1:])  # [head, d_head]
    assert np.allclose(found["z"][0, 0, -1], (change["z"][-1] * heads).sum(-1))
    pattern = base["pattern", 0][-1]  # [head, T]
    assert np.allclose(found["v"][0, 0], np.einsum("thc,hc,ht->th", change["v"], heads, pattern))
    w, d, x = true.blocks[0], change["resid_pre"], base["resid_pre", 0]
    neurons = w.down.weight.T @ slope
    assert np.allclose(found["mlp_post"][0, 0, -1], change["mlp_post"][-1] * neurons)
    scaled = (d - d.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    values = (scaled * w.norm1.weight @ w.v.weight.T).reshape(change["v"].shape)
    want = np.einsum("thc,hc,ht->t", values, heads, pattern)
    normed = w.norm2.weight * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    u = ((normed + w.norm2.bias) @ w.up.weight.T + w.up.bias)[-1]
    share = base["mlp_post", 0][-1] / u
    want[-1] += d[-1] @ slope + (scaled[-1] * w.norm2.weight @ w.up.weight.T * share) @ neurons
    assert np.allclose(found["resid_pre"][0, 0], want)


def test_relevance_is_kept_on_the_way():
    """Without biases, all that the logits say is in the residual stream of every layer."""
    model = deltapatch.from_transformers(hf_model("llama", torch.float64))
    (pair,) = pairs(true_model("llama"), (5,), seed=3)
    options = {"sites": ["resid_pre", "resid_mid", "resid_post"], "positions": "together", "source": "zero"}
    found = estimated(model, [PromptPair(**pair._asdict())], "relp", **options)
    logits = true_model("llama").logits(pair.corrupted)[-1]
    said = logits[pair.clean_answer] - logits[pair.corrupted_answer]
    for site, estimates in found.items():
        assert np.allclose(estimates, -said, rtol=1e-5), site  # but for the norms' epsilon


def test_where_nothing_can_happen():
    """Before the prompts differ, and behind the read-out, estimates are zero, and that is known."""
    model = deltapatch.from_transformers(hf_model("gpt2", torch.float64))
    given = [PromptPair([1, 2, 3, 4, 5], [1, 2, 7, 4, 5], 8, 9), PromptPair([1, 2, 3], [1, 7, 3], 8, 9)]
    options = {"sites": ["mlp_out", "z"], "readout": 3, "positions": "all"}
    with pytest.raises(DeltapatchError):
        estimated(model, given, **options)
    given = given[:1]
    found = estimated(model, given, **options)
    question = ask(model, given, SweepOptions(**options))
    can = reaching(question).reshape(-1)
    exact = deltapatch.sweep(model, given, precision="fp64", progress=False, **options)
    flat = np.concatenate([exact.values("logit_diff", site=s).ravel() for s in options["sites"]])
    assert not flat[~can].any()
    assert flat[can].any()
    assert (np.concatenate([found[s].ravel() for s in options["sites"]])[~can] == 0).all()


def test_what_is_refused():
    model = deltapatch.from_transformers(hf_model("llama"))
    short = PromptPair([1, 2, 3], [1, 7, 3], 8, 9)
    long = with_long_answers(true_model("llama"), pairs(true_model("llama"), (4,))[0], (2, 2), 0, seed=1)
    for given, method, options, said in (
        ([short], "ig-inputs", {"source": "zero", "sites": "z"}, "is no prompt"),
        ([short], "relp", {"sites": ["z", "q"]}, "nothing of q"),
        ([short], "ig-activations", {"sites": "pattern"}, "no line for pattern"),
        ([PromptPair(**long._asdict())], "ig-activations", {"sites": "z"}, "answers of one token"),
    ):
        with pytest.raises(DeltapatchError, match=said):
            estimated(model, given, method, **options)


@pytest.mark.parametrize("layers", ["all", [2]])
@pytest.mark.parametrize("method", ["attribution", "ig-inputs"])
def test_what_they_take_is_known_beforehand(method, layers, monkeypatch):
    """Token by token: forwards of base and source runs, and what gradients go back through."""
    model = deltapatch.from_transformers(hf_model("llama-grouped"))
    prompts = [PromptPair(*pair) for pair in pairs(true_model("llama-grouped"), (5, 3))]
    asked = SweepOptions(sites=["z", "resid_pre"], layers=layers, metrics="logit_diff")
    question = ask(model, prompts, asked)
    estimates, took = Estimates(question, Method(method, "logit_diff", 3)), []
    for kind, name, tokens in (
        (Unpatched, "base", lambda x, *args: len(x)),
        (Unpatched, "both", lambda dx, layer, number, here, places: len(dx) + len(here.base.resid_pre)),
        (Backward, "through", lambda x, *args: 2 * len(x)),
    ):
        real = getattr(kind, name)

        def counted(self, *args, real=real, tokens=tokens):
            took.append(tokens(*args))
            return real(self, *args)

        monkeypatch.setattr(kind, name, counted)
    estimates.run()
    assert sum(took) == estimates.token_layers
