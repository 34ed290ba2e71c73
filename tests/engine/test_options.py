"""The record of options: each is there in Python and in the shell, kept, and held to by who resumes."""

import inspect
import json
from dataclasses import fields
from functools import partial

import click
import pytest
from engine_tiny import hf_model, pairs, true_model

import deltapatch
from deltapatch import DeltapatchError, Intervention, Patch, PromptPair
from deltapatch.cli.sweep import edges as of_edges
from deltapatch.cli.sweep import sweep as of_sites
from deltapatch.engine.options import OF_SCREENS, EdgeOptions, Options, SweepOptions
from deltapatch.results.merge import merge

VARIANT = "llama-grouped"
KINDS = {SweepOptions: deltapatch.sweep, EdgeOptions: deltapatch.sweep_edges, Options: deltapatch.run}
DECISIVE = list(
    {each.name: each for kind in KINDS for each in fields(kind) if each.metadata["word"]}.values()
)
OF_GRIDS = ("sites", "positions", "layers", "senders", "receivers")
# An option that matters only beside another one.
BESIDE = {"noise_scale": {"source": "noise"}, "mean_over": {"source": "mean"}} | {
    name: {"screen": "ig-inputs", "top": 5, "screen_sample": 5} for name in OF_SCREENS
}
WIDTH = 16  # of the model below
BESIDE["directions"] = {"sites": "resid_post.along", "directions": {"resid_post": [[2.0] * WIDTH]}}
OTHER = {"directions": {"resid_post": [[1.0] + [0.0] * (WIDTH - 1)]}}  # what fits the model
for name in ("until", "screen_limit"):
    BESIDE[name] = {"screen": "attribution", "top": 5, "threshold": 0.1, "until": "recall:0.6"}


@pytest.fixture(scope="module")
def model():
    return deltapatch.from_transformers(hf_model(VARIANT))


@pytest.fixture(scope="module")
def prompts():
    return [PromptPair(*pair) for pair in pairs(true_model(VARIANT), (6, 4, 6))]


@pytest.fixture(scope="module")
def interventions():
    return [Intervention(i, [Patch("mlp_out", 0, 1), Patch("z", 1, 2, 0)]) for i in (2, 0, 1, 0)]


def names(options):
    return [each.name for each in options]


def test_python_has_every_option_by_keyword_alone():
    for kind, function in KINDS.items():
        found = inspect.signature(function).parameters
        for each in fields(kind):
            assert found[each.name].kind is inspect.Parameter.KEYWORD_ONLY
            assert found[each.name].default == each.default
            assert f"    {each.name}: " in function.__doc__
    with pytest.raises(TypeError, match="colour"):
        deltapatch.sweep(None, None, colour="red")
    with pytest.raises(TypeError, match="positional"):
        deltapatch.sweep(None, None, "mlp_out")


def test_the_shell_has_every_option_that_decides_something():
    for command, kind in ((of_sites, SweepOptions), (of_edges, EdgeOptions)):
        found = {p.name: p for p in command.params if isinstance(p, click.Option)}
        for each in fields(kind):
            if each.metadata["word"]:
                assert found[each.name].opts == [f"--{each.name.replace('_', '-')}"]
                assert found[each.name].help


@pytest.mark.parametrize("each", DECISIVE, ids=names(DECISIVE))
def test_what_is_given_is_checked(each):
    class Nothing:
        pass

    if each.name in OF_GRIDS:
        return  # checked with the pairs, when the grid is made
    for kind in KINDS:
        if each.name in {one.name for one in fields(kind)}:
            with pytest.raises(DeltapatchError):
                kind(**{each.name: Nothing()})


@pytest.mark.parametrize("finished", [False, True], ids=["cut off", "finished"])
@pytest.mark.parametrize("each", DECISIVE, ids=names(DECISIVE))
def test_a_run_that_is_resumed_with_another_is_refused_by_name(
    each, finished, model, prompts, interventions, tmp_path
):
    """The same for sweeps of sites and edges, and runs of given interventions."""
    if each.name in ("until", "screen_limit") and not finished:
        return  # these have no parts: tests/engine/test_rounds.py cuts them off
    base = {"progress": False, "precision": "fp32", "memory_budget": "64MiB", **BESIDE.get(each.name, {})}
    for i, (kind, function) in enumerate(KINDS.items()):
        if each.name not in {one.name for one in fields(kind)}:
            continue
        given = [model, prompts, *([interventions] if kind is Options else [])]
        way = partial(function, *given)
        folder = tmp_path / str(i)
        way(out=folder, shard=None if finished else (1, 2), **base)
        other = base | {each.name: OTHER.get(each.name, each.metadata["other"])}
        if each.name == "backend":  # the model's device has one backend
            settings = folder / "run.json" if finished else folder / "unfinished" / "manifest.json"
            assert "reference" in settings.read_text()
            continue
        with pytest.raises(DeltapatchError, match=f"different {each.metadata['word']}"):
            way(out=folder, resume=True, **other)
        way(out=folder, resume=True, **base)
        kept = (folder / "run.json").read_text()
        assert each.name in json.loads(kept) or each.name in kept or each.name in (*OF_GRIDS, "metrics")


# ---------------------------------------------------------------------------- runs do what sweeps do


def run_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


def test_a_run_of_given_interventions_is_kept_split_and_merged(model, prompts, interventions, tmp_path):
    options = {"progress": False, "precision": "fp32", "memory_budget": "64MiB"}
    plain = deltapatch.run(model, prompts, interventions, **options)
    deltapatch.run(model, prompts, interventions, out=tmp_path / "whole", **options)
    for part in (2, 1):
        found = deltapatch.run(
            model, prompts, interventions, out=tmp_path / "parts", shard=(part, 2), **options
        )
    assert len(found) == len(interventions)
    assert merge(tmp_path / "parts")
    assert run_bytes(tmp_path / "parts") == run_bytes(tmp_path / "whole")
    for name in ("whole", "parts"):
        outcome = deltapatch.load_outcome(tmp_path / name)
        for metric in plain.metrics:
            assert outcome.values(metric).tolist() == plain.values(metric).tolist()
        assert outcome.pair.tolist() == [2, 0, 1, 0]
        assert outcome.patches.tolist() == [2] * 4
    again = deltapatch.run(model, prompts, interventions, out=tmp_path / "whole", resume=True, **options)
    assert again.values("ie").tolist() == plain.values("ie").tolist()
    with pytest.raises(DeltapatchError, match="is finished, with a different list of interventions"):
        deltapatch.run(model, prompts, interventions[:3], out=tmp_path / "whole", resume=True, **options)
    with pytest.raises(DeltapatchError, match=r"is finished, with a different .*list of interventions"):
        deltapatch.sweep(model, prompts, out=tmp_path / "whole", resume=True, **options)
    deltapatch.sweep(model, prompts, out=tmp_path / "sweep", **options)
    with pytest.raises(DeltapatchError, match="a sweep, not a run"):
        deltapatch.load_outcome(tmp_path / "sweep")


def test_a_run_that_is_saved_says_whose_it_is(model, prompts, interventions, tmp_path):
    outcome = deltapatch.run(model, prompts, interventions, progress=False)
    outcome.save(tmp_path / "run")
    assert deltapatch.load_outcome(tmp_path / "run").values("kl").tolist() == outcome.values("kl").tolist()
