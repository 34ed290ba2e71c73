"""`deltapatch circuit`: a circuit out of a run of edges, what it keeps of the model, and its file."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltapatch.cli.options import as_json, print_json, quiet, say
from deltapatch.errors import DeltapatchError

if TYPE_CHECKING:
    from deltapatch.analysis.circuit import Circuit

EXAMPLES = """\b
Examples:
  deltapatch circuit EDGES --edges 200 --out circuit.json
  deltapatch circuit EDGES --edges 200 --greedy --by sign --curve --out circuit.json
  deltapatch circuit EDGES --threshold 0.05 --metric logit_diff --plot circuit.pdf --out circuit.json
  deltapatch circuit EDGES --acdc 0.01 --metric kl --model MODEL --out circuit.json
"""


@click.command(short_help="Choose a circuit from a run of edges, and check it.", epilog=EXAMPLES)
@click.argument("run", metavar="RUN")
@click.option("--edges", "n_edges", type=click.IntRange(1), help="Keep so many edges, the largest.")
@click.option("--threshold", type=float, help="Keep edges whose mean effect is at least this.")
@click.option(
    "--acdc",
    "acdc_threshold",
    type=float,
    help="Remove edges one by one, as long as the loss, averaged over pairs, grows by less than this: exact "
    "ACDC.",
)
@click.option("--metric", help="What edges are chosen by; logit_diff unless given, with --acdc kl.")
@click.option(
    "--by",
    type=click.Choice(["magnitude", "sign"]),
    default="magnitude",
    show_default=True,
    help="Largest in magnitude, or most for the clean answer.",
)
@click.option(
    "--greedy", is_flag=True, help="With --edges: from the logits back, the best edge into what is kept."
)
@click.option(
    "--source",
    default="counterpart",
    show_default=True,
    help="What removed edges carry when the circuit is checked: counterpart, zero or mean.",
)
@click.option(
    "--mean-over",
    help="Of the source mean: a file of prompts whose runs the mean is over, one a line, or JSON strings and "
    "lists of token ids (.jsonl).",
)
@click.option(
    "--curve", is_flag=True, help="MIB's curve too: faithfulness at 0.1 to 100% of the edges, CPR and CMD."
)
@click.option("--model", help="To check the circuit with; that of the run unless given.")
@click.option("--no-check", is_flag=True, help="Do not run the circuit: the model is not needed.")
@click.option("--plot", "figure", help="A figure to draw, .png or .pdf: the circuit as a graph in layers.")
@click.option("--out", required=True, help="The file to write: EAP-IG's graph JSON.")
@as_json
@quiet
def circuit(
    *,
    run: str,
    n_edges: int | None,
    threshold: float | None,
    acdc_threshold: float | None,
    metric: str | None,
    by: str,
    greedy: bool,
    source: str,
    mean_over: str | None,
    curve: bool,
    model: str | None,
    no_check: bool,
    figure: str | None,
    out: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Choose a circuit from RUN, a sweep of all edges, and say how much of the model's behaviour it keeps.

    Edges that are not in the circuit carry what their sender says in the source run. A faithfulness of 1 is
    all of the clean run's behaviour, 0 that of a run with no edge kept; it is of means over the run's pairs.
    """
    given = [n_edges is not None, threshold is not None, acdc_threshold is not None]
    if sum(given) != 1:
        raise DeltapatchError("say how the circuit is chosen: one of --edges N, --threshold X and --acdc X")
    if no_check and (curve or acdc_threshold is not None):
        raise DeltapatchError("--no-check runs nothing, and --curve and --acdc are runs: leave one out")
    if figure and Path(figure).suffix not in (".png", ".pdf"):
        raise DeltapatchError(f"figure {figure} must end in .png or .pdf")
    for path in (out, *([figure] if figure else [])):
        if os.path.exists(path):
            raise DeltapatchError(f"output path {path} is taken: choose another or remove it")
    from deltapatch.analysis.acdc import acdc
    from deltapatch.analysis.circuit import Circuit
    from deltapatch.analysis.circuit_runs import circuit_curve, faithfulness
    from deltapatch.interventions.prompts_file import load_prompts
    from deltapatch.models.load import load_model
    from deltapatch.results.reading import load_edges

    edges = load_edges(run)
    metric = metric or ("kl" if acdc_threshold is not None else "logit_diff")
    options: dict[str, Any] = {"metric": metric, "source": source, "progress": not quiet}
    about: dict[str, Any] = {"out": out, "metric": metric, "source": source}
    if mean_over is not None:
        options["mean_over"] = about["mean_over"] = load_prompts(mean_over)
    loaded = None if no_check else load_model(model or str(edges.meta.get("model")))
    if loaded is not None and loaded.fingerprint() != edges.meta.get("fingerprint"):
        say(f"{loaded!r} is not the model of {run}: the circuit is checked on another one", False)
    pairs: Any = edges.pairs

    def choose(n: int) -> "Circuit":
        return Circuit.top(edges, n, metric, by=by, greedy=greedy)  # type: ignore[arg-type]  # click checked

    if acdc_threshold is not None:
        assert loaded is not None
        found = acdc(loaded, pairs, acdc_threshold, **options)
        chosen = found.circuit
        about |= {"runs": found.runs, "noise": found.noise, "close": found.close}
        if found.close:
            say(
                f"{len(found.close)} decisions lie within the noise ({found.noise:.1e}) of the threshold",
                quiet,
            )
    elif threshold is not None:
        chosen = Circuit.above(edges, threshold, metric, by=by)  # type: ignore[arg-type]
    else:
        assert n_edges is not None
        chosen = choose(n_edges)
    about |= {"edges": len(chosen), "of": chosen.nodes.n_edges}
    lines = [f"{len(chosen):,} of {chosen.nodes.n_edges:,} edges, after pruning"]
    if loaded is not None:
        share = {}
        for what, removed in (("kept", False), ("removed", True)):
            told = faithfulness(loaded, pairs, chosen, removed=removed, **options)
            share[what] = float(told.share[0])
        about["faithfulness"] = share
        lines.append(
            f"faithfulness {share['kept']:.3f} with these edges alone, {share['removed']:.3f} without them"
        )
    if curve:
        assert loaded is not None
        line = circuit_curve(loaded, pairs, choose, **options)
        f = line.faithfulness.share.tolist()
        points = [(s, len(c), x) for s, c, x in zip(line.shares, line.circuits, f, strict=True)]
        about["curve"] = [dict(zip(("share", "edges", "faithfulness"), p, strict=True)) for p in points]
        about |= {"cpr": line.cpr, "cmd": line.cmd}
        lines.append(repr(line))
    if figure:
        from deltapatch.analysis.edge_plots import draw_circuit

        draw_circuit(chosen, Path(figure))
        about["figure"] = figure
    chosen.save(out)
    if as_json:
        print_json(about)
    else:
        click.echo("\n".join(lines))
        click.echo(out)
