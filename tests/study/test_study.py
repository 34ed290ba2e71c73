"""A small study end to end: its files, its commands alone, the same bytes twice, resuming, checkpoints."""

import copy
import csv
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib import pyplot as plt
from study_tiny import NAMES, SMALL, make_model

import deltapatch as dp
from deltapatch.analysis.importance import relative_importance
from deltapatch.analysis.positions import by_class, class_table
from deltapatch.cli.main import cli
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs_file import read_pairs
from deltapatch.models.load import load_model
from deltapatch.results.reading import load_effects
from deltapatch.study import checkpoints
from deltapatch.study import pairs as pair_files
from deltapatch.study import published as papers
from deltapatch.study.published import Published
from deltapatch.study.reproduce import reproduce
from deltapatch.study.settings import begin, inputs


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Figures are made but not drawn, which takes longest."""

    def save(figure, stem: Path) -> None:
        plt.close(figure)
        for kind in ("png", "pdf"):
            stem.with_suffix(f".{kind}").write_text("")

    monkeypatch.setattr("deltapatch.study.exhibit.save", save)


def tree(folder: Path, figures: bool = False) -> dict[str, bytes]:
    """Every file of a study, but for times.json, the only one that may differ."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "times.json" and (figures or path.suffix not in (".png", ".pdf"))
    }


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_everything_is_there(study) -> None:
    assert list(study.done) == ["factual", "shots-0"]
    assert not study.failures
    report = (study.folder / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([^)]+)\)", report)
    assert all((study.folder / link).is_file() for link in linked)
    drawn = {p.relative_to(study.folder).as_posix() for p in study.folder.rglob("figures/*.png")}
    assert drawn == {link for link in linked if link.endswith(".png")}
    assert all((study.folder / name).with_suffix(".pdf").is_file() for name in drawn)
    numbers = json.loads((study.folder / "study.json").read_text(encoding="utf-8"))
    assert set(numbers["sections"]) == {"factual", "shots-0"}
    for table in study.folder.rglob("tables/*.csv"):
        where = table.relative_to(study.folder).parts
        section = numbers["summary"] if len(where) == 2 else numbers["sections"][where[0]]
        kept = section["exhibits"][table.stem]["table"]
        assert list(kept) == list(rows(table)[0])
        assert table.with_suffix(".md").is_file()
    for pairs in study.folder.rglob("factual/pairs.jsonl"):
        assert len(read_pairs(pairs)) == 6
    assert not list(study.folder.rglob("*.lock"))


def test_runs_are_run_folders_without_times(study) -> None:
    times = json.loads((study.folder / "times.json").read_text(encoding="utf-8"))
    for run in ("factual/components", "factual/heads", "factual/coordinates", "factual/neurons"):
        about = json.loads((study.folder / run / "run.json").read_text(encoding="utf-8"))
        assert not {"date", "seconds"} & set(about)
        assert {"date", "seconds"} == set(times[run])
        assert load_effects(study.folder / run).pairs


def test_what_is_not_swept_is_exactly_nothing(study, model) -> None:
    found = study.done["shots-0"]
    part = load_effects(found.folder / "components")
    pairs = found.made.pairs
    whole = dp.sweep(model, pairs, sites=["mlp_out", "attn_out"], precision="fp32", progress=False)
    n = len(part.positions("mlp_out"))
    assert 0 < n < len(whole.positions("mlp_out"))
    for site in part.sites:
        names, table = class_table(part, site)
        every, full = class_table(whole, site)
        assert names == every
        got, want = (by_class(e.values("ie", site), names, t) for e, t in ((part, table), (whole, full)))
        early = names.index("early")
        assert not got[:, :, early][~np.isnan(got[:, :, early])].any()
        assert not want[:, :, early][~np.isnan(want[:, :, early])].any()
        rest = np.delete(got, early, axis=2), np.delete(want, early, axis=2)
        np.testing.assert_allclose(*rest, rtol=1e-4, atol=1e-6)
    assert relative_importance(part).value == pytest.approx(relative_importance(whole).value, rel=1e-4)
    assert relative_importance(part).cells == relative_importance(whole).cells


def test_commands_make_the_same_pairs_and_runs(study, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = study.done["factual"]
    (tmp_path / "factual").mkdir()
    for line in found.commands():
        result = CliRunner().invoke(cli, [*shlex.split(line)[1:], "--device", "cpu"])
        assert result.exit_code == 0, result.stderr
    for name in ("pairs.jsonl", *(f"{run}/effects.safetensors" for run in found.experiment.runs)):
        assert (tmp_path / "factual" / name).read_bytes() == (found.folder / name).read_bytes()


@pytest.mark.slow
def test_two_studies_are_the_same_files_and_figures(study, model, tmp_path) -> None:
    again = reproduce(model, tmp_path / "again", SMALL, NAMES, progress=False)
    first, second = tree(study.folder, figures=True), tree(again.folder, figures=True)
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.usefixtures("undrawn")
def test_two_studies_are_the_same_files(study, model, tmp_path) -> None:
    again = reproduce(model, tmp_path / "again", SMALL, NAMES, progress=False)
    first, second = tree(study.folder), tree(again.folder)
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.usefixtures("undrawn")
def test_what_is_missing_is_made_again(study, model, tmp_path) -> None:
    folder = Path(shutil.copytree(study.folder, tmp_path / "study"))
    for name in (
        "report.md",
        "factual/heads",
        "factual/joint/neurons-noise",
        "shots-0/pairs.json",
    ):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "factual" / "figures" / "old.png").write_text("of an earlier version")
    said: list[str] = []
    with pytest.raises(DeltapatchError, match="it holds a study; --resume goes on with it"):
        reproduce(model, folder, SMALL, NAMES, progress=False)
    reproduce(model, folder, SMALL, NAMES, resume=True, progress=False, say=said.append)
    assert tree(folder) == tree(study.folder)
    assert sum("joint patches" in line for line in said) == 1


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_study_says_how_to_go_on(model, tmp_path, monkeypatch) -> None:
    def stop(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("deltapatch.study.found.sweep", stop)
    with pytest.raises(KeyboardInterrupt, match=r"kept in .*, and the same with --resume goes on"):
        reproduce(model, tmp_path / "study", SMALL, ("shots",), progress=False)
    monkeypatch.undo()
    done = reproduce(model, tmp_path / "study", SMALL, ("shots",), resume=True, progress=False)
    assert list(done.done) == ["shots-0"]


@pytest.mark.usefixtures("undrawn")
def test_experiments_are_added(model, tmp_path) -> None:
    settings = replace(SMALL, per_template=1)
    reproduce(model, tmp_path / "study", settings, ("shots",), progress=False)
    more = reproduce(
        model, tmp_path / "study", settings, ("numerals-same-result",), resume=True, progress=False
    )
    assert list(more.done) == ["numerals-same-result", "shots-0"]
    assert {r["experiment"] for r in rows(tmp_path / "study" / "tables" / "accuracy.csv")} == set(more.done)
    change = rows(more.done["numerals-same-result"].folder / "tables" / "heatmap_change.csv")
    assert all(float(row["change"]) >= 0 for row in change)


def test_a_study_is_resumed_with_its_own_settings(study, model, other) -> None:
    for wrong, message in (
        (replace(SMALL, seed=1), r"different seed \(0 there, 1 here\)"),
        (replace(SMALL, per_template=3), "different per template"),
    ):
        with pytest.raises(DeltapatchError, match=message):
            reproduce(model, study.folder, wrong, NAMES, resume=True, progress=False)
    with pytest.raises(DeltapatchError, match=r"different model \(fingerprint\)"):
        reproduce(other, study.folder, SMALL, NAMES, resume=True, progress=False)


def test_a_study_is_resumed_with_its_own_weights_and_files(model, model_folder, other, tmp_path) -> None:
    facts, problems = tmp_path / "facts", tmp_path / "problems.jsonl"
    (facts / "data").mkdir(parents=True)
    for file in (facts / "data" / "P36.jsonl", problems):
        file.write_text("{}\n")
    settings = replace(SMALL, facts=str(facts), problems=str(problems))
    begin(tmp_path / "study", settings, inputs(settings, model, None), ["factual"])
    assert begin(tmp_path / "study", settings, inputs(settings, model, None), []) == ["factual"]
    wide = load_model(model_folder, device="cpu", dtype="float64")
    for given, what in (
        (inputs(settings, wide, None), r"dtype \(float32 there, float64 here\)"),
        (inputs(settings, model, other), r"other checkpoint \(fingerprint\) \(None there, \w{32} here\)"),
    ):
        with pytest.raises(DeltapatchError, match=f"begun with a different {what}"):
            begin(tmp_path / "study", settings, given, [])
    for file, what in ((facts / "data" / "P36.jsonl", "facts"), (problems, "word problems")):
        file.write_text("{} \n")
        with pytest.raises(DeltapatchError, match=f"different content of the file of {what}"):
            begin(tmp_path / "study", settings, inputs(settings, model, None), [])
        file.write_text("{}\n")


@pytest.mark.usefixtures("undrawn")
def test_what_was_kept_of_another_question_does_not_count(study, model, tmp_path) -> None:
    folder = Path(shutil.copytree(study.folder, tmp_path / "study"))
    joint = folder / "factual" / "joint"
    one, two = joint / "neurons-noise", joint / "neurons-denoise"
    shutil.rmtree(one)
    shutil.copytree(two, one)  # of as many interventions on as many pairs
    with pytest.raises(DeltapatchError, match="neurons-noise is finished, with a different direction"):
        reproduce(model, folder, SMALL, NAMES, resume=True, progress=False)
    pairs = folder / "shots-0" / "pairs.jsonl"
    pairs.write_text("".join(sorted(pairs.read_text().splitlines(keepends=True))[::-1]))
    with pytest.raises(DeltapatchError, match=r"pairs.json is not of the pairs beside it, .*: remove"):
        pair_files.read(folder / "shots-0")


def test_legends_tell_checkpoints_of_one_name_apart(study) -> None:
    found = study.done["factual"]
    assert checkpoints._names(found, found)[0] != checkpoints._names(found, found)[1]
    model = copy.copy(found.subject.model)
    model.revision = "step1000"
    early = replace(found, subject=replace(found.subject, model=model))
    assert checkpoints._names(found, early) == ("tiny", "tiny at step1000")
    assert all("--revision step1000" in line for line in early.commands())


def test_an_error_of_a_run_ends_the_study(model, tmp_path) -> None:
    with pytest.raises(DeltapatchError, match="shots-0, components: a memory budget of 1 kB is too small"):
        reproduce(model, tmp_path / "study", replace(SMALL, memory_budget=1000), ("shots",), progress=False)


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_done_is_said(model, tmp_path) -> None:
    said: list[str] = []
    settings = replace(SMALL, correct_only=True)
    with pytest.raises(DeltapatchError, match="can do none of these experiments: shots-0: the model answers"):
        reproduce(model, tmp_path / "none", settings, ("shots",), progress=False, say=said.append)
    assert any(line.startswith("  not done: the model answers both prompts of none of") for line in said)
    # Twelve exemplars are more than the context has room for; facts have none.
    settings = replace(SMALL, shots=12, per_template=1)
    names = ("numerals-operands", "factual")
    some = reproduce(model, tmp_path / "some", settings, names, progress=False, say=said.append)
    assert list(some.done) == ["factual"]
    assert "more than the 192 that the model was made for" in some.failures["numerals-operands"]
    report = (some.folder / "report.md").read_text(encoding="utf-8")
    assert "## Not done" in report
    assert some.failures["numerals-operands"] in report
    # Three pairs are too few for some of what is shown.
    assert "joint patches need at least 4 pairs, and there are 3" in report


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_template": 0}, "per-template must be at least 1"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"size": "huge"}, "unknown size 'huge'"),
        ({"answers": "two"}, "unknown answers 'two'"),
        ({"layer": 2}, "layer 2 does not exist: this model has 0 to 1"),
        ({"facts": "nowhere"}, "nowhere cannot be read"),
        ({"problems": "nowhere"}, "nowhere"),
    ],
)
def test_bad_settings(model, tmp_path, settings, message) -> None:
    with pytest.raises(DeltapatchError, match=message):
        reproduce(model, tmp_path / "study", replace(SMALL, **settings), progress=False)
    assert not (tmp_path / "study").exists()


def test_a_folder_that_is_no_study(model, tmp_path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(DeltapatchError, match="taken, and not by a study"):
        reproduce(model, tmp_path, SMALL, NAMES, resume=True, progress=False)


@pytest.mark.usefixtures("undrawn")
def test_the_papers_figures_stand_beside_ours(model, tmp_path, monkeypatch) -> None:
    spec = model.spec
    shape = (spec.architecture, spec.n_layers, spec.d_model, spec.d_mlp)
    known = Published("Tiny", ("tiny",), shape, {"shots-0": {"+": 12.0, "all": 34.0}}, {"shots-0": 56.0})
    monkeypatch.setattr(papers, "PUBLISHED", (known,))
    done = reproduce(model, tmp_path / "study", replace(SMALL, per_template=1), ("shots",), progress=False)
    beside = {row["operator"]: row["paper"] for row in rows(done.folder / "tables" / "accuracy.csv")}
    assert beside == {"+": "0.12", "-": "", "*": "", "/": "", "all": "0.34"}
    importance = rows(done.folder / "shots-0" / "tables" / "importance.csv")
    assert [row["paper"] for row in importance] == ["0.56", "", "", "", ""]
    assert "This is Tiny of the paper" in (done.folder / "report.md").read_text(encoding="utf-8")


def test_joint_patches_recover_towards_one_in_both_directions(study) -> None:
    """The table has what the run found, turned in no direction: 0 is the base run and 1 the source run."""
    folder = study.done["factual"].folder
    table = rows(folder / "tables" / "joint_neurons.csv")
    for direction in ("denoise", "noise"):
        outcome = dp.load_outcome(folder / "joint" / f"neurons-{direction}")
        assert outcome.direction == direction
        change, over = outcome.terms("recovered")
        size = outcome.patches.max()
        some = outcome.patches == size  # all neurons, the same set in any order
        (row,) = (r for r in table if r["direction"] == direction and int(r["size"]) == size)
        assert float(row["recovered"]) == pytest.approx(change[some].mean() / over[some].mean(), rel=1e-5)


def test_medians_stand_beside_means_of_indirect_effects(study) -> None:
    folder = study.done["factual"].folder
    for row in rows(folder / "tables" / "magnitudes.csv"):
        assert (row["median"] != "") == (row["metric"] == "ie")
    effects = load_effects(folder / "neurons")
    by_pair = effects.values("ie")[:, :, 0]
    for row in rows(folder / "tables" / "strongest_neurons.csv")[:5]:
        want = np.median(by_pair[:, int(row["layer"]), int(row["index"])])
        assert float(row["ie_median"]) == pytest.approx(want)


def test_groups_that_figures_do_not_tell_apart_are_said(study) -> None:
    found = study.done["shots-0"]
    assert len(found.grouped) == 4
    found.check_groups()
    for count, pairs, said in ((9, 2, "figures tell at most 8 apart"), (3, 1, "each has a single pair")):
        kinds = [dp.PromptPair("a", "b", "c", "d", meta={"operator": f"{i}"}) for i in range(count)] * pairs
        many = replace(found, made=replace(found.made, pairs=kinds))
        with pytest.raises(DeltapatchError, match=f"its pairs are of {count} kinds, and {said}"):
            many.check_groups()


@pytest.mark.usefixtures("undrawn")
def test_two_checkpoints(model, other, tmp_path) -> None:
    settings = replace(SMALL, per_template=1)
    done = reproduce(model, tmp_path / "study", settings, ("shots",), other=other, progress=False)
    first = load_effects(done.folder / "shots-0" / "components")
    second = load_effects(done.folder / "other" / "shots-0" / "components")
    assert [p.clean for p in first.pairs] == [p.clean for p in second.pairs]
    change = first.values("logit_diff", "attn_out") - second.values("logit_diff", "attn_out")
    assert first.positions("attn_out")[-1] == -1
    want = change[:, 0, -1].mean()
    table = rows(done.folder / "differences" / "shots-0" / "tables" / "differences.csv")
    (row,) = (r for r in table if (r["site"], r["layer"], r["class"]) == ("attn_out", "0", "last"))
    assert float(row["difference"]) == pytest.approx(want)
    assert float(row["low"]) <= want <= float(row["high"])
    (row,) = (
        r for r in rows(done.folder / "differences/shots-0/tables/importance.csv") if r["name"] == "all"
    )
    assert float(row["difference"]) == pytest.approx(float(row["model"]) - float(row["other"]))
    report = (done.folder / "report.md").read_text(encoding="utf-8")
    assert all((done.folder / link).is_file() for link in re.findall(r"\]\(([^)]+)\)", report))
    assert (done.folder / "other" / "report.md").is_file()


@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_and_itself_do_not_differ(model, tmp_path) -> None:
    settings = replace(SMALL, per_template=1)
    done = reproduce(model, tmp_path / "study", settings, ("shots",), other=model, progress=False)
    for row in rows(done.folder / "differences" / "shots-0" / "tables" / "differences.csv"):
        assert {row["difference"], row["low"], row["high"]} == {"0.0"}
        assert row["p"] == "1.0"


@pytest.mark.usefixtures("undrawn")
def test_checkpoints_of_different_tokens_or_depths(model, tmp_path) -> None:
    settings = replace(SMALL, per_template=1)
    builtin = load_model("builtin:llama-arithmetic", device="cpu")
    with pytest.raises(DeltapatchError, match="tokenise"):
        reproduce(model, tmp_path / "tokens", settings, ("shots",), other=builtin, progress=False)
    deep = load_model(make_model(tmp_path / "deep", seed=0, n_layers=3), device="cpu")
    done = reproduce(model, tmp_path / "depths", settings, ("shots",), other=deep, progress=False)
    names = {path.stem for path in (done.folder / "differences" / "shots-0" / "tables").glob("*.csv")}
    assert names == {"accuracy", "importance"}


@pytest.mark.slow
def test_every_experiment(model, tmp_path) -> None:
    """All of them, with facts and word problems from files, on a model that knows every word."""
    facts = tmp_path / "facts.jsonl"
    of = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Greece", "Athens")]
    facts.write_text(
        "".join(json.dumps({"subject": s, "relation": "has capital", "object": o}) + "\n" for s, o in of)
    )
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        '{"template": "Tom has {a} pens and buys {b} more. How many?", "answer": "a + b", '
        '"numbers": {"a": [2, 20], "b": [2, 20]}}\n'
    )
    settings = replace(SMALL, per_template=None, size="quick", facts=str(facts), problems=str(problems))
    done = reproduce(model, tmp_path / "study", settings, progress=False)
    assert not done.failures
    assert "word-problems" in done.done
    for found in done.done.values():
        assert all(check["error"] < 1e-4 for check in found.checks.values()), found.experiment.name
    overlap = rows(done.folder / "tables" / "neurons_neurons.csv")
    assert {"numerals-operands", "retrieval"} <= {row["a"] for row in overlap}
    assert "word-problems" in {row["b"] for row in overlap}  # the last task: the others are before it
