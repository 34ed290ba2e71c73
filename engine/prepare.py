"""A sweep made ready: its options checked, its interventions counted, its plan made or taken over."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch

from deltapatch.arguments import count, n_bytes, position, scale, seed
from deltapatch.engine import settings as of_runs
from deltapatch.engine.job import Job
from deltapatch.engine.settings import settings_of
from deltapatch.engine.work import Work
from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.grid import Grid, Layers, Positions, make_grid
from deltapatch.interventions.pairs_file import Pairs
from deltapatch.models.model import Model
from deltapatch.results.effects import Effects
from deltapatch.results.manifest import Manifest, check_same, settings_of_run
from deltapatch.results.measured import split
from deltapatch.results.metrics import Direction, Reference, metric_names


@dataclass(frozen=True)
class Options:
    """What `sweep` is asked for, as its docstring says it. What is given another way is made the same.

    Raises:
        DeltapatchError: an option is of another type, or out of range.
    """

    sites: str | Sequence[str] = ("mlp_out", "attn_out")
    positions: Positions = "all"
    layers: Layers = "all"
    direction: Direction = "denoise"
    source: str = "counterpart"
    precision: str = "auto"
    backend: str = "auto"
    memory_budget: int | str | None = None
    metrics: str | Sequence[str] = "all"
    readout: int | str = "last"
    seed: int = 0
    noise_scale: float = 3.0
    noise_sample: int | None = None

    def __post_init__(self) -> None:
        for name in ("direction", "source", "precision", "backend"):
            if not isinstance(value := getattr(self, name), str):
                raise DeltapatchError(f"{name} must be a name, not {shown(value)}")
        same = {
            "memory_budget": n_bytes(self.memory_budget, "the memory budget"),
            "metrics": metric_names(self.metrics),
            "readout": position(self.readout, "readout must be a whole number or a label"),
            "seed": seed(self.seed),
            "noise_scale": scale(self.noise_scale, "noise_scale"),
            "noise_sample": count(self.noise_sample, "the noise sample"),
        }
        for name, value in same.items():
            object.__setattr__(self, name, value)

    def of_job(self) -> dict[str, Any]:
        """Those that `Job.of` takes: all but what is patched."""
        own = ("sites", "positions", "layers")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}


@dataclass(frozen=True)
class Prepared:
    """A sweep that can be carried out.

    Attributes:
        job: its checked options and encoded pairs.
        grid: what it patches.
        work: its interventions.
        options: what was asked for.
    """

    job: Job
    grid: Grid
    work: Work
    options: Options

    @cached_property
    def asked(self) -> dict[str, Any]:
        """The settings that decide its result, None where the plan may decide (see manifest.py).

        The model's fingerprint is among them: all its weights are read.
        """
        precision = None if self.options.precision == "auto" else self.options.precision
        budget = self.options.memory_budget
        assert not isinstance(budget, str)  # it became a number when the options were made
        return settings_of(self.job, self.grid, precision, budget)

    def plan(self) -> Manifest:
        """Decide what is left open: the precision, and how the passes are cut on this machine.

        Raises:
            DeltapatchError: the memory budget has no room for one intervention.
        """
        job = self.job
        job.identify()
        truth, n_passes = job.settle(self.work)
        meta = self._meta()
        settings = settings_of(
            job, self.grid, meta["precision"], job.budget, meta["threads"], job.model.stream
        )
        return Manifest(settings, n_passes, len(job.pairs), meta, truth)

    def adopt(self, manifest: Manifest, where: object) -> None:
        """Take over the plan of a run. DeltapatchError where it is another sweep's."""
        check_same(manifest.settings, self.asked, where, finished=False)
        self.job.adopt(manifest.settings)

    def check_finished(self, effects: Effects, where: object) -> None:
        """Check that a finished run is of this sweep; DeltapatchError where it is another's."""
        left_open = {"backend": None} if self.options.backend == "auto" else {}
        check_same(settings_of_run(effects), self.asked | left_open, where, finished=True)

    def effects(self, measured: dict[str, np.ndarray], reference: Reference) -> Effects:
        """What `Job.carry_out` found, with its axes."""
        job = self.job
        sites = split(self.grid, measured, len(job.pairs))
        later = None if job.fingerprint is not None else job.model.fingerprint_later()
        return Effects(sites, job.pairs, reference, job.direction, self._meta(), later)

    def _meta(self) -> dict[str, Any]:
        """What was run, for the record: all that `settings_of_run` asks for."""
        return self.job.meta() | {
            "device_kind": of_runs.device_kind(self.job.model.device),
            "threads": torch.get_num_threads(),
            "noise_sample": self.job.noise_sample,
            "plan": of_runs.PLAN_VERSION,
        }


def prepare(model: Model, pairs: Pairs, options: Options) -> Prepared:
    """Check a sweep.

    Raises:
        DeltapatchError: an option or a pair is wrong.
    """
    job = Job.of(model, pairs, **options.of_job())
    grid = make_grid(options.sites, options.positions, options.layers, job.pairs, model.spec)
    return Prepared(job, grid, Work.of_sweep(grid, job), options)
