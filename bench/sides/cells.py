"""Cells: interventions as arrays, the one form in which every side is given its work."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deltapatch.engine.planning.costs import necessary_flops
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.given import Intervention, Patch
from deltapatch.interventions.sites import find_site
from deltapatch.models.spec import ModelSpec

# Sites that an edit changes in part: along the workload's direction, or one feature of its autoencoder.
ALONG, FEATURE = "resid_post.along", "feature"
EDITS = (ALONG, FEATURE)


class Grid(NamedTuple):
    """The axes of cells that are a whole sweep, so that `deltapatch.sweep` can be asked for it."""

    layers: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Cells:
    """Interventions on one site, each of k patches.

    Attributes:
        site: where all patches go; for those of EDITS an intervention has one patch.
        pair: [n], the prompt pair of each intervention.
        layer, position, index: [n, k]; positions count from 0, an index is -1 for whole vectors.
        grid: the axes, where these are all cells of a sweep in its order [pair, layer, position, index].
    """

    site: str
    pair: np.ndarray
    layer: np.ndarray
    position: np.ndarray
    index: np.ndarray
    grid: Grid | None = None

    def __len__(self) -> int:
        return len(self.pair)

    def __getitem__(self, which: np.ndarray | slice) -> "Cells":
        return Cells(self.site, self.pair[which], self.layer[which], self.position[which], self.index[which])

    @property
    def patches(self) -> int:
        """How many patches an intervention has."""
        return self.layer.shape[1]

    @property
    def first_layer(self) -> np.ndarray:
        """[n], where each intervention leaves the base run."""
        return self.layer.min(axis=1)

    @property
    def first_position(self) -> np.ndarray:
        """[n], the first position that differs from the base run."""
        return self.position.min(axis=1)

    def interventions(self) -> list[Intervention]:
        """The same as objects."""
        arrays = (self.pair, self.layer, self.position, self.index)
        return [
            Intervention(
                pair,
                [Patch(self.site, l, t, i if i >= 0 else None) for l, t, i in zip(*own, strict=True)],
            )
            for pair, *own in zip(*(a.tolist() for a in arrays), strict=True)
        ]

    def necessary_flops(self, spec: ModelSpec, length: int) -> int:
        """What these interventions cost at least, over prompts of `length` tokens."""
        places, counts = np.unique(
            np.stack([self.first_layer, self.first_position]), axis=1, return_counts=True
        )
        site = place_of(self.site) if self.site in EDITS else self.site
        one = find_site(site)[0].n_indices(spec) or 1  # costs counts all indices of a site
        return sum(
            int(count) * (necessary_flops(spec, site, [int(l)], [int(t)], length) // one)
            for (l, t), count in zip(places.T, counts, strict=True)
        )

    def save(self, path: Path) -> None:
        """Write an npz file."""
        arrays = {"pair": self.pair, "layer": self.layer, "position": self.position, "index": self.index}
        if self.grid is not None:
            arrays |= {"layers": np.array(self.grid.layers), "positions": np.array(self.grid.positions)}
        with open(path, "wb") as file:
            np.savez(file, site=np.array(self.site), **arrays)  # type: ignore[arg-type]

    @staticmethod
    def load(path: Path) -> "Cells":
        """Read what `save` wrote."""
        with np.load(path) as file:
            grid = None
            if "layers" in file:
                grid = Grid(tuple(file["layers"].tolist()), tuple(file["positions"].tolist()))
            pair, layer, position, index = (file[name] for name in ("pair", "layer", "position", "index"))
            return Cells(str(file["site"]), pair, layer, position, index, grid)


def place_of(site: str) -> str:
    """The site whose whole values are read and changed."""
    return "resid_post" if site == FEATURE else site.removesuffix(".dim").removesuffix(".along")


def grid_cells(
    spec: ModelSpec, site: str, n_pairs: int, layers: tuple[int, ...], positions: tuple[int, ...]
) -> Cells:
    """All cells of a sweep of one site."""
    n_indices = find_site(site)[0].n_indices(spec)
    axes = (np.arange(n_pairs), np.array(layers), np.array(positions), np.arange(max(1, n_indices)))
    pair, layer, position, index = (a.ravel() for a in np.meshgrid(*axes, indexing="ij"))
    if not n_indices:
        index = np.full(len(pair), -1)
    return Cells(
        site, pair, layer[:, None], position[:, None], index[:, None], Grid(tuple(layers), tuple(positions))
    )


# The sweeps of a comparison: name -> what a reader calls it.
SWEEPS = {
    "mlp_out": "MLP outputs, all layers and positions",
    "attn_out": "attention outputs, all layers and positions",
    "z": "heads (z), all layers and positions",
    "neurons-layer": "hidden neurons of one layer, last position",
    "neurons": "hidden neurons of all layers, last position",
    "joint": "top neurons together, last position",
}


# What growth is measured on beside them.
MORE = {"mlp_out-last": "MLP outputs, all layers, last position"}


def make_cells(name: str, spec: ModelSpec, n_pairs: int, length: int, seed: int = 0, k: int = 20) -> Cells:
    """The cells of one of SWEEPS and MORE.

    Args:
        name: a key of SWEEPS or MORE.
        spec: of the model.
        n_pairs, length: prompt pairs, and the tokens of each.
        seed: of the joint patches, which are drawn: whose neurons they are changes no cost.
        k: neurons in a joint patch.

    Raises:
        DeltapatchError: an unknown name.
    """
    layers, everywhere, last = tuple(range(spec.n_layers)), tuple(range(length)), (length - 1,)
    if name in ("mlp_out", "attn_out", "z"):
        return grid_cells(spec, name, n_pairs, layers, everywhere)
    if name == "mlp_out-last":
        return grid_cells(spec, "mlp_out", n_pairs, layers, last)
    if name == "neurons-layer":
        return grid_cells(spec, "mlp_post", n_pairs, (spec.n_layers // 2,), last)
    if name == "neurons":
        return grid_cells(spec, "mlp_post", n_pairs, layers, last)
    if name != "joint":
        raise DeltapatchError(f"unknown sweep {name!r}: choose from {', '.join([*SWEEPS, *MORE])}")
    rng = np.random.default_rng(seed)
    n, k = 128, min(k, spec.d_mlp)
    neurons = np.stack([rng.choice(spec.n_layers * spec.d_mlp, k, replace=False) for _ in range(n)])
    pair = np.repeat(np.arange(n_pairs), n)
    neurons = np.tile(neurons, (n_pairs, 1))
    return Cells(
        "mlp_post",
        pair,
        neurons // spec.d_mlp,
        np.full_like(neurons, length - 1),
        neurons % spec.d_mlp,
    )
