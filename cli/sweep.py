"""`deltapatch sweep` and `deltapatch edges`: every chosen site or edge of every pair, into a run folder."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltapatch.arguments import in_bytes
from deltapatch.cli.options import (
    Command,
    as_json,
    asked,
    in_flops,
    in_seconds,
    loading,
    print_json,
    quiet,
    read_asked,
    read_shard,
    say,
)
from deltapatch.engine.options import EdgeOptions, Options, SweepOptions
from deltapatch.errors import DeltapatchError

if TYPE_CHECKING:
    from deltapatch.engine.forecast import Forecast
    from deltapatch.results.screened import Screened

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
"""


def sweeping(command: Command) -> Command:
    """The options of every command that sweeps, but for what it patches."""
    for option in (
        quiet,
        as_json,
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
        click.option(
            "--shard",
            metavar="I/N",
            help="Do part I of N only: N processes share the folder --out, and `deltapatch merge` finishes "
            "it.",
        ),
        click.option(
            "--resume",
            is_flag=True,
            help="Go on with the same sweep where it was cut off: only what is missing or damaged is "
            "computed.",
        ),
        click.option("--out", help="The run folder to make; it must not exist, unless a sweep is resumed."),
    ):
        command = option(command)
    return command


@click.command(short_help="Patch every chosen site of every pair.", epilog=EXAMPLES)
@loading
@click.option("--pairs", "pairs_file", required=True, help="Prompt pairs, one JSON object a line.")
@asked(SweepOptions)
@sweeping
def sweep(**given: Any) -> None:
    """Patch every chosen site of every pair, each alone and exactly, and write a run folder."""
    _sweep(SweepOptions, **given)


@click.command(short_help="Patch every edge between heads, MLPs and logits.", epilog=EDGE_EXAMPLES)
@loading
@click.option("--pairs", "pairs_file", required=True, help="Prompt pairs, one JSON object a line.")
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
    model: str,
    revision: str | None,
    device: str,
    dtype: str,
    adapter: str | None,
    stream: bool,
    pairs_file: str,
    out: str | None,
    resume: bool,
    shard: str | None,
    ray: str | None,
    ray_cpus: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Carry out a sweep of sites or edges as the shell asked for it."""
    if not out and not dry_run:
        raise DeltapatchError("Missing option '--out': the run folder to make (or --dry-run to make none)")
    part = read_shard(shard)
    for wanted, option in ((part, "--shard"), (dry_run, "--dry-run")):
        if ray is not None and wanted:
            raise DeltapatchError(f"--ray and {option} do not go together: leave one out")
    if ray_cpus and ray is None:
        raise DeltapatchError("--ray-cpus says of how many CPUs the workers of --ray are: give --ray as well")
    options = read_asked(kind, given)
    screened = options.get("screen") is not None
    for wanted, option in ((ray is not None, "--ray"), (dry_run, "--dry-run")):
        if screened and wanted:
            raise DeltapatchError(f"--screen and {option} do not go together: leave one out")

    from deltapatch.interventions.pairs_file import read_named_pairs
    from deltapatch.results.folder import RUN, check_output

    # Of a run that is finished it is only seen whether it is of this sweep: nothing of that is told.
    finished = bool(out) and (resume or part is not None) and (Path(out or "") / RUN).is_file()
    hushed = quiet or finished
    if out and not resume and part is None:
        check_output(out)
    named = read_named_pairs(pairs_file)
    names, pairs = [name for name, _ in named], [pair for _, pair in named]

    from deltapatch.engine import sweep as sweeps
    from deltapatch.engine.question import ask
    from deltapatch.interventions.pairs import encode_pairs
    from deltapatch.models.load import load_model
    from deltapatch.results.truth import in_words

    loading: dict[str, Any] = {"device": device, "dtype": dtype, "stream": stream, "adapter": adapter}
    loading |= {} if revision is None else {"revision": revision}

    plan: dict[str, Any] = {"model": model, "pairs": len(pairs)}

    def planned(loaded: str, rows: int, flops: float) -> None:
        plan.update(rows=rows, necessary_flops=flops)
        say(loaded, hushed)
        say(f"{len(pairs)} pairs, {rows:,} interventions, {in_flops(flops)} necessary", hushed)

    if ray is not None and not finished:
        from deltapatch.engine.cluster.sweep import Cluster, ray_sweep, ray_sweep_edges

        cluster = Cluster(
            address=ray or None,
            cpus=ray_cpus,
            loading=loading,
            names=names,
            told=lambda report: planned(report.model, report.rows, report.flops),
        )
        spread = ray_sweep_edges if kind is EdgeOptions else ray_sweep
        effects: Any = spread(model, pairs, cluster, out=out, resume=resume, progress=not quiet, **options)
    else:
        loaded = load_model(model, **loading | ({"stream": True} if finished else {}))
        encoded = encode_pairs(pairs, loaded.tokenizer, loaded.spec.d_vocab, names, options.get("align"))
        question = ask(loaded, pairs, kind(**options))
        planned(repr(loaded), question.n_rows, question.flops)
        longest = max(pair.answer_tokens for pair in encoded)
        if longest > 1:
            say(
                f"answers have up to {longest} tokens: effects are of the probability of whole answers",
                hushed,
            )
        if loaded.stream and not stream:
            size = in_bytes(loaded.n_bytes)
            say(f"its {size} do not fit into the memory: every pass reads them from the file", hushed)
        if dry_run and not finished:
            from deltapatch.engine.forecast import forecast

            found = forecast(question)
            if as_json:
                print_json({"model": loaded.name, "stream": loaded.stream, **found.as_dict()})
            else:
                click.echo(_plan(found, loaded.stream))
            return
        here = sweeps.sweep_edges if kind is EdgeOptions else sweeps.sweep
        effects = here(loaded, pairs, progress=not quiet, out=out, resume=resume, shard=part, **options)
    if finished:
        say(f"{out} is finished already: nothing to do", quiet)
    elif part is not None:
        say(f"part {shard} is done; when all are: deltapatch merge {out}", quiet)
        if as_json:
            print_json({"out": out, "part": shard})
        else:
            click.echo(out)
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
            say(_of_screen(effects), quiet)
    if as_json:
        print_json(
            {
                "out": out,
                **plan,
                "answer_tokens": max(pair.answer_tokens for pair in effects.pairs),
                "memory_budget": effects.meta.get("memory_budget"),
                "accuracy": effects.accuracy(),
                **effects.shapes(),
                **(_screen_as_json(effects) if screened else {}),
                "run": effects.meta,
            }
        )
    else:
        click.echo(out)


def _of_screen(found: "Screened") -> str:
    """What a screened sweep says of itself, in words."""
    from deltapatch.analysis.calibration import calibration

    return f"{found}\n{calibration(found)}\n{found.missed()}"


def _screen_as_json(found: "Screened") -> dict[str, Any]:
    """The same for programs."""
    from deltapatch.analysis.calibration import calibration

    columns = {name: column.tolist() for name, column in calibration(found).columns.items()}
    missed = asdict(found.missed())
    return {"verified": len(found.verified), "missed": missed, "calibration": columns}


def _plan(found: "Forecast", stream: bool) -> str:
    """A plan in words."""
    plan, memory = found.plan, found.plan.memory
    passes = f"{len(plan.passes):,} pass{'' if len(plan.passes) == 1 else 'es'}"
    seconds = found.total
    assert seconds is not None
    lines = {
        "interventions": f"{plan.rows:,} on {plan.pairs:,} pairs, in {passes}, {found.precision}",
        "necessary": in_flops(plan.flops),
        "model": in_bytes(memory["model"]) + (", read from the file in every pass" if stream else ""),
        "memory": f"{in_bytes(memory['pass'])} beside the model, {in_bytes(memory['rows'])} of it rows; "
        f"at most {in_bytes(plan.budget)}",
        "results": in_bytes(memory["results"]),
        "time": f"about {in_seconds(seconds)} on this machine",
    }
    return "\n".join(f"{name:<15}{text}" for name, text in lines.items()) + "\nnothing was run"
