"""The public API against the oracle: every architecture, site, direction, source and metric."""

from functools import cache

import numpy as np
import pytest
import torch
from engine_oracle import FLAGS, METRICS, SITES, Patch, TrueModel, resolve
from engine_tiny import (
    SEQUENTIAL,
    VARIANTS,
    build,
    huge,
    model_of,
    nearly_equal_tokens,
    pairs,
    prompt_pairs,
    random_pair,
    true_model,
    without_overlaps,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import deltapatch

TOLERANCE = {"fp32": 1e-5, "fp64": 1e-8, "bf16": 1e-2}
DIRECTIONS = ("denoise", "noise")
SOURCES = ("counterpart", "zero")
AXES = ("pair", "layer", "position", "index")
# Exponentials of log-probabilities: a relative error of the exponent comes out multiplied by the exponent.
EXPONENTIAL = ("ie", "dp_clean", "dp_corrupted", "prob_diff")
SAID = ("says_clean", "says_corrupted")
FIRST_ORDER = tuple(m for m in METRICS if m not in ("recovered", *SAID))  # of which no effect leaves nothing


# ---------------------------------------------------------------------------------------------- helpers


def of(hf):
    return deltapatch.from_transformers(hf)


def sweep(model, pairs, sites, **options):
    return deltapatch.sweep(
        model, prompt_pairs(pairs), sites=list(sites), progress=False, metrics="all", **options
    )


def as_patch(patch):
    index = {} if patch.index is None else {"index": patch.index}
    return deltapatch.Patch(patch.site, layer=patch.layer, position=patch.position, **index)


def run(model, pairs, interventions, **options):
    """Interventions are (pair, patches)."""
    asked = [deltapatch.Intervention(pair=i, patches=[as_patch(p) for p in ps]) for i, ps in interventions]
    return deltapatch.run(model, prompt_pairs(pairs), asked, **options)


def oracle_run(true, pairs, interventions, direction="denoise", source="counterpart"):
    """What `run` should give: name -> [intervention]."""
    found = {name: np.full(len(interventions), np.nan) for name in METRICS}
    for i, pair in enumerate(pairs):
        mine = [n for n, (which, _) in enumerate(interventions) if which == i]
        if mine:
            values = true.effects(pair, [interventions[n][1] for n in mine], direction, source)
            for name in METRICS:
                found[name][mine] = values[name]
    return found


def assert_agrees(values, want, tolerance, where, metrics=METRICS, nothing=1e-12):
    """`values(metric)` and want[metric] agree: their difference is small beside the norm of the whole set."""
    for metric in metrics:
        right = want[metric]
        got = values(metric)
        assert got.shape == right.shape, f"{where}, {metric}: shape {got.shape}, not {right.shape}"
        assert np.array_equal(np.isnan(got), np.isnan(right)), f"{where}, {metric}: NaN in the wrong places"
        off = np.nan_to_num(np.abs(got - right))
        error, scale = np.linalg.norm(off), np.linalg.norm(np.nan_to_num(right))
        if scale <= nothing:
            scale = 1.0  # no effect at all, as of a query that sees one key: what is left is rounding
        allowed = 0 if metric in FLAGS else tolerance * (2 if metric in EXPONENTIAL else 1)
        if error > allowed * scale:
            worst = np.unravel_index(off.argmax(), off.shape)
            axes = AXES if right.ndim > 1 else ("intervention",)
            at = ", ".join(f"{axis} {i}" for axis, i in zip(axes, worst, strict=False))
            pytest.fail(
                f"{where}, {metric}: relative error {error / max(scale, 1e-300):.1e} > {allowed:.0e}, "
                f"worst at {at}: {got[worst]!r} instead of {right[worst]!r}"
            )


def assert_sweep_agrees(variant, pairs, sites, precision, positions=None, layers=None, **options):
    """Sweep all the sites at once and hold each against the oracle."""
    asked = {"positions": "all" if positions is None else positions}
    if layers is not None:
        asked["layers"] = layers
    effects = sweep(model_of(variant, precision), pairs, sites, precision=precision, **asked, **options)
    for site in sites:
        want = true_model(variant).sweep(pairs, site, positions, layers, **options)
        where = f"{variant}, {site}, {precision}, {options}"
        tolerance, metrics = TOLERANCE[precision], METRICS
        if is_singular(variant, site, options):
            tolerance, metrics = 100 * tolerance, [m for m in METRICS if m not in FLAGS]
        assert_agrees(
            lambda metric, site=site: effects.values(metric, site=site), want, tolerance, where, metrics
        )
    return effects


def is_singular(variant, site, options):
    """Zeroing the whole stream under RMSNorm: mere rounding is left, which the norm divides by √eps = 1e-3.

    At the end of the model all logits are then equal, and the most likely token is any.
    """
    whole_stream = site in ("resid_pre", "resid_mid", "resid_post")
    return variant.startswith("llama") and whole_stream and options.get("source") == "zero"


def of_variant(variant, lengths=(5, 4), seed=0):
    return pairs(true_model(variant), lengths, seed)


def sites_of(variant):
    return true_model(variant).sites()


# ------------------------------------------------------------------------------------------------ sweeps


# Each source in each direction, and each of both in each precision.
@pytest.mark.parametrize(
    ("precision", "direction", "source"),
    [
        ("fp32", "denoise", "counterpart"),
        ("fp32", "noise", "zero"),
        ("fp64", "noise", "counterpart"),
        ("fp64", "denoise", "zero"),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_sites_at_all_positions(variant, precision, direction, source):
    drawn = of_variant(variant, (5, 4), seed=int(precision == "fp64"))
    assert_sweep_agrees(variant, drawn, sites_of(variant), precision, direction=direction, source=source)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_sites_in_bfloat16_products(variant):
    hf = build(variant, strength=0.15)  # ie, an exponential, would blow up the error of a larger effect
    true = TrueModel(hf)
    two = pairs(true, (4, 4))
    effects = sweep(of(hf), two, true.sites(), precision="bf16", positions=[1, -1])
    want = {site: true.sweep(two, site, [1, -1]) for site in true.sites()}

    def each_and_all(metric):
        """Every site's effects, and the set of all of them."""
        sets = [(site, effects.values(metric, site=site), want[site][metric]) for site in want]
        together = [
            np.concatenate([values.ravel() for values in side]) for side in list(zip(*sets, strict=True))[1:]
        ]
        return [*sets, ("all sites", *together)]

    for metric in METRICS:
        if metric in FLAGS:
            continue  # near ties may fall either way
        for site, got, right in each_and_all(metric):
            # A few effects alone may cancel, more so in an entropy, whose terms go both ways.
            few = 6 if metric == "entropy" else 3
            tolerance = TOLERANCE["bf16"] * (1 if site == "all sites" else few)
            assert_agrees(
                lambda _, got=got: got, {metric: right}, tolerance, f"{variant}, {site}, bf16", [metric]
            )


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_site_alone_at_some_positions(variant, site):
    """Ints from both ends and labels, of which a short or unlabelled pair lacks some; one layer."""
    if site not in sites_of(variant):
        with pytest.raises(deltapatch.DeltapatchError, match="resid_mid"):
            sweep(model_of(variant), of_variant(variant), [site])
        return
    three = of_variant(variant, (4, 5, 4))
    three[2] = three[2]._replace(labels={})
    asked = [-1, "subject", 2, -5, 4]
    effects = assert_sweep_agrees(variant, three, [site], "fp32", positions=asked, layers=[1])
    assert list(effects.positions(site)) == asked
    assert list(effects.layers) == [1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_position(variant):
    two = of_variant(variant, (4, 6))
    effects = sweep(model_of(variant), two, ["mlp_post", "attn_out"], positions="last")
    for site in ("mlp_post", "attn_out"):
        want = true_model(variant).sweep(two, site, [-1])
        assert_agrees(lambda m, site=site: effects.values(m, site=site), want, 1e-5, f"{variant}, {site}")


@pytest.mark.parametrize("variant", ["neox-parallel", "llama-grouped"])
def test_many_pairs_of_mixed_lengths(variant):
    """Several pairs of the same length, out of order, and a prompt of one token among them."""
    mixed = of_variant(variant, (4, 6, 4, 1, 6, 4, 5), seed=2)
    sites = ["mlp_post", "z", "resid_pre", "k", "mlp_out.dim"]
    assert_sweep_agrees(variant, mixed, sites, "fp64", positions=[0, 1, 3, -1, -4])


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_of_one_token(variant, precision):
    one = of_variant(variant, (1, 1))
    assert_sweep_agrees(variant, one, sites_of(variant), precision)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_a_model_of_one_layer(precision):
    assert_sweep_agrees("one-layer", of_variant("one-layer", (4, 3)), sites_of("one-layer"), precision)


@pytest.mark.filterwarnings("ignore:a prompt of .* tokens exceeds")
def test_rotary_tables_that_depend_on_the_prompts_length():
    three = of_variant("llama-dynamic", (4, 7, 5))
    assert_sweep_agrees("llama-dynamic", three, ["q", "k", "z", "resid_pre"], "fp64")


@pytest.mark.parametrize("variant", ["llama-grouped", "llama-linear"])
def test_key_value_heads_are_what_k_and_v_count(variant):
    effects = sweep(model_of(variant), of_variant(variant), ["q", "k", "v", "z"])
    n_heads, n_kv_heads = (true_model(variant).n_indices(site) for site in "qk")
    assert n_kv_heads < n_heads
    heads = {site: effects.values("ie", site=site).shape[-1] for site in ("q", "k", "v", "z")}
    assert heads == {"q": n_heads, "k": n_kv_heads, "v": n_kv_heads, "z": n_heads}


@pytest.mark.filterwarnings("ignore:a prompt of .* tokens exceeds")
@pytest.mark.parametrize("variant", [*VARIANTS, "one-layer", "llama-dynamic"])
def test_logits(variant):
    for length in (1, 4, 7):
        tokens = random_pair(length, seed=length, first=0).clean
        want = true_model(variant).logits(tokens)
        for precision in ("fp32", "fp64"):
            got = np.asarray(model_of(variant, precision).logits(tokens))
            assert np.linalg.norm(got - want) < 1e-6 * np.linalg.norm(want), f"{variant}, {length} tokens"


# --------------------------------------------------------------------------------------- joint patches


def interventions(true, pairs):
    """One to three sets of one to six patches, anywhere, on any of the pairs."""

    def patch(length):
        return st.sampled_from(true.sites()).flatmap(
            lambda site: st.builds(
                Patch,
                st.just(site),
                st.integers(0, true.n_layers - 1),
                st.integers(0, length - 1),
                st.integers(0, true.n_indices(site) - 1) if true.n_indices(site) else st.none(),
            )
        )

    def one(i):
        patches = st.lists(patch(len(pairs[i].clean)), min_size=1, max_size=6).map(without_overlaps)
        return st.tuples(st.just(i), patches)

    return st.lists(st.sampled_from(range(len(pairs))).flatmap(one), min_size=1, max_size=3)


# Interventions with effects of ordinary size, so that the norm of a set is never that of an accident near 0
ANCHORS = [
    (0, [Patch("resid_pre", 0, 1)]),
    (1, [Patch("resid_post", 1, 2)]),
    (0, [Patch("attn_out", 0, 1), Patch("mlp_out", 1, 4)]),
]


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_random_joint_patches(variant, precision):
    two, true = of_variant(variant), true_model(variant)
    sources = SOURCES if precision == "fp64" else ("counterpart",)  # zeroed streams are singular, see above

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(interventions(true, two), st.sampled_from(DIRECTIONS), st.sampled_from(sources))
    def check(drawn, direction, source):
        options = {"direction": direction, "source": source}
        assume(not any(is_singular(variant, p.site, options) for _, patches in drawn for p in patches))
        asked = [*drawn, *ANCHORS]
        outcome = run(model_of(variant, precision), two, asked, precision=precision, **options)
        want = oracle_run(true, two, asked, **options)
        assert_agrees(outcome.values, want, TOLERANCE[precision], f"{variant}, {options}, {asked}")

    check()


JOINT = {
    "a later position in an earlier layer": [Patch("attn_out", 0, 3), Patch("mlp_out", 1, 1)],
    "an earlier position in an earlier layer": [Patch("mlp_out", 0, 1), Patch("attn_out", 1, 3)],
    "a head of a later layer first in the list": [Patch("z", 1, 1, 1), Patch("v", 0, 2, 0)],
    "one block, one position": [
        Patch("q", 1, 3, 0),
        Patch("z", 1, 3, 1),
        Patch("mlp_post", 1, 3, 5),
        Patch("mlp_out", 1, 3),
    ],
    "one block, several positions": [
        Patch("k", 0, 1, 0),
        Patch("q", 0, 3, 1),
        Patch("v", 0, 2, 0),
        Patch("attn_out.dim", 0, 1, 2),
        Patch("mlp_post", 0, 2, 7),
        Patch("mlp_out.dim", 0, 3, 4),
    ],
    "all neurons are the whole output": [Patch("mlp_post", 0, 1, i) for i in range(24)],
    "all heads of all positions": [Patch("z", 1, t, h) for t in range(4) for h in range(2)],
    "overwritten downstream": [Patch("mlp_post", 0, 2, 1), Patch("mlp_out", 0, 2), Patch("resid_post", 0, 2)],
    "before and after a block": [
        Patch("resid_pre.dim", 1, 1, 3),
        Patch("resid_post.dim", 1, 1, 3),
    ],
    "a window of layers": [Patch("mlp_out", 0, -1), Patch("mlp_out", 1, -1)],
    "last and first position": [Patch("resid_pre", 1, -1), Patch("resid_pre", 0, 0)],
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("variant", ["neox-parallel", "gptj", "llama-grouped"])
def test_joint_patches_of_every_shape(variant, source):
    """All of them in one run, so that rows that start at different layers and positions travel together."""
    two = of_variant(variant)
    asked = [(i, patches) for patches in JOINT.values() for i in (0, 1)]
    outcome = run(model_of(variant, "fp64"), two, asked, precision="fp64", source=source)
    want = oracle_run(true_model(variant), two, asked, source=source)
    for n, (name, i) in enumerate((name, i) for name in JOINT for i in (0, 1)):
        one = {metric: value[n : n + 1] for metric, value in want.items()}
        assert_agrees(lambda m, n=n: outcome.values(m)[n : n + 1], one, 1e-8, f"{variant}, {name}, pair {i}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_joint_patch_does_not_depend_on_the_order_of_its_patches(variant):
    two, options = of_variant(variant), {"precision": "fp64"}
    patches = [p for p in JOINT["one block, several positions"] if p.index is not None]
    forth, back = run(model_of(variant, "fp64"), two, [(0, patches), (0, patches[::-1])], **options).values(
        "ie"
    )
    assert forth == pytest.approx(back, rel=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stream_at_all_positions_is_the_source_run(variant, precision):
    two, true = of_variant(variant), true_model(variant)
    sites = ["resid_pre", "resid_post"] + (["resid_mid"] if variant in SEQUENTIAL else [])
    asked = [
        (i, [Patch(site, l, t) for t in range(len(pair.clean))])
        for i, pair in enumerate(two)
        for site in sites
        for l in range(true.n_layers)
    ]
    outcome = run(model_of(variant, precision), two, asked, precision=precision)
    for name in ("clean", "corrupted"):
        for i, pair in enumerate(two):
            logits = np.stack([true.logits(tokens)[-1] for tokens in (pair.clean, pair.corrupted)])
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            answer = getattr(pair, f"{name}_answer")
            got = outcome.values(f"dlogp_{name}")[[n for n, (which, _) in enumerate(asked) if which == i]]
            want = logp[0, answer] - logp[1, answer]
            np.testing.assert_allclose(got, want, rtol=TOLERANCE[precision], err_msg=f"{variant}, pair {i}")
    np.testing.assert_allclose(outcome.values("recovered"), 1, rtol=TOLERANCE[precision])


def test_a_patch_given_twice_is_refused():
    twice = [Patch("mlp_post", 0, 1, 3), Patch("mlp_post", 0, 1, 3)]
    with pytest.raises(deltapatch.DeltapatchError):
        run(model_of("gptj"), of_variant("gptj"), [(0, twice)])
    with pytest.raises(deltapatch.DeltapatchError):  # position 4 of 5 is the last one
        run(model_of("gptj"), of_variant("gptj"), [(0, [Patch("mlp_out", 0, 4), Patch("mlp_out", 0, -1)])])


# ----------------------------------------------------------------------- the ends of the range of effects


TINY = {
    "fp32": 1e-6,
    "fp64": 1e-5,
}  # the relative difference of two embeddings; effects are ten times smaller


@cache
def tiny_effects(variant, precision):
    """site -> what a sweep at positions 1 and -1 should give, in 80 bits."""
    hf, pair = nearly_equal_tokens(variant, TINY[precision])
    exact = TrueModel(hf, np.longdouble)
    return {site: exact.sweep([pair], site, [1, -1]) for site in exact.sites()}


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_effects(variant, precision):
    """Prompts that hardly differ: hooks in float32 would leave no digit of these effects."""
    hf, pair = nearly_equal_tokens(variant, TINY[precision])
    engine = of(hf.double() if precision == "fp64" else hf)
    effects = sweep(engine, [pair], sites_of(variant), positions=[1, -1], precision=precision)
    for site, want in tiny_effects(variant, precision).items():
        assert 0 < np.abs(want["dlogp_clean"]).max() < 1e-4
        assert_agrees(
            lambda metric, site=site: effects.values(metric, site=site),
            want,
            TOLERANCE[precision],
            f"{variant}, {site}, {precision}",
            FIRST_ORDER,
            nothing=0,
        )


def test_recovered_is_nan_with_a_warning_where_the_runs_do_not_differ():
    hf, pair = nearly_equal_tokens("llama", 1e-7)
    effects = sweep(of(hf), [pair], ["mlp_out"])
    with pytest.warns(UserWarning, match="recovered"):
        assert np.isnan(effects.values("recovered", site="mlp_out")).all()


# Attention logits of hundreds carry float32 errors of 1e-5 themselves, whatever the method
HUGE_TOLERANCE = {"fp32": 1e-3, "fp64": 1e-8}


# Each source in each precision, once of parallel blocks and once of sequential ones.
@pytest.mark.parametrize(
    ("variant", "source", "precision"),
    [
        ("neox-parallel", "counterpart", "fp32"),
        ("neox-parallel", "zero", "fp64"),
        ("gptj", "counterpart", "fp64"),
        ("gptj", "zero", "fp32"),
        ("neox-sequential", "counterpart", "fp64"),
        ("neox-sequential", "zero", "fp32"),
        ("llama-grouped", "counterpart", "fp32"),
        ("llama-grouped", "zero", "fp64"),
    ],
)
def test_huge_effects(variant, source, precision):
    """Attention logits change by hundreds, and so do the final ones: finite and right."""
    hf = huge(variant)
    true = TrueModel(hf)
    two = pairs(true)
    engine = of(hf.double() if precision == "fp64" else hf)
    effects = sweep(engine, two, true.sites(), precision=precision, source=source)
    for site in true.sites():
        want = true.sweep(two, site, source=source)
        where = f"{variant}, {site}, {precision}, {source}"
        finite = ~np.isnan(want["kl"])
        told = not is_singular(variant, site, {"source": source})
        # ie is the exponential of a number in the hundreds
        metrics = [m for m in METRICS if m != "ie" and (told or m not in FLAGS)]
        assert all(np.isfinite(effects.values(m, site=site)[finite]).all() for m in METRICS), where
        # Probabilities near 1 and divergences near 0 are saturated; entropies of nearly certain answers are
        # exponentials of logits in the thousands.
        for some, nothing in (([m for m in metrics if m != "entropy"], 1e-2), (["entropy"], 0.1)):
            assert_agrees(
                lambda metric, site=site: effects.values(metric, site=site),
                want,
                HUGE_TOLERANCE[precision],
                where,
                some,
                nothing=nothing,
            )


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_patch_that_changes_nothing_gives_exactly_zero(variant, precision):
    """Identical prompts, and positions before the first difference: zero bit for bit, in every metric."""
    pair = random_pair(5, seed=4, first=2)
    same = pair._replace(corrupted=pair.clean)
    for direction in DIRECTIONS:
        options = {"precision": precision, "direction": direction}
        effects = sweep(model_of(variant, precision), [pair, same], sites_of(variant), **options)
        for site in sites_of(variant):
            for metric in FIRST_ORDER:
                values = effects.values(metric, site=site)
                where = f"{variant}, {site}, {metric}, {options}"
                assert (values[1] == 0).all(), f"{where}: identical prompts"
                assert (values[0, :, :2] == 0).all(), f"{where}: before the first difference"
            for i, metric in enumerate(SAID):
                base_run = 1 if direction == "denoise" else 0
                unpatched = effects.reference.says[:, base_run, i]
                values = effects.values(metric, site=site)
                assert (values[1] == unpatched[1]).all()
                assert (values[0, :, :2] == unpatched[0]).all()
            assert (effects.values("kl", site=site)[0, 0, 2] != 0).any(), f"{variant}, {site}"


@pytest.mark.parametrize("variant", ["gptj", "llama-grouped"])
def test_a_joint_patch_that_changes_nothing_gives_exactly_zero(variant):
    pair = random_pair(5, seed=4, first=3)
    before = [Patch("z", 1, 1, 0), Patch("mlp_post", 0, 2, 1), Patch("resid_post", 0, 0)]
    outcome = run(model_of(variant), [pair], [(0, before)])
    assert all((outcome.values(metric) == 0).all() for metric in FIRST_ORDER)


def test_the_helpers_resolve_positions_as_the_contract_says():
    pair = random_pair(4, seed=0)
    assert [resolve(pair, p) for p in (0, -1, -4, -5, 4, "subject", "nobody")] == [
        0,
        3,
        0,
        None,
        None,
        1,
        None,
    ]


def test_a_loaded_model_is_left_as_it_was():
    hf = build("neox-parallel")
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    sweep(of(hf), of_variant("neox-parallel"), ["mlp_post", "q"], source="zero")
    assert all(torch.equal(before[name], value) for name, value in hf.state_dict().items())
