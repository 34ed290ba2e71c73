"""Answers of several tokens: the log-probability of the whole answer, against the oracle.

The oracle runs each answer by itself, after its prompt in a plain forward; the engine has both in one run.
"""

import numpy as np
import pytest
from engine_oracle import FLAGS, METRICS, Patch, TrueModel, answers_of
from engine_tiny import (
    VARIANTS,
    model_of,
    nearly_equal_tokens,
    pairs,
    prompt_pairs,
    random_pair,
    said,
    true_model,
    with_long_answers,
    without_overlaps,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import deltapatch
from deltapatch import DeltapatchError
from deltapatch.engine.planning.planner import Costs
from deltapatch.interventions.runs import NONE, continuation
from deltapatch.kernels.readout_tail import TOLERANCE as TAIL

ANCHORS = ([Patch("resid_pre", 0, 1)], [Patch("resid_post", 1, -1)])  # effects of ordinary size
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-8}
DIRECTIONS = ("denoise", "noise")
# How many tokens clean and corrupted answer have, and how many of the first are the same.
SHAPES = (
    ((1, 1), 0), ((2, 2), 0), ((2, 2), 1), ((3, 2), 0), ((3, 4), 2), ((1, 3), 0), ((4, 1), 0),
    ((1, 3), 1), ((4, 2), 2), ((2, 2), 2), ((3, 3), 3), ((4, 4), 3),
)  # fmt: skip


def answered(true, shapes, lengths=(5, 4), seed=0):
    """A pair of each shape of answers, with prompts of these lengths in turn."""
    drawn = pairs(true, [lengths[i % len(lengths)] for i in range(len(shapes))], seed)
    return [
        with_long_answers(true, pair, *shape, seed=10 * seed + i)
        for i, (pair, shape) in enumerate(zip(drawn, shapes, strict=True))
    ]


def sweep(engine, drawn, sites, **options):
    return deltapatch.sweep(engine, prompt_pairs(drawn), sites=sites, progress=False, **options)


def run(engine, drawn, interventions, **options):
    """Interventions are (pair, patches)."""
    asked = [
        deltapatch.Intervention(i, [deltapatch.Patch(*patch) for patch in patches])
        for i, patches in interventions
    ]
    return deltapatch.run(engine, prompt_pairs(drawn), asked, progress=False, **options)


def assert_agrees(values, want, tolerance, where, metrics=METRICS, nothing=1e-12):
    """`values(metric)` and want[metric] agree: their difference is small beside the norm of the whole set."""
    for metric in metrics:
        got, right = values(metric), want[metric]
        assert np.array_equal(np.isnan(got), np.isnan(right)), f"{where}, {metric}"
        error, scale = (np.linalg.norm(np.nan_to_num(x)) for x in (got - right, right))
        twice = 2 if metric in ("ie", "dp_clean", "dp_corrupted", "prob_diff") else 1  # exponentials
        allowed = 0 if metric in FLAGS else twice * tolerance * (scale if scale > nothing else 1)
        assert error <= allowed, f"{where}, {metric}: {error / max(scale, 1e-300):.1e}"


def assert_sweep_agrees(true, engine, drawn, sites, precision, positions=None, **options):
    asked = {"positions": "all" if positions is None else positions}
    effects = sweep(engine, drawn, sites, precision=precision, **asked, **options)
    for site in sites:
        want = true.sweep(drawn, site, positions, **options)
        where = f"{site}, {precision}, {options}"
        metrics = [m for m in METRICS if m != "recovered"]
        assert_agrees(lambda m, s=site: effects.values(m, s), want, TOLERANCE[precision], where, metrics)
        for i, pair in enumerate(drawn):
            # Alone too: the probability of a long answer is small. What its tokens change may cancel.
            assert_agrees(
                lambda m, i=i, s=site: effects.values(m, s)[i],
                {m: want[m][i] for m in METRICS},
                TOLERANCE[precision] * (10 if precision == "fp32" else 1),
                f"{where}, {pair}",
                metrics_of(pair),
            )
    return effects


def metrics_of(pair):
    """All but, where the answers do not part at apt tokens, the one that divides by what they are apart."""
    apart = any(a != b for a, b in zip(*answers_of(pair), strict=False))
    return [m for m in METRICS if apart or m != "recovered"]


# ---------------------------------------------------------------------------------------------- sweeps


@pytest.mark.filterwarnings("ignore:recovered is undefined")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_sites_at_all_positions(variant, direction):
    """Answers of every shape in one sweep."""
    true = true_model(variant)
    drawn = answered(true, SHAPES[direction == "noise" :: 2], (4, 3))
    assert_sweep_agrees(true, model_of(variant), drawn, true.sites(), "fp32", direction=direction)


@pytest.mark.filterwarnings("ignore:recovered is undefined")
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_float64_at_some_positions(variant):
    """Positions from the end and labels are of the prompt, whatever follows it."""
    true = true_model(variant)
    drawn = answered(true, SHAPES, (4, 6, 1, 4), seed=1)
    sites = ["mlp_out", "z", "k", "mlp_post", "v", "attn_out.dim"]
    positions = [-1, 0, "subject", -3]
    effects = assert_sweep_agrees(
        true, model_of(variant, "fp64"), drawn, sites, "fp64", positions, direction="noise", source="zero"
    )
    assert effects.meta["answer_tokens"] == 4


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("variant", ["neox-sequential", "gptj", "llama-grouped"])
def test_random_joint_patches(variant, precision):
    true = true_model(variant)

    def patch(site):
        size = true.n_indices(site)
        index = st.integers(0, size - 1) if size else st.none()
        return st.builds(Patch, st.just(site), st.integers(0, true.n_layers - 1), st.integers(-5, -1), index)

    sets = st.lists(st.sampled_from(true.sites()).flatmap(patch), min_size=1, max_size=6)

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(
        st.lists(sets.map(without_overlaps), min_size=1, max_size=4),
        st.lists(st.sampled_from(SHAPES), min_size=2, max_size=3),
        st.integers(0, 100),
        st.sampled_from(DIRECTIONS),
    )
    def check(joint, shapes, seed, direction):
        drawn = answered(true, shapes, (5,), seed)
        asked = [(i, patches) for i in range(len(drawn)) for patches in (*joint, *ANCHORS)]
        outcome = run(model_of(variant, precision), drawn, asked, precision=precision, direction=direction)
        each = [true.effects(pair, [*joint, *ANCHORS], direction) for pair in drawn]
        want = {m: np.concatenate([effects[m] for effects in each]) for m in METRICS}
        metrics = [m for m in METRICS if m != "recovered"]
        assert_agrees(outcome.values, want, TOLERANCE[precision], f"{variant}, {drawn}, {joint}", metrics)

    check()


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_effects(variant, precision):
    """Prompts that hardly differ: effects of 1e-6, of every token of an answer."""
    hf, pair = nearly_equal_tokens(variant, {"fp32": 1e-6, "fp64": 1e-5}[precision])
    exact = TrueModel(hf, np.longdouble)
    two = [
        pair._replace(clean_answer=[30, 40, 7], corrupted_answer=[11, 5]),
        pair._replace(clean_answer=[3, 40], corrupted_answer=[3, 11]),
    ]
    engine = deltapatch.from_transformers(hf.double() if precision == "fp64" else hf)
    sites = [s for s in exact.sites() if not s.endswith((".dim", "_post", "q"))]
    effects = sweep(engine, two, sites, positions=[1, -1], precision=precision)
    for site in sites:
        want = exact.sweep(two, site, [1, -1])
        assert 0 < np.abs(want["dlogp_clean"]).max() < 1e-4
        for i, leave_out in enumerate((("recovered",), ("recovered", "ie"))):
            # Where both answers begin alike, the indirect effect is the difference of nearly equal numbers.
            assert_agrees(
                lambda m, i=i, site=site: effects.values(m, site=site)[i],
                {m: want[m][i] for m in METRICS},
                TOLERANCE[precision],
                f"{site}, pair {i}",
                [m for m in METRICS if m not in leave_out],
                nothing=0,
            )


@pytest.mark.parametrize("variant", ["neox-parallel", "llama-grouped"])
def test_what_the_run_says(variant):
    """Answers that the clean and the corrupted run really give: patches change what is said, at any token."""
    true = true_model(variant)
    prompts = [
        p for p in pairs(true, (4, 5) * 6, seed=3) if said(true, p.clean, 1) != said(true, p.corrupted, 1)
    ]
    drawn = [
        pair._replace(clean_answer=said(true, pair.clean, n), corrupted_answer=said(true, pair.corrupted, n))
        for n, pair in zip((1, 2, 3, 3), prompts, strict=False)
    ]
    assert len(drawn) == 4
    sites = ["resid_pre", "resid_post", "mlp_out", "attn_out"]
    for direction in DIRECTIONS:
        effects = assert_sweep_agrees(true, model_of(variant), drawn, sites, "fp32", direction=direction)
        assert effects.accuracy() == 1
        found = {m: np.concatenate([effects.values(m, site=s).ravel() for s in sites]) for m in FLAGS}
        assert 0 < np.nanmean(found["says_clean"]) < 1
        assert 0 < np.nanmean(found["says_corrupted"]) < 1
        assert np.nanmax(found["says_clean"] + found["says_corrupted"]) == 1
    half = [pair._replace(clean_answer=[*pair.clean_answer[:-1], 0]) for pair in drawn]
    assert sweep(model_of(variant), half, "mlp_out", positions="last").accuracy() == 0.5


def test_a_patch_that_changes_nothing_gives_exactly_zero():
    pair = random_pair(5, seed=4, first=2)._replace(clean_answer=[4, 5, 6], corrupted_answer=[4, 9])
    effects = sweep(
        model_of("gptj"), [pair, pair._replace(corrupted=pair.clean)], ["z", "mlp_post", "resid_pre"]
    )
    for site in effects.sites:
        for metric in ("ie", "logit_diff", "dlogp_clean", "dlogp_corrupted", "kl", "entropy", "flip"):
            values = effects.values(metric, site=site)
            assert (values[1] == 0).all()
            assert (values[0, :, :2] == 0).all()


# ------------------------------------------------------------------------------------ one run, many ways


@pytest.fixture
def tight(monkeypatch):
    """A tiny model's workspace is a thousand times its rows: count the rows alone, and dearly."""
    monkeypatch.setattr(Costs, "of", classmethod(lambda cls, *args, **named: Costs(0, 0, 0, 10, 10)))


@pytest.mark.parametrize(
    "source",
    ["counterpart", "noise", *(pytest.param(s, marks=pytest.mark.slow) for s in ("mean", "resample"))],
)
def test_many_passes_give_what_one_gives(source, tight):
    drawn = answered(true_model("llama-grouped"), SHAPES[:8], (5, 3))
    options = {"source": source, "seed": 3, "precision": "fp64"}
    one = sweep(model_of("llama-grouped", "fp64"), drawn, ["mlp_out", "k", "mlp_post"], **options)
    many = sweep(
        model_of("llama-grouped", "fp64"), drawn, ["mlp_out", "k", "mlp_post"], memory_budget=2500, **options
    )
    assert (one.meta["passes"], many.meta["rows"]) == (1, one.meta["rows"])
    assert many.meta["passes"] > 10
    for site in one.sites:
        for name in one.sites[site].measured:
            a, b = (e.values(name, site=site) for e in (one, many))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * np.nanmax(np.abs(a)) + 1e-13)
    for name, array in one.reference.arrays().items():
        np.testing.assert_allclose(array, getattr(many.reference, name), atol=1e-12)


def test_a_run_folder_holds_them_and_resumes(tmp_path, tight):
    drawn = answered(true_model("gptj"), SHAPES[:5], (5, 3))
    options = {"precision": "fp32", "memory_budget": 3000, "noise_sample": 0}
    effects = sweep(model_of("gptj"), drawn, ["mlp_out", "z"], out=tmp_path / "whole", **options)
    for part in (1, 2):
        sweep(model_of("gptj"), drawn, ["mlp_out", "z"], out=tmp_path / "run", shard=(part, 2), **options)
    (tmp_path / "run/unfinished/1.safetensors").unlink()
    again = sweep(model_of("gptj"), drawn, ["mlp_out", "z"], out=tmp_path / "run", resume=True, **options)
    loaded = deltapatch.load_effects(tmp_path / "run")
    for found in (again, loaded):
        assert found.pairs == effects.pairs
        assert found.accuracy() == effects.accuracy()
        for metric in ("ie", "says_clean", "recovered"):
            assert np.array_equal(found.values(metric, "z"), effects.values(metric, "z"), equal_nan=True)
    assert (tmp_path / "run/effects.safetensors").read_bytes() == (
        tmp_path / "whole/effects.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "asked",
    [["logit_diff"], ["kl"], ["entropy"], ["flip", "dp_clean"], ["dlogp_corrupted"], ["says_clean"], ["ie"]],
    ids=str,
)
def test_metrics_that_are_asked_for_alone_are_what_they_are_among_all(asked):
    drawn = answered(true_model("neox-sequential"), SHAPES)
    few, every = (sweep(model_of("neox-sequential"), drawn, "z", metrics=m) for m in (asked, "all"))
    for name in asked:
        a, b = few.values(name), every.values(name)
        assert np.array_equal(np.isnan(a), np.isnan(b))
        assert np.linalg.norm(np.nan_to_num(a - b)) <= 1e-6 * np.linalg.norm(np.nan_to_num(b))


def test_the_expansion_of_the_read_out_keeps_its_bound(monkeypatch):
    drawn = answered(true_model("neox-parallel"), SHAPES)
    options = {"metrics": ["ie", "logit_diff"], "noise_sample": 0}
    want = sweep(model_of("neox-parallel", "fp64"), drawn, "mlp_post", precision="fp64", **options)
    plain = sweep(model_of("neox-parallel"), drawn, "mlp_post", precision="fp16", **options)
    made = []
    path = "deltapatch.engine.wavefront.readout.worth_a_tail"
    monkeypatch.setattr(path, lambda *sizes: made.append(1) or True)
    got = sweep(model_of("neox-parallel"), drawn, "mlp_post", precision="fp16", **options)
    assert made
    changed = False
    for name in ("dlogp_clean", "dlogp_corrupted", "logit_diff"):
        right, whole, found = (np.nan_to_num(e.values(name)) for e in (want, plain, got))
        size = np.linalg.norm(right)
        assert np.linalg.norm(found - right) <= np.linalg.norm(whole - right) + TAIL["fp16"] * size
        changed |= bool((found != whole).any())
    assert changed


# --------------------------------------------------------------------------------------- shapes and errors


def test_continuations():
    def of(clean, corrupted):
        found = continuation(clean, corrupted)
        return found.tokens, found.fork, found.targets

    assert of([5], [6]) == ([], None, [(5, 6)])
    assert of([4, 1], [4, 2]) == ([4], None, [(4, 4), (1, 2)])
    assert of([4, 1], [5, 2]) == ([4, 5], (0, 1), [(4, 5), (1, NONE), (NONE, 2)])
    assert of([7], [4, 2]) == ([4], None, [(7, 4), (NONE, 2)])
    assert of([4, 2, 9], [4]) == ([4, 2], None, [(4, 4), (2, NONE), (9, NONE)])
    assert of([1, 2, 3, 4], [1, 5, 6]) == (
        [1, 2, 3, 5],
        (1, 3),
        [(1, 1), (2, 5), (3, NONE), (4, NONE), (NONE, 6)],
    )
    assert of([1, 2], [1, 2]) == ([1], None, [(1, 1), (2, 2)])


answers = st.lists(st.integers(0, 2), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(answers, answers)
def test_every_token_of_both_answers_is_read_after_those_before_it(clean, corrupted):
    found = continuation(clean, corrupted)
    shape = found.shape(3)
    run = [-3, -2, -1, *found.tokens]
    assert shape.length == len(run)
    assert shape.reads == len(found.targets)
    seen = {0: [], 1: []}  # what each answer's next token comes after
    for at, targets in enumerate(found.targets, start=2):
        first, second = shape.fork or (len(run), len(run))
        before = [t for i, t in enumerate(run[: at + 1]) if not (at >= second and first <= i < second)]
        assert shape.positions[at] == len(before) - 1
        for i, token in enumerate(targets):
            if token != NONE:
                assert before == [-3, -2, -1, *seen[i]]
                seen[i].append(token)
    assert [seen[0], seen[1]] == [clean, corrupted]


def test_answers_of_one_token_add_nothing(monkeypatch):
    """Not to a run, not to a row, not to what is read."""
    (pair,) = pairs(true_model("gptj"), (5,))
    spelt = pair._replace(clean_answer=[pair.clean_answer], corrupted_answer=[pair.corrupted_answer])
    one, other = (sweep(model_of("gptj"), [p], ["mlp_out", "z"]) for p in (pair, spelt))
    assert one.pairs == other.pairs
    assert one.meta["answer_tokens"] == 1
    for site in one.sites:
        for name, values in one.sites[site].measured.items():
            assert np.array_equal(values, other.sites[site].measured[name])
    run = continuation(one.pairs[0].clean_answer, one.pairs[0].corrupted_answer).shape(5)
    assert (run.length, run.reads, run.fork) == (5, 1, None)


def test_they_are_said_out_loud():
    drawn = answered(true_model("gptj"), SHAPES[:4])
    effects = sweep(model_of("gptj"), drawn, "mlp_out", positions="last")
    assert effects.meta["answer_tokens"] == 3
    assert "answers of up to 3 tokens" in repr(effects)
    assert "tokens" not in repr(sweep(model_of("gptj"), drawn[:1], "mlp_out", positions="last"))


def test_another_readout_is_for_answers_of_one_token():
    drawn = answered(true_model("gptj"), SHAPES[:2])
    with pytest.raises(DeltapatchError, match=r"pair 1 has an answer of 2 tokens.*leave out readout=2"):
        sweep(model_of("gptj"), drawn, "mlp_out", readout=2)
    effects = sweep(model_of("gptj"), drawn, "mlp_out", readout=-1)
    same = sweep(model_of("gptj"), drawn, "mlp_out")
    assert np.array_equal(effects.values("ie"), same.values("ie"), equal_nan=True)


def test_dynamic_rotary_scaling_beyond_the_context():
    """Its angles depend on how many tokens there are: what follows a prompt would change it."""
    drawn = answered(true_model("llama-dynamic"), SHAPES[:2], (4,))
    with pytest.raises(DeltapatchError, match=r"pair 1 has an answer of 2 tokens.* dynamic rotary scaling"):
        sweep(model_of("llama-dynamic"), drawn, "mlp_out")
    (short,) = answered(true_model("llama-dynamic"), SHAPES[1:2], (3,))
    assert np.isfinite(sweep(model_of("llama-dynamic"), [short], "mlp_out").values("ie")).all()
