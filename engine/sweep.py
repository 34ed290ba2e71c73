"""Sweeps and runs, the way in: pairs and interventions become a question, passes, and what these found.

A sweep patches a grid, each activation alone; a run carries out given interventions. All else is the same.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np

from deltapatch.engine.audit import Audit
from deltapatch.engine.options import EdgeOptions, Options, ScreenOptions, SweepOptions, takes
from deltapatch.engine.passes import at_work, passes, progress_of, run_pass
from deltapatch.engine.progress import progress_bar
from deltapatch.engine.question import Decided, Question, ask
from deltapatch.engine.screening.rounds import verify_until
from deltapatch.engine.screening.screen import Screen
from deltapatch.engine.settings import (
    check_same,
    decided_by,
    meta_of,
    settings_of,
    settings_of_run,
)
from deltapatch.engine.wavefront.pool import threads
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.given import Intervention, Listed, checked
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.pairs_file import Pairs
from deltapatch.interventions.wirings import Wirings
from deltapatch.models.model import Model
from deltapatch.models.spec import ModelSpec
from deltapatch.models.surroundings import undisturbed
from deltapatch.results.checkpoint import Unfinished, tidy, unfinished
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.effects import Effects
from deltapatch.results.estimated import Estimated
from deltapatch.results.folder import RUN, check_output
from deltapatch.results.manifest import Manifest
from deltapatch.results.measured import Found, Gathered, with_axes
from deltapatch.results.outcome import Outcome
from deltapatch.results.reading import read_run
from deltapatch.results.screened import Screened, load_screened
from deltapatch.results.screened_edges import ScreenedEdges
from deltapatch.results.screened_outcome import ScreenedOutcome
from deltapatch.results.truth import Truth
from deltapatch.results.wired_outcome import WiredOutcome

Make = Callable[[ModelSpec, list[EncodedPair]], Listed]  # makes interventions, of a model and its pairs


@overload
def sweep(model: Model, pairs: Pairs, *, screen: None = None, **options: Any) -> Effects: ...
@overload
def sweep(model: Model, pairs: Pairs, *, screen: str, **options: Any) -> Screened: ...
@takes(SweepOptions)
@undisturbed()
def sweep(model: Model, pairs: Pairs, **options: Any) -> Effects | Screened:
    """Patch every chosen site, layer, position and index of every pair, each alone, exactly.

    Args:
        model: from `load_model` or `from_transformers`.
        pairs: prompt pairs, of any lengths, one or several, as `PromptPair` or dictionaries of its fields; or
            the path of a pairs file. Where answers have several tokens, effects are of the probability
            of whole answers; `positions` and labels are those of the prompt.
        {options}

    Returns:
        Effects: arrays [pair, layer, position] or [pair, layer, position, index] for every site and metric.
        With `screen`, Screened: estimates of all, the exact effects of some, and what may have been missed.

    Raises:
        DeltapatchError: bad input, one clear sentence.
    """
    asked = SweepOptions(**options)
    if asked.screen is not None:
        screened = _screened(model, pairs, asked)
        assert isinstance(screened, Screened)
        return screened
    found = _answer(model, pairs, asked, None)
    assert isinstance(found, Effects)
    return found


@overload
def sweep_edges(model: Model, pairs: Pairs, *, screen: None = None, **options: Any) -> EdgeEffects: ...
@overload
def sweep_edges(model: Model, pairs: Pairs, *, screen: str, **options: Any) -> ScreenedEdges: ...
@takes(EdgeOptions)
@undisturbed()
def sweep_edges(model: Model, pairs: Pairs, **options: Any) -> EdgeEffects | ScreenedEdges:
    """Patch every chosen edge of every pair, each alone, exactly.

    An edge sends one node's change (source - base) into what one receiver reads, and into nothing else. In
    MIB and EAP-IG the clean run is the base: that is `direction="noise"`.

    Args:
        model: from `load_model` or `from_transformers`.
        pairs: as of `sweep`.
        {options}

    Returns:
        EdgeEffects: `values` is [pair, sender, receiver], or [pair, sender, receiver, position].
        With `screen`, ScreenedEdges: estimates of all, exact effects of some, and what may have been missed.

    Raises:
        DeltapatchError: bad input, one clear sentence.
    """
    asked = EdgeOptions(**options)
    if asked.screen is not None:
        screened = _screened(model, pairs, asked)
        assert isinstance(screened, ScreenedEdges)
        return screened
    found = _answer(model, pairs, asked, None)
    assert isinstance(found, EdgeEffects)
    return found


@undisturbed()
def run_wired(
    model: Model, pairs: Pairs, wirings: Callable[[ModelSpec, list[EncodedPair]], Wirings], **options: Any
) -> WiredOutcome:
    """Carry out runs in which every receiver reads a stream of its own.

    Args:
        model, pairs: as of `sweep`.
        wirings: makes them, of the model's spec and the pairs.
        options: of `run`, but for those of a run folder.

    Raises:
        DeltapatchError: bad input, one clear sentence.
    """
    asked = Options(**options)
    if asked.out is not None or asked.resume:
        raise DeltapatchError("circuits and paths write no run folder: leave out `out`")
    question = ask(model, pairs, asked, wirings)
    assert isinstance(question.interventions, Wirings)
    gathered, meta = _in_memory(question)
    return WiredOutcome(
        gathered.measured, question.interventions, question.pairs, gathered.reference, asked.direction, meta
    )


@takes(Options)
@undisturbed()
def run(
    model: Model, pairs: Pairs, interventions: Intervention | Sequence[Intervention], **options: Any
) -> Outcome:
    """Carry out given interventions, each with any number of patches.

    Args:
        model, pairs: as for `sweep`.
        interventions: one or several, each `Intervention(pair, patches)`.
        {options}

    Returns:
        Outcome: one number for each intervention and metric.

    Raises:
        DeltapatchError: bad input; also an intervention without patches, or with one patch twice.
    """
    outcome = _answer(model, pairs, Options(**options), checked(interventions))
    assert isinstance(outcome, Outcome)
    return outcome


@undisturbed()
def run_listed(model: Model, pairs: Pairs, make: Make, **options: Any) -> Outcome:
    """Carry out interventions that are made as arrays.

    Args:
        model, pairs: as of `sweep`.
        make: makes them, of the model's spec and the pairs.
        options: of `run`.

    Raises:
        DeltapatchError: bad input, one clear sentence.
    """
    outcome = _answer(model, pairs, Options(**options), make)
    assert isinstance(outcome, Outcome)
    return outcome


@undisturbed()
def screen_listed(model: Model, pairs: Pairs, make: Make, options: ScreenOptions) -> ScreenedOutcome:
    """Estimate interventions that are made as arrays and add vectors, and carry some of them out.

    Args:
        model, pairs, make: as of `run_listed`.
        options: with a screen.

    Raises:
        DeltapatchError: bad input, one clear sentence.
    """
    found = _screened(model, pairs, options, make)
    assert isinstance(found, ScreenedOutcome)
    return found


def _screened(model: Model, pairs: Pairs, options: ScreenOptions, make: Make | None = None) -> Estimated:
    """Estimate, verify, and keep both where that is asked for. Parts have what they did themselves.

    Args:
        make: of what is no grid, as of `run_listed`.
    """
    if options.out is not None and not options.resume and options.part is None:
        check_output(options.out)
    screen = Screen(model, pairs, options, make)
    if options.until is not None:
        return _until(model, pairs, screen)
    choice = screen.choose()
    verified = _answer(model, pairs, screen.options, partial(screen.listed, choice.effects))
    assert isinstance(verified, Outcome)
    found = screen.result(verified, choice)
    if options.out is not None and (Path(options.out) / RUN).is_file():
        found.put_estimates(Path(options.out))
    return found


def _until(model: Model, pairs: Pairs, screen: Screen) -> Estimated:
    """Verify in rounds, each a run of its own; in a run folder theirs are kept until the last is done."""

    def verify(folder: Path | None, effects: np.ndarray, number: int) -> Outcome:
        out = None if folder is None else folder / str(number)
        own = replace(screen.options, out=out, resume=out is not None)
        found = _answer(model, pairs, own, partial(screen.listed, effects))
        assert isinstance(found, Outcome)
        return found

    options = screen.options
    if options.out is None:
        return verify_until(screen, partial(verify, None))
    path = Path(options.out)
    with unfinished(path, options.resume) as kept:
        if not kept.finished:
            found = verify_until(screen, partial(verify, kept.rounds))
            found.put_estimates(path)
            kept.finish(found.verified)
            return found
    found = load_screened(path)
    effects = found.verified.interventions.labels["effect"]
    _finished(ask(model, pairs, options, partial(screen.listed, effects)))
    return found


def _answer(
    model: Model,
    pairs: Pairs,
    options: Options,
    interventions: list[Intervention] | Make | None,
) -> Found:
    """Ask, carry the passes out, and put what they found in order."""
    joins = options.resume or options.part is not None
    if options.out is not None and not joins:
        check_output(options.out)
    question = ask(model, pairs, options, interventions)
    if options.out is None:
        gathered, meta = _in_memory(question)
        found = _with_axes(question, gathered, meta)
        found._fingerprint = question.model.fingerprint_later()
        return found
    path = Path(options.out)
    if joins and (path / RUN).is_file():
        return _finished(question)
    with unfinished(path, options.resume, options.part) as kept:
        if kept.finished:
            return _finished(question)
        with kept.planning():
            if kept.manifest is None:
                kept.begin(plan(question), question.pairs, given_arrays(question))
            assert kept.manifest is not None
            decided = adopt(question, kept.manifest)
        with threads(decided.threads):
            found = _in_folder(question, decided, kept)
        if options.part is None:
            kept.finish(found)
    return found


def _in_memory(question: Question) -> tuple[Gathered, dict[str, Any]]:
    """What the passes of a question find, and what is said of them; nothing is kept."""
    began = time.perf_counter()
    with _bar(question) as tick, at_work(question) as pool:
        audit = Audit(question, pool)
        decided = question.decided(question.precision or audit.cheapest())
        gathered = _gathered(question, decided)
        for part in passes(question, decided, pool):
            gathered.add(run_pass(question, part, decided.precision, pool, tick))
        truth = audit.truth_for(decided.precision)
        why = audit.left_out(decided.precision) if truth is None else None
    meta = meta_of(question, decided, None) | {"noise_floor_left_out": why}
    return gathered, meta | _told(question, decided, gathered, truth, time.perf_counter() - began)


def _in_folder(question: Question, decided: Decided, kept: Unfinished) -> Found:
    """Carry out the passes of this process's part that are not kept yet, and keep them."""
    manifest = kept.manifest
    assert manifest is not None
    began, of_others = time.perf_counter(), 0.0
    gathered = _gathered(question, decided)
    with _bar(question) as tick, at_work(question) as pool:
        for number, part in enumerate(passes(question, decided, pool)):
            if not kept.wants(number):
                continue
            done = kept.kept(number, part.out, part.pairs, gathered)
            if done is None:
                done = run_pass(question, part, decided.precision, pool, tick)
                kept.keep(number, done)
            else:
                tick(progress_of(question, part))
                of_others += done.seconds  # what is kept took its time in another process
            gathered.add(done)
    truth = manifest.truth if kept.whole else None
    seconds = manifest.meta["seconds"] + time.perf_counter() - began + of_others
    meta = meta_of(question, decided, manifest.settings["model"])
    meta["noise_floor_left_out"] = manifest.meta["noise_floor_left_out"] if kept.whole else None
    return _with_axes(question, gathered, meta | _told(question, decided, gathered, truth, seconds))


def _bar(question: Question) -> Any:
    return progress_bar("patching", question.row_layers, question.options.progress)


def _gathered(question: Question, decided: Decided) -> Gathered:
    dtype = np.float64 if decided.precision.name == "fp64" else np.float32
    return Gathered(question.measured, dtype, question.interventions.n_effects, len(question.pairs))


def _told(
    question: Question, decided: Decided, gathered: Gathered, truth: Truth | None, seconds: float
) -> dict[str, Any]:
    """What a run says of itself when it is done."""
    floor = None
    if truth is not None:
        direction = question.options.direction
        floor = truth.noise_floor(decided.precision.name, gathered.measured, direction)
    return {
        "noise_floor": floor,
        "passes": gathered.passes,
        "rows": gathered.rows,
        "seconds": round(seconds, 3),
    }


def _with_axes(question: Question, gathered: Gathered, meta: dict[str, Any]) -> Found:
    return with_axes(question.asked, gathered, question.pairs, question.options.direction, meta)


def plan(question: Question, budget: int | None = None) -> Manifest:
    """Decide what is left open: the precision, and how the passes are cut on this machine.

    Args:
        budget: bytes that a pass may take, where it is not what the question says.

    Raises:
        DeltapatchError: the memory budget has no room for one intervention.
    """
    _ = question.fingerprint  # which reads all weights
    began = time.perf_counter()
    with at_work(question) as pool:
        audit = Audit(question, pool)
        precision = question.precision or audit.cheapest()
        truth = audit.truth_for(precision)
        why = audit.left_out(precision) if truth is None else None
        decided = question.decided(precision)
        if budget is not None:
            decided = replace(decided, memory_budget=budget)
        n_passes = sum(1 for _ in passes(question, decided, pool))
    meta = meta_of(question, decided, question.fingerprint) | {
        "noise_floor_left_out": why,
        "seconds": round(time.perf_counter() - began, 3),
    }
    return Manifest(settings_of(question, decided), n_passes, len(question.pairs), meta, truth)


def adopt(question: Question, manifest: Manifest, where: object = None) -> Decided:
    """Take over the plan of a run. DeltapatchError where it is another one's."""
    asked = settings_of(question)
    check_same(manifest.settings, asked, where or question.options.out, finished=False)
    return decided_by(manifest.settings)


def given_arrays(question: Question) -> dict[str, np.ndarray] | None:
    """Of a list of interventions, what a run folder keeps."""
    return question.asked.arrays() if isinstance(question.asked, Listed) else None


def _finished(question: Question) -> Found:
    """What a finished run found. DeltapatchError where it is damaged, or another one's."""
    path = Path(question.options.out or "")
    found = read_run(path)
    asked = settings_of(question)
    left_open = {"backend": None} if question.options.backend == "auto" else {}
    check_same(settings_of_run(found), asked | left_open, path, finished=True)
    tidy(path)
    return found
