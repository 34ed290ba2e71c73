"""The settings of a run: all that decides a bit of its result."""

from typing import Any

import torch

from deltapatch.engine.job import Job
from deltapatch.interventions.grid import Grid
from deltapatch.results.folder import environment
from deltapatch.results.manifest import digest_of

PLAN_VERSION = 3  # to be raised whenever passes are cut, or computed, in another way


def settings_of(
    job: Job,
    grid: Grid,
    precision: str | None,
    budget: int | None,
    threads: int | None = None,
    stream: bool | None = None,
) -> dict[str, Any]:
    """What decides the result of a sweep; None for what the plan may decide."""
    versions = environment()["versions"]
    return {
        "plan": PLAN_VERSION,
        "deltapatch": versions["deltapatch"],
        "torch": versions["torch"],
        "model": job.identify(),
        "dtype": str(job.model.dtype).removeprefix("torch."),
        "device": device_kind(job.model.device),
        "backend": job.backend.name,
        "pairs": digest_of(job.pairs),
        "sites": [
            {"site": g.site.name, "layers": g.layers.tolist(), "indices": g.n_indices} for g in grid.sites
        ],
        "positions": grid.sites[0].positions,
        "direction": job.direction,
        "source": job.source,
        "readout": job.readout,
        "metrics": list(job.measured),
        "seed": job.seed,
        "noise_scale": job.noise_scale if job.source == "noise" else None,
        "noise_sample": job.noise_sample,
        "precision": precision,
        "memory_budget": budget,
        "threads": threads,
        "stream": stream,
    }


def device_kind(device: torch.device) -> str:
    """What must be the same for the same bits: "cuda 9.0", "cpu AVX512"."""
    if device.type == "cuda":
        return "cuda {}.{}".format(*torch.cuda.get_device_capability(device))
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
