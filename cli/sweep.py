"""`deltapatch sweep` and `deltapatch edges`: every chosen site or edge of every pair, into a run folder."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltapatch.arguments import in_bytes
from deltapatch.cli.loading import Loading, loading
from deltapatch.cli.options import (
    Command,
    asked,
    in_flops,
    in_seconds,
    pairs_file,
    print_json,
    read_asked,
    say,
)
from deltapatch.cli.run_folder import RunFolder, run_folder
from deltapatch.cli.screened import of_screen, screen_as_json
from deltapatch.engine.options import EdgeOptions, Options, SweepOptions
from deltapatch.errors import DeltapatchError

if TYPE_CHECKING:
    from deltapatch.engine.cluster.worker import Report
    from deltapatch.engine.planning.forecast import Forecast

EXAMPLES = """\b
Examples:
  deltapatch sweep --model MODEL --pairs pairs.jsonl --sites mlp_out,attn_out --out RUN
  deltapatch sweep --model MODEL --pairs pairs.jsonl --sites mlp_post --positions last --out NEURONS
  deltapatch sweep --model MODEL --pairs pairs.jsonl --sites mlp_post --positions last --out NEURONS --resume
  deltapatch sweep --model MODEL --pairs pairs.jsonl --sites mlp_post --out NEURONS --ray head:6379
  deltapatch sweep --model MODEL --pairs pairs.jsonl --sites z --positions op1,last --layers 0-5,9 --dry-run
  deltapatch sweep --model MODEL --pairs pairs.jsonl --sites mlp_post --screen attribution --top 500 --out TOP
"""


EDGE_EXAMPLES = """\b
Examples:
  deltapatch edges --model MODEL --pairs pairs.jsonl --out EDGES
  deltapatch edges --model MODEL --pairs pairs.jsonl --effect both --direction noise --out EDGES
  deltapatch edges --model MODEL --pairs pairs.jsonl --senders input,m0-3 --receivers "a<v>,m" --out EDGES
  deltapatch edges --model MODEL --pairs pairs.jsonl --positions op1,last --dry-run
  deltapatch edges --model MODEL --pairs pairs.jsonl --screen attribution --top 500 --out TOP
"""


def sweeping(command: Command) -> Command:
    """The options of every command that sweeps, but for what it patches."""
    command = run_folder(command)
    for option in (
        click.option("--dry-run", is_flag=True, help="Check everything, say what it would take, and stop."),
        click.option(
            "--ray-cpus", type=click.IntRange(1), help="With --ray: workers of so many CPUs each, no GPUs."
        ),
        click.option(
            "--ray",
            is_flag=False,
            flag_value="",
            metavar="[ADDRESS]",
            help="Spread the sweep over a Ray cluster, one worker a GPU: that at ADDRESS (host:port), or "
            "else that of RAY_ADDRESS, one that runs on this machine, or one that is started here until the "
            "end.",
        ),
    ):
        command = option(command)
    return command


@click.command(short_help="Patch every chosen site of every pair.", epilog=EXAMPLES)
@loading
@pairs_file
@asked(SweepOptions)
@sweeping
def sweep(**given: Any) -> None:
    """Patch every chosen site of every pair, each alone and exactly, and write a run folder."""
    _sweep(SweepOptions, **given)


@click.command(short_help="Patch every edge between heads, MLPs and logits.", epilog=EDGE_EXAMPLES)
@loading
@pairs_file
@asked(EdgeOptions)
@sweeping
def edges(**given: Any) -> None:
    """Patch every edge of every pair, each alone and exactly, and write a run folder.

    An edge sends what one node (input, a head a3.h5, an MLP m3) says in the source run into what one receiver
    (a5.h2<q>, <k>, <v>, m7, logits) reads, and into nothing else. MIB's and EAP-IG's edges have the clean run
    as their base: --direction noise.
    """
    _sweep(EdgeOptions, **given)


def _sweep(
    kind: type[Options],
    *,
    loading: Loading,
    folder: RunFolder,
    pairs_file: str,
    ray: str | None,
    ray_cpus: int | None,
    dry_run: bool,
    **given: Any,
) -> None:
    """Carry out a sweep of sites or edges as the shell asked for it."""
    out, quiet = folder.out, folder.quiet
    if out or not dry_run:
        folder.check(" (or --dry-run to make none)")
    for wanted, option in ((folder.part, "--shard"), (dry_run, "--dry-run")):
        if ray is not None and wanted:
            raise DeltapatchError(f"--ray and {option} do not go together: leave one out")
    if ray_cpus and ray is None:
        raise DeltapatchError("--ray-cpus says of how many CPUs the workers of --ray are: give --ray as well")
    options = read_asked(kind, given)
    screened = options.get("screen") is not None
    if screened and ray is not None:
        raise DeltapatchError("--screen and --ray do not go together: leave one out")

    from deltapatch.interventions.pairs_file import read_named_pairs
    from deltapatch.results.folder import RUN

    # Of a run that is finished it is only seen whether it is of this sweep: nothing of that is told.
    finished = out is not None and (Path(out) / RUN).is_file()  # else it would be taken
    hushed = quiet or finished
    named = read_named_pairs(pairs_file)
    names, pairs = [name for name, _ in named], [pair for _, pair in named]

    from deltapatch.engine import sweep as sweeps
    from deltapatch.engine.question import ask
    from deltapatch.interventions.encode import encode_pairs
    from deltapatch.results.truth import in_words

    plan: dict[str, Any] = {"model": loading.model, "pairs": len(pairs)}

    def planned(rows: int, flops: float) -> None:
        plan.update(rows=rows, necessary_flops=flops)
        say(f"{len(pairs)} pairs, {rows:,} interventions, {in_flops(flops)} necessary", hushed)

    if ray is not None and not finished:
        from deltapatch.engine.cluster.sweep import Cluster, ray_sweep, ray_sweep_edges

        def told(report: "Report") -> None:
            say(report.model, hushed)
            planned(report.rows, report.flops)

        how = loading.arguments()
        cluster = Cluster(address=ray or None, cpus=ray_cpus, loading=how, names=names, told=told)
        spread = ray_sweep_edges if kind is EdgeOptions else ray_sweep
        goes = {"out": out, "resume": folder.resume, "progress": not quiet}
        effects: Any = spread(loading.model, pairs, cluster, **goes, **options)
    else:
        # Of a finished run the model's header is enough.
        loaded = (replace(loading, stream=True) if finished else loading).load(quiet=hushed)
        encoded = encode_pairs(pairs, loaded.tokenizer, loaded.spec.d_vocab, names, options["align"])
        question = ask(loaded, pairs, kind(**options))
        planned(question.n_rows, question.flops)
        longest = max(pair.answer_tokens for pair in encoded)
        if longest > 1:
            say(
                f"answers have up to {longest} tokens: effects are of the probability of whole answers",
                hushed,
            )
        if loaded.stream and not loading.stream:
            size = in_bytes(loaded.n_bytes)
            say(f"its {size} do not fit into the memory: every pass reads them from the file", hushed)
        if dry_run and not finished:
            from deltapatch.engine.planning.forecast import forecast
            from deltapatch.engine.planning.screens import forecast_screen

            found = forecast_screen(question) if screened else forecast(question)
            if folder.as_json:
                print_json({"model": loaded.name, "stream": loaded.stream, **found.as_dict()})
            else:
                click.echo(_plan(found, loaded.stream))
            return
        here = sweeps.sweep_edges if kind is EdgeOptions else sweeps.sweep
        effects = here(loaded, pairs, **folder.arguments(), **options)
    if finished:
        say(f"{out} is finished already: nothing to do", quiet)
    elif folder.part is not None:
        folder.tell_part()
        return
    else:
        say(in_words(effects.meta), quiet)
        computed = f"{len(effects.verified):,} of " if screened else ""
        say(
            f"{computed}{plan['rows']:,} interventions in {effects.meta['seconds']:.1f} s; "
            f"accuracy of the unpatched runs {effects.accuracy():.1%}",
            quiet,
        )
        if caveat := effects.caveat():
            say(caveat, quiet)
        if screened:
            say(of_screen(effects), quiet)
    folder.tell(
        {
            **plan,
            "answer_tokens": max(pair.answer_tokens for pair in effects.pairs),
            "memory_budget": effects.meta.get("memory_budget"),
            "accuracy": effects.accuracy(),
            **effects.shapes(),
            **(screen_as_json(effects) if screened and folder.as_json else {}),
            "run": effects.meta,
        }
    )


def _plan(found: "Forecast", stream: bool) -> str:
    """A plan in words."""
    plan, memory = found.plan, found.plan.memory
    passes = f"{len(plan.passes):,} pass{'' if len(plan.passes) == 1 else 'es'}"
    assert found.seconds is not None
    assert found.total is not None
    estimates = found.seconds.get("estimates")
    lines = {
        "interventions"
        if estimates is None
        else "verified": f"{plan.rows:,} on {plan.pairs:,} pairs, in {passes}, {found.precision}",
        "necessary": in_flops(plan.flops),
        "model": in_bytes(memory["model"]) + (", read from the file in every pass" if stream else ""),
        "memory": f"{in_bytes(memory['pass'])} beside the model, {in_bytes(memory['rows'])} of it rows; "
        f"at most {in_bytes(plan.budget)}",
        "results": in_bytes(memory["results"]),
        "time": f"about {in_seconds(found.total)} on this machine"
        + ("" if estimates is None else f", {in_seconds(estimates)} of it for the estimates"),
    }
    return "\n".join(f"{name:<15}{text}" for name, text in lines.items()) + "\nnothing was run"
