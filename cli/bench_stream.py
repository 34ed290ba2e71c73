"""`deltapatch bench stream`: deltapatch alone, on a model of true shape that is streamed from disk."""

import re
import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from deltapatch.arguments import n_bytes
from deltapatch.cli.delivery import deliver, out_file, read_sizes
from deltapatch.cli.options import as_json, quiet, read_names, read_positions, say
from deltapatch.engine.options import SCREENS
from deltapatch.errors import DeltapatchError

EXAMPLES = """\b
Examples:
  deltapatch bench stream --shape gptj-6b --folder /tmp/gptj-6b --memory-budget 3GB --out stream.json
  deltapatch bench stream --shape pythia-2.8b --layers 4 --n-pairs 10,100,1000 --length 8-64
"""


@click.command(short_help="Measure a model of true shape, streamed.", epilog=EXAMPLES)
@click.option("--shape", default="gptj-6b", show_default=True, help="gptj-6b, pythia-2.8b, llama-7b, ...")
@click.option("--layers", type=int, help="In place of the model's own number.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Of the checkpoint, made if it is not there; a temporary one unless given.",
)
@click.option(
    "--n-pairs", "counts", default="4", show_default=True, help="Prompt pairs; several in turn: 1,10,100."
)
@click.option(
    "--length",
    "lengths",
    default="16",
    show_default=True,
    help="Tokens of a prompt; 8-64: of any of these lengths; several in turn: 16,512,2048.",
)
@click.option("--sites", default="mlp_out,attn_out", show_default=True, help="Sites, with commas between.")
@click.option("--positions", default="last", show_default=True, help="As for sweep.")
@click.option("--memory-budget", help="As for sweep.")
@click.option("--in-memory", is_flag=True, help="Do not stream the model, if it fits.")
@click.option(
    "--screen", type=click.Choice(SCREENS), help="As for sweep: estimate all, verify the top and a sample."
)
@click.option("--top", type=int, help="As for sweep.")
@click.option("--screen-sample", type=int, help="As for sweep.")
@click.option("--threads", default=0, help="Of PyTorch; its own choice unless given.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--device-memory", help="Of a GPU, what may be used: 4GB, far less than the model.")
@out_file
@as_json
@quiet
def stream(
    *,
    shape: str,
    layers: int | None,
    folder: Path | None,
    counts: str,
    lengths: str,
    sites: str,
    positions: str,
    memory_budget: str | None,
    in_memory: bool,
    screen: str | None,
    top: int | None,
    screen_sample: int | None,
    threads: int,
    device: str,
    device_memory: str | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Sweep a model of true shape and random weights, streamed from disk, and measure time and memory.

    Each sweep runs in a process of its own. The checkpoint, in float16, takes 12 GB for gptj-6b.
    """
    from deltapatch.bench.report import stream as table
    from deltapatch.bench.results import check_free
    from deltapatch.bench.stream import Sweep, make_checkpoint, measure

    check_free(out)
    at, budget = read_positions(positions), n_bytes(memory_budget, "--memory-budget")
    cap = n_bytes(device_memory, "--device-memory")
    given = {"screen": screen, "top": top, "screen_sample": screen_sample}
    of_screen = {name: value for name, value in given.items() if value is not None}
    if of_screen and screen is None:
        raise DeltapatchError("--top and --screen-sample are of a screen: give --screen too")
    wanted = [
        (n, low, high) for n in read_sizes("--n-pairs", counts) for low, high in _ranges("--length", lengths)
    ]
    with tempfile.TemporaryDirectory(prefix="deltapatch-bench-") as temporary:
        where = folder or Path(temporary)
        say(f"{shape} in {where}", quiet)
        if make_checkpoint(shape, layers, where):
            say("the checkpoint is written", quiet)
        runs = []
        for n, low, high in wanted:
            each = [low + (high - low) * i // max(1, n - 1) for i in range(n)]
            of = f"{low}" if low == high else f"{low} to {high}"
            say(f"{n:,} pairs of {of} tokens", quiet)
            sweep = Sweep(
                folder=str(where),
                lengths=each,
                sites=read_names(sites),
                positions=at,
                memory_budget=budget,
                stream=not in_memory,
                device=device,
                threads=threads,
                device_memory=cap,
                screen=of_screen,
            )
            runs.append({"sweep": asdict(sweep) | {"folder": shape}, "found": measure(sweep)})
    deliver("stream", {"shape": shape, "runs": runs}, out, as_json, table)


def _ranges(option: str, text: str) -> list[tuple[int, int]]:
    """16,8-64: a length, and any of several."""
    found = [re.fullmatch(r"(\d+)(?:-(\d+))?", item) for item in read_names(text)]
    out = [(int(m[1]), int(m[2] or m[1])) for m in found if m]
    if not out or len(out) < len(found) or any(not 0 < low <= high for low, high in out):
        raise DeltapatchError(f"{option} {text!r} is not a list of lengths such as 16,512 or 8-64")
    return out
