"""Interactions, Shapley values and smallest sets, against the oracle and their definitions."""

import itertools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from engine_oracle import METRICS, Patch, TrueModel, resolve
from engine_tiny import build, hf_model, pairs, prompt_pairs, true_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import deltapatch as dp
from deltapatch.analysis.part_sets import growing
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.given import listed_interventions
from deltapatch.interventions.joint import Joint, checked_parts
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.parts import Part
from deltapatch.interventions.roles import Roles
from deltapatch.interventions.table import COLUMNS

VARIANT = "llama-grouped"
# Heads and neurons of one layer, whole vectors and coordinates, other layers and positions.
PARTS = [
    ("z", 0, -1, 1),
    ("z", 0, -1, 2),
    ("k", 1, "subject", 0),
    ("mlp_post", 1, -1, 5),
    ("mlp_out", 1, "subject"),
    ("resid_post.dim", 0, -1, 3),
    ("resid_mid", 2, -1),
]
# In a float64 run of a tiny model, rounding of 1e-16 is what is left of an interaction that is nothing.
TINY = 1e-12


@pytest.fixture(scope="module")
def drawn():
    return pairs(true_model(VARIANT), (5, 4))


def engine(dtype=torch.float64):
    return dp.from_transformers(hf_model(VARIANT, dtype))


def by_hand(true, pair, sets, metric, direction):
    """The effect of joint patches of parts, by the oracle: [set]."""
    rows = [[Patch(s, l, resolve(pair, p), *i) for s, l, p, *i in chosen] for chosen in sets]
    return true.effects(pair, rows, direction)[metric]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_as_by_brute_force(drawn, direction):
    true, n = true_model(VARIANT), len(PARTS)
    runs = {
        "fp64": dp.interactions(
            engine(), prompt_pairs(drawn), PARTS, direction=direction, precision="fp64", noise_sample=0
        ),
        "fp32": dp.interactions(
            engine(torch.float32), prompt_pairs(drawn), PARTS, direction=direction, precision="fp32"
        ),
    }
    first, second = np.triu_indices(n, 1)
    sets = [[p] for p in PARTS] + [[PARTS[a], PARTS[b]] for a, b in zip(first, second, strict=True)] + [PARTS]
    for metric in runs["fp64"].metrics:
        found = np.stack([by_hand(true, pair, sets, metric, direction) for pair in drawn]).astype(float)
        alone, both, together = found[:, :n], found[:, n:-1], found[:, -1]
        want = both - alone[:, first] - alone[:, second]
        for precision, bound in (("fp64", 1e-8), ("fp32", 1e-5)):
            run = runs[precision]
            got = run.values(metric)
            assert got.shape == (2, n, n)
            np.testing.assert_array_equal(got, got.transpose(0, 2, 1))
            assert np.isnan(got[:, range(n), range(n)]).all()
            error = np.linalg.norm(got[:, first, second] - want)
            assert error < bound * np.linalg.norm(want), (metric, precision)
            np.testing.assert_allclose(run.together(metric), together, rtol=10 * bound)
            np.testing.assert_allclose(
                run.contrast(metric), together - alone.sum(1), rtol=0, atol=bound * np.abs(found).sum()
            )
    assert set(METRICS) - set(runs["fp64"].metrics) == {"ie", "kl", "flip", "says_clean", "says_corrupted"}


def test_a_part_inside_another_and_parts_that_do_nothing(drawn):
    """The whole vector has the coordinate in it; in the last layer no earlier position is read."""
    last = engine().spec.n_layers - 1
    parts = [("mlp_out", 1, -1), ("mlp_out.dim", 1, -1, 3), ("mlp_out", last, 0), ("z", last, 0, 1)]
    found = dp.interactions(engine(), prompt_pairs(drawn), parts, precision="fp64", metrics="logit_diff")
    values, alone = found.values("logit_diff"), found.alone("logit_diff")
    assert np.abs(alone[:, 1]).min() > TINY
    np.testing.assert_allclose(values[:, 0, 1], -alone[:, 1], rtol=1e-10)
    assert not alone[:, 2:].any()
    assert not values[:, 2, 3].any()
    assert np.abs(values[:, :2, 2:]).max() < TINY


@pytest.fixture(scope="module")
def linear():
    """One layer whose last norm divides by a constant, but for parts in a thousand: effects add up."""
    model = build("one-layer")
    model.gpt_neox.final_layer_norm.eps = model.config.layer_norm_eps = 1e6
    return model


def test_effects_that_add_up_have_no_interaction(linear):
    """They are nearly linear there; float32 does not keep what is left, and float64 is taken by itself."""
    pair = pairs(TrueModel(linear), (5,))
    parts = [("mlp_post", 0, -1, 3), ("mlp_post", 0, -1, 4), ("attn_out", 0, -1), ("z", 0, 2, 1)]
    model = dp.from_transformers(linear)
    found = dp.interactions(model, prompt_pairs(pair), parts, metrics="logit_diff")
    assert found.meta["precision"] == "fp64"
    alone, values = found.alone("logit_diff"), found.values("logit_diff")
    assert (np.abs(alone[0, :3]) > 1e-8).all()
    assert np.nanmax(np.abs(values)) < 1e-5 * np.abs(alone).max()
    true = TrueModel(linear)
    sets = [[p] for p in parts] + [[parts[0], parts[2]]]
    single = by_hand(true, pair[0], sets, "logit_diff", "denoise").astype(float)
    np.testing.assert_allclose(values[0, 0, 2], single[4] - single[0] - single[2], atol=1e-14)


def test_the_precision_follows_the_interactions(drawn, monkeypatch):
    model = engine(torch.float32)
    plain = dp.interactions(model, prompt_pairs(drawn), PARTS[:3], metrics="logit_diff")
    assert plain.meta["precision"] == "fp32"
    monkeypatch.setattr("deltapatch.analysis.interactions.TOLERANCE", 1e-12)
    strict = dp.interactions(model, prompt_pairs(drawn), PARTS[:3], metrics="logit_diff")
    assert strict.meta["precision"] == "fp64"
    assert dp.interactions(engine(), prompt_pairs(drawn), PARTS[:3]).meta["precision"] == "fp64"


def test_sixteen_bits_are_warned_of(drawn):
    options = {"metrics": "logit_diff", "noise_sample": 20}
    with pytest.warns(UserWarning, match="rounding is about"):
        rough = dp.interactions(
            engine(torch.float32), prompt_pairs(drawn), PARTS, precision="bf16", **options
        )
    fine = dp.interactions(engine(), prompt_pairs(drawn), PARTS, precision="fp64", **options)
    off = np.nan_to_num(rough.values("logit_diff") - fine.values("logit_diff"))
    error = np.linalg.norm(off) / np.linalg.norm(np.nan_to_num(fine.values("logit_diff")))
    assert rough.relative_noise("logit_diff") / 10 < error < 10 * rough.relative_noise("logit_diff")
    assert rough.relative_noise("recovered") == pytest.approx(rough.relative_noise("logit_diff"))
    assert fine.noise("logit_diff") is None


def test_a_part_that_a_pair_does_not_have(drawn):
    asked = prompt_pairs(drawn)
    parts = [("mlp_out", 0, 4), *PARTS[:2]]  # the second prompt has four tokens
    with pytest.warns(UserWarning, match="mlp_out L0 @4 in 1"):
        found = dp.interactions(engine(), asked, parts, precision="fp64")
    values = found.values("logit_diff")
    assert np.isnan(values[1, 0]).all()
    assert np.isnan(found.together("logit_diff")[1])
    assert not np.isnan(values[1, 1, 2])
    assert found.columns("logit_diff")["pair"].tolist() == [0, 0, 0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shared = dp.shapley(engine(), asked, parts, permutations=6, metric="logit_diff", precision="fp64")
    assert abs(shared.values[1, 0]) < TINY  # it adds nothing there
    np.testing.assert_allclose(shared.values.sum(1), shared.together, rtol=1e-12)


def test_all_positions_at_once_and_directions(drawn):
    rng, model = np.random.default_rng(3), engine()
    along = rng.normal(size=(2, model.spec.d_model))
    parts = [
        dp.Patch("z", 0, "together", 1),
        dp.Patch("resid_post", 1, -1, along=along[0]),
        dp.Patch("resid_post", 1, -1, along=along[1]),
        dp.Patch("mlp_out", 2, -1, add=along[0]),
    ]
    found = dp.interactions(model, prompt_pairs(drawn), parts, precision="fp64")
    assert found.names[1:3] == ["resid_post L1 @last #1", "resid_post L1 @last #2"]
    for i, pair in enumerate(drawn):
        every = [dp.Patch("z", 0, at, 1) for at in range(len(pair.clean))]
        sets = [every, [parts[1]], [parts[3]], [*every, parts[1]], [*every, parts[3]]]
        one = dp.run(model, prompt_pairs(drawn), [dp.Intervention(i, s) for s in sets], precision="fp64")
        e = one.values("logit_diff")
        np.testing.assert_allclose(found.values("logit_diff")[i, 0, 1], e[3] - e[0] - e[1], rtol=1e-8)
        np.testing.assert_allclose(found.values("logit_diff")[i, 3, 0], e[4] - e[0] - e[2], rtol=1e-8)


def encoded(lengths):
    texts = [str(t) for t in range(max(lengths))]
    return [
        EncodedPair(
            list(range(n)), [0, *range(1, n)], [1], [2], {"a": i % n}, {}, texts[:n], texts[:n], "1", "2"
        )
        for i, n in enumerate(lengths)
    ]


def spots_of(pair, at):
    if at == "together":
        return list(range(len(pair.clean)))
    return [] if pair.resolve(at) is None else [pair.resolve(at)]


PART = st.tuples(
    st.sampled_from(["mlp_out", "attn_out"]), st.integers(0, 1), st.sampled_from([0, 3, -1, "a", "together"])
)


@settings(max_examples=25, deadline=None)
@given(st.lists(PART, min_size=2, max_size=5, unique=True), st.data())
def test_sets_as_arrays_are_those_of_objects(parts, data):
    asked, spec = encoded([3, 5, 4]), engine().spec
    for pair in asked:
        spots = [(site, layer, t) for site, layer, at in parts for t in spots_of(pair, at)]
        assume(spots)
        assume(len(set(spots)) == len(spots))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        joint = Joint.of(checked_parts(parts), asked, spec, Roles(source="zero"))
    rows = st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)).filter(any)
    sets = np.array(data.draw(st.lists(rows, min_size=1, max_size=4)))
    want = []
    for i, pair in enumerate(asked):
        for members in sets:
            patches = []
            for (site, layer, at), inside in zip(parts, members, strict=True):
                patches += [dp.Patch(site, layer, t) for t in spots_of(pair, at) if inside]
            if patches:
                want.append(dp.Intervention(i, patches))
    assume(want)
    table = listed_interventions(want, asked, spec, Roles(source="zero")).table_of_all
    found = joint.listed(sets, {"set": np.arange(len(sets))}).table_of_all
    for name in ("pair", "row", *COLUMNS):
        np.testing.assert_array_equal(getattr(found, name), getattr(table, name))


def every_set(n):
    return [s for size in range(1, n + 1) for s in itertools.combinations(range(n), size)]


@pytest.fixture(scope="module")
def all_sets(drawn):
    """The effects of every set of the first five parts, one by one: set -> [pair], and the whole way."""
    sets = every_set(5)
    true = true_model(VARIANT)
    e = np.stack(
        [by_hand(true, p, [[PARTS[i] for i in s] for s in sets], "logit_diff", "denoise") for p in drawn]
    )
    gap = [
        true.effects(p, [[Patch("resid_pre", 0, t) for t in range(len(p.clean))]])["logit_diff"][0]
        for p in drawn
    ]
    return {s: e[:, i].astype(float) for i, s in enumerate(sets)} | {(): np.zeros(2)}, float(np.mean(gap))


def test_shapley_values_by_definition(drawn, all_sets):
    effects, n = all_sets[0], 4
    options = {"metric": "logit_diff", "precision": "fp64"}
    found = dp.shapley(engine(), prompt_pairs(drawn), PARTS[:n], permutations=24, **options)
    want = np.zeros((2, n))
    for part in range(n):
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - 1 - size) / math.factorial(n)
            for s in itertools.combinations([i for i in range(n) if i != part], size):
                want[:, part] += weight * (effects[tuple(sorted((*s, part)))] - effects[s])
    np.testing.assert_allclose(found.values, want, rtol=1e-8)
    assert found.orders == 24
    assert not found.stderr.any()
    single = sum(effects[(i,)] for i in range(n))
    np.testing.assert_allclose(found.contrast, effects[tuple(range(n))] - single, rtol=1e-7)
    sampled = dp.shapley(engine(), prompt_pairs(drawn), PARTS[:n], permutations=12, seed=3, **options)
    assert sampled.orders == 12
    assert (sampled.stderr > 0).all()
    np.testing.assert_allclose(sampled.values.sum(1), found.together, rtol=1e-10)
    assert (np.abs(sampled.values.mean(0) - want.mean(0)) < 6 * sampled.stderr).all()
    assert "contrast" in repr(found)
    assert found.table().columns["logit_diff"].tolist() == sorted(want.mean(0), reverse=True) or np.allclose(
        found.table().columns["logit_diff"], sorted(want.mean(0), reverse=True)
    )


@pytest.mark.parametrize("beam", [1, 10])
def test_the_smallest_set_beside_exhaustive_search(drawn, all_sets, beam):
    effects, gap = all_sets
    recovered = {s: e.mean() / gap for s, e in effects.items()}
    best = {n: max((s for s in recovered if len(s) == n), key=recovered.get) for n in range(1, 6)}
    share = max(recovered[best[n]] for n in (1, 2)) + 1e-6  # takes three parts or more, where any are enough
    enough = [n for n in best if recovered[best[n]] >= share]
    found = dp.smallest_set(
        engine(), prompt_pairs(drawn), PARTS[:5], share=share, beam=beam, precision="fp64"
    )
    sizes, curve = found.curve("search")
    assert sizes.tolist() == list(range(1, len(sizes) + 1))
    for n, value in zip(sizes.tolist(), curve, strict=True):
        assert value <= recovered[best[n]] + 1e-9
        if beam == 10:  # follows every set there is
            assert value == pytest.approx(recovered[best[n]], rel=1e-8)
    if beam == 10:
        assert bool(found.parts) == bool(enough)
        assert len(found.parts) == (min(enough) if enough else 0)
    order = np.argsort([-recovered[(i,)] for i in range(5)])
    top = [recovered[tuple(sorted(order[:k].tolist()))] for k in range(1, 6)]
    np.testing.assert_allclose(found.curve("top")[1], top, rtol=1e-8)
    for step in found.steps:
        assert step.recovered == pytest.approx(recovered[step.members], rel=1e-8)
        assert step.low <= step.recovered + 1e-9
    assert len(found.table()) == len(found.steps)


class Game:
    """Stands for carrying out: part 0 is best alone, and parts 1 and 2 do everything together."""

    WORTH = {(0,): 0.6, (1,): 0.5, (2,): 0.4, (0, 1): 0.7, (0, 2): 0.65, (1, 2): 0.95, (0, 1, 2): 1.0}  # noqa: RUF012
    parts = (Part("z", 0, -1, 0), Part("z", 0, -1, 1), Part("z", 0, -1, 2))
    rows = 0

    def __len__(self):
        return 3

    def effects(self, sets):
        self.rows += len(sets)
        return np.array([[self.WORTH[tuple(np.flatnonzero(s).tolist())] for s in sets]])

    def mean(self, values):
        return values.mean(0)

    def interval(self, values):
        return values.mean(0), values.mean(0)


def test_what_is_not_needed_is_taken_out_again(drawn, monkeypatch):
    monkeypatch.setattr("deltapatch.analysis.smallest_set.PartSets", lambda *_: Game())
    greedy = dp.smallest_set(None, None, PARTS[:3])
    told = [(s.method, s.members) for s in greedy.steps if s.method != "top"]
    assert told == [("search", (0,)), ("search", (0, 1)), ("search", (0, 1, 2)), ("pruned", (1, 2))]
    assert greedy.smallest("search").members == (0, 1, 2)
    assert greedy.parts == [Game.parts[1], Game.parts[2]]
    wide = dp.smallest_set(None, None, PARTS[:3], beam=3)
    assert [s.members for s in wide.steps if s.method == "search"] == [(0,), (1, 2)]
    assert "pruned: 2 parts recover 0.95" in repr(greedy)
    with pytest.raises(DeltapatchError, match="unknown method"):
        greedy.smallest("luck")


def test_what_never_is_enough(drawn):
    limited = dp.smallest_set(engine(), prompt_pairs(drawn), PARTS[:5], share=50, most=2, precision="fp64")
    assert limited.parts == []
    assert math.isnan(limited.recovered)
    assert "no set that was tried recovers 50" in repr(limited)


def test_orders_grow():
    np.testing.assert_array_equal(
        growing(np.array([[2, 0, 1]])), [[[False, False, True], [True, False, True], [True, True, True]]]
    )


def test_run_folders(drawn, tmp_path):
    asked, options = prompt_pairs(drawn), {"precision": "fp32", "metrics": ["recovered", "dp_clean"]}
    model = engine(torch.float32)
    found = dp.interactions(model, asked, PARTS, out=tmp_path / "run", **options)
    for way in ("run", "saved"):
        if way == "saved":
            dp.interactions(model, asked, PARTS, **options).save(tmp_path / way)
        back = dp.load_interactions(tmp_path / way)
        assert back.parts == found.parts
        assert [p.position for p in back.parts[1:3]] == [-1, "subject"]
        for metric in ("recovered", "logit_diff", "dp_clean"):
            np.testing.assert_array_equal(back.values(metric), found.values(metric))
    for part in (1, 2):
        dp.interactions(model, asked, PARTS, out=tmp_path / "parts", shard=(part, 2), **options)
    from deltapatch.results.merge import merge

    merge(tmp_path / "parts")
    resumed = dp.interactions(model, asked, PARTS, out=tmp_path / "parts", resume=True, **options)
    np.testing.assert_array_equal(resumed.values("recovered"), found.values("recovered"))
    with pytest.raises(DeltapatchError, match="list of interventions"):
        dp.interactions(model, asked, PARTS[:-1], out=tmp_path / "parts", resume=True, **options)
    dp.run(model, asked, dp.Intervention(0, [dp.Patch("z", 0, -1, 0)])).save(tmp_path / "plain")
    with pytest.raises(DeltapatchError, match="has no interactions"):
        dp.load_interactions(tmp_path / "plain")


def test_the_top_of_a_sweep(drawn):
    effects = dp.sweep(
        engine(torch.float32), prompt_pairs(drawn), sites=["z", "mlp_out"], positions=["last", "subject"]
    )
    parts = dp.top_parts(effects, 7, "logit_diff")
    z = np.abs(effects.values("logit_diff", site="z").mean(0)).ravel()
    whole = np.abs(effects.values("logit_diff", site="mlp_out").mean(0)).ravel()
    sizes = [
        abs(
            effects.values("logit_diff", site=p.site).mean(0)[
                (
                    p.layer,
                    effects.positions(p.site).index(p.position),
                    *([] if p.index is None else [p.index]),
                )
            ]
        )
        for p in parts
    ]
    np.testing.assert_allclose(sizes, np.sort(np.concatenate([z, whole]))[::-1][:7])
    assert {p.site for p in dp.top_parts(effects, 3, sites=["z"])} == {"z"}
    assert len(dp.interactions(engine(torch.float32), prompt_pairs(drawn), parts, metrics="logit_diff")) == 21
    with pytest.raises(DeltapatchError, match="at least one part"):
        dp.top_parts(effects, 0)


def test_what_is_shown(drawn):
    found = dp.interactions(engine(torch.float32), prompt_pairs(drawn), PARTS[:4], metrics="logit_diff")
    first, second = np.triu_indices(4, 1)
    mean = found.values("logit_diff").mean(0)[first, second]
    table = found.top(3, "logit_diff")
    np.testing.assert_allclose(
        np.abs(table.columns["logit_diff"]), np.sort(np.abs(mean))[::-1][:3], rtol=1e-12
    )
    frame = found.to_pandas(["logit_diff", "recovered"])
    assert list(frame.columns) == ["pair", "first", "second", "logit_diff", "recovered"]
    assert len(frame) == 12
    assert "Interactions of 4 parts, 6 pairs of them" in repr(found)
    assert found.names[0] in found._repr_html_()
    assert len(found.plot("logit_diff").axes) == 2
    alone = dp.interactions(engine(torch.float32), prompt_pairs(drawn)[:1], PARTS[:3], metrics="logit_diff")
    assert "q" not in alone.top(3, "logit_diff").columns  # one prompt pair says nothing of the spread


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ([("z", 0, -1, 1)], {}, "1 part(s) were given"),
        ([("z", 0, -1, 1), "mlp"], {}, "part 1 must be a Patch or"),
        ([("z", 0, -1, 1), ("z", 0, -1, 99)], {}, "part 1: site z needs an index"),
        ([("z", 0, -1, 1), ("mlp_out", 9, -1)], {}, "part 1: layer 9 does not exist"),
        ([("z", 0, -1, 1), ("mlp_out", 0, 1.5)], {}, "part 1: a position must be"),
        ([("z", 0, -1, 1), ("nowhere", 0, -1)], {}, "unknown site 'nowhere'"),
        ([("z", 0, -1, 1), ("mlp_out", 0, "object")], {}, "mlp_out L0 @object does not exist in any pair"),
        ([("z", 0, 4, 1), ("mlp_out", 0, 4)], {}, "pair 1 has none of the parts"),
        ([("z", 0, -1, 1), ("z", 0, -1, 1)], {}, "z L0.H1 @last #1 and z L0.H1 @last #2 are the same"),
        ([("resid_pre", 1, -1), ("resid_post", 0, -1)], {}, "are the same activation in pair 0"),
        ([dp.Patch("z", 0, -1, 1, into="logits"), ("z", 0, -1, 2)], {}, "part 0 says `into`"),
        (PARTS[:2], {"metrics": "kl"}, "effects in kl do not add up"),
        (PARTS[:2], {"metrics": ["logit_diff", "flip"]}, "effects in flip do not add up"),
    ],
)
def test_what_is_refused(drawn, parts, options, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DeltapatchError, match=re.escape(message)):
            dp.interactions(engine(), prompt_pairs(drawn), parts, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *a: dp.shapley(*a, permutations=1), "at least 2"),
        (lambda *a: dp.shapley(*a, metric="kl"), "effects in kl do not add up"),
        (lambda *a: dp.shapley(*a, out="run"), "leave out `out`"),
        (lambda *a: dp.smallest_set(*a, share=0), "share must be above 0"),
        (lambda *a: dp.smallest_set(*a, share="most"), "share must be a number"),
        (lambda *a: dp.smallest_set(*a, beam=0), "beam must be at least 1"),
        (lambda *a: dp.smallest_set(*a, most=0), "most must be at least 1"),
        (lambda *a: dp.smallest_set(*a, metrics="kl"), "leave out `metrics`"),
    ],
)
def test_what_sets_refuse(drawn, call, message):
    with pytest.raises(DeltapatchError, match=re.escape(message)):
        call(engine(), prompt_pairs(drawn), PARTS[:3])
    found = dp.interactions(engine(), prompt_pairs(drawn), PARTS[:3], metrics="logit_diff")
    with pytest.raises(DeltapatchError, match="did not measure"):
        found.values("dp_clean")
