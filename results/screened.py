"""Screened sweeps: estimates of all effects, exact effects of some, and what that says of the others."""

import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError

from deltapatch.errors import DeltapatchError, path_of
from deltapatch.interventions.edges import EdgeGrid, grid_of
from deltapatch.interventions.grid import Grid
from deltapatch.interventions.sites import find_site
from deltapatch.models.header import open_safetensors
from deltapatch.results.effects import AXES, import_pandas, is_labelled, position_column
from deltapatch.results.estimated import ESTIMATES, FIRST_ORDER, NOTHING, Choice, Estimated
from deltapatch.results.metrics import Function, asked_of
from deltapatch.results.outcome import Outcome
from deltapatch.results.reading import load_outcome
from deltapatch.results.screened_edges import ScreenedEdges
from deltapatch.results.screened_outcome import ScreenedOutcome, labels_of_file
from deltapatch.results.strata import Strata

_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class Screened(Estimated):
    """What a screened sweep found.

    Args:
        verified, estimates, choice, by: as of `Estimated`.
        grid: all that was screened, as axes.
    """

    def __init__(self, verified: Outcome, grid: Grid, estimates: np.ndarray, choice: Choice, by: str) -> None:
        super().__init__(verified, estimates, choice, by)
        self._grid = grid

    @property
    def sites(self) -> list[str]:
        """Names of the sites that were screened."""
        return [g.site.name for g in self._grid.sites]

    def values(self, metric: str | Function, site: str | None = None) -> np.ndarray:
        """Exact effects: float64, of the shape that `Effects.values` has; NaN where none was verified.

        What is verified is chosen by its estimate, so means over what is here are no means over all.

        Raises:
            DeltapatchError: an unknown metric or site, or one that was not screened.
        """
        flat = np.full(self._grid.n_effects, np.nan)
        flat[self._effect] = self.verified.values(metric)
        return self._at(flat, site)

    def estimate(self, metric: str | None = None, site: str | None = None) -> np.ndarray:
        """First-order estimates: float64, of the shape of `values`; NaN where a pair has no such position.

        Args:
            metric: of `estimated`; what was screened by, unless told.

        Raises:
            DeltapatchError: a metric that does not follow from what was estimated; as of `values`.
        """
        return self._at(self._estimated(self.by if metric is None else metric), site)

    def is_verified(self, site: str | None = None) -> np.ndarray:
        """Whether an effect is exact here: bool, of the shape of `values`."""
        flat = np.zeros(self._grid.n_effects, dtype=bool)
        flat[self._effect] = True
        return self._at(flat, site)

    def is_drawn(self, site: str | None = None) -> np.ndarray:
        """Whether an effect was verified as one of the random sample: bool, of the shape of `values`."""
        return self.is_verified(site) & self._at(self._stratum >= 0, site)

    def columns(self, metrics: str | Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The long form of what was verified, one entry each: pair, site, layer, position, index.

        Then `estimate` (of what was screened by), `drawn` (by chance, not by its estimate) and the metrics.
        `index` is -1 for sites without one; positions are text where any is a label.

        Args:
            metrics: `recovered` by default, or the first that can be answered.

        Raises:
            DeltapatchError: an unknown metric, or one that was not measured.
        """
        n = len(self._effect)
        columns: dict[str, np.ndarray] = {
            "pair": self.verified.pair,
            "site": np.empty(n, dtype=object),
            "layer": np.empty(n, dtype=np.int64),
            "position": np.empty(n, dtype=object),
            "index": np.full(n, -1),
        }
        for g in self._grid.sites:
            shape = g.shape(self._grid.n_pairs)
            mine = np.flatnonzero((self._effect >= g.offset) & (self._effect < g.offset + math.prod(shape)))
            at = np.unravel_index(self._effect[mine] - g.offset, shape)
            columns["site"][mine] = g.site.name
            columns["layer"][mine] = g.layers[at[1]]
            columns["position"][mine] = position_column(g.positions, is_labelled(g.positions))[at[2]]
            if len(at) > 3:
                columns["index"][mine] = at[3]
        columns["estimate"] = self.estimates_of_verified()
        columns["drawn"] = self._stratum[self._effect] >= 0
        return columns | {name: self.verified.values(name) for name in asked_of(self.metrics, metrics)}

    def to_pandas(self, metrics: str | Sequence[str] | None = None) -> Any:
        """A DataFrame of `columns`. DeltapatchError where pandas is not installed."""
        return import_pandas().DataFrame(self.columns(metrics))

    def shapes(self) -> dict[str, Any]:
        """The axes of every site, for programs."""
        n_pairs = self._grid.n_pairs
        return {
            "sites": {g.site.name: dict(zip(AXES, g.shape(n_pairs), strict=False)) for g in self._grid.sites}
        }

    @property
    def _what(self) -> str:
        return f"  sites: {', '.join(self.sites)}\n"

    def _scale(self, flat: np.ndarray, factor: np.ndarray) -> None:
        for g in self._grid.sites:
            size = math.prod(g.shape(self._grid.n_pairs))
            own = flat[g.offset : g.offset + size].reshape(len(self.pairs), -1)
            own *= factor[:, None]

    def _as_file(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        return {}, {"grid": json.dumps(self._grid.settings())}

    def _at(self, flat: np.ndarray, site: str | None) -> np.ndarray:
        """What a site has of [effect]; of a full hook name its layer alone."""
        if site is None and len(self._grid.sites) > 1:
            raise DeltapatchError(f"several sites were screened, so name one: {', '.join(self.sites)}")
        wanted, layer = find_site(self.sites[0] if site is None else site)
        for g in self._grid.sites:
            if g.site == wanted:
                shape = g.shape(self._grid.n_pairs)
                found = flat[g.offset : g.offset + math.prod(shape)].reshape(shape)
                if layer is None:
                    return found
                row = np.flatnonzero(g.layers == layer)
                if len(row):
                    return found[:, row]
                raise DeltapatchError(f"layer {layer} of {wanted.name} was not screened")
        raise DeltapatchError(f"site {wanted.name!r} was not screened: this run has {', '.join(self.sites)}")


def load_screened(path: str | os.PathLike[str]) -> Screened | ScreenedOutcome | ScreenedEdges:
    """The result of a screened sweep in a run folder, of sites, edges or features.

    Raises:
        DeltapatchError: it is none, is damaged, or has no estimates.
    """
    verified, path = load_outcome(path), path_of(path, "a run folder")
    if not (path / ESTIMATES).is_file():
        raise DeltapatchError(
            f"{path} has no {ESTIMATES}: it is no screened sweep, or one in parts, which the same sweep with "
            "--resume (in Python resume=True) completes"
        )
    try:
        with open_safetensors(path / ESTIMATES, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = file.metadata() or {}
        return _read(verified, arrays, about)
    except (*_DAMAGE, SafetensorError) as error:
        raise DeltapatchError(
            f"{path / ESTIMATES} is damaged ({error}): run the same sweep again, elsewhere"
        ) from error


def _read(
    verified: Outcome, arrays: dict[str, np.ndarray], about: dict[str, str]
) -> Screened | ScreenedOutcome | ScreenedEdges:
    """What a file holds, checked. ValueError, KeyError or TypeError where it makes no sense."""
    estimates, choice = _choice(verified, arrays, int(about.get("looks", 0)))
    if about["by"] not in FIRST_ORDER:
        raise ValueError("what was estimated")
    if "grid" not in about:
        labels = labels_of_file(arrays, verified, len(estimates))
        return ScreenedOutcome(verified, labels, estimates, choice, about["by"])
    axes = json.loads(about["grid"]) | {"source": verified.meta["source"], "direction": verified.direction}
    if not all(type(position) in (int, str) for position in axes["positions"]):
        raise ValueError("positions")
    grid = grid_of(axes, len(verified.pairs))
    if grid.n_effects != len(estimates):
        raise ValueError("arrays do not fit the grid")
    if isinstance(grid, EdgeGrid):
        return ScreenedEdges(verified, grid, estimates, choice, about["by"])
    return Screened(verified, grid, estimates, choice, about["by"])


def _choice(verified: Outcome, arrays: dict[str, np.ndarray], looks: int) -> tuple[np.ndarray, Choice]:
    """The estimates of a file, and what was verified of them, checked."""
    estimates, stratum, size, drawn = (arrays[name] for name in ("estimate", "stratum", "size", "drawn"))
    effect = verified.interventions.labels["effect"]
    whole = all(a.ndim == 1 and a.dtype == np.int64 for a in (stratum, size, drawn, effect))
    fits = estimates.ndim == 1 and len(estimates) == len(stratum) and len(size) == len(drawn)
    if not whole or not fits or estimates.dtype not in (np.float32, np.float64):
        raise ValueError("arrays do not fit each other")
    inside = (stratum >= NOTHING) & (stratum < len(size))
    if not inside.all() or (effect < 0).any() or (effect >= len(estimates)).any():
        raise ValueError("numbers out of range")
    mine = stratum[effect]
    right = len(np.unique(effect)) == len(effect) and (mine != NOTHING).all()
    right &= (np.bincount(stratum[stratum >= 0], minlength=len(size)) == size).all()
    right &= (np.bincount(mine[mine >= 0], minlength=len(size)) == drawn).all()
    if not right:
        raise ValueError("strata do not fit what was verified")
    if (looks > 0) != (verified.meta.get("until") is not None):
        raise ValueError("looks")
    return estimates, Choice(stratum, Strata(size, drawn), np.sort(effect), looks)
