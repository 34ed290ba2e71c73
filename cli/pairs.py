"""`deltapatch pairs`: prompt pairs of a task, for one model's tokenizer."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from deltapatch.cli.options import SEED, adapter, as_json, model, print_json, quiet, read_names, revision, say
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.alignment import ENDS

EXAMPLES = """\b
Tasks:
  arithmetic      two operands; --operators, --differ, --numbers, --max-number, --templates
  three-operands  29 expressions; --shapes, --differ, --numbers, --max-number, --templates
  retrieval       how many pens, of apples and pens; --numbers, --max-number, --templates
  factual         a relation's object; --data LAMA or FACTS.jsonl, --relations
  word-problems   from your own file; --data PROBLEMS.jsonl, --wording, --max-number
\b
Lines of PROBLEMS.jsonl, each of one of these kinds:
  {"template": "Tom has {a} pens and buys {b} more. How many?", "answer": "a + b", "numbers": {"a": [2, 20]}}
  {"question": "Tom has 3 pens and buys 4 more. How many?", "answer": 7, "equation": "3 + 4"}
  {"question": "Tom has three pens and buys four more. How many?", "answer": 7}
  {"clean": "...", "corrupted": "...", "clean_answer": "7", "corrupted_answer": "9"}
\b
Examples:
  deltapatch pairs --task arithmetic --model builtin:gpt-neox-arithmetic --shots 0 --out pairs.jsonl
  deltapatch pairs --task arithmetic --model EleutherAI/gpt-j-6b --per-template 50 --seed 1 --out pairs.jsonl
  deltapatch pairs --task arithmetic --differ same_result --operators +,-,max --model MODEL --out pairs.jsonl
  deltapatch pairs --task arithmetic --answers text --max-number 999 --model MODEL --out pairs.jsonl
  deltapatch pairs --show pairs.jsonl --model MODEL
  deltapatch pairs --task factual --data LAMA/data --relations P36,P103 --model MODEL --out pairs.jsonl
"""


@click.command(short_help="Make prompt pairs of a task.", epilog=EXAMPLES)
@click.option(
    "--show",
    metavar="FILE",
    help="Make no pairs: print those of a pairs file as MODEL sees them, each token with its position, with "
    "labels and answers.",
)
@click.option(
    "--align", type=click.Choice([ENDS]), help="With --show: how pairs line up that do not say so themselves."
)
@click.option("--task", default="arithmetic", show_default=True, help="What the pairs are about.")
@model
@revision
@click.option("--shots", type=int, help="Solved examples before each question; as in the paper unless given.")
@click.option("--per-template", type=int, help="Pairs of each operator (or shape, relation) and template.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="The same seed gives the same pairs.")
@click.option("--operators", help="Of + - * / % ^ max min > <, with commas between.  [default: + - * /]")
@click.option("--shapes", help='Expressions such as "(x + y) * z", with commas between.  [default: all]')
@click.option(
    "--differ", help="What differs: operands, same_result (operands alone) or operator.  [default: operands]"
)
@click.option("--numbers", help="numerals or words.  [default: numerals]")
@click.option("--max-number", type=int, help="The largest operand and result.  [default: 300]")
@click.option("--templates", help="Numbers of templates, with commas between.")
@click.option("--data", type=click.Path(), help="A LAMA folder, or a JSONL file of facts or word problems.")
@click.option("--relations", help="Relations, with commas between.")
@click.option("--wording", help='What a word problem is put in.  [default: "Q: {question} A:"]')
@click.option(
    "--answers",
    help="one: answers of one token, as in the paper. text: of any length, so that numbers may be large and "
    "a tokenizer of digits has all results, not 1 to 9; sweeps are then about the probability of whole "
    "answers. ids: the same as token ids.  [default: one]",
)
@click.option(
    "--only-correct", is_flag=True, help="Keep the pairs whose two prompts the model answers right."
)
@click.option(
    "--among",
    type=click.Choice(["vocabulary", "answers"]),
    default="vocabulary",
    show_default=True,
    help="With --only-correct: the most likely token of all, or of these pairs' answers as in the paper.",
)
@click.option("--device", default="auto", show_default=True, help="With --only-correct: auto, cpu or cuda.")
@adapter
@click.option("--out", type=click.Path(), help="The pairs file to make; it must not exist.")
@as_json
@quiet
def pairs(
    *,
    show: str | None,
    task: str,
    model: str,
    revision: str | None,
    shots: int | None,
    per_template: int | None,
    seed: int,
    only_correct: bool,
    among: str,
    device: str,
    adapter: str | None,
    out: str | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Make prompt pairs and write them to a file, one JSON object a line; or show those of a file.

    Degenerate pairs are left out, and how many and why is said on stderr.
    """
    if show is not None:
        _refuse_beside_show()
        _show(show, model, given["align"], as_json)
        return
    if not out:
        raise DeltapatchError("Missing option '--out': the pairs file to make (or --show FILE to make none)")
    from deltapatch.interventions.pairs_file import write_pairs
    from deltapatch.tasks.answered import keep_answered
    from deltapatch.tasks.registry import TASKS, make_pairs

    if Path(out).exists():
        raise DeltapatchError(f"output path {out} is taken: choose another or remove it")
    if task not in TASKS:  # before a model is loaded for it
        raise DeltapatchError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    options = _options({name: value for name, value in given.items() if value is not None})
    for name in options:
        if name not in TASKS[task].options:
            raise DeltapatchError(f"the task {task} has no option --{name.replace('_', '-')}")

    from deltapatch.models.load import load_model

    # Streamed, where only the model's tokenizer is wanted.
    lora = adapter if only_correct else None
    on = device if only_correct else "cpu"
    loaded = load_model(model, on, stream=not only_correct, adapter=lora, revision=revision)
    made, dropped = make_pairs(task, loaded.tokenizer, per_template, shots, seed, **options)
    if only_correct:
        made = keep_answered(loaded, made, dropped, among)
    write_pairs(out, made)
    for line in dropped.lines():
        say(line, quiet)
    if as_json:
        facts = {"out": out, "task": task, "pairs": len(made), "dropped": dict(dropped.reasons)}
        print_json(facts | {"notes": dropped.notes})
    else:
        click.echo(out)


def _refuse_beside_show() -> None:
    """Raise DeltapatchError where an option is given that only says how pairs are made."""
    context = click.get_current_context()
    for name in context.params:
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name not in ("show", "model", "align", "as_json", "quiet"):
            option = name.replace("_", "-")
            raise DeltapatchError(f"--show and --{option} do not go together: leave one out")


def _show(path: str, model: str, align: str | None, as_json: bool) -> None:
    """Print the pairs of a file as a model sees them."""
    from deltapatch.cli.show import as_text, shown_pairs
    from deltapatch.interventions.encode import encode_pairs
    from deltapatch.interventions.pairs_file import read_named_pairs
    from deltapatch.models.load import load_model

    names, given = zip(*read_named_pairs(path), strict=True)
    loaded = load_model(model, "cpu", stream=True)  # of which only the tokenizer is read
    encoded = encode_pairs(given, loaded.tokenizer, loaded.spec.d_vocab, names, align)
    found = shown_pairs(given, names, encoded, loaded.tokenizer)
    if as_json:
        print_json({"model": model, "pairs": found})
    else:
        click.echo(as_text(found), nl=False)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Options as the tasks take them: lists where there are several."""
    for name in ("operators", "shapes", "relations"):
        if name in given:
            given[name] = read_names(given[name])
    if len(given.get("operators", ())) == 1 and set(given["operators"][0]) <= set("+-*/%^<>"):
        given["operators"] = list(given["operators"][0])  # +-*/ without commas
    if "templates" in given:
        items = read_names(given["templates"])
        if not items or not all(item.isdecimal() for item in items):
            raise DeltapatchError(f"--templates {given['templates']!r} is not numbers such as 0,2,5")
        given["templates"] = [int(item) for item in items]
    return given
