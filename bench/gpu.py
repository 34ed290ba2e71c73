"""All that is to be measured on a GPU, in one command of less than eight minutes.

    python -m deltapatch.bench.gpu --out bench/results/gpu.json

It runs the tests that need a GPU, then measures the machine's limits, each kernel, whole sweeps of random
models of true shapes, batched hooks on the same shapes, and the built-in models' effects in every precision.
What fails is written down as failed, and the rest goes on. `--tiny` measures toy shapes anywhere, so that
the command itself can be tested. The last line of stdout is one JSON object.

On a machine where deltapatch is not installed, a link to this repository is enough:

    mkdir -p /tmp/site && ln -sfn "$PWD" /tmp/site/deltapatch
    PYTHONPATH=/tmp/site python -m deltapatch.bench.gpu
"""

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from deltapatch.engine.runfolder import environment

Report = dict[str, Any]


class Bench:
    """The machine, the sizes and what has been found.

    Args:
        device: where to measure.
        tiny: toy shapes.
    """

    def __init__(self, device: str, tiny: bool) -> None:
        import torch

        from deltapatch.bench.true_shapes import CONFIGS
        from deltapatch.kernels.product import PRECISIONS

        self.device, self.tiny = torch.device(device), tiny
        self.configs = {name: _shrunk(config) if tiny else config for name, config in CONFIGS.items()}
        self.precisions = {name: PRECISIONS[name] for name in ("fp32", "tf32", "bf16", "fp16", "fp8")}
        self.rows = 64 if tiny else 16384
        self.rates: dict[str, float] = {}  # precision -> FLOP/s, the best over all shapes

    def seconds(self, work: Callable[[], Any], repeats: int = 10) -> float:
        """The median time of one call, after three that do not count."""
        import torch

        for _ in range(3):
            work()
        times = []
        for _ in range(repeats):
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                work()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            else:
                began = time.perf_counter()
                work()
                times.append(time.perf_counter() - began)
        return sorted(times)[repeats // 2]

    def once(self, work: Callable[[], Any]) -> tuple[Any, float, int]:
        """What a call gives, its seconds, and the most memory that tensors took on the GPU meanwhile."""
        import torch

        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = work()
        if on_gpu:
            torch.cuda.synchronize()
        return result, time.perf_counter() - began, torch.cuda.max_memory_allocated() if on_gpu else 0

    # What is measured --------------------------------------------------------------------------------------

    def limits(self) -> Report:
        """Copy rate in GB/s, read and written; product rates in TFLOP/s at the models' shapes."""
        import torch

        from deltapatch.kernels.product import narrow, narrow_weight, product

        x = torch.randn((1 << 16) if self.tiny else (1 << 29), device=self.device)
        y = torch.empty_like(x)
        copy = 2 * x.numel() * 4 / self.seconds(lambda: y.copy_(x))
        out: Report = {"copy_gb_s": copy / 1e9, "products_tflop_s": {}}
        self.copy = copy
        for model, config in self.configs.items():
            spec = _spec(config)
            wide = spec.n_heads * spec.d_head
            shapes = {"qkv": (spec.d_model, wide), "up": (spec.d_model, spec.d_mlp),
                      "down": (spec.d_mlp, spec.d_model)}  # fmt: skip
            for name, (n_in, n_out) in shapes.items():
                d = torch.randn(self.rows, n_in, device=self.device)
                w = torch.randn(n_out, n_in, device=self.device)
                for mode, precision in self.precisions.items():
                    a, b = narrow(d, precision), narrow_weight(w, precision)
                    rate = 2 * self.rows * n_in * n_out / self.seconds(partial(product, a, b))
                    self.rates[mode] = max(rate, self.rates.get(mode, 0.0))
                    out["products_tflop_s"].setdefault(mode, {})[f"{model} {name}"] = rate / 1e12
        return out

    def kernels(self) -> Report:
        """Each operation at the models' shapes: microseconds, GB/s of what must be read and written."""
        from deltapatch.bench.cases import Cases
        from deltapatch.kernels.backend import choose_backend
        from deltapatch.kernels.product import PRECISIONS

        backend = choose_backend("auto", self.device)
        out: Report = {"backend": backend.name}
        for model, config in self.configs.items():
            for mode in ("fp32", "fp16"):
                for case in Cases(backend, _spec(config), PRECISIONS[mode], self.rows, self.device):
                    seconds = self.seconds(case.call)
                    out[f"{model} {mode} {case.name}"] = {
                        "microseconds": seconds * 1e6,
                        "gb_s": case.n_bytes / seconds / 1e9,
                        "of_copy": case.n_bytes / seconds / self.copy,
                    }
        return out

    def sweeps(self) -> Report:
        """Whole sweeps, against the FLOPs that they need at the measured rate of their precision."""
        neurons, components = ("mlp_post",), ("mlp_out", "attn_out")
        out: Report = {}
        for name in ("gptj-6b", "llama-7b", "pythia-2.8b"):
            jobs: list[Any] = [(neurons, "last", 1, "fp16"), (neurons, "last", 1, "fp8")]
            if name == "gptj-6b":
                jobs.append((components, "all", 2 if self.tiny else 64, "fp16"))
            out |= dict(self._sweeps_of(name, jobs))
        return out

    def _sweeps_of(self, name: str, jobs: list[Any]) -> Iterator[tuple[str, Report]]:
        """Sweeps of one model: (sites, positions, pairs, precision)."""
        import numpy as np
        import torch

        import deltapatch
        from deltapatch.bench.true_shapes import random_model
        from deltapatch.engine.costs import necessary_flops

        model = random_model(self.configs[name], self.device, torch.float16)
        spec, length = model.spec, 16
        rng = np.random.default_rng(0)
        for sites, positions, n_pairs, mode in jobs:
            prompts = rng.integers(0, spec.d_vocab, (n_pairs, 2, length)).tolist()
            pairs = [deltapatch.PromptPair(clean, corrupted, 3, 4) for clean, corrupted in prompts]

            options: Any = {"positions": positions, "precision": mode, "progress": False}
            sweep = partial(deltapatch.sweep, model, pairs, list(sites), **options)
            sweep(layers=[spec.n_layers - 1] if positions == "last" else [0, spec.n_layers - 1])  # compiles
            effects, seconds, peak = self.once(sweep)
            meta = effects.meta
            at = range(length) if positions == "all" else [-1]
            each = sum(necessary_flops(spec, site, range(spec.n_layers), at, length) for site in sites)
            yield (
                f"{name} {'+'.join(sites)} {positions} {mode}",
                {
                    "seconds": seconds,
                    "pairs": n_pairs,
                    "rows": meta["rows"],
                    "passes": meta["passes"],
                    "rows_s": meta["rows"] / seconds,
                    "tflop_s": n_pairs * each / seconds / 1e12,
                    "of_product_rate": n_pairs * each / seconds / self.rates[mode],
                    "peak_bytes": peak,
                    "noise_floor": meta["noise_floor"],
                },
            )

    def hooks(self) -> Report:
        """Batched hooks on transformers' models in bfloat16, hidden neurons at the last position: rows/s."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        out: Report = {}
        batch = 8 if self.tiny else 200
        for name in ("gptj-6b", "llama-7b", "pythia-2.8b"):
            fields = dict(self.configs[name])
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
            with torch.device(self.device):
                before = torch.get_default_dtype()
                torch.set_default_dtype(torch.bfloat16)
                try:
                    hf = AutoModelForCausalLM.from_config(config).eval()
                finally:
                    torch.set_default_dtype(before)
            body, head = hf.base_model, hf.get_output_embeddings()
            inner = [m for n, m in hf.named_modules() if n.endswith(("fc_out", "dense_4h_to_h", "down_proj"))]
            ids = torch.randint(0, config.vocab_size, (batch, 16), device=self.device)
            rows = torch.arange(batch, device=self.device)

            def swap(module: Any, args: Any, rows: Any = rows) -> None:
                args[0][rows, -1, rows] = 1.0

            def forward(body: Any = body, head: Any = head, ids: Any = ids) -> None:
                h = body(ids, use_cache=False).last_hidden_state[:, -1]
                head(h).float().log_softmax(-1)[:, :2].cpu()

            with torch.no_grad():
                handle = inner[len(inner) // 2].register_forward_pre_hook(swap)
                seconds = self.seconds(forward, repeats=5)
                handle.remove()
            out[name] = {"batch": batch, "rows_s": batch / seconds}
            del hf, body, head, inner
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return out

    def precision(self) -> Report:
        """Effects of the built-in models in every precision, and by hooks, against float64."""
        from deltapatch.bench.precision import precision
        from deltapatch.bench.random_models import Shape
        from deltapatch.bench.setup import make_workload

        out: Report = {}
        for name in ("gpt-neox", "gptj", "llama")[: 1 if self.tiny else 3]:
            model = f"builtin:{name}-arithmetic"
            with TemporaryDirectory() as folder:
                work = make_workload(
                    model, Shape(), None, 1 if self.tiny else 4, 16, Path(folder), device=self.device.type
                )
                result = precision(work)
            keep = ("error", "rank_correlation", "top_worst", "reason")
            out[model] = {
                method: {key: found[key] for key in keep if key in found}
                for method, found in result["methods"].items()
            }
        return out


def run_tests() -> Report:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return {"exit_code": done.returncode, "output": done.stdout[-6000:]}


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def _spec(config: dict[str, Any]) -> Any:
    from deltapatch.models.config import Config
    from deltapatch.models.registry import read_config

    return read_config(Config(config, "the benchmark's config"))[1]


def _shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """Toy shapes of the same kind."""
    small = {"n_layer": 2, "num_hidden_layers": 2, "n_embd": 64, "hidden_size": 64, "n_head": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 97,
             "rotary_dim": 8}  # fmt: skip
    return {key: small.get(key, value) for key, value in config.items()}


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="Toy shapes: whether the command works, not how fast anything is.")
@click.option("--only", help="Parts to do, with commas: tests, limits, kernels, sweeps, hooks, precision.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the JSON there too, after every part.")
def main(device: str, tiny: bool, only: str | None, out: Path | None) -> None:
    """Run the GPU's tests, then measure; write what was found after every part."""
    import torch

    bench = Bench(device, tiny)
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    report: Report = {"device": name, "tiny": tiny, "triton": _triton_version(), **environment()}
    parts: dict[str, Callable[[], Report]] = {
        "tests": run_tests,
        "limits": bench.limits,
        "kernels": bench.kernels,
        "sweeps": bench.sweeps,
        "hooks": bench.hooks,
        "precision": bench.precision,
    }
    wanted = only.split(",") if only else list(parts)[1 if tiny else 0 :]
    for part in wanted:
        if part not in parts:
            raise click.BadParameter(f"unknown part {part!r}: choose from {', '.join(parts)}")
    if "limits" not in wanted and {"kernels", "sweeps"} & set(wanted):
        wanted.insert(0, "limits")
    failed = False
    for part in wanted:
        began = time.perf_counter()
        try:
            report[part] = parts[part]()
        except Exception:  # a lent GPU's time is short: what can be measured still is
            report[part] = {"failed": traceback.format_exc()}
        failed |= "failed" in report[part] or bool(report[part].get("exit_code"))
        report[part]["took_seconds"] = time.perf_counter() - began
        click.echo(f"--- {part}\n{json.dumps(report[part], indent=1)}")
        if out is not None:
            out.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps(report))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
