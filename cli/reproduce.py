"""`deltapatch reproduce`: the whole study on a model, every table and figure with its numbers."""

from typing import Any

import click

from deltapatch.arguments import n_bytes
from deltapatch.cli.loading import Loading, loading
from deltapatch.cli.options import (
    SEED,
    as_json,
    in_flops,
    print_json,
    quiet,
    read_names,
    say,
)
from deltapatch.errors import DeltapatchError

EXAMPLES = """\b
Examples:
  deltapatch reproduce --model builtin:gpt-neox-arithmetic --out study
  deltapatch reproduce --model MODEL --experiment numerals-operands,retrieval --quick --out study
  deltapatch reproduce --model EleutherAI/gpt-j-6b --paper-size --facts LAMA/data --out gptj
  deltapatch reproduce --model BASE --adapter LORA --compare BASE --experiment three-operands --out tuned
  deltapatch reproduce --model EleutherAI/pythia-70m --compare EleutherAI/pythia-70m \\
      --compare-revision step1000 --experiment retrieval --out training
  deltapatch reproduce --model MODEL --out study --resume
  deltapatch reproduce --list
\b
In the folder are report.md, with every table and figure, study.json, with every number, and for each
experiment its pairs.jsonl and its runs, which sweep, effects and plot take as they take any other.
"""


def _list(context: click.Context, option: click.Parameter, asked: bool) -> None:
    from deltapatch.study.presets import experiments

    if asked:
        known = experiments()
        width = max(map(len, known))
        click.echo("\n".join(f"{name:<{width}}  {known[name].title}" for name in known))
        context.exit()


@click.command(short_help="Run the whole study on a model.", epilog=EXAMPLES)
@loading
@click.option(
    "--experiment",
    "names",
    multiple=True,
    help="Only these, with commas between or several times; `words` is all whose names begin with it.",
)
@click.option(
    "--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="List the experiments."
)
@click.option("--quick", is_flag=True, help="Few pairs: to see that all works.")
@click.option("--paper-size", is_flag=True, help="As many pairs as in the paper: 50 of each template.")
@click.option("--per-template", type=int, help="So many pairs of each template, shape or relation.")
@click.option(
    "--shots",
    default=2,
    show_default=True,
    help="Exemplars before each question; two operands also with every smaller number.",
)
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="Of pairs, intervals, tests and random sets."
)
@click.option(
    "--max-number", type=int, help="The largest number, where a model knows none up to the tasks' own 300."
)
@click.option(
    "--answers",
    type=click.Choice(["auto", "one", "text"]),
    default="auto",
    show_default=True,
    help="Answers of one token, of any length, or of any length where numbers are several tokens.",
)
@click.option(
    "--correct-only",
    is_flag=True,
    help="Keep the pairs whose two prompts the model answers right, as the paper does.",
)
@click.option("--facts", "--lama", "facts", help="A LAMA folder, or a JSONL file of facts, for `factual`.")
@click.option("--problems", help="A JSONL file of word problems, for `word-problems`.")
@click.option("--top", type=int, help="How many coordinates are the strongest.  [default: about a tenth]")
@click.option(
    "--layer",
    type=int,
    help="Whose coordinates are patched.  [default: where the MLP has the largest effect]",
)
@click.option("--compare", help="Another checkpoint, with the same tokens: the same study on the same pairs.")
@click.option("--compare-revision", help="Its revision of the hub, as --revision: step1000, for example.")
@click.option("--precision", default="auto", show_default=True, help="Of the sweeps, as for sweep.")
@click.option("--memory-budget", help="Of the sweeps, as for sweep; fixed by model and device unless given.")
@click.option("--out", help="The study's folder; it must not exist, unless a study is resumed.")
@click.option("--resume", is_flag=True, help="Go on with a study, or add experiments to it.")
@click.option("--dry-run", is_flag=True, help="Say what it would take, and the commands that do each alone.")
@as_json
@quiet
def reproduce(
    *,
    loading: Loading,
    names: tuple[str, ...],
    compare: str | None,
    compare_revision: str | None,
    out: str | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Run the study of Stolfo, Belinkov and Sachan (2023) on any model, and what it left open.

    Two and three operands, number words, number retrieval, facts: accuracy, effects of every MLP and
    attention output, of heads, coordinates and neurons, how certain they are, and what they do together.
    What a model cannot do is said, with the reason, and left out.
    """
    from deltapatch.study.presets import choose

    if not out and not dry_run:
        raise DeltapatchError("Missing option '--out': the study's folder (or --dry-run to make none)")
    chosen = [name for text in names for name in read_names(text)]
    if names and not chosen:
        raise DeltapatchError("--experiment names no experiment; --list lists them")
    order = choose(chosen, given["shots"], () if given["problems"] else ("word-problems",))

    if compare_revision is not None and compare is None:
        raise DeltapatchError("--compare-revision is of the checkpoint that --compare names: give both")
    settings = _settings(given)
    settings.check()

    from deltapatch.study.reproduce import check_folder, check_inputs
    from deltapatch.study.reproduce import reproduce as run_study

    if out and not dry_run:
        check_folder(out, resume)
    loaded = loading.load(quiet=quiet)
    other = None if compare is None else loading.load_other(compare, compare_revision)
    check_inputs(loaded, settings, order, other)
    if dry_run:
        _estimate(loaded, settings, order, as_json)
        return
    assert out is not None
    study = run_study(
        loaded,
        out,
        settings,
        chosen,
        adapter=loading.adapter,
        other=other,
        resume=resume,
        progress=not quiet,
        say=lambda line: say(line, quiet),
    )
    for name, why in study.failures.items():
        if quiet:  # said already otherwise
            say(f"{name} was not done: {why}")
    if as_json:
        print_json(
            {
                "out": out,
                "model": loaded.name,
                "experiments": {name: _facts(found) for name, found in study.done.items()},
                "failures": study.failures,
            }
        )
    else:
        click.echo(out)


def _settings(given: dict[str, Any]) -> Any:
    from deltapatch.study.settings import Settings

    quick, paper = given.pop("quick"), given.pop("paper_size")
    if quick and paper:
        raise DeltapatchError("--quick and --paper-size exclude each other")
    size = "quick" if quick else "paper" if paper else "usual"
    given["memory_budget"] = n_bytes(given["memory_budget"], "--memory-budget")
    return Settings(size=size, **given)


def _facts(found: Any) -> dict[str, Any]:
    importance = found.importance.get("all")
    return {
        "pairs": len(found.made.pairs),
        "accuracy": float(found.made.right.mean()),
        "importance": None if importance is None else importance.value,
        "null": None if importance is None else importance.null,
        "error": max((check["error"] for check in found.checks.values()), default=None),
    }


def _estimate(model: Any, settings: Any, order: list[str], as_json: bool) -> None:
    from dataclasses import asdict

    from deltapatch.study.estimate import estimate

    found = estimate(model, settings, order)
    if as_json:
        print_json({"model": model.name, "experiments": [asdict(each) for each in found]})
        return
    for each in found:
        if each.reason is not None:
            click.echo(f"# {each.name}: not possible: {each.reason}")
        else:
            click.echo(
                f"# {each.name}: {each.title}; {each.pairs} pairs, {each.rows:,} interventions, "
                f"{in_flops(each.flops)} necessary"
            )
            click.echo("\n".join(each.commands))
    rows, flops = (sum(getattr(each, key) for each in found) for key in ("rows", "flops"))
    click.echo(
        f"# together {rows:,} interventions, {in_flops(flops)} necessary, and joint patches; nothing was run"
    )
