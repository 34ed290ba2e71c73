"""What the Triton kernels compile to at the shapes of real models; no GPU is needed.

    python -m deltapatch.bench.compile_kernels --model gptj-6b --arch 90 --precision fp16
    python -m deltapatch.bench.compile_kernels --arch 90 --triton 3.6.0 --triton installed --out file.json

The backend's own host code runs on CPU tensors of the true widths, and each launch is compiled with the
specialisation that it would have on that GPU, by the Triton that is installed or, in an environment made for
it, by another version. Exit code 1 where a kernel spills registers, asks for more shared memory than there
is, waits after each wgmma, or misses the tensor cores that its products are for.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import click
import torch
from torch import Tensor

from deltapatch.bench.results import check_free
from deltapatch.bench.sides.isolate import default_cache, python_with
from deltapatch.bench.true_shapes import COMPILED, CONFIGS, spec_of
from deltapatch.errors import DeltapatchError
from deltapatch.kernels import readout_triton
from deltapatch.kernels.activation import Neurons
from deltapatch.kernels.attention import QKV, AttentionBase, Rotary
from deltapatch.kernels.backend import TRITON
from deltapatch.kernels.edits import Swap
from deltapatch.kernels.norm import Norms, Part
from deltapatch.kernels.product import PRECISIONS, Operand, Precision, Scaled, narrow_triton
from deltapatch.kernels.readout import BaseReadout, ReadRows, Unembedding
from deltapatch.kernels.segments import Segment, read_segments
from deltapatch.models import forward
from deltapatch.models.spec import ModelSpec
from deltapatch.results.folder import environment

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have
PRECISIONS_OF = {80: ("fp32", "bf16", "fp16"), 90: ("fp32", "tf32", "bf16", "fp16", "fp8")}
TOKENS = (16, 64, 128)  # of prompts: for each a kernel is laid out in its own way
SHOWN = {  # compile-time arguments that tell launches of one kernel apart
    "BY_ROWS": "rows",
    "HAS_EARLIER": "earlier",
    "HAS_FORK": "fork",
    "HAS_Z": "swaps",
    "NORMS": "norms",
    "HAS_TO": "to",
    "OF_HEADS": "heads",
    "HAS_WINDOW": "window",
    "HAS_CAP": "cap",
    "ACT": "act",
    "HAS_GATE": "gate",
    "HAS_SWAPS": "swaps",
    "BLOCK_P": "patches",
}
WITH_PRODUCTS = ("_attention_kernel",)
# Bytes that a kernel's thread may spill. The registers of the activation's are capped, so that two long rows
# share a multiprocessor, which a GPU rewards; some versions of the assembler then lack one or two.
_MAY_SPILL = {"_activation_kernel": 8}


class Compiled(NamedTuple):
    """One kernel, compiled for one model and architecture."""

    model: str
    arch: int
    precision: str
    tokens: int
    kernel: str
    variant: str  # as in SHOWN
    registers: int
    spilled: int  # bytes of stack: nothing else in these kernels uses one
    shared: int  # bytes
    instructions: int
    tensor: int  # of them on tensor cores
    serialised: bool

    def problems(self) -> list[str]:
        """What must not be, in words."""
        out = []
        if self.spilled > _MAY_SPILL.get(self.kernel, 0):
            out.append(f"spills {self.spilled} bytes of registers")
        if self.shared > SHARED_LIMIT[self.arch]:
            out.append(f"needs {self.shared} bytes of shared memory, of {SHARED_LIMIT[self.arch]}")
        if self.serialised:
            out.append("waits after each wgmma")
        if self.kernel in WITH_PRODUCTS and not self.tensor:
            out.append("does its products without tensor cores")
        return out


def compile_all(
    models: Iterable[str], arch: int, precisions: Iterable[str] = (), tokens: Sequence[int] = TOKENS
) -> list[Compiled]:
    """Every kernel launch of these models, compiled for this architecture; each binary once a model."""
    work = [(model, arch, tuple(precisions or PRECISIONS_OF[arch]), tuple(tokens)) for model in models]
    if len(work) == 1:
        return _compile(*work[0])
    with ProcessPoolExecutor(min(len(work), os.cpu_count() or 1), get_context("spawn")) as pool:
        return [c for found in pool.map(_compile, *zip(*work, strict=True)) for c in found]


def _compile(model: str, arch: int, precisions: tuple[str, ...], tokens: tuple[int, ...]) -> list[Compiled]:
    seen: dict[str, tuple[Any, ...]] = {}
    spec = spec_of(COMPILED[model])
    for precision in precisions:
        for n in tokens:
            with compiling_for(arch) as launches:
                _launch_attention_of(spec, PRECISIONS[precision], n)
                if n == tokens[0]:  # all else is the same for prompts of any length
                    _launch_the_rest(spec, PRECISIONS[precision], n)
            for kernel, variant, binary in launches:
                seen.setdefault(binary.hash, (precision, n, kernel, variant, binary))
    return [_inspect(model, arch, *launch) for launch in seen.values()]


@contextmanager
def compiling_for(arch: int) -> Iterator[list[tuple[str, str, Any]]]:
    """Within it a kernel launch compiles for the architecture and does nothing else; yields what it made."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple[str, str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        binary = run(self, *args, grid=grid, warmup=True, **options)
        variant = " ".join(f"{short}={options[name]}" for name, short in SHOWN.items() if name in options)
        launches.append((self.fn.__name__, variant, binary))
        return binary

    with _launching(arch, compile_only):
        yield launches


@contextmanager
def recording_for(arch: int) -> Iterator[list[tuple[str, str]]]:
    """Within it no kernel is compiled or run; yields each launch's name and what it would be compiled for."""
    launches: list[tuple[str, str]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = self.device_caches[arch][-1]
        _, specialisation, left = binder(*args, debug=False, **options)
        chosen = {name: left[name] for name in sorted(left) if name not in self.arg_names}
        launches.append((self.fn.__name__, f"{specialisation} {chosen}"))

    with _launching(arch, record):
        yield launches


@contextmanager
def _launching(arch: int, launch: Any) -> Iterator[None]:
    """Within it there is a GPU of this architecture, and this is how kernels are launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        """Says which device there is; kernels are cached by its number."""

        def get_current_device(self) -> int:
            return arch

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

    driver, run = triton.runtime.driver._active, JITFunction.run
    triton.runtime.driver.set_active(Driver())
    JITFunction.run = launch
    try:
        yield
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = driver


_PAIRS = 2


def _launch_attention_of(w: ModelSpec, precision: Precision, length: int) -> None:
    """Attention once for each way in which the engine calls it on prompts of this length."""
    rows = 40  # enough that, of whole prompts, the last layer takes several rows at a time
    for window in (None, length // 2) if w.windows else (None,):
        for positions in (1, 5, length):
            segments = [Segment(0, _PAIRS, positions, rows, 0, length)]
            for swapped in (False, True):
                for reads_only in (False, True):
                    _launch_attention(w, precision, segments, swapped, reads_only, window)
        # Answers of several tokens: runs that fork near their end.
        for positions in (5, length):
            forked = [Segment(0, _PAIRS, positions, rows, 0, length, 5, (length - 4, length - 2))]
            for reads_only in (False, True):
                _launch_attention(w, precision, forked, True, reads_only, window)


def _launch_the_rest(w: ModelSpec, precision: Precision, length: int) -> None:
    """Each other operation of the backend once for each way in which the engine calls it."""
    rows = 16
    one = [Segment(0, _PAIRS, 1, rows, 0, length)]
    for swapped in (False, True):
        _launch_norms(w, precision, one, swapped)
        _launch_head_norms(w, precision, one, swapped)
        _launch_activations(w, precision, one, swapped)
    _launch_columns(w, one)
    narrow_triton(torch.empty(8, w.n_heads * w.d_head), precision)
    _launch_readout(w, precision, _PAIRS, rows, read_segments(one))


def _difference(precision: Precision, segments: list[Segment], *shape: int) -> Scaled:
    """What a product gives for these rows."""
    n_tokens = sum(s.n_tokens for s in segments)
    return Scaled(torch.empty(n_tokens, *shape), torch.ones(n_tokens) if precision.scaled else None)


def _base(segments: list[Segment], *shape: int) -> Tensor:
    return torch.empty(sum(s.pairs * s.length for s in segments), *shape)


def _swaps(swapped: bool, single: bool, *shape: int) -> list[Swap]:
    at = torch.arange(8)
    return [Swap(at, at, at % shape[0] if single else None, torch.empty(8, *shape))] if swapped else []


def _launch_norms(w: ModelSpec, precision: Precision, segments: list[Segment], swapped: bool) -> None:
    dx, d = (
        Scaled(_difference(precision, segments, w.d_model).values),
        _difference(precision, segments, w.d_model),
    )
    whole, weight = _swaps(swapped, False, w.d_model), torch.empty(w.d_model)
    x, out, to = _base(segments, w.d_model), torch.empty_like(dx.values), torch.arange(len(dx.values))
    shared = (Norms(x, [weight], 1e-5, w.norm == "layer"), segments, precision)
    two = (Norms(x, [weight, weight], 1e-5, w.norm == "layer"), segments, precision)
    none = (None, segments, precision)
    TRITON.add_norm([Part(dx, [])], whole, *shared)
    TRITON.add_norm([Part(dx, []), Part(d, whole)], whole, *shared, out=out)
    TRITON.add_norm([Part(dx, []), Part(d, whole), Part(d, whole)], whole, *two, out=out, to=to)
    TRITON.add_norm([Part(dx, []), Part(d, whole), Part(d, whole)], whole, *none, out=out, to=to)
    if swapped:
        TRITON.add_norm([Part(None, whole)], [], *none, out=out, to=to)


def _launch_head_norms(w: ModelSpec, precision: Precision, segments: list[Segment], swapped: bool) -> None:
    """Norms of queries and keys, of heads or of all together; and those behind attention and MLP."""
    norms, kinds = w.norm == "layer", {"q": w.n_heads, "k": w.n_kv_heads}
    for n in kinds.values() if w.qk_norm in ("head", "each") else ():
        d, x = _difference(precision, segments, n, w.d_head), _base(segments, n, w.d_head)
        weight = torch.empty(n, w.d_head) if w.qk_norm == "each" else torch.empty(w.d_head)
        part = Part(d, _swaps(swapped, True, n, w.d_head))
        TRITON.add_norm([part], [], Norms(x, [weight], 1e-5, norms), segments, precision.exact)
    behind = [w.d_model] if w.post_norm else []
    whole = [n * w.d_head for n in kinds.values()] if w.qk_norm == "width" else []
    for width in (*behind, *whole) if not swapped else ():  # patches come before these, or after
        d, x = _difference(precision, segments, width), _base(segments, width)
        of_it = Norms(x, [torch.empty(width)], 1e-5, norms)
        TRITON.add_norm([Part(d, [])], [], of_it, segments, precision.exact)


def _launch_activations(w: ModelSpec, precision: Precision, segments: list[Segment], swapped: bool) -> None:
    up, other = (
        Neurons(_difference(precision, segments, w.d_mlp), _base(segments, w.d_mlp)) for _ in range(2)
    )
    gate, act = other if w.gated else None, forward.activation(w.activation)
    TRITON.activation_difference(act, up, gate, segments, _swaps(swapped, True, w.d_mlp), precision)


def _launch_attention(
    w: ModelSpec,
    precision: Precision,
    segments: list[Segment],
    swapped: bool,
    reads_only: bool,
    window: int | None,
) -> None:
    dq, scale = _difference(precision, segments, w.n_heads, w.d_head)
    dk = _difference(precision, segments, w.n_kv_heads, w.d_head).values
    dv = dk
    if w.fused_qkv:
        dq, dk, dv = _difference(precision, segments, w.n_heads, 3, w.d_head).values.unbind(2)
    q, k = _base(segments, w.n_heads, w.d_head), _base(segments, w.n_kv_heads, w.d_head)
    rotary = Rotary(_base(segments, w.rope.dim // 2), _base(segments, w.rope.dim // 2), w.rope.interleaved)
    heads = {"q": w.n_heads, "k": w.n_kv_heads, "v": w.n_kv_heads, "z": w.n_heads}
    swaps = {place: _swaps(swapped, True, n, w.d_head) for place, n in heads.items()}
    d, base = QKV(dq, dk, dv, scale), AttentionBase(q, k, k, rotary, 0.1, w.attention_softcap, window)
    TRITON.attention_difference(d, base, segments, swaps, precision, reads_only=reads_only)


def _launch_columns(w: ModelSpec, segments: list[Segment]) -> None:
    weight, swaps = torch.empty(w.d_model, w.d_mlp), _swaps(True, True, w.d_mlp)
    for n_tokens in (1, 8):  # many patches a token, and few
        TRITON.gather_columns(swaps, weight, n_tokens)


def _launch_readout(
    w: ModelSpec, precision: Precision, pairs: int, rows: int, segments: list[Segment]
) -> None:
    cap = w.logit_softcap
    base = BaseReadout(
        torch.empty(pairs, w.d_vocab),
        torch.empty(pairs, w.d_vocab, dtype=torch.float64),
        torch.empty(pairs, w.d_model),
        torch.zeros(pairs, 2, dtype=torch.long),
        cap=cap,
        uncapped=None if cap is None else torch.empty(pairs, w.d_vocab),
    )
    exact = torch.empty(w.d_vocab, w.d_model)
    weight = Operand(exact.new_empty(exact.shape, dtype=precision.operand), None, precision)

    def product(x: Scaled, weight: Operand) -> Scaled:
        return Scaled(torch.empty(len(x.values), len(weight.values)), x.scale)

    with mock.patch.object(readout_triton, "product", product):  # no kernel of ours
        read = ReadRows(torch.empty(pairs * rows, w.d_model), segments, [0])
        TRITON.readout(read, Unembedding(exact, weight), base, measured=("kl", "entropy"))


def _inspect(
    model: str, arch: int, precision: str, tokens: int, kernel: str, variant: str, binary: Any
) -> Compiled:
    """Look into the binary that would run; the assembler's warnings come from assembling it once more."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    tools = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin, again = (
            str(Path(folder, name)) for name in ("kernel.ptx", "kernel.cubin", "again.cubin")
        )
        Path(ptx).write_text(binary.asm["ptx"])
        Path(cubin).write_bytes(binary.asm["cubin"])
        gpu = f"--gpu-name={sm_arch_from_capability(arch)}"
        said = _output(get_ptxas(arch).path, "-v", gpu, ptx, "-o", again)
        usage = _output(tools.cuobjdump.path, "--dump-resource-usage", cubin)
        sass = _output(tools.nvdisasm.path, "-c", cubin)
    registers, stack, local = (
        int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL")
    )
    instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass, re.MULTILINE)
    return Compiled(
        model,
        arch,
        precision,
        tokens,
        kernel,
        variant,
        registers,
        stack + local,
        binary.metadata.shared,
        len(instructions),
        sum(i.startswith(("HMMA", "HGMMA", "UTCHMMA")) for i in instructions),
        "C7515" in said or "serialized" in said,
    )


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def problems(compiled: Iterable[Compiled]) -> list[str]:
    """What is wrong with any of them, in words."""
    return [
        f"{c.kernel} {c.variant} in {c.precision} at {c.tokens} tokens for {c.model} on sm_{c.arch} {what}"
        for c in compiled
        for what in c.problems()
    ]


def write(path: Path, reports: list[dict[str, Any]]) -> None:
    """Write what was compiled by each Triton, a kernel a line."""
    parts = []
    for report in reports:
        head = {key: value for key, value in report.items() if key != "kernels"}
        lines = ",\n  ".join(json.dumps(kernel) for kernel in report["kernels"])
        parts.append(
            f'{json.dumps({**head, "columns": Compiled._fields})[:-1]},\n "kernels": [\n  {lines}]}}'
        )
    path.write_text("[" + ",\n".join(parts) + "]\n", encoding="utf-8")


def read(path: Path) -> list[tuple[dict[str, Any], list[Compiled]]]:
    """Reports from a file: versions and date, and the kernels."""
    return [(report, [Compiled(*k) for k in report["kernels"]]) for report in json.loads(path.read_text())]


def _by(triton: str, arguments: list[str]) -> list[dict[str, Any]]:
    """The reports of this command in an environment of its own with another version of Triton."""
    python = python_with(f"triton=={triton}", default_cache(), lambda line: click.echo(line, err=True))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "report.json")
        command = [python, "-m", "deltapatch.bench.compile_kernels", *arguments, "--out", str(out)]
        done = subprocess.run(command)
        if not out.exists():
            raise DeltapatchError(
                f"the kernels cannot be compiled by Triton {triton}: exit code {done.returncode}"
            )
        found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(COMPILED)), help="Default: all.")
@click.option("--arch", "archs", multiple=True, type=click.Choice(["80", "90"]), help="Default: both.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice([name for name in PRECISIONS if name != "fp64"]),
    help="Default: all that the architecture has.",
)
@click.option("--tokens", multiple=True, type=click.IntRange(8), help="Of prompts. Default: 16, 64 and 128.")
@click.option("--triton", "tritons", multiple=True, help="A version, or `installed`, which is the default.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the table there too, as JSON.")
def main(
    models: tuple[str, ...],
    archs: tuple[str, ...],
    precisions: tuple[str, ...],
    tokens: tuple[int, ...],
    tritons: tuple[str, ...],
    out: Path | None,
) -> None:
    """Compile every kernel and print a table of what it takes."""
    try:
        check_free(out)
        asked = [("--model", models), ("--arch", archs), ("--precision", precisions), ("--tokens", tokens)]
        arguments = [str(part) for name, values in asked for value in values for part in (name, value)]
        reports = []
        for triton in tritons or ("installed",):
            if triton not in ("installed", version("triton")):
                reports += _by(triton, arguments)
                continue
            compiled = []
            for arch in archs or ("80", "90"):
                compiled += compile_all(models or tuple(CONFIGS), int(arch), precisions, tokens or TOKENS)
            _print(compiled)
            reports.append({"triton": version("triton"), **environment(), "kernels": compiled})
        if out is not None:
            write(out, reports)
    except DeltapatchError as error:
        sys.exit(f"Error: {error}")
    bad = [
        f"Triton {r['triton']}: {what}"
        for r in reports
        for what in problems(Compiled(*k) for k in r["kernels"])
    ]
    for what in bad:
        click.echo(what, err=True)
    sys.exit(1 if bad else 0)


def _print(compiled: list[Compiled]) -> None:
    row = "{:<12} {:>4} {:<5} {:>6} {:<20} {:<76} {:>5} {:>6} {:>7} {:>6} {:>6}"
    names = (
        "model",
        "sm",
        "prec",
        "tokens",
        "kernel",
        "variant",
        "regs",
        "spill",
        "shared",
        "instr",
        "tensor",
    )
    click.echo(row.format(*names))
    for c in compiled:
        click.echo(row.format(*c[:11]))


if __name__ == "__main__":
    main()
