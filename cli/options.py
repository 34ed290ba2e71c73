"""Options that several commands share, and how their text is read."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

import click

from deltapatch import arguments
from deltapatch.arguments import scaled
from deltapatch.engine.options import Options

Command = TypeVar("Command", bound=Callable[..., Any])

quiet = click.option("--quiet", "-q", is_flag=True, help="No progress on stderr; errors and warnings remain.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
model = click.option(
    "--model", required=True, help="A model folder, a Hugging Face hub id, or builtin:gpt-neox-arithmetic."
)
stream = click.option(
    "--stream",
    is_flag=True,
    help="Read weights from the file layer by layer in every pass, and keep none: for models larger than the "
    "memory, which are streamed without asking.",
)
revision = click.option(
    "--revision",
    help="Of a model of the hub: a branch, a tag or a commit, such as step1000 of a Pythia model.",
)
adapter = click.option("--adapter", help="A LoRA adapter (PEFT, safetensors) to merge into the model.")

pairs_file = click.option(
    "--pairs", "pairs_file", required=True, help="Prompt pairs, one JSON object a line."
)

SEED = click.IntRange(0)
read_names, read_positions, read_layers = arguments.names, arguments.positions, arguments.layers


def as_record(kind: type, name: str, options: Sequence[Any]) -> Callable[[Command], Command]:
    """Options, in their order, that the command gets as one argument: a record with a field for each."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def collected(**given: Any) -> Any:
            record = kind(**{each.name: given.pop(each.name) for each in fields(kind)})
            return command(**{name: record}, **given)

        found: Any = collected
        for option in reversed(options):
            found = option(found)
        return found

    return decorate


def asked(kind: type[Options], without: Sequence[str] = ()) -> Callable[[Command], Command]:
    """An option of the command for each of some options that the shell takes, in their order.

    Args:
        without: names of those that this command does not take.
    """

    def decorate(command: Command) -> Command:
        taken = [each for each in fields(kind) if each.metadata["typed"] and each.name not in without]
        for each in reversed(taken):
            own = dict(each.metadata["typed"])
            own.pop("read", None)
            if choice := own.pop("choice", None):
                own["type"] = click.Choice(choice)
            if "at_least" in own:
                own["type"] = click.IntRange(own.pop("at_least"))
            own.setdefault("default", each.default)
            own["show_default"] = own["default"] is not None
            command = click.option(f"--{each.name.replace('_', '-')}", each.name, **own)(command)
        return command

    return decorate


def read_asked(kind: type[Options], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the shell was given for the options of `asked`, as Python takes it."""
    out = {}
    for each in fields(kind):
        typed = each.metadata["typed"]
        if typed and each.name in given:
            value, read = given[each.name], typed.get("read")
            out[each.name] = value if read is None or not isinstance(value, str) else read(value)
    return out


def in_flops(number: float) -> str:
    """A number of FLOPs for people: 1.5 TFLOP."""
    return scaled(number, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def in_seconds(number: float) -> str:
    """A time for people: 0.3 s, 12 s, 4 min, 3.5 h."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if number >= 1.5 * size:
            return f"{number / size:.2g} {unit}"
    return f"{number:.2g} s" if number < 10 else f"{number:.0f} s"


def say(text: str, quiet: bool = False) -> None:
    """A line of progress, on stderr."""
    if not quiet:
        click.echo(text, err=True)


def print_json(value: Any) -> None:
    """One JSON object on stdout, which its encoding can print."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, default=str)
    click.echo(text)
