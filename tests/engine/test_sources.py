"""Sources mean, resample and noise against the oracle's forward; seeds."""

import numpy as np
import pytest
import torch
from engine_oracle import FLAGS, METRICS, Patch, both, continuations, metrics_of_answers
from engine_tiny import hf_model, pairs, random_pair, true_model, with_long_answers

import deltapatch

VARIANTS = ("neox-parallel", "neox-sequential", "llama-grouped")
SITES = ("mlp_out", "k", "z", "resid_pre", "mlp_post", "attn_out.dim")
LENGTHS = (4, 3, 4, 3, 4)
DIRECTIONS = ("denoise", "noise")


def model(variant):
    return deltapatch.from_transformers(hf_model(variant, torch.float64))


def drawn(variant):
    """Pairs whose answers are of one token and of several."""
    true = true_model(variant)
    found = pairs(true, LENGTHS, seed=5)
    for i, sizes in ((1, (2, 1)), (2, (3, 2)), (4, (1, 2))):
        found[i] = with_long_answers(true, found[i], sizes, 0, seed=i)
    return found


def sweep(variant, prompts, **options):
    asked = [deltapatch.PromptPair(**p._asdict()) for p in prompts]
    return deltapatch.sweep(model(variant), asked, progress=False, **({"sites": SITES} | options))


# ----------------------------------------------------------------------------- what is right, from the oracle


def forward(true, tokens, noise, visit, after=()):
    """Logits [row, 1 + n, vocab] at the end of a prompt with noise on its embeddings, and after n tokens."""

    def noisy(site, layer, value):
        if noise is not None and (site, layer) == ("resid_pre", 0):
            value = value.copy()
            value[:, : len(tokens)] += noise
        return visit(site, layer, value)

    return true.forward([*tokens, *after], visit.n_rows, noisy)[:, len(tokens) - 1 :]


class Keep:
    """Remembers every site's value."""

    n_rows = 1

    def __init__(self):
        self.values = {}

    def __call__(self, site, layer, value):
        self.values[site, layer] = value[0]
        return value


class Swap:
    """Puts other values in, one patch a row."""

    def __init__(self, patches, values):
        self.patches, self.values, self.n_rows = patches, values, max(1, len(patches))

    def __call__(self, site, layer, value):
        value = value.copy()
        for row, p in enumerate(self.patches):
            if (p.site.removesuffix(".dim"), p.layer) == (site, layer):
                where = p.position if p.index is None else (p.position, p.index)
                value[row][where] = self.values[site, layer][where]
        return value


def activations(true, tokens, noise=None):
    keep = Keep()
    forward(true, tokens, noise, keep)
    return keep.values


def expected(true, pair, values, site, direction, noise=None):
    """Every metric [layer, position(, index)] of one pair, its patches taken from `values`."""
    clean = pair.clean, None
    corrupted = (pair.corrupted, None) if noise is None else (pair.clean, noise)
    base = corrupted if direction == "denoise" else clean
    n_indices = true.n_indices(site)
    shape = (true.n_layers, len(pair.clean), *([n_indices] if n_indices else []))
    cells = [Patch(site, *at) for at in np.ndindex(shape)]
    after = continuations(pair)
    runs = [
        both(after, lambda more, run=run: forward(true, *run, Swap([], None), more)[0])
        for run in (base, clean, corrupted)
    ]
    patched = both(after, lambda more: forward(true, *base, Swap(cells, values), more))
    found = metrics_of_answers(runs[0], patched, *runs[1:], pair, direction)
    return {name: value.reshape(shape) for name, value in found.items()}


def mean_by_position(runs, of_keys):
    """Of several [T, ...], or of patterns [T, head, T]: at each position over those that have it."""
    longest = max(len(run) for run in runs)
    if of_keys:
        runs = [np.pad(run, ((0, 0), (0, 0), (0, longest - len(run)))) for run in runs]
    return np.array([np.mean([run[t] for run in runs if len(run) > t], axis=0) for t in range(longest)])


def agrees(effects, number, site, want, metrics=METRICS):
    """Whether one pair's effects are right."""
    for metric in metrics:
        right = want[metric]
        got = effects.values(metric, site=site)[number][:, : right.shape[1]]
        assert got.shape == right.shape
        if not np.linalg.norm(got - right) <= (0 if metric in FLAGS else 1e-8) * np.linalg.norm(right):
            return False
    return True


# ------------------------------------------------------------------------------------------------ the sources


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_mean_over_all_prompts_of_the_same_length(variant, direction):
    true, prompts = true_model(variant), drawn(variant)
    effects = sweep(variant, prompts, source="mean", direction=direction)
    for length in set(LENGTHS):
        runs = [
            activations(true, t) for p in prompts if len(p.clean) == length for t in (p.clean, p.corrupted)
        ]
        mean = {at: np.mean([run[at] for run in runs], axis=0) for at in runs[0]}
        for number, pair in enumerate(prompts):
            if len(pair.clean) == length:
                for site in SITES:
                    assert agrees(effects, number, site, expected(true, pair, mean, site, direction)), site


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", [*VARIANTS, "gpt2"])
def test_mean_over_prompts_that_are_not_the_pairs(variant, direction):
    """They are cut at the longest pair; of shorter ones, a position's mean is over those that have it.

    Patterns too, of shorter pairs and beside runs with more keys.
    """
    true, prompts = true_model(variant), drawn(variant)
    others = [random_pair(length, seed=20 + length).clean for length in (4, 2, 7, 5, 3)]
    asked = {"source": "mean", "mean_over": others, "direction": direction}
    effects = sweep(variant, prompts, sites=(*SITES, "pattern"), **asked)
    runs = [activations(true, tokens[:4]) for tokens in others]
    mean = {at: mean_by_position([run[at] for run in runs], at[0] in ("scores", "pattern")) for at in runs[0]}
    for number, pair in enumerate(prompts):
        for site in SITES:
            assert agrees(effects, number, site, expected(true, pair, mean, site, direction)), (number, site)
    for number in (0, 3):  # of 4 and of 3 tokens, and answers of one
        n = len(prompts[number].clean)
        own = {at: value[:n, :, :n] for at, value in mean.items() if at[0] == "pattern"}
        assert agrees(effects, number, "pattern", expected(true, prompts[number], own, "pattern", direction))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", [*VARIANTS, "gpt2"])
def test_means_by_label(variant, direction):
    """A position that a pair has a label for takes the mean over where the dataset has it.

    Any other goes by position. Labels are beyond the longest pair in one prompt, missing in another, twice at
    one position in a third.
    """
    true, prompts = true_model(variant), drawn(variant)
    prompts = [p._replace(labels={"a": 1, "b": len(p.clean) - 1, "c": 0}) for p in prompts]
    where = [(4, {"a": 3, "b": 1}), (7, {"a": 6}), (5, {"b": 2, "d": 0}), (3, {}), (6, {"a": 2, "b": 2})]
    others = [(random_pair(n, seed=60 + n).clean, labels) for n, labels in where]
    given = [{"prompt": ids, "labels": labels} if labels else ids for ids, labels in others]
    asked = {"source": "mean", "mean_over": given, "direction": direction}
    effects = sweep(variant, prompts, **asked)
    runs = [activations(true, tokens) for tokens, _ in others]
    for number, pair in enumerate(prompts):
        mean = {}
        for at in runs[0]:
            if at[0] in ("scores", "pattern"):
                continue
            mean[at] = mean_by_position([run[at] for run in runs], of_keys=False)
            for label, position in pair.labels.items():
                if label != "c":
                    of_it = [
                        run[at][own[label]]
                        for run, (_, own) in zip(runs, others, strict=True)
                        if label in own
                    ]
                    mean[at][position] = np.mean(of_it, axis=0)
        for site in SITES:
            assert agrees(effects, number, site, expected(true, pair, mean, site, direction)), (number, site)


def test_a_label_of_a_text_before_those_of_its_tokens():
    """`a` is the last token of a text: in the dataset, of two; in the pair, of one."""
    of = [3, 1, 4, 1, 5], [3, 1, 4, 2, 5]
    pair = deltapatch.PromptPair(*of, 6, 7, labels={"a": 2, "a[0]": 2, "a[-1]": 2})
    prompts = [[5, 4, 3, 2, 1], [9, 2, 6, 5, 3]]
    several = [{"a[0]": 1, "a[1]": 3, "a[-2]": 1, "a[-1]": 3, "a": 3}, {"a": 0, "a[0]": 0, "a[-1]": 0}]
    alone = [{"a": 3}, {"a": 0}]
    found = [
        deltapatch.sweep(
            model("llama-grouped"),
            pair,
            source="mean",
            mean_over=[{"prompt": p, "labels": l} for p, l in zip(prompts, labels, strict=True)],
        ).values("logit_diff", site="mlp_out")
        for labels in (several, alone)
    ]
    np.testing.assert_array_equal(*found)
    twice = deltapatch.PromptPair(*of, 6, 7, labels={"a": 2, "b": 2})
    given = [{"prompt": prompts[0], "labels": {"a": 2, "b": 3}}]
    with pytest.raises(
        deltapatch.DeltapatchError, match="has the labels a and b, which mean_over has at diff"
    ):
        deltapatch.sweep(model("llama-grouped"), twice, source="mean", mean_over=given)


def test_a_run_with_other_labels_is_not_resumed(tmp_path):
    pair = deltapatch.PromptPair([3, 1, 4, 1, 5], [3, 1, 4, 2, 5], 6, 7, labels={"a": 2})
    for at, prompt in ((1, [5, 4, 3, 2, 1]), (3, [5, 4, 3, 2, 1]), (1, [5, 4, 3, 2, 2])):
        given = {"source": "mean", "mean_over": [{"prompt": prompt, "labels": {"a": at}}]}
        kept = {"out": tmp_path / "run", "resume": True}
        if (at, prompt[-1]) == (1, 1):
            deltapatch.sweep(model("llama-grouped"), pair, **given, **kept)
            continue
        with pytest.raises(
            deltapatch.DeltapatchError, match="different list of prompts that the mean is over"
        ):
            deltapatch.sweep(model("llama-grouped"), pair, **given, **kept)


@pytest.mark.parametrize("variant", ["neox-parallel", "gemma2"])
def test_a_mean_over_a_dataset_in_float32(variant):
    """Held to float64, which the oracle holds above."""
    prompts = drawn(variant)
    asked = {"source": "mean", "mean_over": [random_pair(n, seed=40 + n).clean for n in (4, 3, 6)]}
    want = sweep(variant, prompts, **asked)
    narrow = deltapatch.from_transformers(hf_model(variant))
    pairs_ = [deltapatch.PromptPair(**p._asdict()) for p in prompts]
    found = deltapatch.sweep(narrow, pairs_, sites=SITES, precision="fp32", progress=False, **asked)
    for site in SITES:
        for metric in ("logit_diff", "dlogp_clean", "kl"):
            right, got = (np.nan_to_num(e.values(metric, site=site)) for e in (want, found))
            assert np.linalg.norm(got - right) <= 1e-5 * np.linalg.norm(right), (site, metric)


def test_the_mean_over_the_prompts_of_the_pairs_is_that_of_the_pairs():
    """Edges, patches that one receiver sees, joint patches and estimates find their means as sweeps do."""
    prompts = [deltapatch.PromptPair(*p) for p in pairs(true_model("llama-grouped"), (4, 4))]
    of = model("llama-grouped")
    alone = deltapatch.Patch("z", 0, 2, 1, into=["m1", "logits"])
    joint = [deltapatch.Patch("mlp_post", 1, 1, 3), deltapatch.Patch("q", 2, 3, 0)]
    given = [deltapatch.Intervention(1, [alone]), deltapatch.Intervention(0, joint)]
    wide = {"source": "mean", "precision": "fp64", "progress": False}
    every = [p for pair in prompts for p in (pair.clean, pair.corrupted)]
    for ask in (
        lambda **o: deltapatch.sweep_edges(of, prompts, **wide, **o).values("logit_diff"),
        lambda **o: deltapatch.run(of, prompts, given[:1], **wide, **o).values("logit_diff"),
        lambda **o: deltapatch.run(of, prompts, given[1:], **wide, **o).values("logit_diff"),
        lambda **o: deltapatch.sweep(
            of, prompts, sites=["z", "resid_pre"], screen="attribution", **wide, **o
        ).estimate("logit_diff", site="resid_pre"),
    ):
        want, found, other = ask(), ask(mean_over=every), ask(mean_over=every[:1])
        assert np.nanmax(np.abs(found - want)) <= 1e-8 * np.nanmax(np.abs(want))
        assert np.nanmax(np.abs(other - want)) > 1e-3 * np.nanmax(np.abs(want))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean_over": []}, "mean_over has no prompts"),
        ({"mean_over": "the mean"}, "mean_over must be a list of prompts"),
        ({"mean_over": [[1, 2, 3, 4], 5]}, "and prompt 1 is 5"),
        ({"mean_over": [[1, 2, 3, 4], [1, 2.5]]}, "a token of prompt 1 of mean_over"),
        ({"mean_over": [[1, 2, 3, 4], []]}, "prompt 1 of mean_over: the given prompt is empty"),
        ({"mean_over": [[1, 2, 3, 61]]}, "prompt 0 of mean_over: token 61 of given is out of range"),
        ({"mean_over": ["text"]}, "prompt 0 of mean_over: given is text, but this model has no tokenizer"),
        ({"mean_over": [[1, 2], [1, 2, 3]]}, "longest prompt of mean_over has 3 .* position 3 of pair 1"),
        ({"mean_over": [[1, 2, 3, 4]], "source": "zero"}, "mean_over is of source 'mean', not of 'zero'"),
        ({"mean_over": [{"prompt": [1, 2, 3, 4]}]}, "prompt 0 with labels must be"),
        ({"mean_over": [{"prompt": 5, "labels": {}}]}, "and prompt 0 is 5"),
        ({"mean_over": [{"prompt": [1, 2, 3, 4], "labels": {"a": 4}}]}, "'a' is at position 4"),
        ({"mean_over": [{"prompt": [1, 2], "labels": {"subject": "x"}}]}, "give its position"),
        ({"mean_over": [{"prompt": [1, 2, 3], "labels": {"x": 1}}]}, "no mean at position 3 of pair 1"),
        (
            {"mean_over": [{"prompt": [1, 2, 3, 4], "labels": {"subject": 1}}], "sites": "pattern"},
            "a mean of pattern is taken position by position",
        ),
    ],
)
def test_what_a_mean_cannot_be_over(given, message):
    prompts = pairs(true_model("neox-parallel"), (3, 4))
    with pytest.raises(deltapatch.DeltapatchError, match=message):
        sweep("neox-parallel", prompts, **{"source": "mean"} | given)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_resample_takes_another_pairs_source_run(variant, direction):
    true, prompts = true_model(variant), drawn(variant)
    effects = sweep(variant, prompts, source="resample", direction=direction, seed=1)
    partners = []
    for number, pair in enumerate(prompts):
        others = [i for i, p in enumerate(prompts) if i != number and len(p.clean) == len(pair.clean)]
        runs = {i: prompts[i].clean if direction == "denoise" else prompts[i].corrupted for i in others}
        values = {i: activations(true, tokens) for i, tokens in runs.items()}
        fits = [
            i
            for i in others
            if all(agrees(effects, number, s, expected(true, pair, values[i], s, direction)) for s in SITES)
        ]
        assert len(fits) == 1, f"pair {number} takes from {fits} of {others}"
        partners += fits
    assert sorted(partners) == list(range(len(prompts)))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_noise_on_the_embeddings_where_the_prompts_differ(variant, direction):
    """As in ROME: the corrupted run is the clean prompt with noise. A pair's noise has a seed of its own."""
    true, prompts = true_model(variant), drawn(variant)
    effects = sweep(variant, prompts, source="noise", direction=direction, seed=9, noise_scale=0.7)
    scale = 0.7 * float(hf_model(variant).get_input_embeddings().weight.detach().double().std())
    for number, pair in enumerate(prompts):
        differs = np.array(pair.clean) != np.array(pair.corrupted)
        noise = np.random.default_rng((9, number)).standard_normal((len(pair.clean), true.embedding.shape[1]))
        noise *= scale * differs[:, None]
        values = activations(true, pair.clean, noise if direction == "noise" else None)
        for site in SITES:
            want = expected(true, pair, values, site, direction, noise)
            assert agrees(effects, number, site, want), (number, site)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_noise_leaves_what_precedes_the_first_difference_at_exactly_zero(direction):
    pair = random_pair(5, seed=4, first=2)
    effects = sweep("neox-parallel", [pair], source="noise", direction=direction)
    for site in SITES:
        assert (effects.values("kl", site=site)[0, :, :2] == 0).all()
        assert (effects.values("kl", site=site)[0, 0, 2] != 0).any()


def test_the_mean_of_one_pair_lies_half_way():
    """Half of the counterpart's difference enters at the embedding."""
    pair = random_pair(4, seed=8)
    true = true_model("llama-grouped")
    effects = sweep("llama-grouped", [pair], sites=["resid_pre"], source="mean")
    two = [activations(true, t) for t in (pair.clean, pair.corrupted)]
    half = {at: (two[0][at] + two[1][at]) / 2 for at in two[0]}
    assert agrees(effects, 0, "resid_pre", expected(true, pair, half, "resid_pre", "denoise"))


@pytest.mark.parametrize("source", ["resample", "noise"])
def test_a_seed_gives_the_same_effects_again_and_another_gives_others(source):
    prompts = pairs(true_model("neox-parallel"), (4,) * 6)
    first, again, other = (
        sweep("neox-parallel", prompts, sites=["mlp_out"], source=source, seed=seed).values("ie")
        for seed in (3, 3, 4)
    )
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_resample_needs_another_pair_of_the_same_length():
    prompts = pairs(true_model("neox-parallel"), (4, 3, 4))
    with pytest.raises(deltapatch.DeltapatchError, match="pair 1 is alone with its 3 tokens"):
        sweep("neox-parallel", prompts, source="resample")
