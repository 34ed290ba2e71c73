"""Merging: the kept passes of a run whose parts are all done become the run folder of one process."""

from itertools import islice
from os import PathLike
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.edges import EdgeGrid, grid_of
from deltapatch.interventions.given import Listed
from deltapatch.interventions.grid import Grid
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.models.header import check_regular
from deltapatch.results.checkpoint import GO_ON, Unfinished, read_plan, tidy, unfinished
from deltapatch.results.folder import INTERVENTIONS, PAIRS, RUN, UNFINISHED, is_begun
from deltapatch.results.kept import DamagedPass, KeptPasses
from deltapatch.results.manifest import Manifest, digest_of
from deltapatch.results.measured import Found, Gathered, PassEffects, with_axes
from deltapatch.results.reading import read_interventions, read_pairs_text, read_run

_NAMED = 10_000  # missing passes that are looked up for a message


def merge(path: str | PathLike[str]) -> bool:
    """Join what the parts of a run found, check that it is whole and complete, and finish the run folder.

    Args:
        path: the run folder that all parts had as their output.

    Returns:
        Whether there was anything to do: False where the run is finished already.

    Raises:
        DeltapatchError: it is no run, a part is at work, passes are missing or damaged, or the disk is full;
            the run is finished and damaged.
    """
    path = Path(path)
    if (path / RUN).is_file():
        read_run(path)
        tidy(path)
        return False
    if not is_begun(path):
        raise DeltapatchError(f"{path} is not a run folder: give the output folder of the parts of a sweep")
    with unfinished(path, resume=True) as run:
        if run.finished:
            return False
        join(run)
    return True


def join(run: Unfinished) -> Found:
    """Finish a run whose passes are all done, without its model.

    Raises:
        DeltapatchError: passes are missing or damaged, or the disk is full.
    """
    path = run.path
    if run.has_rounds:
        raise DeltapatchError(f"run {path} is one in rounds, which has no parts to merge: {GO_ON}")
    manifest = run.manifest or read_plan(path)
    pairs = _pairs(path, manifest)
    interventions = _interventions(path, manifest, pairs)
    _check_complete(run, manifest, interventions, pairs)
    gathered = _gather(path, run.passes, manifest, interventions, pairs)
    settings = manifest.settings
    meta = manifest.meta | {
        "passes": gathered.passes,
        "rows": gathered.rows,
        "seconds": round(gathered.seconds, 3),
    }
    if manifest.truth is not None:
        meta["noise_floor"] = manifest.truth.noise_floor(
            settings["precision"], gathered.measured, settings["direction"]
        )
    found = with_axes(interventions, gathered, pairs, settings["direction"], meta)
    run.finish(found)
    return found


def _interventions(path: Path, manifest: Manifest, pairs: list[EncodedPair]) -> Grid | EdgeGrid | Listed:
    if "interventions" not in manifest.settings:
        return grid_of(manifest.settings, len(pairs))
    file = path / UNFINISHED / INTERVENTIONS
    try:
        found = read_interventions(file, pairs)
        if found.settings()["interventions"] != manifest.settings["interventions"]:
            raise ValueError("they are not those of the manifest")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise DeltapatchError(
            f"run {path} cannot be merged: {file} is damaged ({reason}); the same run with resume=True needs "
            "none of it"
        ) from error
    return found


def _pairs(path: Path, manifest: Manifest) -> list[EncodedPair]:
    file = path / UNFINISHED / PAIRS
    try:
        check_regular(file)
        pairs = read_pairs_text(file.read_text(encoding="utf-8"))
        if digest_of(pairs) != manifest.settings["pairs"] or len(pairs) != manifest.n_pairs:
            raise ValueError("they are not those of the manifest")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DeltapatchError(
            f"run {path} cannot be merged: {file} is damaged ({reason}); the same sweep with "
            "--resume needs none of it"
        ) from error
    return pairs


def _check_complete(
    run: Unfinished, manifest: Manifest, interventions: Grid | EdgeGrid | Listed, pairs: list[EncodedPair]
) -> None:
    """Read every kept pass before arrays for all are made: a manifest's number is not worth much memory."""
    path, n_passes = run.path, manifest.n_passes
    have = [number for number in run.passes.numbers() if number < n_passes]
    rows, damaged = 0, []
    for number in have:
        found = _read(run.passes, number)
        if found is None:
            damaged.append(number)
        else:
            rows += len(found.out)
    n_missing = n_passes - len(have)
    if n_missing or damaged:
        # No more are named than a sentence holds, whatever number the manifest gives.
        there = set(have)
        missing = list(islice((n for n in range(n_passes) if n not in there), _NAMED))
        gone = f"{n_missing} missing" + (f" ({run.parts(missing)})" if missing else "")
        broken = f"{len(damaged)} damaged" + (f" ({run.parts(damaged)})" if damaged else "")
        raise DeltapatchError(
            f"run {path} is not complete: of {n_passes} passes, {gone} and {broken}; "
            "run the same parts again, or the whole sweep with --resume"
        )
    if rows != sum(interventions.n_rows(i, pair) for i, pair in enumerate(pairs)):
        raise DeltapatchError(f"run {path} is damaged: its shards do not hold what its manifest promises")


def _gather(
    path: Path,
    passes: KeptPasses,
    manifest: Manifest,
    interventions: Grid | EdgeGrid | Listed,
    pairs: list[EncodedPair],
) -> Gathered:
    dtype = np.float64 if manifest.settings["precision"] == "fp64" else np.float32
    names = manifest.settings["metrics"]
    gathered = Gathered(names, dtype, interventions.n_effects, len(pairs))
    seen = np.zeros(interventions.n_effects, dtype=bool)
    ran = np.zeros(len(pairs), dtype=bool)
    for number in range(manifest.n_passes):
        found = _read(passes, number)
        if found is None or not _fits(found, gathered, names):
            raise DeltapatchError(f"run {path} is damaged: pass {number} does not fit its manifest")
        gathered.add(found)
        seen[found.out] = True
        ran[found.pairs] = True
    # As many as there should be, and each once: these are all.
    acted = interventions.acted
    complete = int(seen.sum()) == gathered.rows and bool(ran[acted].all())
    if not complete or not all(seen[interventions.table(i, pairs[i])[1]].all() for i in acted):
        raise DeltapatchError(f"run {path} is damaged: its shards do not hold what its manifest promises")
    return gathered


def _read(passes: KeptPasses, number: int) -> PassEffects | None:
    try:
        return passes.read(number)
    except DamagedPass:
        return None


def _fits(found: PassEffects, gathered: Gathered, names: list[str]) -> bool:
    kinds = {name: gathered.measured[name].dtype for name in names}
    n_effects, n_pairs = len(gathered.measured[names[0]]), len(gathered.reference.logit)
    inside = all(
        at.min(initial=0) >= 0 and at.max(initial=-1) < n
        for at, n in ((found.out, n_effects), (found.pairs, n_pairs))
    )
    return inside and {name: values.dtype for name, values in found.measured.items()} == kinds
