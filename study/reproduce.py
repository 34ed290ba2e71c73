"""The whole study: every experiment's pairs, sweeps, tables and figures, and a report of all."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from deltapatch.errors import DeltapatchError
from deltapatch.models.header import check_regular
from deltapatch.models.model import Model
from deltapatch.results.folder import plain_errors
from deltapatch.results.lock import held
from deltapatch.study import checkpoints
from deltapatch.study import pairs as pair_files
from deltapatch.study.across import compare
from deltapatch.study.exhibit import Exhibit
from deltapatch.study.exhibits import EXHIBITS
from deltapatch.study.found import Found
from deltapatch.study.pairs import Made
from deltapatch.study.presets import Experiment, choose, comparisons, experiments
from deltapatch.study.published import Published, published
from deltapatch.study.report import NUMBERS, REPORT, Section, clear, write_report
from deltapatch.study.settings import SETTINGS, Settings, begin, inputs
from deltapatch.study.subject import StudyStopped, Subject
from deltapatch.tasks.facts import read_facts
from deltapatch.tasks.problem_file import read_problems

_PROBE = "Q: What is the sum of 12 and 207? A: 219\nThe capital of France is Paris, twenty-one pens."
_SAME_WEIGHTS = (None, "main", "float16")  # revisions of the models that the paper is about
LOCK, OTHER, DIFFERENCES = "study.lock", "other", "differences"


@dataclass(frozen=True)
class Study:
    """What a study found: the experiments that were done, and why others were not."""

    folder: Path
    done: dict[str, Found]
    failures: dict[str, str]
    other: dict[str, Found]


def reproduce(
    model: Model,
    out: str | Path,
    settings: Settings | None = None,
    names: Sequence[str] = (),
    *,
    adapter: str | None = None,
    other: Model | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Study:
    """Run the study of a model, and write every table and figure with the numbers behind them.

        OUT/report.md, study.json          what was found; settings.json, with what; times.json, how long
        OUT/<experiment>/pairs.jsonl       its prompt pairs; pairs.json, what was dropped and why
        OUT/<experiment>/components, ...   its runs, each a run folder; joint/, what joint patches did
        OUT/<experiment>/tables, figures   what is shown
        OUT/tables, figures                across experiments
        OUT/other, differences             another checkpoint on the same pairs, and how it differs

    The same settings on the same machine give the same files, times.json apart.

    Args:
        model: a model with a tokenizer.
        out: the study's folder.
        settings: the usual ones by default.
        names: of experiments, or what their names begin with; all by default.
        adapter: the name of the adapter that was merged into the model, if any.
        other: another checkpoint, whose tokenizer gives the same tokens, to be studied on the same pairs.
        resume: go on with a study that was cut off, or add experiments to one.
        progress: show bars on stderr where that is a terminal.
        say: told what is being done, a line at a time.

    Raises:
        DeltapatchError: bad settings, or a folder that is taken; files that cannot be read or written; no
            experiment that the model can do.
    """
    settings = settings or Settings()
    settings.check()
    chosen = choose(list(names), settings.shots, () if settings.problems else ("word-problems",))
    check_inputs(model, settings, chosen, other)
    folder = Path(out)
    check_folder(folder, resume)
    with plain_errors(folder, "what was done before is kept; free some, and resume"):
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder / LOCK, f"another process works on the study in {folder}: wait until it is done"):
            try:
                have = set(begin(folder, settings, inputs(settings, model, other), chosen))
                order = [name for name in experiments(settings.shots) if name in have]
                subject = Subject(
                    model,
                    folder,
                    folder,
                    settings,
                    say,
                    progress,
                    _paper(model, adapter),
                    settings.layer,
                    adapter,
                )
                return _study(subject, order, other)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"Interrupted; what is done is kept in {folder}, and the same with --resume goes on"
                ) from None
            finally:
                (folder / LOCK).unlink(missing_ok=True)
                _drop_if_empty(folder)


def _paper(model: Model, adapter: str | None = None) -> Published | None:
    """What the paper says of a model: nothing of a checkpoint in its training, for example."""
    return published(model, adapter) if model.revision in _SAME_WEIGHTS else None


def _study(subject: Subject, order: list[str], other: Model | None) -> Study:
    """Both checkpoints, and the report."""
    known = experiments(subject.settings.shots)
    sections, failures = _experiments(subject, [known[name] for name in order], partial(_made, subject))
    done = _founds(sections)
    if not done:
        reasons = "; ".join(f"{name}: {why}" for name, why in failures.items())
        raise DeltapatchError(f"the model can do none of these experiments: {reasons}")
    theirs: dict[str, Found] = {}
    if other is not None:
        subject.say(f"The other checkpoint: {other.name}")
        second = replace(
            subject, model=other, folder=subject.folder / OTHER, adapter=None, paper=_paper(other)
        )
        given = partial(_given, second, subject, done)
        their_sections, their_failures = _experiments(second, [known[name] for name in done], given)
        theirs = _founds(their_sections)
        failures |= {f"{OTHER}/{name}": why for name, why in their_failures.items()}
        write_report(second, _summary(second, theirs), their_sections, their_failures)
        sections += _differences(subject, done, theirs)
    write_report(subject, _summary(subject, done), sections, failures)
    subject.say(f"Report: {subject.folder / REPORT}; every number: {subject.folder / NUMBERS}")
    return Study(subject.folder, done, failures, theirs)


def _experiments(
    subject: Subject, chosen: Sequence[Experiment], made: Callable[[Experiment], Made]
) -> tuple[list[Section], dict[str, str]]:
    """Every experiment with its exhibits; and why some cannot be done."""
    sections, failures = [], {}
    for number, experiment in enumerate(chosen, start=1):
        subject.say(f"[{number}/{len(chosen)}] {experiment.name}: {experiment.title}")
        try:
            own = made(experiment)
        except StudyStopped:
            raise
        except DeltapatchError as error:
            failures[experiment.name] = str(error)
            subject.say(f"  not done: {error}")
            continue
        subject.say(f"  {len(own.pairs)} pairs, {own.right.mean():.1%} of the prompts answered right")
        section = Section(experiment.title, experiment.name, found=Found(subject, experiment, own))
        _show(subject, section)
        sections.append(section)
    return sections, failures


def _show(subject: Subject, section: Section) -> None:
    """Make and write the exhibits of an experiment."""
    found = section.found
    assert found is not None
    clear(found.folder)
    for name in found.experiment.exhibits:
        try:
            for exhibit in EXHIBITS[name](found):
                section.exhibits.append(exhibit.write(found.folder))
        except StudyStopped:
            raise
        except DeltapatchError as error:
            section.reasons[name] = str(error)
            subject.say(f"  {name} is not shown: {error}")
    found.forget()


def _made(subject: Subject, experiment: Experiment) -> Made:
    """The pairs of an experiment."""
    return _kept(subject, experiment, lambda: pair_files.make(experiment, subject.settings, subject.model))


def _given(second: Subject, first: Subject, done: dict[str, Found], experiment: Experiment) -> Made:
    """The pairs of the first checkpoint, for the second."""
    own = done[experiment.name].made
    return _kept(
        second,
        experiment,
        lambda: checkpoints.same_pairs(own, first.model, second.model, pair_files.AMONG),
    )


def _kept(subject: Subject, experiment: Experiment, make: Callable[[], Made]) -> Made:
    """The pairs of an experiment: read where they were made before, else made and written."""
    folder = subject.folder / experiment.name
    made = pair_files.read(folder)
    if made is None:
        made = make()
        with subject.stopping(experiment.name):
            folder.mkdir(parents=True, exist_ok=True)
            pair_files.write(folder, made)
    return made


def _differences(subject: Subject, done: dict[str, Found], theirs: dict[str, Found]) -> list[Section]:
    sections = []
    for name, second in theirs.items():
        place = f"{DIFFERENCES}/{name}"
        subject.say(f"  differences: {name}")
        section = Section(f"Both checkpoints: {done[name].experiment.title}", place)
        clear(subject.folder / place)
        for exhibit in checkpoints.differences(done[name], second):
            section.exhibits.append(exhibit.write(subject.folder / place))
        done[name].forget()
        second.forget()
        sections.append(section)
    return sections


def _summary(subject: Subject, done: dict[str, Found]) -> Section:
    """What is shown across experiments."""
    exhibits: list[Exhibit] = []
    clear(subject.folder)
    for comparison in comparisons(subject.settings.shots):
        for exhibit in compare(comparison, done):
            exhibits.append(exhibit.write(subject.folder))
    return Section("All experiments", "", exhibits)


def _founds(sections: Sequence[Section]) -> dict[str, Found]:
    return {s.found.experiment.name: s.found for s in sections if s.found is not None}


def check_inputs(model: Model, settings: Settings, chosen: Sequence[str], other: Model | None = None) -> None:
    """What can be seen to be wrong before anything is written."""
    for each in (model, other):
        if each is not None and each.tokenizer is None:
            raise DeltapatchError(f"{each.name} has no tokenizer, and the study's prompts are text")
    if other is not None:
        ids, theirs = (list(m.tokenizer(_PROBE)["input_ids"]) for m in (model, other))
        if ids != theirs:
            raise DeltapatchError(
                f"{other.name} tokenises text in another way than {model.name}: the same pairs cannot be "
                "patched in both"
            )
    if settings.layer is not None and settings.layer >= model.spec.n_layers:
        raise DeltapatchError(
            f"layer {settings.layer} does not exist: this model has 0 to {model.spec.n_layers - 1}"
        )
    if "word-problems" in chosen and settings.problems is None:
        raise DeltapatchError("word-problems come from a file of yours: give its path with --problems")
    if settings.facts is not None:
        read_facts(Path(settings.facts), None)
    if settings.problems is not None:
        read_problems(Path(settings.problems))


def check_folder(out: str | Path, resume: bool) -> None:
    """Raise DeltapatchError where a study cannot be begun or resumed."""
    folder = Path(out)
    with plain_errors(folder):
        empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if empty:
        return
    if not _is_study(folder):
        raise DeltapatchError(
            f"output path {folder} is taken, and not by a study: choose another with --out or remove it"
        )
    if not resume:
        raise DeltapatchError(
            f"output path {folder} is taken: it holds a study; --resume goes on with it, or choose another"
        )


def _drop_if_empty(folder: Path) -> None:
    """Remove the folder of a study that has nothing but its settings."""
    if [path.name for path in folder.iterdir()] == [SETTINGS]:
        (folder / SETTINGS).unlink()
        with suppress(OSError):  # something else may lie there by now
            folder.rmdir()


def _is_study(folder: Path) -> bool:
    try:
        check_regular(folder / SETTINGS)
        about: Any = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return isinstance(about, dict) and about.get("format") == "deltapatch study"
    except (OSError, ValueError):
        return False
