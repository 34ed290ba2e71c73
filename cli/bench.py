"""`deltapatch bench`: against the tools of others on the same sweeps, each judged by a float64 oracle."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from deltapatch.cli.bench_stream import stream
from deltapatch.cli.delivery import deliver, out_file, read_sizes
from deltapatch.cli.options import SEED, as_json, print_json, quiet, read_names, revision, say
from deltapatch.errors import DeltapatchError

Command = TypeVar("Command", bound=Callable[..., Any])

EXAMPLES = """\b
Examples:
  deltapatch bench compare --peers hooks-batched,deltapatch-fp32 --sweeps mlp_out --layers 2 --d-model 64
  deltapatch bench compare --isolate --runs 3 --threads 1 --out result.json
  deltapatch bench compare --model random:smollm2-135m --sweeps neurons-layer
  deltapatch bench compare --model builtin:llama-arithmetic --metric logit_diff
  deltapatch bench precision --out precision.json
  deltapatch bench growth --axes rows,length --out growth.json
  deltapatch bench stream --shape gptj-6b --folder /tmp/gptj-6b --memory-budget 3GB --out stream.json
  deltapatch bench stream --shape pythia-2.8b --layers 4 --n-pairs 10,100,1000 --length 8-64
  deltapatch bench figures result.json precision.json --out figures
"""

_file = click.Path(path_type=Path)


def _options(*options: Any) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_model = _options(
    click.option(
        "--model",
        "models",
        multiple=True,
        help="A model as for sweep, random (of the sizes below), or random:gpt-neox-small, "
        "random:smollm2-135m; may be given again.  [default: these two, or random where a size is given]",
    ),
    revision,
    click.option("--pairs", "pairs_file", help="Prompt pairs of one length; made up unless given."),
    click.option("--n-pairs", default=1, show_default=True, help="Pairs that are made up."),
)
_shape = _options(
    click.option("--architecture", default="gpt_neox", show_default=True, help="gpt_neox, gptj or llama."),
    click.option("--layers", default=6, show_default=True),
    click.option("--d-model", default=512, show_default=True),
    click.option("--d-mlp", default=2048, show_default=True),
    click.option("--heads", default=8, show_default=True),
    click.option("--kv-heads", default=0, help="Key-value heads of llama; as many as heads unless given."),
    click.option("--vocab", default=50304, show_default=True),
    click.option("--tied", is_flag=True, help="The embedding of llama is its read-out too."),
    click.option("--length", default=16, show_default=True, help="Tokens of prompts that are made up."),
)
_OF_WORKLOAD = ("metric", "device", "threads", "seed")
_SIZES = ("architecture", "layers", "d_model", "d_mlp", "heads", "kv_heads", "vocab", "tied")
_work = _options(
    click.option("--metric", default="ie", show_default=True, help="ie (log-probabilities) or logit_diff."),
    click.option(
        "--batch",
        default="16,64,256",
        show_default=True,
        help="Rows of a batch: each peer that has the choice takes the best of these, with commas.",
    ),
    click.option("--threads", default=0, help="Of PyTorch; its own choice unless given."),
    click.option("--device", default="cpu", show_default=True, help="cpu or cuda."),
    click.option("--seed", type=SEED, default=0, show_default=True),
)
_measure = _options(
    click.option("--peers", default="all", show_default=True, help="Names, with commas; see bench peers."),
    click.option("--rounds", default=5, show_default=True, help="Repeats of every peer, in turn."),
    click.option("--runs", default=1, show_default=True, help="Do it all so often; the worst ratio is told."),
    click.option(
        "--limit", default=60.0, show_default=True, help="Seconds; what takes longer is measured on a sample."
    ),
    click.option("--sample", default=10.0, show_default=True, help="Seconds that such a sample takes."),
    click.option("--check", default=64, show_default=True, help="Cells that all are judged by."),
    click.option("--isolate", is_flag=True, help="Give peers that are not installed an environment."),
    click.option("--cache", type=_file, help="Where environments are kept; ~/.cache/deltapatch/bench."),
)


@click.group(short_help="Measure against the tools of others.", epilog=EXAMPLES)
def bench() -> None:
    """Measure deltapatch and other tools on the same sweeps, and check that all compute the same thing.

    No speed is told of anything whose effects disagree with a float64 oracle within its precision.
    """


@bench.command()
@_model
@_shape
@click.option("--sweeps", default="all", show_default=True, help="Of bench peers' second list, with commas.")
@_work
@_measure
@out_file
@as_json
@quiet
def compare(
    models: tuple[str, ...], sweeps: str, out: Path | None, as_json: bool, quiet: bool, **chosen: Any
) -> None:
    """Compare speed, memory and agreement on sweeps of models.

    These are random ones of a small GPT-NeoX's shape and of SmolLM2-135M's unless --model or sizes choose
    others. Every peer runs in a process of its own, pinned to as many CPUs as it has threads; their repeats
    take turns. --out is written after every model.
    """
    from deltapatch.bench.compare import compare as run_comparison
    from deltapatch.bench.report import comparison
    from deltapatch.bench.results import check_free, joined, stamp, write
    from deltapatch.bench.sides.cells import SWEEPS, make_cells
    from deltapatch.models.load import load_model

    check_free(out)
    wanted = list(SWEEPS) if sweeps == "all" else read_names(sweeps)
    if unknown := [name for name in wanted if name not in SWEEPS]:
        raise DeltapatchError(f"unknown sweep {unknown[0]!r}: choose from {', '.join(SWEEPS)}")
    names, options, make_side = _measurement(chosen, quiet)
    found = []
    with tempfile.TemporaryDirectory(prefix="deltapatch-bench-") as folder:
        titles = [_title(model, chosen["revision"]) for model in _models(models)]
        works = [_workload(m, chosen, Path(folder, str(i))) for i, m in enumerate(_models(models))]
        for title, work in zip(titles, works, strict=True):
            say(title, quiet)
            spec = load_model(work.folder, device="cpu").spec
            cells = [(name, make_cells(name, spec, len(work.clean), work.length)) for name in wanted]
            result = run_comparison(work, cells, names, make_side, options, lambda text: say(text, quiet))
            result["model"]["name"] = title
            found.append(result)
            if out is not None:
                write(out, stamp("compare", joined(found)))
    deliver("compare", joined(found), out, as_json, comparison)


@bench.command()
@_shape
@click.option("--axes", default="all", show_default=True, help="rows, layers, length, vocab, pairs.")
@click.option("--values", help="Sizes along the axes, with commas; usual ones unless given.")
@click.option("--sweep", help="What is swept.  [default: neurons; along pairs, mlp_out-last]")
@_work
@_measure
@out_file
@as_json
@quiet
def growth(
    axes: str,
    values: str | None,
    sweep: str | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    **chosen: Any,
) -> None:
    """Measure how cost grows with rows, layers, prompt length, vocabulary and pairs, on random models.

    --out is written after every size: what is cut off keeps those before.
    """
    from deltapatch.bench.growth import AXES
    from deltapatch.bench.growth import growth as run_growth
    from deltapatch.bench.report import growth as table
    from deltapatch.bench.results import check_free, stamp, write

    check_free(out)

    def keep(result: dict[str, Any]) -> None:
        if out is not None:
            write(out, stamp("growth", result))

    names, options, make_side = _measurement(chosen, quiet)
    sizes = None if values is None else read_sizes("--values", values)
    result = run_growth(
        list(AXES) if axes == "all" else read_names(axes),
        _shape_of(chosen),
        chosen["length"],
        names,
        make_side,
        options,
        sweep=sweep,
        values=sizes,
        work={
            "batches": read_sizes("--batch", chosen["batch"]),
            **{name: chosen[name] for name in _OF_WORKLOAD},
        },
        say=lambda text: say(text, quiet),
        keep=keep,
    )
    deliver("growth", result, out, as_json, table)


@bench.command()
@click.option("--model", default="builtin:gpt-neox-arithmetic", show_default=True, help="As for compare.")
@revision
@click.option("--pairs", "pairs_file", help="Prompt pairs of one length; made up unless given.")
@click.option("--n-pairs", default=8, show_default=True, help="Pairs that are made up.")
@_shape
@click.option("--layer", type=int, help="Whose neurons are patched; the middle one unless given.")
@_work
@out_file
@as_json
@quiet
def precision(
    model: str, layer: int | None, out: Path | None, as_json: bool, quiet: bool, **chosen: Any
) -> None:
    """Compare effects in every precision, by hooks and by deltapatch, with those in float64.

    --layers, --d-model and so on are the shape of --model random.
    """
    from deltapatch.bench.precision import precision as run_precision
    from deltapatch.bench.report import precision as table
    from deltapatch.bench.results import check_free

    check_free(out)
    with tempfile.TemporaryDirectory(prefix="deltapatch-bench-") as folder:
        work = _workload(model, chosen, Path(folder))
        result = run_precision(work, layer, lambda text: say(text, quiet))
    result["model"]["name"] = _title(model, chosen["revision"])
    deliver("precision", result, out, as_json, table)


bench.add_command(stream)


@bench.command()
@click.argument("results", nargs=-1, required=True, type=_file)
@click.option("--out", type=_file, default=Path("docs/figures"), show_default=True, help="A folder.")
@as_json
def figures(results: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Draw RESULTS, files or folders of them, as PNG and PDF, and print the files' paths."""
    from deltapatch.bench.figures import draw_all

    paths = [str(path) for path in draw_all(results, out)]
    if as_json:
        print_json({"results": [str(path) for path in results], "figures": paths})
    else:
        click.echo("\n".join(paths))


@bench.command()
@as_json
def peers(as_json: bool) -> None:
    """List the peers, whether each can run here, and the sweeps."""
    from deltapatch.bench.peers.registry import make_peer
    from deltapatch.bench.setup import all_names
    from deltapatch.bench.sides.cells import SWEEPS
    from deltapatch.bench.sides.side import about

    found = {name: about(make_peer(name)) for name in all_names()}
    if as_json:
        print_json({"peers": found, "sweeps": SWEEPS})
        return
    for name, told in found.items():
        click.echo(f"{name:<18} {told['missing'] or told['what']}")
    click.echo()
    for name, what in SWEEPS.items():
        click.echo(f"{name:<18} {what}")


def _measurement(chosen: dict[str, Any], quiet: bool) -> tuple[Any, Any, Any]:
    """The names of peers, the options of a comparison, and what makes sides."""
    from deltapatch.bench.setup import all_names, check_names, side_maker
    from deltapatch.bench.sides.job import Options

    options = Options(
        rounds=chosen["rounds"],
        runs=chosen["runs"],
        limit=chosen["limit"],
        sample=chosen["sample"],
        check=chosen["check"],
        seed=chosen["seed"],
    )
    names = all_names() if chosen["peers"] == "all" else check_names(read_names(chosen["peers"]))
    return names, options, side_maker(chosen["isolate"], chosen["cache"], lambda text: say(text, quiet))


def _models(given: tuple[str, ...]) -> tuple[str, ...]:
    """The models of a comparison: those given, a random one of given sizes, or the usual two."""
    from deltapatch.bench.random_models import SHAPES

    source = click.get_current_context().get_parameter_source
    sizes = any(source(name) is not ParameterSource.DEFAULT for name in _SIZES)
    return given or (("random",) if sizes else tuple(f"random:{name}" for name in SHAPES))


def _title(model: str, revision: str | None) -> str:
    kind, _, shape = model.partition(":")
    if kind == "random":
        return f"{shape}, random weights" if shape else "random weights"
    return model if revision is None else f"{model} at {revision}"


def _shape_of(chosen: dict[str, Any]) -> Any:
    from deltapatch.bench.random_models import Shape

    return Shape(**{name: chosen[name] for name in _SIZES})


def _workload(model: str, chosen: dict[str, Any], folder: Path) -> Any:
    from deltapatch.bench.setup import make_workload

    return make_workload(
        model,
        folder,
        shape=_shape_of(chosen),
        batches=read_sizes("--batch", chosen["batch"]),
        **{name: chosen[name] for name in ("pairs_file", "n_pairs", "length", "revision", *_OF_WORKLOAD)},
    )
