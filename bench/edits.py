"""How fast features and directions go: beside neurons and whole vectors, and by the tools of others.

    python -m deltapatch.bench.edits --out bench/results/edits_cpu.json

First sweeps of deltapatch in one process, in turns: every feature that changes of a random autoencoder behind
a layer, and every hidden neuron of that layer, at the last position; a direction of the residual stream at
every layer and position, and the whole stream there. Rows of each two pass through as many layers. Then the
same features and directions by hooks, pyvene and SAELens, each library in an environment of its own, compared
as `deltapatch bench compare` compares. With one thread seconds are the processor's, so that others may use it
too.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch

from deltapatch.analysis.features import sweep_features
from deltapatch.bench.compare import MakeSide
from deltapatch.bench.compare import compare as compare_sides
from deltapatch.bench.edit_work import cells_of, make_work
from deltapatch.bench.peers.ours import PREFIX
from deltapatch.bench.random_models import SHAPES
from deltapatch.bench.results import check_free, stamp, write
from deltapatch.bench.setup import side_maker
from deltapatch.bench.sides.cells import ALONG
from deltapatch.bench.sides.job import Options
from deltapatch.bench.sides.workload import Workload
from deltapatch.engine.sweep import sweep
from deltapatch.models.autoencoder import load_sae
from deltapatch.models.load import load_model
from deltapatch.models.model import Model
from deltapatch.results.folder import environment

# What is measured, and what it is held to.
BESIDE = {"features": "neurons", "directions": "whole vectors"}
PEERS = ("hooks", "hooks-batched", "hooks-layer", "hooks-prefix", "pyvene", "pyvene-batched", "sae-lens")
Say = Callable[[str], None]
Clock = Callable[[], float]


def measure(work: Workload, rounds: int, precision: str, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Rates of every sweep in every round, and the ratios of those that belong together.

    Args:
        work: what `make_work` made.
        rounds: in each of which every sweep is done once, after one that does not count.
        precision: of the sweeps.
        clock: in seconds.
    """
    works = _works(load_model(work.folder), work, precision)
    rates: dict[str, list[float]] = {name: [] for name in works}
    rows: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, one in works.items():
            began = clock()
            rows[name] = one()
            if number:
                rates[name].append(rows[name] / (clock() - began))
    ratios = {name: float(np.median(np.divide(rates[name], rates[other]))) for name, other in BESIDE.items()}
    return {"length": work.length, "rows": rows, "rates": rates, "ratios": ratios}


def _works(model: Model, work: Workload, precision: str) -> dict[str, Callable[[], int]]:
    """What is measured: each gives how many interventions it carried out."""
    sae = load_sae(work.autoencoder)
    direction = np.array([work.direction])
    options: dict[str, Any] = {"precision": precision, "metrics": "ie", "progress": False, "noise_sample": 0}

    def grid(**asked: Any) -> int:
        return int(np.isfinite(sweep(model, work.pairs, **asked, **options).values("ie")).sum())

    return {
        "features": lambda: len(sweep_features(model, work.pairs, sae, positions=[-1], **options)),
        "neurons": lambda: grid(sites="mlp_post", layers=[sae.layer], positions="last"),
        "directions": lambda: grid(sites=ALONG, directions={"resid_post": direction}),
        "whole vectors": lambda: grid(sites="resid_post"),
    }


def compare(
    work: Workload, names: Sequence[str], make_side: MakeSide, options: Options, say: Say
) -> dict[str, Any]:
    """The same edits by several tools, judged by float64 forwards: what `bench compare` finds.

    Args:
        work: what `make_work` made.
        names: of PEERS, and deltapatch's.
        make_side, options, say: as of `deltapatch.bench.compare`.
    """
    found = compare_sides(work, cells_of(work), names, make_side, options, say)
    return {name: value for name, value in found.items() if name not in environment()}


def _told(found: dict[str, Any]) -> Iterator[str]:
    """A line for every side of every sweep."""
    for one in found["sweeps"]:
        for side, column in one["columns"].items():
            if column["status"] == "measured":
                error = f"off by {column['agreement']['error']:.0e} of the norm"
                yield f"{one['name']}, {side}: {column['rate']:,.0f} a second, {error}"
            elif column["status"] != "lacks":
                yield f"{one['name']}, {side}: {column['status']}, {column['reason']}"


def _say(text: str) -> None:
    click.echo(text, err=True)


def _read_peers(context: click.Context, option: click.Parameter, text: str) -> list[str]:
    """The names of an option; none stands for no peers."""
    names = [] if text == "none" else text.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        raise click.BadParameter(f"unknown peer {unknown[0]!r}: choose from {', '.join(PEERS)}, or none")
    return names


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--shape", type=click.Choice(list(SHAPES)), default="smollm2-135m", show_default=True)
@click.option(
    "--length", type=click.IntRange(3), default=16, show_default=True, help="Tokens of the prompts."
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--precision", default="fp32", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Of PyTorch; its own choice unless given.")
@click.option(
    "--peers",
    default=",".join(PEERS),
    show_default=True,
    callback=_read_peers,
    help="Names, with commas, or none.",
)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Of the peers.")
@click.option("--limit", default=3.0, show_default=True, help="Seconds; peers that take longer do a sample.")
@click.option("--sample", default=1.5, show_default=True, help="Seconds that such a sample takes.")
@click.option("--cache", type=click.Path(path_type=Path), help="Where peers' environments are kept.")
@click.option("--out", type=click.Path(path_type=Path), help="A JSON file; one of that name is replaced.")
def main(
    *, shape: str, length: int, rounds: int, precision: str, threads: int | None, peers: list[str], runs: int,
    limit: float, sample: float, cache: Path | None, out: Path | None,
) -> None:  # fmt: skip
    """Measure features beside neurons, directions beside whole vectors, and both by other tools."""
    check_free(out)
    if threads is not None:
        torch.set_num_threads(threads)
    with TemporaryDirectory(prefix="deltapatch-edits-") as folder:
        work = make_work(SHAPES[shape], length, Path(folder), threads or 0)
        alone = threads == 1  # whose processor time is its own, whoever else uses the CPU
        found = measure(work, rounds, precision, time.process_time if alone else time.perf_counter)
        for name, other in BESIDE.items():
            rate, beside = (float(np.median(found["rates"][one])) for one in (name, other))
            times = f"{found['ratios'][name]:.2f} times as fast"
            click.echo(f"{name} {rate:,.0f} a second, {other} {beside:,.0f}: {times}")
        if peers:
            options = Options(rounds=1, runs=runs, limit=limit, sample=sample, processor=alone)
            make_side = side_maker(True, cache, _say)
            found["peers"] = compare(work, [*peers, f"{PREFIX}{precision}"], make_side, options, _say)
            for told in _told(found["peers"]):
                click.echo(told)
    about = {"model": shape, "threads": torch.get_num_threads(), "precision": precision}
    result = stamp("edits", {**environment(), **about, **found})
    if out is not None:
        write(out, result)


if __name__ == "__main__":
    main()
