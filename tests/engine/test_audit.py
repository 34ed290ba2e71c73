"""The noise floor that a run reports, and the precision that "auto" chooses by it."""

import numpy as np
import pytest
import torch
from engine_tiny import build, hf_model, true_model
from engine_tiny import pairs as drawn_pairs

import deltapatch
from deltapatch import DeltapatchError
from deltapatch.engine import audit
from deltapatch.engine.options import SweepOptions
from deltapatch.engine.planning.memory import Costs
from deltapatch.engine.question import ask
from deltapatch.engine.wavefront.pool import Pool
from deltapatch.kernels.product import PRECISIONS
from deltapatch.models.model import Model, Origin
from deltapatch.models.model_weights import Streamed
from deltapatch.results.metrics import METRICS
from deltapatch.results.truth import in_words

VARIANT = "neox-parallel"


@pytest.fixture(scope="module")
def model():
    return deltapatch.from_transformers(hf_model(VARIANT))


def pairs(variant, lengths):
    return [deltapatch.PromptPair(*pair) for pair in drawn_pairs(true_model(variant), lengths)]


@pytest.fixture
def eager(monkeypatch):
    """Choosing is worth it for any work, and bfloat16 is fast."""
    monkeypatch.setattr(audit, "_WORTH_CHOOSING", {"cpu": 0})
    monkeypatch.setattr(audit, "fast_bfloat16", lambda: True)


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_noise_floor_is_the_error_of_the_runs_own_effects(model, precision):
    options = {"sites": "mlp_out,z", "progress": False, "noise_sample": 10_000}  # all of them
    given = pairs(VARIANT, [5, 7])
    run = deltapatch.sweep(model, given, precision=precision, **options)
    true = deltapatch.sweep(model, given, precision="fp64", **options)
    floor = run.meta["noise_floor"]
    assert floor["precision"] == "fp64"
    cells = [~np.isnan(true.values("kl", site)) for site in ("mlp_out", "z")]
    assert floor["recomputed"] == sum(int(c.sum()) for c in cells)
    for metric in ("ie", "logit_diff", "kl", "dp_clean"):
        got, want = (
            np.concatenate([e.values(metric, s)[c] for s, c in zip(("mlp_out", "z"), cells, strict=True)])
            for e in (run, true)
        )
        assert floor["relative_error"][metric] == pytest.approx(error(got, want), rel=1e-3)
    measured = {m: e for m, e in floor["relative_error"].items() if not METRICS[m].yes_or_no}
    assert floor["worst"] == max(measured, key=measured.get)
    assert true.meta["noise_floor"] is None


@pytest.mark.parametrize("variant", ["neox-parallel", "gptj", "llama-grouped"])
def test_precisions_come_out_in_order(variant):
    model = deltapatch.from_transformers(hf_model(variant))
    given = pairs(variant, [6])
    floors = {}
    for precision in ("fp32", "tf32", "fp16", "bf16", "fp8"):
        effects = deltapatch.sweep(model, given, precision=precision, progress=False, noise_sample=1000)
        assert effects.meta["precision"] == precision
        floors[precision] = effects.meta["noise_floor"]["relative_error"]["logit_diff"]
    assert floors["fp32"] < 1e-5
    assert floors["fp32"] < floors["fp16"] < 1e-3
    assert floors["fp32"] < floors["tf32"] < 1e-3
    assert floors["fp16"] < floors["bf16"] < 1e-2
    assert floors["bf16"] < floors["fp8"] < 0.15


def test_a_sample_is_drawn_again_alike(model):
    given = pairs(VARIANT, [6] * 9)
    floors = [
        deltapatch.sweep(model, given, precision="bf16", progress=False, seed=seed, noise_sample=32).meta[
            "noise_floor"
        ]
        for seed in (0, 0, 1)
    ]
    assert floors[0] == floors[1]
    assert floors[0]["relative_error"] != floors[2]["relative_error"]
    assert 32 <= floors[0]["recomputed"] <= 36


def test_no_sample(model):
    effects = deltapatch.sweep(model, pairs(VARIANT, [5]), progress=False, noise_sample=0)
    assert effects.meta["noise_floor"] is None
    assert in_words(effects.meta) == (
        "precision fp32: no effects were computed again in float64 (no sample was asked for)"
    )
    with pytest.raises(DeltapatchError, match="noise sample must be 0 or more"):
        deltapatch.sweep(model, pairs(VARIANT, [5]), progress=False, noise_sample=-1)


def test_interventions_have_a_noise_floor_as_well(model):
    patches = [deltapatch.Patch("mlp_post", 0, -1, 3), deltapatch.Patch("z", 1, 2, 0)]
    outcome = deltapatch.run(
        model, pairs(VARIANT, [5, 5]), [deltapatch.Intervention(1, patches)], precision="bf16", progress=False
    )
    assert outcome.meta["noise_floor"]["recomputed"] == 1
    assert 0 < outcome.meta["noise_floor"]["relative_error"]["ie"] < 1e-1


def test_auto_takes_the_first_that_is_precise_enough(model, eager, monkeypatch):
    options = {"progress": False, "metrics": "logit_diff"}
    given = pairs(VARIANT, [6])
    assert deltapatch.sweep(model, given, **options).meta["precision"] == "bf16"
    monkeypatch.setattr(audit, "TOLERANCE", 1e-6)
    assert deltapatch.sweep(model, given, **options).meta["precision"] == "fp32"


@pytest.mark.parametrize(("expands", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_without_products_of_16_bits_auto_rounds_only_what_then_skips_the_vocabulary(
    model, eager, monkeypatch, expands, chosen
):
    monkeypatch.setattr(audit, "fast_bfloat16", lambda: False)
    monkeypatch.setattr(audit, "worth_a_tail", lambda *args: expands)
    effects = deltapatch.sweep(model, pairs(VARIANT, [6]), metrics="logit_diff", progress=False)
    assert effects.meta["precision"] == chosen


def test_auto_takes_float32_where_choosing_costs_more_than_it_saves(model):
    assert deltapatch.sweep(model, pairs(VARIANT, [6]), progress=False).meta["precision"] == "fp32"


def test_auto_keeps_float64(eager):
    model = deltapatch.from_transformers(hf_model("llama", torch.float64))
    effects = deltapatch.sweep(model, pairs("llama", [5]), progress=False)
    assert effects.meta["precision"] == "fp64"
    assert effects.values("ie", "mlp_out").dtype == np.float64


def test_auto_passes_over_a_precision_that_cannot_hold_the_weights(model, monkeypatch):
    hf = build(VARIANT)
    hf.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.data[0, 0] = 7e4
    heavy = deltapatch.from_transformers(hf)
    monkeypatch.setattr(audit.Audit, "_candidates", lambda self: ["fp16", "fp32"])
    assert deltapatch.sweep(model, pairs(VARIANT, [5]), progress=False).meta["precision"] == "fp16"
    assert deltapatch.sweep(heavy, pairs(VARIANT, [5]), progress=False).meta["precision"] == "fp32"
    with pytest.raises(DeltapatchError, match=r"larger than float16 holds .* use precision='bf16'"):
        deltapatch.sweep(heavy, pairs(VARIANT, [5]), precision="fp16", progress=False)


def test_a_budget_without_room_for_float64_leaves_float32(model, monkeypatch):
    real = Costs.of.__func__

    def costs(cls, model, precision, *rest, **named):
        found = real(cls, model, precision, *rest, **named)
        return found if precision.base == torch.float32 else Costs(10**15, 1, 1, 1, 1)

    monkeypatch.setattr(Costs, "of", classmethod(costs))
    given = pairs(VARIANT, [5])
    options = {"progress": False, "noise_sample": 8}
    floor = deltapatch.sweep(model, given, precision="bf16", **options).meta["noise_floor"]
    assert floor["precision"] == "fp32"
    assert deltapatch.sweep(model, given, precision="fp32", **options).meta["noise_floor"] is None


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "auto"])
@pytest.mark.parametrize("n_pairs", [1, 9])
def test_a_small_run_is_checked_in_float64(model, precision, n_pairs):
    given = pairs(VARIANT, [6] * n_pairs)
    effects = deltapatch.sweep(model, given, precision=precision, progress=False)
    n = sum(effects.values("ie", site).size for site in effects.sites)
    floor = effects.meta["noise_floor"]
    assert floor["precision"] == "fp64"
    assert 0 < floor["relative_error"]["logit_diff"] < (1e-5 if precision in ("fp32", "auto") else 1e-1)
    fewest = max(4, -(-n // 16))
    assert fewest <= floor["recomputed"] <= fewest + 3  # of up to four pairs
    assert effects.meta["noise_floor_left_out"] is None


@pytest.mark.parametrize("out", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_beside_which_the_sample_is_not_little_says_so(model, precision, out, monkeypatch, tmp_path):
    monkeypatch.setattr(audit, "_SMALL", {})
    where = tmp_path / "run" if out else None
    effects = deltapatch.sweep(model, pairs(VARIANT, [6]), precision=precision, progress=False, out=where)
    if out:
        effects = deltapatch.load_effects(where)
    said = in_words(effects.meta)
    if precision == "bf16":
        assert effects.meta["noise_floor"]["precision"] == "fp32"
        assert "effects computed again in float32 differ by" in said
    else:
        assert effects.meta["noise_floor"] is None
        assert said == (
            "precision fp32: no effects were computed again in float64 (that would take long beside so "
            "short a run)"
        )


def audited(model, given, **options):
    return audit.Audit(ask(model, given, SweepOptions(precision="fp32", **options)), Pool())


@pytest.mark.parametrize("source", ["counterpart", "mean", "resample"])
def test_the_sample_takes_a_small_share_of_the_run(model, source, monkeypatch):
    monkeypatch.setattr(audit, "_SMALL", {})
    monkeypatch.setattr(audit, "_CONVERTING", 0)  # the model is tiny
    sizes, little = {}, {}
    for n in (3, 12, 60, 200):
        found = audited(model, pairs(VARIANT, [6] * n), sites="mlp_out", source=source)
        took = found._takes(found._pairs)
        sizes[n] = len({pair for pair, *_ in found.sample})
        little[n] = found._is_little
        if found._is_little:
            runs = found._of_runs(found.question.order)
            assert took <= (found.question.flops + runs) / 8
            # In float64 a row and an unpatched run take twice as long; a mean needs the runs of all.
            sample = sum(part.n_rows for _, part, _ in found.sample)
            n_effects = found.question.interventions.n_effects
            per_pair = runs if source == "mean" else runs * sizes[n] / n
            assert took == pytest.approx(2 * (per_pair + found.question.flops * sample / n_effects), rel=0.1)
    # The unpatched runs of a single pair are a good part of a run of few, and those that a mean needs of any.
    assert not little[3]
    assert little[200] == (source != "mean")
    assert sizes[3] == 1
    assert sizes[200] == (1 if source == "mean" else 4)


def test_a_streamed_model_is_read_again_only_beside_a_long_run(model, monkeypatch):
    """The sample of a run in float32 is left out, and that of a lossy run taken once."""
    given, read = pairs(VARIANT, [6] * 3), []
    streamed = Model(Streamed(model._weights.checkpoint), Origin("streamed"))
    reading = type(model).reading
    monkeypatch.setattr(type(model), "reading", lambda self: read.append(self.stream) or reading(self))

    def passes(of, precision):
        read.clear()
        meta = deltapatch.sweep(of, given, precision=precision, progress=False).meta
        floor = meta["noise_floor"]
        return (floor and floor["precision"]) or meta["noise_floor_left_out"], len(read)

    assert passes(model, "fp32") == ("fp64", 2)
    assert passes(streamed, "fp32") == ("the model would be read from its file once more", 1)
    assert passes(streamed, "bf16") == ("fp32", 2)
    monkeypatch.setattr(audit, "_READING", {"cpu": 0})
    assert passes(streamed, "fp32") == ("fp64", 2)


def test_no_room_for_float64_is_no_reason_to_compute_float32_again(model, monkeypatch):
    monkeypatch.setattr(audit.Audit, "_recompute", lambda self, precision: _no_room(precision))
    with pytest.raises(AssertionError, match="fp32"):
        deltapatch.sweep(model, pairs(VARIANT, [5]), precision="bf16", progress=False)
    effects = deltapatch.sweep(model, pairs(VARIANT, [5]), precision="fp32", progress=False)
    assert effects.meta["noise_floor"] is None
    assert effects.meta["noise_floor_left_out"] == "the memory budget has no room for it"


def _no_room(precision):
    if precision.name == "fp64":
        raise DeltapatchError("too little memory")
    raise AssertionError(precision.name)


@pytest.mark.parametrize("metrics", ["says_clean", "flip"])
def test_what_is_yes_or_no_is_checked_too(model, metrics):
    meta = deltapatch.sweep(model, pairs(VARIANT, [5]), metrics=metrics, progress=False).meta
    assert in_words(meta) == "precision fp32: 4 effects computed again in float64 say the same"
    meta["noise_floor"]["relative_error"][metrics] = 0.25
    assert in_words(meta).endswith(f"4 effects computed again in float64 differ in {metrics} of 25%")


def test_what_is_said():
    floor = {"recomputed": 32, "precision": "fp64", "relative_error": {"ie": 4.2e-2}, "worst": "ie"}
    said = in_words({"precision": "fp8", "noise_floor": floor})
    assert said.startswith("precision fp8 (approximate, for screening): 32 effects computed again in float64")
    assert said.endswith(" differ by 4e-02 (ie)")


def test_few_tokens_are_not_worth_narrowing_for(model, monkeypatch):
    monkeypatch.setattr("deltapatch.engine.wavefront.products.FEW", 256)
    given = pairs(VARIANT, [6])
    effects = {
        p: deltapatch.sweep(model, given, precision=p, progress=False) for p in ("fp32", "bf16", "fp16")
    }
    values = {p: e.values("logit_diff", "mlp_out") for p, e in effects.items()}
    assert np.array_equal(values["bf16"], values["fp32"])
    assert not np.array_equal(values["fp16"], values["fp32"])


def test_a_sample_that_judges_a_precision_is_taken_in_it(model, monkeypatch):
    """However few its tokens: else any precision would be good enough."""
    monkeypatch.setattr("deltapatch.engine.wavefront.products.FEW", 1 << 20)
    question = ask(model, pairs(VARIANT, [6]), SweepOptions(noise_sample=3, progress=False))
    sample = audit.Audit(question, Pool())
    narrow, exact = (sample._recompute(PRECISIONS[name]).measured for name in ("bf16", "fp32"))
    assert not np.array_equal(narrow["logit_diff"], exact["logit_diff"])
