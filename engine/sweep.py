"""Sweeps and runs, the way in: pairs and sites become interventions, these passes, and those effects."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from deltapatch.arguments import several, whole
from deltapatch.engine.job import Job
from deltapatch.engine.pool import threads
from deltapatch.engine.prepare import Options, Prepared, prepare
from deltapatch.engine.work import Work
from deltapatch.errors import DeltapatchError, path_of, shown
from deltapatch.interventions.given import Intervention, checked, tables_of
from deltapatch.interventions.grid import Layers, Positions
from deltapatch.interventions.pairs_file import Pairs
from deltapatch.interventions.sites import PLACES
from deltapatch.interventions.table import row_layers
from deltapatch.models.model import Model
from deltapatch.models.surroundings import undisturbed
from deltapatch.results.checkpoint import tidy, unfinished
from deltapatch.results.effects import Effects, load_effects
from deltapatch.results.folder import RUN, check_output
from deltapatch.results.metrics import Direction
from deltapatch.results.outcome import Outcome


@undisturbed()
def sweep(
    model: Model,
    pairs: Pairs,
    sites: str | Sequence[str] = ("mlp_out", "attn_out"),
    positions: Positions = "all",
    layers: Layers = "all",
    direction: Direction = "denoise",
    source: str = "counterpart",
    precision: str = "auto",
    backend: str = "auto",
    memory_budget: int | str | None = None,
    progress: bool = True,
    out: str | PathLike[str] | None = None,
    metrics: str | Sequence[str] = "all",
    readout: int | str = "last",
    seed: int = 0,
    noise_scale: float = 3.0,
    noise_sample: int | None = None,
    resume: bool = False,
    shard: tuple[int, int] | None = None,
) -> Effects:
    """Patch every chosen site, layer, position and index of every pair, each alone, exactly.

    Args:
        model: from `load_model` or `from_transformers`.
        pairs: prompt pairs, of any lengths, one or several, as `PromptPair` or dictionaries of its fields; or
            the path of a pairs file. Where answers have several tokens, effects are of the probability
            of whole answers; `positions` and labels are those of the prompt.
        sites: names of sites, for example ["mlp_out", "z", "mlp_post"].
        positions: "all", "last", or ints (negative from the end) and label names, one or several.
        layers: "all", or ints and ranges, one or several.
        direction: "denoise" patches clean activations into the corrupted run, "noise" the other way round.
        source: "counterpart" (the pair's other prompt), "zero", "mean" (over both prompts of all pairs of the
            same length), "resample" (another pair's source run) or "noise" (the corrupted run is the clean
            prompt with Gaussian noise on the embeddings where the prompts differ, as in ROME).
        precision: of the products of differences: "fp64", "fp32", "tf32", "bf16", "fp16" (each row scaled by
            a power of two), "fp8" (for screening: effects are approximate), or "auto": the cheapest whose
            effects, in a sample of this sweep, are within 1e-2 of float64 (fp64 for a model loaded in
            float64). Unpatched runs are float32 in all of them, or float64.
        backend: "triton" (on a CUDA device), "reference", or "auto": the best one for the model's device.
        memory_budget: bytes, or text such as "2GB", that the sweep may use beside the model and its
            results; a quarter of what is free, at most 4 GiB, by default; on a GPU half of what is free
            there.
        progress: show a bar on stderr where that is a terminal.
        out: write a run folder there, which must not exist yet. What each pass finds is kept there at once.
        metrics: which metrics will be asked for, or "all"; leaving out kl, flip and says_* saves some time.
        readout: where the effect is read, a position or label; patches after it have no effect. Answers of
            several tokens are read from the end of the prompt on.
        seed: of "resample" and "noise".
        noise_scale: of "noise", in standard deviations of the embeddings.
        noise_sample: how many of the effects are computed again in float64, drawn by `seed`; their relative
            errors are `meta["noise_floor"]`. 0 for none. By default 4 to 32, so few that they take an eighth
            of the run's time or half a second. Where even that is not enough, they are computed in
            float32 (of a run that is itself less precise) or not at all, as `meta["noise_floor_left_out"]`
            says.
        resume: `out` may hold a run of the same sweep that was cut off: only what is missing is computed, and
            the result has the same bytes as if nothing had happened. A finished one is read.
        shard: (i, n), i from 1: do only this part of the passes, and leave `out` unfinished until all n parts
            are done, by processes that share `out`, and `engine.merge.merge` joins them. What the others
            found is NaN here. Implies `resume`.

    Returns:
        Effects: arrays [pair, layer, position] or [pair, layer, position, index] for every site and metric.

    Raises:
        DeltapatchError: bad input, one clear sentence.
    """
    if out is not None:
        path_of(out, "out")
    part = _part(shard, out)
    joins = resume or part is not None
    if out is not None and not joins:
        check_output(out)
    options = Options(
        sites,
        positions,
        layers,
        direction,
        source,
        precision,
        backend,
        memory_budget,
        metrics,
        readout,
        seed,
        noise_scale,
        noise_sample,
    )
    ready = prepare(model, pairs, options)
    if out is None:
        return ready.effects(*ready.job.carry_out(ready.work, progress))
    path = Path(out)
    if joins and (path / RUN).is_file():
        return _finished(path, ready)
    with unfinished(path, resume, part) as kept:
        if kept.finished:
            return _finished(path, ready)
        with kept.planning():
            if kept.manifest is None:
                kept.begin(ready.plan(), ready.job.pairs)
            assert kept.manifest is not None
            ready.adopt(kept.manifest, out)
        with threads(kept.manifest.settings["threads"]):
            effects = ready.effects(*ready.job.carry_out(ready.work, progress, kept))
        if part is None:
            kept.finish(effects)
    return effects


@undisturbed()
def run(
    model: Model,
    pairs: Pairs,
    interventions: Intervention | Sequence[Intervention],
    direction: Direction = "denoise",
    source: str = "counterpart",
    precision: str = "auto",
    backend: str = "auto",
    memory_budget: int | str | None = None,
    progress: bool = True,
    metrics: str | Sequence[str] = "all",
    readout: int | str = "last",
    seed: int = 0,
    noise_scale: float = 3.0,
    noise_sample: int | None = None,
) -> Outcome:
    """Carry out given interventions, each with any number of patches. Arguments are those of `sweep`.

    Raises:
        DeltapatchError: bad input; also an intervention without patches, or with one patch twice.
    """
    options = Options(
        direction=direction,
        source=source,
        precision=precision,
        backend=backend,
        memory_budget=memory_budget,
        metrics=metrics,
        readout=readout,
        seed=seed,
        noise_scale=noise_scale,
        noise_sample=noise_sample,
    )
    interventions = checked(interventions)
    job = Job.of(model, pairs, **options.of_job())
    tables = tables_of(interventions, job.pairs, model.spec)
    work = Work(
        job.ordered(tables),
        lambda pair: tables[pair],
        len(interventions),
        sum(job.runs[i.pair].reads for i in interventions),
        sum(row_layers(t, [job.runs[p]], model.spec.n_layers) for p, (t, _) in tables.items()),
        frozenset(PLACES[i] for t, _ in tables.values() for i in np.unique(t.place)),
        lambda i: f"intervention {i}",
    )
    measured, reference = job.carry_out(work, progress)
    pair = np.array([i.pair for i in interventions])
    patches = np.array([len(i.patches) for i in interventions])
    return Outcome(measured, pair, patches, reference, direction, job.meta())


def _part(shard: tuple[int, int] | None, out: object) -> tuple[int, int] | None:
    """Of a shard, counted from 0."""
    if shard is None:
        return None
    must = "shard must be two whole numbers such as (2, 8), the part and how many there are"
    given = list(several(shard, "shard", "a part such as (2, 8)"))
    if len(given) != 2:
        raise DeltapatchError(f"{must}, not {shown(shard)}")
    i, n = (whole(number, must) for number in given)
    if not 1 <= i <= n:
        raise DeltapatchError(f"shard {i}/{n} does not exist: the first of {n} is 1/{n}, the last {n}/{n}")
    if out is None:
        raise DeltapatchError("a shard needs an output folder, which all shards share")
    return i - 1, n


def _finished(path: Path, ready: Prepared) -> Effects:
    """The effects of a finished run. DeltapatchError where it is damaged, or of another sweep."""
    effects = load_effects(path)
    ready.check_finished(effects, path)
    tidy(path)
    return effects
