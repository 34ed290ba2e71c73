"""The tables of docs/gpu.md, made of what `deltapatch.bench.gpu` wrote: a test holds the page to the files.

python -m deltapatch.bench.gpu_page bench/results/gpu_h100.json bench/results/gpu_h100_precision.json
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from deltapatch.bench.markdown import as_table
from deltapatch.bench.markdown import precision as errors

Report = dict[str, Any]
MODELS = {"gptj": "GPT-J-6B", "llama": "LLaMA-7B", "pythia": "Pythia-2.8B"}
SWEEPS = {
    "neurons": "all hidden neurons, last position, one pair",
    "components": "MLP and attention outputs, every layer and position, 64 pairs",
    "components of one pair": "the same, one pair",
}
# What the device did, by a part of its kernels' names; the rest is PyTorch's.
KINDS = {
    "products": ("nvjet", "gemm", "splitK"),
    "activation": ("_activation_kernel",),
    "attention": ("_attention_kernel", "_narrow_kernel"),
    "residual adds and norms": ("_add_norm_kernel",),
    "read-out, its products apart": ("_take_in_kernel", "_dots_kernel"),
    "entry of neurons": ("_gather_kernel",),
}


def sweeps(report: Report) -> str:
    """Every whole sweep."""
    head = [
        "",
        "",
        "interventions",
        "seconds",
        "with noise floor",
        "a second",
        "of product rate",
        "error",
        "GB",
    ]
    rows = [head]
    for part, model in MODELS.items():
        for step, found in report["parts"].get(part, {}).get("steps", {}).items():
            if "rows_s" not in found:
                continue
            what, mode = step.rsplit(" ", 1)
            share, error = found["of_product_rate"], found["noise_floor"]["relative_error"]["ie"]
            rows.append(
                [
                    f"{model}, {mode}",
                    SWEEPS[what],
                    f"{found['rows']:,}",
                    f"{found['seconds']:.2f}",
                    f"{found['seconds_with_noise_floor']:.2f}",
                    f"{found['rows_s']:,.0f}",
                    "" if share is None else f"{share:.0%}",
                    f"{error:.0e}",
                    f"{found['peak_bytes'] / 1e9:.0f}",
                ]
            )
    return as_table(rows)


def hooks(report: Report) -> str:
    """Hidden neurons by hooks, and how many times as fast deltapatch's first sweep of the model was."""
    rows = [["", "hooks in bfloat16, in batches", "a second", "rows of a batch", "deltapatch is"]]
    for part, model in MODELS.items():
        for kind, found in report["parts"].get(part, {}).get("steps", {}).get("hooks", {}).items():
            times = f"{found['deltapatch_over_it']:.1f} times as fast"
            rows.append([model, kind, f"{found['rows_s']:,.0f}", str(found["batch"]), times])
    return as_table(rows)


def times(report: Report) -> str:
    """Where the time of GPT-J's sweep of all neurons goes."""
    found = report["parts"]["gptj"]["steps"]["where the time goes"]
    left = found["seconds"] * found["busy"]
    rows = [["", "seconds", "calls", "microseconds a call"]]
    for kind, names in KINDS.items():
        mine = [told for key, told in found["kernels"].items() if any(name in key for name in names)]
        seconds, calls = sum(told["seconds"] for told in mine), sum(told["calls"] for told in mine)
        left -= seconds
        rows.append([kind, f"{seconds:.3f}", f"{calls:,}", f"{seconds / calls * 1e6:,.0f}"])
    idle = found["seconds"] * (1 - found["busy"])
    rows += [["copies and other small kernels", f"{left:.3f}", "", ""], ["nothing", f"{idle:.3f}", "", ""]]
    return as_table(rows)


def precision(report: Report) -> str:
    """Effects of the built-in models' neurons against float64."""
    steps = report["parts"]["precision"]["steps"]
    return "\n\n".join(f"{name}:\n\n{errors({'methods': found})}" for name, found in steps.items())


TABLES: Mapping[str, Callable[[Report], str]] = {"sweeps": sweeps, "hooks": hooks, "times": times}


def tables(report: Report) -> dict[str, str]:
    """What a file has, by the name that the page marks it with."""
    if "precision" in report["parts"]:
        return {"precision": precision(report)}
    return {name: of(report) for name, of in TABLES.items()}


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(files: tuple[Path, ...]) -> None:
    """Print the tables of files."""
    for path in files:
        for name, table in tables(json.loads(path.read_text())).items():
            click.echo(f"<!-- {name} -->\n{table}\n<!-- /{name} -->\n")


if __name__ == "__main__":
    main()
