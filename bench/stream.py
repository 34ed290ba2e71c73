"""deltapatch alone on a model of true shape, streamed from disk: time, memory, and what was predicted.

The sweep runs in a process of its own, whose memory is watched: what the system keeps of files in its cache
does not count, what the process itself holds does.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deltapatch.arguments import in_bytes
from deltapatch.errors import DeltapatchError

_EVERY = 0.005  # seconds between two looks at the memory


@dataclass(frozen=True)
class Sweep:
    """What is swept, and how.

    Attributes:
        folder: the checkpoint.
        lengths: tokens of each pair's prompts, which are random.
        sites, positions: as for `deltapatch.sweep`.
        memory_budget: bytes, or None.
        stream: whether the model is streamed though it may fit.
        device, threads: where; of PyTorch, 0 for its own choice.
        device_memory: bytes of a GPU's memory that may be used, or None.
        screen: options of a screen, as for `deltapatch.sweep`; none: everything is exact.
    """

    folder: str
    lengths: list[int]
    sites: list[str]
    positions: Any
    memory_budget: int | None = None
    stream: bool = True
    device: str = "cpu"
    threads: int = 0
    device_memory: int | None = None
    screen: dict[str, Any] = field(default_factory=dict)


def make_checkpoint(shape: str, layers: int | None, folder: Path) -> bool:
    """Write a checkpoint of random weights in float16 unless there is one; whether one was written.

    Args:
        shape: one of `true_shapes.CONFIGS`.
        layers: how many, in place of the model's own.
        folder: where.

    Raises:
        DeltapatchError: an unknown shape, or too little room on the disk.
    """
    import torch

    from deltapatch.bench.true_shapes import CONFIGS, config_bytes, write_random_model

    if shape not in CONFIGS:
        raise DeltapatchError(f"unknown shape {shape!r}: choose from {', '.join(CONFIGS)}")
    config = dict(CONFIGS[shape])
    if layers is not None:
        config["n_layer" if "n_layer" in config else "num_hidden_layers"] = layers
    if (folder / "config.json").is_file():
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if any(found.get(key) != value for key, value in config.items()):
            raise DeltapatchError(f"{folder} holds another model: choose another folder or remove it")
        return False
    folder.mkdir(parents=True, exist_ok=True)
    need, free = config_bytes(config, torch.float16), shutil.disk_usage(folder).free
    if need > free:
        raise DeltapatchError(f"{folder} has {in_bytes(free)} free, but the model takes {in_bytes(need)}")
    write_random_model(config, folder, torch.float16)
    return True


def measure(sweep: Sweep) -> dict[str, Any]:
    """Carry a sweep out in a process of its own.

    Raises:
        DeltapatchError: it failed; the message is the process's last words.
    """
    done = subprocess.run(
        [sys.executable, "-m", "deltapatch.bench.stream", json.dumps(asdict(sweep))],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode:
        raise DeltapatchError(f"the sweep failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Watch:
    """The most memory that this process has at once, from when it is made."""

    def __init__(self) -> None:
        self.own = self.mapped = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(_EVERY):
            own, mapped = resident()
            self.own, self.mapped = max(self.own, own), max(self.mapped, mapped)


def resident() -> tuple[int, int]:
    """Bytes of memory of this process's own, and of pages of files that it has mapped."""
    with open("/proc/self/status") as file:
        kinds = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file if line.startswith("Rss")}
    return kinds["RssAnon"] + kinds["RssShmem"], kinds["RssFile"]


def carry_out(sweep: Sweep) -> dict[str, Any]:
    """The sweep in this process: what was predicted, what it took, and how much memory it had."""
    import numpy as np
    import torch

    import deltapatch
    from deltapatch.bench.limits import product_rate
    from deltapatch.bench.sides.memory import device_peak_bytes
    from deltapatch.engine.options import SweepOptions
    from deltapatch.engine.planning.costs import layer_parameters
    from deltapatch.engine.planning.forecast import forecast
    from deltapatch.engine.planning.screens import forecast_screen
    from deltapatch.engine.question import ask
    from deltapatch.results.folder import environment
    from deltapatch.results.screened import Screened

    if sweep.threads:
        torch.set_num_threads(sweep.threads)
    if sweep.device_memory is not None and sweep.device != "cpu":
        there = torch.cuda.get_device_properties(sweep.device).total_memory
        torch.cuda.set_per_process_memory_fraction(sweep.device_memory / there, sweep.device)
    watch = Watch()
    model = deltapatch.load_model(sweep.folder, device=sweep.device, stream=sweep.stream)
    spec, draw = model.spec, np.random.default_rng(0)
    pairs = [
        deltapatch.PromptPair(*draw.integers(0, spec.d_vocab, (2, n)).tolist(), *_answers(draw, spec.d_vocab))
        for n in sweep.lengths
    ]
    options: dict[str, Any] = {"memory_budget": sweep.memory_budget, **sweep.screen}
    began = time.perf_counter()
    asked = SweepOptions(sites=sweep.sites, positions=sweep.positions, **options)
    predicted = (forecast_screen if sweep.screen else forecast)(ask(model, pairs, asked)).as_dict()
    predicting = time.perf_counter() - began
    began = time.perf_counter()
    effects = deltapatch.sweep(
        model, pairs, sites=sweep.sites, positions=sweep.positions, progress=False, **options
    )
    seconds = time.perf_counter() - began
    watch.stop()
    found = [effects.values(m, s) for m in effects.metrics for s in effects.sites]
    if not all(np.isfinite(values).any() for values in found):
        raise DeltapatchError("there are no finite effects")
    rate = product_rate("fp32", spec.d_model, sweep.device)
    flops = predicted["necessary_flops"]
    runs = 2 * layer_parameters(spec) * spec.n_layers * 2 * sum(sweep.lengths)
    screened = _of_screen(effects) if isinstance(effects, Screened) else {}
    return {
        **environment(),
        **screened,
        "threads": torch.get_num_threads(),
        "spec": asdict(spec),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_bytes": model.n_bytes,
        "predicted": predicted,
        "predicting_seconds": predicting,
        "seconds": seconds,
        "run": effects.meta,
        "rows_per_second": predicted["rows"] / seconds,
        "peak_own_bytes": watch.own,
        "peak_mapped_bytes": watch.mapped,
        "peak_device_bytes": device_peak_bytes(),
        "product_rate": rate,
        "of_product_rate": flops / seconds / rate if rate else None,
        # With the products of the unpatched runs, which rows are differences from.
        "of_product_rate_with_unpatched": (flops + runs) / seconds / rate if rate else None,
        "predicted_over_real": predicted["predicted_seconds"]
        / (seconds if sweep.screen else effects.meta["seconds"]),
    }


def _of_screen(effects: Any) -> dict[str, Any]:
    """What a screen says of itself."""
    from deltapatch.analysis.calibration import calibration

    missed = effects.missed()
    columns = calibration(effects).columns
    return {
        "screened": sum(effects.estimate(site=site).size for site in effects.sites),
        "verified": len(effects.verified),
        "missed": asdict(missed) | {"says": str(missed)},
        "calibration": {name: column.tolist() for name, column in columns.items()},
    }


def _answers(draw: Any, d_vocab: int) -> list[int]:
    chosen: list[int] = draw.choice(d_vocab, 2, replace=False).tolist()
    return chosen


if __name__ == "__main__":
    print(json.dumps(carry_out(Sweep(**json.loads(sys.argv[1])))))
