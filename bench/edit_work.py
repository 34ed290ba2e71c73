"""What edits are compared on: a random model, a pair, a direction and an autoencoder; the interventions."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from deltapatch.bench.random_models import Shape, make_model, make_pairs
from deltapatch.bench.sides.cells import ALONG, FEATURE, Cells, Grid, grid_cells
from deltapatch.bench.sides.workload import Workload, one_length
from deltapatch.models.autoencoder import load_sae
from deltapatch.models.load import load_model
from deltapatch.models.model import Model
from deltapatch.models.patched import patched_logits
from deltapatch.models.spec import ModelSpec


def make_work(shape: Shape, length: int, folder: Path, threads: int = 0) -> Workload:
    """A random model, a pair, a direction and an autoencoder behind the middle layer, written to a folder.

    Args:
        shape: of the model; the autoencoder has as many features as the model has neurons in a layer.
        length: tokens of the prompts.
        folder: where they go.
        threads: of those who measure.
    """
    path = make_model(shape, folder / "model")
    model = load_model(str(path))
    direction = np.random.default_rng(0).normal(size=model.spec.d_model)
    return Workload(
        str(path),
        *one_length(make_pairs(model, 1, length)),
        threads=threads,
        direction=(direction / np.linalg.norm(direction)).tolist(),
        autoencoder=str(_make_autoencoder(model.spec, folder / "autoencoder")),
    )


def _make_autoencoder(spec: ModelSpec, folder: Path) -> Path:
    """A random one, as SAELens writes them."""
    draw = torch.Generator().manual_seed(0)
    d, n = spec.d_model, spec.d_mlp
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, n), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,)}
    weights = {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    weights["W_dec"] /= 10 * d**0.5  # features as small as those of trained ones beside the stream
    hook = f"blocks.{spec.n_layers // 2}.hook_resid_post"
    about = {
        "architecture": "standard", "d_in": d, "d_sae": n, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"hook_name": hook, "sae_lens_version": "6.0.0"},
    }  # fmt: skip
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(about), encoding="utf-8")
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def cells_of(work: Workload) -> list[tuple[str, Cells]]:
    """What all sides do, but for what cannot have an effect.

    Directions: at every position from where prompts differ, and every layer but the last, behind which only
    the last position is read. Features: all that change at the last position.
    """
    model = load_model(work.folder)
    layers = range(model.spec.n_layers - 1)
    apart = np.array(work.clean) != np.array(work.corrupted)  # [pair, T]
    positions = range(int(apart.any(0).argmax()), work.length)
    along = grid_cells(model.spec, ALONG, len(work.clean), tuple(layers), tuple(positions))
    return [("directions", along), ("features", _features(work, model))]


def _features(work: Workload, model: Model) -> Cells:
    sae = load_sae(work.autoencoder)
    assert sae.layer is not None
    kept: list[torch.Tensor] = []  # [pair, d_model], clean and corrupted

    def keep(site: str, layer: int, value: torch.Tensor) -> None:
        if (site, layer) == ("resid_post", sae.layer):
            kept.append(value[:, -1])

    for ids in (work.clean, work.corrupted):
        patched_logits(model, torch.tensor(ids), keep)
    clean, corrupted = (sae.encode(x)[0] for x in kept)
    pair, feature = (a.numpy() for a in (clean != corrupted).nonzero(as_tuple=True))
    layer, position = (np.full((len(pair), 1), n) for n in (sae.layer, work.length - 1))
    grid = Grid((sae.layer,), (work.length - 1,))
    return Cells(FEATURE, pair, layer, position, feature[:, None], grid)
