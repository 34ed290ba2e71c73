"""What is measured on a GPU, part by part; `deltapatch.bench.gpu` runs each in a process of its own.

    python -m deltapatch.bench.gpu_parts gptj --device cuda

writes a line of JSON to stdout for every number, as soon as it is found: its name and what was found, or
why nothing was. A part is a list of such steps, the most valuable first; one that fails does not keep the
next ones from being tried.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import click
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

import deltapatch
from deltapatch.bench.cases import OPERATIONS, Cases
from deltapatch.bench.clock import Clock
from deltapatch.bench.peers import wiring
from deltapatch.bench.peers.hooks_prefix import Prefix
from deltapatch.bench.precision import precision
from deltapatch.bench.random_models import make_pairs
from deltapatch.bench.setup import make_workload
from deltapatch.bench.true_shapes import COMPILED, random_model, spec_of
from deltapatch.engine.planning.costs import necessary_flops
from deltapatch.kernels.backend import choose_backend
from deltapatch.kernels.compilations import count_compilations
from deltapatch.kernels.lang import HAS_TRITON
from deltapatch.kernels.product import PRECISIONS, narrow, narrow_weight, product
from deltapatch.models.model import Model
from deltapatch.models.spec import ModelSpec
from deltapatch.results.folder import environment

Report = dict[str, Any]
Step = tuple[str, Callable[[], Report]]

# Relative errors that a first look allows: of products of random matrices, of the effects of a small sweep.
ROUNDING = {"fp32": 1e-5, "tf32": 2e-3, "bf16": 1e-2, "fp16": 2e-3, "fp8": 1e-1}
EFFECTS = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2, "fp8": 0.3}
NEURONS = (("mlp_post",), "last", 1)
COMPONENTS = (("mlp_out", "attn_out"), "all", 64)
ONE_PAIR = (("mlp_out", "attn_out"), "all", 1)
_BATCHES = (64, 200, 512)  # of the hooks
_BATCHES_OF_LAST = (512, 2048, 8192)  # of those that compute the last position alone
_NOISE_SAMPLE = 32
_LONGEST, _NAME = 30, 120  # kernels that are told, and letters of their names


class Bench:
    """The machine, the sizes, and what has been found that later steps need.

    Args:
        device: where to measure.
        tiny: toy shapes, in Triton's interpreter where there is no GPU.
    """

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = torch.device(device), tiny
        self.clock = Clock(self.device)
        self.backend = "triton" if HAS_TRITON else "reference"
        self.configs = {name: _shrunk(config) if tiny else config for name, config in COMPILED.items()}
        self.rows, self.length = (4, 4) if tiny else (16384, 16)  # row tokens; tokens of a prompt
        self.rates: dict[str, float] = {}  # precision -> FLOP/s, the best over all shapes
        self.neurons_a_second: dict[str, float] = {}  # model -> in its first sweep
        self.edges_a_second: float | None = None  # the best of all sweeps of edges
        self._model: tuple[str, Model] | None = None

    def part(self, name: str) -> Iterator[Step]:
        """The steps of a part."""
        parts: dict[str, Callable[[], Iterator[Step]]] = {
            "smoke": self.smoke,
            "gptj": self.gptj,
            "fp8": self.fp8,
            "llama": partial(self.shape, "llama-7b"),
            "pythia": partial(self.shape, "pythia-2.8b"),
            "kernels": self.kernels,
            "edges": self.edges,
            "precision": self.precision,
        }
        return parts[name]()

    # The parts ---------------------------------------------------------------------------------------------

    def smoke(self) -> Iterator[Step]:
        """Half a minute that tells whether anything else is worth its time."""
        for mode in ("bf16", "fp16", "fp8", "tf32", "fp32"):
            yield f"products {mode}", partial(self.products_are_right, mode)
        for mode in ("fp16", "bf16", "fp32", "fp8"):
            yield f"small sweep {mode}", partial(self.a_small_sweep_is_right, mode)

    def gptj(self) -> Iterator[Step]:
        """All neurons of GPT-J-6B, hooks on the same, and the limits of the machine."""
        name = "gptj-6b"
        yield "product rate fp16", partial(self.product_rate, name, "fp16")
        yield "neurons fp16", partial(self.sweep, name, NEURONS, "fp16")
        yield "where the time goes", partial(self.where_the_time_goes, name, "fp16")
        yield "hooks", partial(self.hooks, name)
        for mode in ("bf16", "tf32", "fp32"):
            yield f"product rate {mode}", partial(self.product_rate, name, mode)
        yield "copy", self.copy_rate
        yield "neurons bf16", partial(self.sweep, name, NEURONS, "bf16")
        yield "components fp16", partial(self.sweep, name, COMPONENTS, "fp16")
        yield "components of one pair fp16", partial(self.sweep, name, ONE_PAIR, "fp16")

    def fp8(self) -> Iterator[Step]:
        """Products and the screen in fp8."""
        yield "product rate fp8", partial(self.product_rate, "gptj-6b", "fp8")
        yield "neurons fp8", partial(self.sweep, "gptj-6b", NEURONS, "fp8")

    def shape(self, name: str) -> Iterator[Step]:
        """All neurons of another model, and hooks on the same."""
        yield "product rate fp16", partial(self.product_rate, name, "fp16")
        yield "neurons fp16", partial(self.sweep, name, NEURONS, "fp16")
        yield "hooks", partial(self.hooks, name)
        yield "product rate bf16", partial(self.product_rate, name, "bf16")
        yield "neurons bf16", partial(self.sweep, name, NEURONS, "bf16")

    def kernels(self) -> Iterator[Step]:
        """Each operation at the models' shapes."""
        yield "copy", self.copy_rate
        for mode in ("fp16",) if self.tiny else ("fp16", "bf16", "fp32"):
            for name in ("gptj-6b", "llama-7b", "pythia-2.8b"):
                for operation in OPERATIONS:
                    yield f"{name} {mode} {operation}", partial(self.operation, name, mode, operation)

    def edges(self) -> Iterator[Step]:
        """All edges of GPT-2 small, and a whole forward for each of them."""
        for mode in ("fp32", "fp16"):
            yield f"edges {mode}", partial(self.all_edges, "gpt2", mode)
        yield "forwards", partial(self.forwards, "gpt2")

    def precision(self) -> Iterator[Step]:
        """Effects of the built-in models in every precision, and by hooks, against float64."""
        for name in ("gptj",) if self.tiny else ("gptj", "gpt-neox", "llama"):
            yield name, partial(self.errors, f"builtin:{name}-arithmetic")

    # The steps ---------------------------------------------------------------------------------------------

    def products_are_right(self, mode: str) -> Report:
        """Products of many sizes against float64.

        Raises:
            AssertionError: one is wrong.
        """
        n_in, n_out = (64, 32) if self.tiny else (16384, 4096)
        w = self.draw(n_out, n_in)
        errors = {}
        for n_rows in (1, 17, 255, 256, 257, 4097)[: 3 if self.tiny else 6]:
            d = self.draw(n_rows, n_in)
            found = product(narrow(d, PRECISIONS[mode]), narrow_weight(w, PRECISIONS[mode])).plain()
            errors[str(n_rows)] = _error(found, d.double() @ w.double().t())
        return _within({"error_by_rows": errors}, max(errors.values()), ROUNDING[mode])

    def a_small_sweep_is_right(self, mode: str) -> Report:
        """Effects of a built-in model against those in float64.

        Raises:
            AssertionError: they are wrong.
        """
        name = "builtin:gptj-arithmetic"
        model = self.model("gptj-6b") if self.tiny else deltapatch.load_model(name, device=self.device)
        pair = deltapatch.PromptPair(*make_pairs(model, 1, self.length)[0])
        options: Any = {"positions": "last"} if self.tiny else {}
        options |= {"sites": ["mlp_out", "z"], "metrics": "logit_diff", "noise_sample": 0, "progress": False}
        true = deltapatch.sweep(model, [pair], precision="fp64", **options)
        got = deltapatch.sweep(model, [pair], precision=mode, backend=self.backend, **options)
        error = {}
        for site in options["sites"]:
            a, b = (torch.from_numpy(e.values("logit_diff", site=site)).nan_to_num() for e in (got, true))
            error[site] = _error(a, b)
        return _within({"error": error}, max(error.values()), EFFECTS[mode])

    def copy_rate(self) -> Report:
        """GB/s, read and written."""
        return {"gb_s": self.copy / 1e9}

    def product_rate(self, name: str, mode: str) -> Report:
        """TFLOP/s of the products of a model's layer."""
        spec = self.spec(name)
        wide, d = spec.n_heads * spec.d_head, spec.d_model
        out = {}
        for label, (n_in, n_out) in {
            "qkv": (d, wide),
            "up": (d, spec.d_mlp),
            "down": (spec.d_mlp, d),
        }.items():
            a = narrow(self.draw(self.rows, n_in), PRECISIONS[mode])
            b = narrow_weight(self.draw(n_out, n_in), PRECISIONS[mode])
            rate = 2 * self.rows * n_in * n_out / self.clock.seconds(partial(product, a, b))
            self.rates[mode] = max(rate, self.rates.get(mode, 0.0))
            out[label] = rate / 1e12
        return {"tflop_s": out}

    def sweep(self, name: str, what: tuple[tuple[str, ...], str, int], mode: str) -> Report:
        """A whole sweep, with and without the noise floor, against its FLOPs at the product rate."""
        sites, positions, n_pairs = what
        spec, n_pairs = self.spec(name), 1 if self.tiny else n_pairs
        whole = self._whole_sweep(name, sites, positions, n_pairs, mode)
        with count_compilations() as warm:
            for noise_sample in (0, _NOISE_SAMPLE):
                whole(layers=warm_layers(spec), noise_sample=noise_sample)
        timed = []
        with count_compilations() as compiled:
            for noise_sample in (0, _NOISE_SAMPLE) if self.tiny else (0, 0, _NOISE_SAMPLE):
                timed.append(self.clock.whole(partial(whole, noise_sample=noise_sample)))
        *without, (effects, with_floor, _) = timed
        seconds, meta = min(taken for _, taken, _ in without), effects.meta
        at = range(self.length) if positions == "all" else [-1]
        flops = n_pairs * sum(necessary_flops(spec, s, range(spec.n_layers), at, self.length) for s in sites)
        if what == NEURONS:
            self.neurons_a_second.setdefault(name, meta["rows"] / seconds)
        return {
            "seconds": seconds,
            "seconds_of_each": [taken for _, taken, _ in without],
            "seconds_with_noise_floor": with_floor,
            "compiled_before": warm.count,
            "compiled_meanwhile": compiled.names,
            "pairs": n_pairs,
            "rows": meta["rows"],
            "passes": meta["passes"],
            "rows_s": meta["rows"] / seconds,
            "tflop_s": flops / seconds / 1e12,
            "of_product_rate": flops / seconds / self.rates[mode] if mode in self.rates else None,
            "peak_bytes": max(peak for _, _, peak in timed),
            "noise_floor": meta["noise_floor"],
        }

    def where_the_time_goes(self, name: str, mode: str) -> Report:
        """Of a sweep of all hidden neurons that was carried out before: what the device did, longest first.

        `busy` is the share of the time on the wall in which the device computed. One stream computes, so that
        times add up; what the profiler itself costs is in `seconds`.
        """
        whole = self._whole_sweep(name, *NEURONS, mode)
        activities = [ProfilerActivity.CUDA if self.clock.on_gpu else ProfilerActivity.CPU]
        with profile(activities=activities) as seen:
            _, seconds, _ = self.clock.whole(partial(whole, noise_sample=0))
        of_device = "self_device_time_total" if self.clock.on_gpu else "self_cpu_time_total"
        took = {told.key: (getattr(told, of_device) / 1e6, told.count) for told in seen.key_averages()}
        longest = sorted(took.items(), key=lambda item: -item[1][0])[:_LONGEST]
        return {
            "seconds": seconds,
            "busy": sum(t for t, _ in took.values()) / seconds,
            "kernels": {key[:_NAME]: {"seconds": t, "calls": n} for key, (t, n) in longest},
        }

    def all_edges(self, name: str, mode: str) -> Report:
        """Total effects of all edges of a model on one pair, whose prompts differ in the last six tokens."""
        spec, model = self.spec(name), self.model(name)
        clean, other = np.random.default_rng(0).integers(0, spec.d_vocab, (2, self.length)).tolist()
        pair = deltapatch.PromptPair(clean, [*clean[:-6], *other[-6:]], 3, 4)
        options: Any = {"precision": mode, "backend": self.backend, "noise_sample": 0, "progress": False}
        whole = partial(deltapatch.sweep_edges, model, [pair], direction="noise", **options)
        whole()  # compiles
        timed = [self.clock.whole(whole) for _ in range(1 if self.tiny else 3)]
        found, seconds = timed[0][0], min(taken for _, taken, _ in timed)
        self.edges_a_second = max(self.edges_a_second or 0.0, len(found.edges) / seconds)
        return {
            "seconds": seconds,
            "seconds_of_each": [taken for _, taken, _ in timed],
            "edges": len(found.edges),
            "edges_s": len(found.edges) / seconds,
            "peak_bytes": max(peak for _, _, peak in timed),
        }

    def forwards(self, name: str) -> Report:
        """Prompts a second through transformers' model in bfloat16: hooks need one for each edge."""
        model, spec = self._transformers_model(name), self.spec(name)
        found = {}
        for batch in (4,) if self.tiny else (64, 512, 2048):
            found[batch] = batch / self._hooked(model, spec, batch, spec.n_layers, None)
        batch = max(found, key=lambda b: found[b])
        ours = self.edges_a_second
        over = None if ours is None else ours / found[batch]
        return {"forwards_s": found[batch], "batch": batch, "deltapatch_over_it": over}

    def hooks(self, name: str) -> Report:
        """Batched hooks on transformers' model in bfloat16, hidden neurons at the last position: rows/s.

        The whole model for each batch; from the patched layer on: a batch then takes the layers that remain,
        a mean over all layers; and of these the last position alone, over keys and values of the others that
        are kept. Each at the best of a few batch sizes.
        """
        model, spec = self._transformers_model(name), self.spec(name)
        kept = self._keys_and_values(model, spec)
        best: dict[str, tuple[float, int]] = {}
        for cache, batches in ((None, _BATCHES), (kept, _BATCHES_OF_LAST)):
            for batch in (4, 8) if self.tiny else batches:
                by_depth = [self._hooked(model, spec, batch, depth, cache) for depth in (spec.n_layers, 1)]
                mean = sum(by_depth) / 2  # over all layers, since they are alike
                kinds = {"whole model": by_depth[0], "from the patched layer on": mean}
                if cache is not None:
                    kinds = {"from the patched layer and position on": mean}
                for kind, seconds in kinds.items():
                    best[kind] = max(best.get(kind, (0.0, 0)), (batch / seconds, batch))
        out: Report = {kind: {"rows_s": rate, "batch": batch} for kind, (rate, batch) in best.items()}
        ours = self.neurons_a_second.get(name)
        for found in out.values():
            found["deltapatch_over_it"] = None if ours is None else ours / found["rows_s"]
        return out

    def operation(self, name: str, mode: str, operation: str) -> Report:
        """Of each of its cases: microseconds, GB/s of what must be read and written, share of a copy's."""
        backend = choose_backend(self.backend, self.device)
        cases = Cases(backend, self.spec(name), PRECISIONS[mode], self.rows, self.device)
        out = {}
        for case in getattr(cases, operation)():
            seconds = self.clock.seconds(case.call)
            rate = case.n_bytes / seconds
            out[case.name] = {"microseconds": seconds * 1e6, "gb_s": rate / 1e9, "of_copy": rate / self.copy}
        return out

    def errors(self, model: str) -> Report:
        """Errors of every method, relative to float64."""
        with TemporaryDirectory() as folder:
            n_pairs, on = (1 if self.tiny else 4), self.device.type
            work = make_workload(model, Path(folder), n_pairs=n_pairs, device=on)
            found = precision(work)["methods"]
        keep = ("error", "rank_correlation", "top_worst", "reason")
        return {method: {key: told[key] for key in keep if key in told} for method, told in found.items()}

    # What they are made of ---------------------------------------------------------------------------------

    def _whole_sweep(
        self, name: str, sites: Sequence[str], positions: str, n_pairs: int, mode: str
    ) -> Callable[..., Any]:
        """A sweep of random prompts, but for layers and the noise floor."""
        model = self.model(name)
        prompts = np.random.default_rng(0).integers(0, model.spec.d_vocab, (n_pairs, 2, self.length)).tolist()
        pairs = [deltapatch.PromptPair(clean, corrupted, 3, 4) for clean, corrupted in prompts]
        options: Any = {"positions": positions, "precision": mode, "backend": self.backend, "progress": False}
        return partial(deltapatch.sweep, model, pairs, sites=list(sites), **options)

    def spec(self, name: str) -> ModelSpec:
        """Of a model's shape."""
        return spec_of(self.configs[name])

    def model(self, name: str) -> Model:
        """A random model of that shape in float16; only the last one is kept."""
        if self._model is None or self._model[0] != name:
            self._model = None
            self._model = name, random_model(self.configs[name], self.device, torch.float16)
        return self._model[1]

    def draw(self, *shape: int) -> torch.Tensor:
        """Random numbers of size one."""
        return torch.randn(shape, device=self.device)

    @cached_property
    def copy(self) -> float:
        """Bytes a second, read and written."""
        x = self.draw((1 << 16) if self.tiny else (1 << 29))
        y = torch.empty_like(x)
        return 2 * x.numel() * 4 / self.clock.seconds(lambda: y.copy_(x))

    def _transformers_model(self, name: str) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        self._model = None
        fields = dict(self.configs[name])
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with self.device:
                return AutoModelForCausalLM.from_config(config).eval()
        finally:
            torch.set_default_dtype(before)

    def _keys_and_values(self, model: Any, spec: ModelSpec) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """[layer], of a prompt's positions but the last, [1, head, T - 1, d_head]."""
        cache = DynamicCache()
        before = self.draw(1, self.length - 1, spec.d_model).to(torch.bfloat16)
        with torch.no_grad():
            wiring.backbone(model, spec)(inputs_embeds=before, past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _hooked(
        self,
        model: Any,
        spec: ModelSpec,
        batch: int,
        depth: int,
        kept: list[tuple[torch.Tensor, torch.Tensor]] | None,
    ) -> float:
        """Seconds of a batch through the last layers, with a neuron patched in the first of them.

        Of all positions, or over what is kept of those before the last.
        """
        body, head = wiring.backbone(model, spec), model.get_output_embeddings()
        first, width = spec.n_layers - depth, self.length if kept is None else 1
        rows = torch.arange(batch, device=self.device)
        options: dict[str, Any] = {"use_cache": False}
        if kept is not None:
            each = [(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in kept]
            options = {"use_cache": True, "past_key_values": Prefix(each, self.length - 1)}
            options["position_ids"] = torch.full((1, 1), self.length - 1, device=self.device)
            options["attention_mask"] = self.draw(1, 1, 1, self.length).to(torch.bfloat16).zero_()
        options["inputs_embeds"] = self.draw(batch, width, spec.d_model).to(torch.bfloat16)

        def swap(module: Any, args: Any) -> None:
            args[0][rows, -1, rows % args[0].shape[-1]] = 1.0

        def forward() -> None:
            last = body(**options).last_hidden_state[:, -1]
            head(last).float().log_softmax(-1)[:, :2]

        down, _ = wiring.module(wiring.layers(model, spec)[first], spec, "mlp_post")
        handle = down.register_forward_pre_hook(swap)
        try:
            with torch.no_grad(), wiring.only_from(model, spec, first):
                return self.clock.seconds(forward, repeats=5)
        finally:
            handle.remove()


def warm_layers(spec: ModelSpec) -> Sequence[int]:
    """Layers whose sweep launches all that a sweep of all layers does.

    Rows enter in a layer and in the last one, and pass through a layer in which others enter.
    """
    return range(max(0, spec.n_layers - 3), spec.n_layers)


def _error(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found.double() - want).norm() / want.norm())


def _within(found: Report, error: float, allowed: float) -> Report:
    if not error <= allowed:  # nor is NaN
        raise AssertionError(f"an error of {error:.2g}, where {allowed:.2g} is allowed: {json.dumps(found)}")
    return {**found, "allowed": allowed}


def _shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """Toy shapes of the same kind."""
    small = {"n_layer": 4, "num_hidden_layers": 4, "n_embd": 16, "hidden_size": 16, "n_head": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 4, "vocab_size": 32,
             "rotary_dim": 8, "n_inner": 4}  # fmt: skip
    return {key: small.get(key, value) for key, value in config.items()}


def machine(device: str | torch.device) -> Report:
    """What it is measured on."""
    on_gpu = torch.device(device).type == "cuda"
    about: Report = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "cuda": torch.version.cuda,
    }
    if on_gpu:
        about["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return about | environment()


def carry_out(steps: Iterator[Step], lines: TextIO) -> None:
    """Do steps, and write a line for each."""
    for name, work in steps:
        try:
            found = work()
        except Exception as error:  # a lent GPU's time is short: what else can be measured still is
            said = " ".join(str(error).split())[:500]
            found = {"failed": f"{type(error).__name__}: {said}", "traceback": traceback.format_exc()[-4000:]}
        print(json.dumps({"step": name, "found": found}), file=lines, flush=True)


@click.command()
@click.argument("part")
@click.option("--device", default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="Toy shapes.")
def main(part: str, device: str, tiny: bool) -> None:
    """Measure one part; a line of JSON for every number."""
    # What libraries print goes to stderr: stdout has lines of ours alone.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    bench = Bench(device, tiny)
    print(json.dumps({"machine": machine(bench.device)}), file=lines, flush=True)
    carry_out(bench.part(part), lines)


if __name__ == "__main__":
    sys.exit(main())
