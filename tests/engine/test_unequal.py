"""Pairs whose prompts have unequal numbers of tokens, and what lines up of them, against the oracle."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_edge_oracle import OWN, SOURCE, effects, total
from engine_oracle import FLAGS, METRICS, Pair, Patch, counterparts
from engine_tiny import VOCAB, model_of, pairs, true_model, with_apt_answers, with_long_answers

import deltapatch as dp
from deltapatch import DeltapatchError
from deltapatch.analysis.attribution import attribute_edges
from deltapatch.analysis.positions import aligned
from deltapatch.engine.options import SweepOptions
from deltapatch.engine.question import ask
from deltapatch.explore.collect import collect
from deltapatch.study.oracle import check_run

ENDS = "prefix+suffix"
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-8}
DIRECTIONS = ("denoise", "noise")
# Parallel and sequential blocks, rotary of two kinds, learned positions, windows, norms of heads.
VARIANTS = ("neox-parallel", "neox-sequential", "gptj", "gpt2", "gemma2", "qwen3", "phi3")
QUICK = ("neox-sequential", "gptj", "gemma2")  # the others are slow
EXPONENTIAL = ("ie", "dp_clean", "dp_corrupted", "prob_diff")


def drawn(variant, seed=0, middles=((2, 3), (2, 0)), answers=None):
    """Pairs that begin in two tokens and end in two, with so many tokens between in either prompt."""
    rng, true = np.random.default_rng(seed), true_model(variant)
    out = []
    for i, sizes in enumerate(middles):
        tokens = rng.permutation(VOCAB).tolist()
        begin, end = tokens[:2], tokens[2:4]
        clean, corrupted = tokens[4 : 4 + sizes[0]], tokens[10 : 10 + sizes[1]]
        pair = Pair([*begin, *clean, *end], [*begin, *corrupted, *end], 0, 0, {"subject": 1}, align=ENDS)
        apt = with_apt_answers(true, pair)
        out.append(apt if answers is None else with_long_answers(true, apt, *answers[i], seed=seed + i))
    return out


def mapped(variant, seed=0):
    """Pairs lined up by lists: of unequal and of equal length, in step and shifted."""
    whole = pairs(true_model(variant), (6, 5), seed=seed)
    unequal = whole[0]._replace(clean=whole[0].clean[:4], align=[[0, 1], [2, 3], [-1, -1]])
    shifted = whole[0]._replace(align=[[0, 1], [1, 3], [4, 5]])
    in_step = whole[1]._replace(align=[[1, 1], [3, 3], [4, 4]])
    return [unequal, shifted, in_step, whole[1]]


def asked(given):
    return [dp.PromptPair(**pair._asdict()) for pair in given]


def sweep(variant, given, sites, precision="fp32", **options):
    own = {"sites": sites, "precision": precision, "progress": False, "noise_sample": 0}
    return dp.sweep(model_of(variant, precision), asked(given), **own | options)


def sites_of(variant):
    return [site for site in true_model(variant).sites() if site != "pattern"]


def assert_agrees(got, want, tolerance, where):
    for metric in METRICS:
        values, right = got(metric), want[metric]
        assert np.array_equal(np.isnan(values), np.isnan(right)), f"{where}, {metric}"
        error, scale = (np.linalg.norm(np.nan_to_num(x)) for x in (values - right, right))
        allowed = 0 if metric in FLAGS else tolerance * (2 if metric in EXPONENTIAL else 1) * (scale or 1)
        assert error <= allowed, f"{where}, {metric}: {error / max(scale, 1e-300):.1e}"


def assert_sweep_agrees(variant, given, sites, precision, positions="all", **options):
    found = sweep(variant, given, sites, precision, positions=positions, **options)
    listed = None if positions == "all" else positions
    for site in sites:
        want = true_model(variant).sweep(given, site, listed, **options)
        assert_agrees(
            lambda metric, s=site: found.values(metric, s), want, TOLERANCE[precision], f"{variant}, {site}"
        )
    return found


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "variant",
    [v if v in QUICK else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS],
)
def test_all_sites_at_all_positions(variant, direction):
    """Beside pairs of equal length, in the same passes."""
    given = [*drawn(variant), *pairs(true_model(variant), (5,))]
    found = assert_sweep_agrees(variant, given, sites_of(variant), "fp32", direction=direction)
    there = np.isfinite(found.values("kl", "mlp_out")[:, 0])  # [pair, position]
    want = np.zeros_like(there)
    for i, pair in enumerate(given):
        want[i, list(counterparts(pair))] = True
    assert np.array_equal(there, want)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("variant", ["neox-sequential", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_in_float64(variant, direction):
    given = [*drawn(variant, 1), *mapped(variant, 1)]
    assert_sweep_agrees(variant, given, sites_of(variant), "fp64", [-1, 0, 3, "subject"], direction=direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lists_of_positions(direction):
    assert_sweep_agrees("gptj", mapped("gptj"), sites_of("gptj"), "fp32", direction=direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_zero_needs_no_counterpart(direction):
    """Only a place in the base run: of the clean prompt every position has one."""
    given = [*drawn("llama", 2), *mapped("llama", 2)]
    sites = ["mlp_out", "z", "q", "mlp_post"]
    found = assert_sweep_agrees("llama", given, sites, "fp32", direction=direction, source="zero")
    if direction == "noise":
        assert np.isfinite(found.values("kl", "z")[0, 0, : len(given[0].clean)]).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_answers_of_several_tokens(direction):
    given = drawn("neox-parallel", 3, answers=[((3, 2), 1), ((1, 3), 0)])
    assert_sweep_agrees("neox-parallel", given, ["mlp_out", "k", "z"], "fp32", direction=direction)


@pytest.mark.parametrize("variant", ["gpt2", "llama-grouped"])
def test_joint_patches(variant):
    true, given, rng = (
        true_model(variant),
        [*drawn(variant, 4), mapped(variant, 4)[0]],
        np.random.default_rng(4),
    )
    sites = ["resid_pre", "q", "k", "v", "z", "mlp_post", "attn_out"]
    listed = []
    for i, pair in enumerate(given):
        for _ in range(6):
            some = [(s, l, p) for s in sites for l in range(true.n_layers) for p in counterparts(pair)]
            chosen = [some[j] for j in rng.choice(len(some), 3, replace=False)]
            listed.append((i, [Patch(s, l, p, 1 if true.n_indices(s) else None) for s, l, p in chosen]))
    found = dp.run(
        model_of(variant),
        asked(given),
        [dp.Intervention(i, [dp.Patch(*patch) for patch in patches]) for i, patches in listed],
        precision="fp32",
        progress=False,
    )
    for i, pair in enumerate(given):
        mine = [n for n, (own, _) in enumerate(listed) if own == i]
        want = true.effects(pair, [listed[n][1] for n in mine])
        assert_agrees(lambda metric, m=mine: found.values(metric)[m], want, 1e-5, f"{variant}, pair {i}")


def test_what_only_sees_the_same_tokens_is_exactly_zero():
    """And not nearly: both runs begin alike, though they go through the layers side by side."""
    found = sweep("llama", drawn("llama", 5), ["resid_post", "k", "mlp_post"], positions=[0, 1])
    for site in ("resid_post", "k", "mlp_post"):
        assert (found.values("logit_diff", site) == 0).all()
        assert (found.values("kl", site) == 0).all()
    same = pairs(true_model("llama"), (5,))[0]
    twice = same._replace(corrupted=same.clean)
    for align in (None, ENDS, [[1, 1], [3, 3]]):
        effects = sweep("llama", [twice._replace(align=align)], ["mlp_out", "z"], metrics="kl").values(
            "kl", "z"
        )
        assert (np.nan_to_num(effects) == 0).all()


def test_where_angles_depend_on_the_length_even_the_beginning_differs():
    """Dynamic rotary scaling turns every token of a longer prompt by other angles."""
    given = drawn("llama-dynamic", 6)
    assert_sweep_agrees("llama-dynamic", given, ["k", "z", "resid_post"], "fp32")
    assert (sweep("llama-dynamic", given, ["resid_post"], positions=1, layers=0).values("kl") > 0).all()


def test_equal_lengths_stay_as_they_are():
    """Bit for bit: everything lines up, by name or by a list."""
    given = pairs(true_model("llama"), (5, 4))
    whole = sweep("llama", given, ["z", "mlp_out"])
    for align in (ENDS, "list"):
        named = [
            p._replace(align=[[t, t] for t in range(len(p.clean))] if align == "list" else ENDS)
            for p in given
        ]
        again = sweep("llama", named, ["z", "mlp_out"])
        assert all(
            np.array_equal(whole.values(m, s), again.values(m, s), equal_nan=True)
            for m in whole.metrics
            for s in ("z", "mlp_out")
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_noise_is_on_what_has_no_equal_counterpart(direction):
    """Both runs are of the clean prompt then: with another corrupted one of its length nothing changes."""
    pair = drawn("gptj", 7)[0]
    other = [*pair.clean[:2], *((t + 1) % VOCAB for t in pair.clean[2:4]), *pair.clean[4:]]
    equal = pair._replace(corrupted=other, align=None)
    found = [
        sweep("gptj", [one], ["mlp_out", "z"], direction=direction, source="noise").values("logit_diff", "z")
        for one in (pair, equal)
    ]
    assert np.array_equal(*found)
    assert np.abs(found[0][:, :, 2:]).max() > 0


@pytest.mark.parametrize(("variant", "direction"), [("llama-grouped", "denoise"), ("neox-parallel", "noise")])
def test_edges_at_single_positions(variant, direction):
    given, true = drawn(variant, 8, ((1, 2), (2, 0))), true_model(variant)
    found = dp.sweep_edges(
        model_of(variant),
        asked(given),
        senders=["input", "a0.h1", "m0"],
        positions="all",
        direction=direction,
        precision="fp32",
        progress=False,
    )
    got = {metric: found.flat(metric) for metric in METRICS}  # [pair, edge, position]
    for i, pair in enumerate(given):
        lined_up = counterparts(pair)
        missing = [t for t in range(len(found.positions)) if t not in lined_up]
        assert np.isnan(got["kl"][i][:, missing]).all()
        n_base = len(pair.corrupted if direction == "denoise" else pair.clean)
        for clean, corrupted in lined_up.items():
            kind = np.where(
                np.arange(n_base) == (corrupted if direction == "denoise" else clean), SOURCE, OWN
            )
            want = effects(true, pair, [total(edge, kind) for edge in found.edges], direction)
            where = f"{variant}, pair {i}, position {clean}"
            assert_agrees(lambda metric, i=i, t=clean: got[metric][i, :, t], want, 1e-5, where)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_features_and_directions(direction):
    """Those of an autoencoder that is the identity, and the axes, are the coordinates of the vector."""
    given = [*drawn("llama", 9, ((2, 3), (2, 1))), mapped("llama", 9)[0]]
    eye = torch.eye(16, dtype=torch.float64)
    weights = {"w_enc": eye, "w_dec": eye, "b_dec": eye[0] * 0, "b_enc": eye.sum(0) * 100}  # never below 0
    plain = dp.Autoencoder("plain", "mlp_out", 0, "relu", "none", weights, subtracts=False)
    positions = [0, -1, "subject"]
    options = {"precision": "fp64", "progress": False, "positions": positions, "direction": direction}
    engine = model_of("llama", "fp64")
    true = sweep("llama", given, ["mlp_out.dim"], "fp64", layers=0, positions=positions, direction=direction)
    want = true.values("logit_diff", "mlp_out.dim")[:, 0]  # [pair, position, coordinate]
    for found, name in (
        (dp.sweep_features(engine, asked(given), plain, **options), "feature"),
        (dp.sweep_directions(engine, asked(given), {"mlp_out": eye}, layers=0, **options), "direction"),
    ):
        columns = found.columns("logit_diff")
        got = np.where(np.isnan(want), np.nan, 0)
        for pair, told, which, value in zip(
            *(columns[c] for c in ("pair", "position", name, "logit_diff")), strict=True
        ):
            at = positions.index(told) if told in positions else 2  # of a label the place is told
            got[pair, at, which] = value
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)


def test_a_run_folder_tells_what_lined_up(tmp_path):
    """Its pairs, its effects, what of each pair was patched; a run with other positions is another run."""
    given = drawn("llama", 11)
    found = sweep("llama", given, ["z", "mlp_out"], out=tmp_path / "run")
    again = dp.load_effects(tmp_path / "run")
    assert again.pairs == found.pairs
    for site in ("z", "mlp_out"):
        assert np.array_equal(again.values("kl", site), found.values("kl", site), equal_nan=True)
    assert again.places("z")[1] == [0, 1, None, None, 4, 5]
    assert set(again.columns("kl", "mlp_out")["position"].tolist()) == {0, 1, 4, 5}
    other = [given[0]._replace(align=[[0, 0], [-1, -1]]), given[1]]
    with pytest.raises(DeltapatchError, match="a different pairs: sha256"):
        sweep("llama", other, ["z", "mlp_out"], out=tmp_path / "run", resume=True)
    swapped = [dp.Intervention(i, [dp.Patch("z", 0, -1, 1), dp.Patch("v", 1, 0, 0)]) for i in range(2)]
    outcome = dp.run(model_of("llama"), asked(given), swapped, out=tmp_path / "given", progress=False)
    assert np.array_equal(dp.load_outcome(tmp_path / "given").values("kl"), outcome.values("kl"))


def test_a_damaged_map_is_no_run(tmp_path):
    found = sweep("llama", drawn("llama", 11), ["mlp_out"])
    for align in (None, [], [[0, 0, 0]], [[0, 9]], [[1, 1], [0, 2]]):
        path = tmp_path / repr(align)
        found.pairs = [replace(found.pairs[0], align=align), found.pairs[1]]
        found.save(path)
        with pytest.raises(DeltapatchError, match=r"damaged \(align of a pair in pairs.jsonl\)"):
            dp.load_effects(path)


def test_classes_and_pages_leave_out_what_was_not_patched():
    """A class is the mean over what of it could be patched, on the axis of the clean prompt."""
    labels = {"op1": 2, "op2": -2}  # at 2 nothing lines up
    given = [pair._replace(labels=labels) for pair in drawn("llama", 12)]
    found = sweep("llama", given, ["mlp_out"])
    names, values, _ = aligned(found, "kl", "mlp_out")
    kl = found.values("kl", "mlp_out")
    assert names == ["early", "op2", "last"]
    assert np.allclose(values[0], np.stack([kl[0][:, [0, 1]].mean(1), kl[0][:, 4], kl[0][:, 5]], 1))
    page = collect(found, ["kl"])
    assert page["sites"][0]["swept"][0] == [0, 1, None, None, 4, 5]
    assert page["pairs"][0]["changed"] == ([2, 3], [2, 3, 4])


def test_a_trained_model_in_float32():
    """Where a counterpart is the same token, two float32 runs differ by too little to be subtracted."""
    name, sites = "builtin:gpt-neox-arithmetic", ["resid_pre", "attn_out", "mlp_out"]
    texts = [f"What is 23 plus 45{more}? The answer is" for more in ("", " plus 61")]
    pair = dp.PromptPair(*texts, "68", "84", align=ENDS)
    options = {"sites": sites, "metrics": "logit_diff", "progress": False, "noise_sample": 0}
    got = dp.sweep(dp.load_model(name), [pair], precision="fp32", **options)
    want = dp.sweep(dp.load_model(name, dtype="float64"), [pair], **options)
    for site in sites:
        a, b = (np.nan_to_num(found.values("logit_diff", site)) for found in (got, want))
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), site


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_studys_plain_forwards_agree(direction):
    found = sweep("llama", drawn("llama", 14), ["z", "mlp_out"], "fp64", direction=direction)
    assert check_run(model_of("llama", "fp64"), found, 40, 0)["error"] < 1e-8


def test_memory_counts_the_sources_own_runs():
    given = drawn("llama", 13)
    question = ask(model_of("llama"), asked(given), SweepOptions(sites="z"))
    assert [run.tokens for run in question.runs] == [len(p.clean) + len(p.corrupted) for p in given]
    whole = ask(model_of("llama"), asked(pairs(true_model("llama"), (6, 5))), SweepOptions(sites="z"))
    assert [run.tokens for run in whole.runs] == [6, 5]


REFUSED = [
    (lambda m, p: dp.sweep(m, p, sites="pattern"), "attention patterns need prompts that line up entirely"),
    (
        lambda m, p: dp.sweep(m, p, positions="together"),
        "at all positions together need prompts",
    ),
    (lambda m, p: dp.sweep_edges(m, p), "edges at all positions together need"),
    (lambda m, p: dp.path_effects(m, p, [["m0", "logits"]]), "circuits and paths need prompts"),
    (lambda m, p: attribute_edges(m, p), "estimates by gradients need prompts that line up entirely"),
    (lambda m, p: dp.sweep(m, p, source="mean"), "source 'mean' goes position by position"),
    (lambda m, p: dp.sweep(m, p, source="resample"), "choose counterpart, zero or noise"),
    (lambda m, p: dp.sweep(m, p, positions="subject"), "position 'subject' has no counterpart in the other"),
    (lambda m, p: dp.sweep(m, p, positions=[0, 2]), "position 2 has no counterpart in the other prompt"),
    (lambda m, p: dp.sweep(m, p, readout="subject"), "position 'subject' of pair 0 has no counterpart"),
    (lambda m, p: patched(m, p, dp.Patch("z", 0, 3, 0)), "intervention 0: position 3 has no counterpart"),
    (lambda m, p: patched(m, p, dp.Patch("pattern", 0, -1, 0)), "an attention pattern is over all positions"),
    (lambda m, p: patched(m, p, dp.Patch("mlp_out", 0, 0, into="logits")), "some receivers alone see need"),
    (lambda m, p: dp.sweep_directions(m, p, {"mlp_out": np.eye(16)}, positions=2), "position 2 has no"),
]


def patched(engine, given, patch):
    return dp.run(engine, given, dp.Intervention(0, [patch]))


@pytest.mark.parametrize(("call", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_needs_prompts_that_line_up_says_so(call, said):
    pair = drawn("llama", 10, ((2, 3),))[0]._replace(labels={"subject": 2})
    with pytest.raises(DeltapatchError, match=re.escape(said)):
        call(model_of("llama"), asked([pair]))


def test_the_last_position_may_have_no_counterpart():
    pair = drawn("llama", 10, ((2, 3),))[0]._replace(align=[[0, 0], [-2, -2]])
    with pytest.raises(DeltapatchError, match="position -1 has no counterpart in the other prompt"):
        dp.sweep(model_of("llama"), asked([pair]), positions="last")
    assert_sweep_agrees("llama", [pair], ["z", "resid_pre"], "fp64")  # read at the end of each, all the same


# ------------------------------------------------------------------- beside screens, joint parts and probes


def test_screens_and_parts_at_all_positions_refuse_them_and_parts_elsewhere_are_joint_patches():
    given = asked(drawn("gptj"))
    engine, options = model_of("gptj", "fp64"), {"precision": "fp64", "progress": False}
    with pytest.raises(DeltapatchError, match="a screen needs prompts that line up"):
        dp.sweep(engine, given, sites="mlp_out", screen="attribution", **options)
    parts = [dp.Patch("attn_out", 0, -1), dp.Patch("attn_out", 0, -2)]
    with pytest.raises(DeltapatchError, match="line up entirely"):
        dp.interactions(engine, given, [*parts, dp.Patch("mlp_out", 1, "together")], **options)
    found = dp.interactions(engine, given, parts, metrics="logit_diff", **options)
    sets = [[parts[0]], [parts[1]], parts]
    each = dp.run(engine, given, [dp.Intervention(i, some) for i in range(2) for some in sets], **options)
    a, b, both = each.values("logit_diff").reshape(2, 3).T
    assert np.abs(both - a - b).min() > 1e-6
    np.testing.assert_allclose(found.values("logit_diff")[:, 0, 1], both - a - b, rtol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_probes_read_where_the_clean_position_is_in_the_base_run(direction):
    """Counted from the end, where the prompts line up: the whole stream swapped there is the source's."""
    true, (pair, *_) = true_model("gptj"), drawn("gptj")
    engine = model_of("gptj", "fp64")
    probe = dp.Probe("mood", np.random.default_rng().normal(size=engine.spec.d_model), 0, -2)
    options = {"direction": direction, "precision": "fp64", "progress": False, "metrics": probe}
    got = dp.sweep(engine, asked([pair]), sites="resid_post", layers=0, positions=-2, **options)
    clean, corrupted = (
        true.activations(tokens)["resid_post", 0][-2] @ probe.direction
        for tokens in (pair.clean, pair.corrupted)
    )
    want = clean - corrupted if direction == "denoise" else corrupted - clean
    assert got.values("mood")[0, 0, 0] == pytest.approx(want, rel=1e-8)


def test_pairs_that_do_not_say_it_line_up_as_the_option_says(tmp_path):
    """A pair's own list stays; of equal prompts nothing changes; a run is held to it."""
    variant = "llama-grouped"
    said = [*drawn(variant), *mapped(variant)]
    silent = [pair._replace(align=None) if pair.align == "prefix+suffix" else pair for pair in said]
    assert silent != said
    options = {"sites": ["mlp_out"], "out": tmp_path / "run"}
    found = sweep(variant, silent, align="prefix+suffix", **options)
    np.testing.assert_array_equal(found.values("kl"), sweep(variant, said, ["mlp_out"]).values("kl"))
    with pytest.raises(DeltapatchError, match="same number of tokens"):
        sweep(variant, silent, resume=True, **options)
    with pytest.raises(DeltapatchError, match="align"):
        sweep(variant, silent, ["mlp_out"], align="suffix")
