"""How fast features of an autoencoder go beside hidden neurons, and directions beside whole vectors.

    python -m deltapatch.bench.edits --out bench/results/edits_cpu.json

All four are sweeps of deltapatch in one process, in turns: every feature that changes of a random
autoencoder behind a layer, and every hidden neuron of that layer, at the last position; a direction of the
residual stream at every layer and position, and the whole stream there. Rows of each two pass through as many
layers.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch

from deltapatch.analysis.features import sweep_features
from deltapatch.bench.random_models import SHAPES, Shape, make_model, make_pairs
from deltapatch.bench.results import check_free, stamp, write
from deltapatch.engine.sweep import sweep
from deltapatch.interventions.pairs import PromptPair
from deltapatch.models.autoencoder import Autoencoder
from deltapatch.models.load import load_model
from deltapatch.models.model import Model
from deltapatch.results.folder import environment

# What is measured, and what it is held to.
BESIDE = {"features": "neurons", "directions": "whole vectors"}


def measure(shape: Shape, length: int, rounds: int, precision: str) -> dict[str, Any]:
    """Rates of every sweep in every round, and the ratios of those that belong together.

    Args:
        shape: of the model.
        length: tokens of the prompts.
        rounds: in each of which every sweep is done once, after one that does not count.
        precision: of the sweeps.
    """
    with TemporaryDirectory() as folder:
        model = load_model(str(make_model(shape, Path(folder) / "model")))
        drawn = make_pairs(model, 1, length)
        works = _works(model, [PromptPair(*pair) for pair in drawn], precision)
        rates: dict[str, list[float]] = {name: [] for name in works}
        rows: dict[str, int] = {}
        for number in range(rounds + 1):
            for name, work in works.items():
                began = time.perf_counter()
                rows[name] = work()
                if number:
                    rates[name].append(rows[name] / (time.perf_counter() - began))
    ratios = {name: float(np.median(np.divide(rates[name], rates[other]))) for name, other in BESIDE.items()}
    return {"length": length, "rows": rows, "rates": rates, "ratios": ratios}


def _works(model: Model, pairs: list[PromptPair], precision: str) -> dict[str, Callable[[], int]]:
    """What is measured: each gives how many interventions it carried out."""
    spec, layer = model.spec, model.spec.n_layers // 2
    draw = torch.Generator().manual_seed(0)
    d, n = spec.d_model, spec.d_mlp
    shapes: dict[str, tuple[int, ...]] = {"w_enc": (d, n), "w_dec": (n, d), "b_enc": (n,), "b_dec": (d,)}
    weights = {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    weights["w_dec"] /= 10 * d**0.5  # features as small as those of trained ones beside the stream
    sae = Autoencoder("random", "resid_post", layer, "relu", "none", weights, subtracts=True)
    direction = np.random.default_rng(0).normal(size=(1, spec.d_model))
    options: dict[str, Any] = {"precision": precision, "metrics": "ie", "progress": False, "noise_sample": 0}

    def grid(**asked: Any) -> int:
        return int(np.isfinite(sweep(model, pairs, **asked, **options).values("ie")).sum())

    return {
        "features": lambda: len(sweep_features(model, pairs, sae, positions=[-1], **options)),
        "neurons": lambda: grid(sites="mlp_post", layers=[layer], positions="last"),
        "directions": lambda: grid(sites="resid_post.along", directions={"resid_post": direction}),
        "whole vectors": lambda: grid(sites="resid_post"),
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--shape", type=click.Choice(list(SHAPES)), default="smollm2-135m", show_default=True)
@click.option(
    "--length", type=click.IntRange(3), default=16, show_default=True, help="Tokens of the prompts."
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--precision", default="fp32", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Of PyTorch; its own choice unless given.")
@click.option("--out", type=click.Path(path_type=Path), help="A JSON file; one of that name is replaced.")
def main(
    *, shape: str, length: int, rounds: int, precision: str, threads: int | None, out: Path | None
) -> None:
    """Measure features beside neurons, and directions beside whole vectors."""
    check_free(out)
    if threads is not None:
        torch.set_num_threads(threads)
    found = measure(SHAPES[shape], length, rounds, precision)
    about = {"model": shape, "threads": torch.get_num_threads(), "precision": precision}
    result = stamp("edits", {**environment(), **about, **found})
    for name, other in BESIDE.items():
        rate, beside = (float(np.median(found["rates"][one])) for one in (name, other))
        click.echo(
            f"{name} {rate:,.0f} a second, {other} {beside:,.0f}: {found['ratios'][name]:.2f} times as fast"
        )
    if out is not None:
        write(out, result)


if __name__ == "__main__":
    main()
