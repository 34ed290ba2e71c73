"""What arithmetic does to effects: hooks and deltapatch in every precision, against float64."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from deltapatch.bench.peers.attribution import Attribution
from deltapatch.bench.peers.base import Peer
from deltapatch.bench.peers.hooks_batched import HooksBatched
from deltapatch.bench.peers.ours import Ours
from deltapatch.bench.sides.agreement import compare as agreement
from deltapatch.bench.sides.batch_size import choose
from deltapatch.bench.sides.cells import Cells, grid_cells
from deltapatch.bench.sides.workload import Workload
from deltapatch.errors import DeltapatchError
from deltapatch.kernels.product import PRECISIONS
from deltapatch.models.load import load_model
from deltapatch.results.folder import environment

_LONGEST = 10.0  # seconds of a batch
_POINTS = 1500  # kept of each method, for the scatter plot


class HooksIn(HooksBatched):
    """Hooks in batches on a model in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def methods() -> dict[str, Peer]:
    """What is compared, in the order of the table."""
    hooks = {f"hooks, {name}": HooksIn(getattr(torch, name)) for name in ("float32", "bfloat16", "float16")}
    ours = {f"deltapatch, {name}": Ours(name) for name in PRECISIONS if name != "fp64"}
    return {**hooks, **ours, "attribution patching": Attribution()}


def precision(
    work: Workload, layer: int | None = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Effects of all hidden neurons of one layer, at the last position, by every method.

    Args:
        work: the model and the pairs.
        layer: of the neurons; the middle one unless given.
        say: takes lines of progress.

    Raises:
        DeltapatchError: there is no such layer.
    """
    model = load_model(work.folder, device=work.device)
    spec = model.spec
    layer = spec.n_layers // 2 if layer is None else layer
    if not 0 <= layer < spec.n_layers:
        raise DeltapatchError(f"layer {layer} does not exist: this model has 0 to {spec.n_layers - 1}")
    if work.threads:
        torch.set_num_threads(work.threads)
    cells = grid_cells(spec, "mlp_post", len(work.clean), (layer,), (work.length - 1,))
    say("exact effects")
    exact = _values(Ours("fp64"), work, spec, cells)[0]
    rng = np.random.default_rng(0)
    shown = np.sort(rng.choice(len(cells), min(_POINTS, len(cells)), replace=False))
    found: dict[str, Any] = {}
    for name, peer in methods().items():
        say(name)
        try:
            got, seconds = _values(peer, work, spec, cells)
        except Exception as error:  # not on this machine; compilers raise exceptions of their own
            found[name] = {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            continue
        each = [
            agreement(work, got[own], exact[own]) for own in np.split(np.arange(len(cells)), len(work.clean))
        ]
        found[name] = {
            "error": float(np.mean([a["effect_error"] for a in each])),
            "rank_correlation": float(np.mean([a["rank_correlation"] for a in each])),
            "top_mean": float(np.mean([a["top_overlap"] for a in each])),
            "top_worst": float(np.min([a["top_overlap"] for a in each])),
            "difference": max(a["difference"] for a in each),
            "seconds": seconds,
            "effects": work.effect(got)[shown].tolist(),
        }
    return {
        **environment(),
        "model": {"name": model.name, **asdict(spec)},
        "workload": {"pairs": len(work.clean), "length": work.length, "device": work.device},
        "metric": work.metric,
        "layer": layer,
        "interventions": len(cells),
        "exact": work.effect(exact)[shown].tolist(),
        "methods": found,
    }


def _values(peer: Peer, work: Workload, spec: Any, cells: Cells) -> tuple[np.ndarray, float]:
    """[n, column], and the seconds that it took once the model was loaded."""
    peer.prepare(work, spec)
    peer.start(cells.site)
    choose(peer, cells, work.batches, _LONGEST, time.perf_counter)
    began = time.perf_counter()
    peer.start(cells.site)
    values = np.full((len(cells), len(work.columns)), np.nan)
    for batch in peer.batches(cells):
        values[batch] = peer.measure(cells if len(batch) == len(cells) else cells[batch])
    return values, time.perf_counter() - began
