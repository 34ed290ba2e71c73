"""`deltapatch demo`: the main job on the built-in model, with nothing to download."""

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltapatch.cli.options import SEED, as_json, print_json, quiet, say
from deltapatch.errors import DeltapatchError

if TYPE_CHECKING:
    from deltapatch.results.effects import Effects

EXAMPLES = """\b
Examples:
  deltapatch demo
  deltapatch demo --out demo
"""

MADE_BY = "deltapatch demo"
MODEL = "gpt-neox-arithmetic"
OPERATORS, PER_TEMPLATE = "+-*/", 2
METRIC = "recovered"  # the model is so sure that the indirect effect, a ratio, reaches millions


@click.command(short_help="Find what makes the built-in model do arithmetic.", epilog=EXAMPLES)
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    help="Where the run and its plots go; a folder that an earlier demo made is replaced. A new folder "
    "deltapatch-demo unless given.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the pairs.")
@as_json
@quiet
def demo(out: str | None, seed: int, as_json: bool, quiet: bool) -> None:
    """Find what makes a small model do arithmetic: every MLP, attention and neuron, patched exactly.

    Takes the built-in model, makes arithmetic pairs, sweeps mlp_out and attn_out over all layers and
    positions and every hidden neuron at the last position, prints the strongest and draws the figures.
    """
    folder = _free(out)
    began = time.perf_counter()

    from deltapatch.analysis.plots import plot_run
    from deltapatch.models.load import load_model
    from deltapatch.tasks.arithmetic import arithmetic_pairs

    model = load_model(f"builtin:{MODEL}", device="cpu")
    spec = model.spec
    say(f"Model: {MODEL} (built in), {spec.n_layers} layers, {spec.d_mlp} hidden neurons each", quiet)
    pairs, _ = arithmetic_pairs(
        model.tokenizer, per_template=PER_TEMPLATE, shots=0, operators=OPERATORS, seed=seed
    )
    say(f"Pairs: {len(pairs)} of two-operand arithmetic, for example {pairs[0].clean!r}", quiet)
    effects = _sweep(model, pairs, progress=not quiet)
    effects.meta |= {"made_by": MADE_BY, "pairs_seed": seed}
    rows, seconds = effects.meta["rows"], effects.meta["seconds"]
    say(f"Swept {rows:,} interventions in {seconds:.1f} s ({rows / seconds:,.0f} a second)", quiet)

    _clear(folder)
    effects.save(folder)
    figures = [str(path) for path in plot_run(effects, folder / "plots", METRIC)]
    components, neurons = _tables(effects)
    total = time.perf_counter() - began
    if as_json:
        top = {
            "components": [dict(zip(components, row, strict=True)) for row in _rows(components)],
            "neurons": [dict(zip(neurons, row, strict=True)) for row in _rows(neurons)],
        }
        facts = {"out": str(folder), "pairs": len(pairs), "rows": rows, "sweep_seconds": seconds}
        print_json(
            {**facts, "accuracy": effects.accuracy(), "top": top, "figures": figures, "seconds": total}
        )
        return
    click.echo(_report(effects, components, neurons))
    click.echo(
        f"Run folder  {folder}\nFigures     {folder / 'plots'}: {', '.join(_stems(figures))} (PNG and PDF)"
    )
    click.echo(f"Took {total:.0f} s. Next: deltapatch effects {folder} --site mlp_post --top 50")


def _sweep(model: Any, pairs: list[Any], progress: bool) -> "Effects":
    """Whole vectors everywhere and neurons at the last position, as one run."""
    from deltapatch.engine.sweep import sweep

    effects = sweep(model, pairs, sites=["mlp_out", "attn_out"], progress=progress)
    neurons = sweep(model, pairs, sites=["mlp_post"], positions="last", progress=progress)
    effects.sites |= neurons.sites
    for count in ("rows", "passes", "seconds"):
        effects.meta[count] += neurons.meta[count]
    return effects


def _tables(effects: "Effects") -> tuple[dict[str, Any], dict[str, Any]]:
    """The top components by layer and position class, and the top neurons."""
    from deltapatch.analysis.tables import averages, component

    parts = averages(effects, METRIC, ["layer", "class"], ["mlp_out", "attn_out"]).top(8).columns
    neurons = averages(effects, METRIC, ["layer", "index"], ["mlp_post"]).top(10).columns
    names = [component("mlp_post", *where) for where in zip(neurons["layer"], neurons["index"], strict=True)]
    return (
        {"site": parts["site"], "layer": parts["layer"], "position": parts["class"]} | _numbers(parts),
        {"neuron": names} | _numbers(neurons),
    )


def _numbers(columns: dict[str, Any]) -> dict[str, Any]:
    return {METRIC: columns[METRIC], "stderr": columns["stderr"]}


def _rows(columns: dict[str, Any]) -> list[tuple[Any, ...]]:
    import numpy as np

    return list(zip(*(np.asarray(column).tolist() for column in columns.values()), strict=True))


def _report(effects: "Effects", components: dict[str, Any], neurons: dict[str, Any]) -> str:
    import numpy as np

    from deltapatch.analysis.render import as_text
    from deltapatch.analysis.tables import Table
    from deltapatch.results.metrics import check_metric

    neurons = {name: np.array(c, dtype=object) if name == "neuron" else c for name, c in neurons.items()}
    total = int(np.prod(effects.site("mlp_post").shape[1:]))
    return (
        f"The model answers {effects.accuracy():.1%} of the {2 * len(effects.pairs)} prompts correctly.\n\n"
        + as_text(
            Table(components, METRIC),
            f"Top components by {check_metric(METRIC).label}",
        )
        + "\n"
        + as_text(
            Table(neurons, METRIC), f"Top neurons of {total:,} (hidden neurons, last position), likewise"
        )
    )


def _stems(figures: list[str]) -> list[str]:
    return [Path(path).stem for path in figures if path.endswith(".png")]


def _free(out: str | None) -> Path:
    """The folder to write: as given, if it is free or an earlier demo's; else a fresh name."""
    if out is not None:
        folder = Path(out)
        _check_ours(folder)
        return folder
    number, folder = 1, Path("deltapatch-demo")
    while folder.exists():
        number += 1
        folder = Path(f"deltapatch-demo-{number}")
    return folder


def _check_ours(folder: Path) -> None:
    """Raise DeltapatchError where a folder has anything that the demo did not put there."""
    from deltapatch.models.header import check_regular
    from deltapatch.results.folder import EFFECTS, PAIRS, RUN, check_output

    try:
        check_regular(folder / RUN)
        about = json.loads((folder / RUN).read_text(encoding="utf-8"))
        ours = isinstance(about, dict) and about.get("made_by") == MADE_BY
        ours = ours and {p.name for p in folder.iterdir()} <= {RUN, PAIRS, EFFECTS, "plots"}
        plots = list((folder / "plots").iterdir()) if (folder / "plots").exists() else []
        ours = ours and all(p.suffix in (".png", ".pdf") for p in plots)
    except (OSError, ValueError):
        ours = False
    if ours:
        return
    try:
        check_output(folder)
    except DeltapatchError as error:
        raise DeltapatchError(
            f"output path {folder} is taken, and not by an earlier demo alone: choose another with --out"
        ) from error


def _clear(folder: Path) -> None:
    """Remove what an earlier demo made."""
    _check_ours(folder)
    if folder.exists():
        shutil.rmtree(folder)
