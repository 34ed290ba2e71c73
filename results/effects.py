"""Effects: what a sweep found, as arrays with named axes, in memory and in a run folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from deltapatch import markup
from deltapatch.arguments import several
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.roles import Roles
from deltapatch.interventions.sites import SITES, find_site
from deltapatch.results.folder import Record, reference_tensors
from deltapatch.results.metrics import Direction, Own, Reference, asked_of, compute, metrics_of, terms
from deltapatch.results.result import Result

AXES = ("pair", "layer", "position", "index")  # of every measured array; whole-vector sites have no index


@dataclass(frozen=True)
class SiteEffects:
    """The measured numbers of one site.

    Attributes:
        layers: [layer], the layers that were swept.
        positions: [position], as the user gave them: ints (negative from the end) or labels.
        measured: name (see `metrics.MEASURED`) -> [pair, layer, position] or [pair, layer, position, index];
            NaN where a pair has no such position.
    """

    site: str
    layers: np.ndarray
    positions: list[int | str]
    measured: dict[str, np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        """[pair, layer, position] or [pair, layer, position, index]."""
        return next(iter(self.measured.values())).shape

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes, in order."""
        return AXES[: len(self.shape)]

    def layer_row(self, layer: int) -> int:
        """Where a layer lies on the layer axis; DeltapatchError where it was not swept."""
        found = np.flatnonzero(self.layers == layer)
        if not len(found):
            raise DeltapatchError(
                f"layer {layer} of {self.site} was not swept: there are {_listing(self.layers.tolist())}"
            )
        return int(found[0])


@dataclass(repr=False)
class Effects(Result):
    """What a sweep found. `values` is the way in."""

    sites: dict[str, SiteEffects]
    pairs: list[EncodedPair]
    reference: Reference
    direction: Direction
    meta: dict[str, Any] = field(default_factory=dict)
    # Of a sweep that kept nothing: hashes the model, should its effects be saved.
    _fingerprint: Callable[[], str | None] | None = field(default=None, compare=False)

    def site(self, name: str | None = None) -> SiteEffects:
        """The measured numbers of a site; the name may be left out when only one site was swept.

        Raises:
            DeltapatchError: no such site, not swept, or several were swept and none is named.
        """
        return self._find(name)[0]

    def values(self, metric: str | Own, site: str | None = None) -> np.ndarray:
        """A metric of a site: float64, [pair, layer, position] or, where the site has one, [..., index].

        NaN where a pair has no such position, or none that can be patched. A full hook name
        (``blocks.3.mlp.hook_post``) asks for that layer only, and the layer axis then has length 1.

        Raises:
            DeltapatchError: an unknown metric or site, or one that was not swept.
        """
        return compute(metric, self._measured(site), self.reference, self.direction)

    def terms(self, metric: str | Own, site: str | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """A metric of a site as it is averaged: a mean over pairs is the mean of the first over the second's.

        Returns:
            float64, of the shape of `values`, and [pair] for a ratio such as `recovered`; None for metrics
            whose mean over pairs is just that of their values.

        Raises:
            DeltapatchError: as of `values`.
        """
        return terms(metric, self._measured(site), self.reference, self.direction)

    @property
    def layers(self) -> np.ndarray:
        """[layer], the layers of all sites; DeltapatchError where they differ between sites."""
        every = [s.layers for s in self.sites.values()]
        if any(not np.array_equal(every[0], other) for other in every[1:]):
            raise DeltapatchError("the sites were swept at different layers: ask layers_of(site)")
        return every[0]

    def layers_of(self, site: str | None = None) -> np.ndarray:
        """[layer], the layers of one site."""
        swept, layer = self._find(site)
        return swept.layers if layer is None else np.array([swept.layers[swept.layer_row(layer)]])

    def positions(self, site: str | None = None) -> list[int | str]:
        """[position], as the user gave them: ints (negative from the end) or label names."""
        return list(self._find(site)[0].positions)

    def places(self, site: str | None = None) -> list[list[int | None]]:
        """Where each position of a site is in the clean prompt of each pair, from 0: a list for each pair.

        None where a pair has no such position, or one that could not be patched: it has no counterpart.
        """
        roles, positions = Roles(self.direction, self.meta.get("source", "counterpart")), self.positions(site)
        return [
            [pair.resolve(at) if roles.place(pair, at) is not None else None for at in positions]
            for pair in self.pairs
        ]

    @property
    def metrics(self) -> list[str]:
        """The metrics that this run can answer for all its sites."""
        measured = [set(s.measured) for s in self.sites.values()]
        return metrics_of(set.intersection(*measured))

    def shapes(self) -> dict[str, Any]:
        """The axes of every site, for programs."""
        return {"sites": {name: dict(zip(s.axes, s.shape, strict=True)) for name, s in self.sites.items()}}

    def columns(
        self, metrics: str | Sequence[str] | None = None, sites: str | Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The long form: pair, site, layer, position, index and the metrics, one entry a cell that exists.

        Every column has one type: `index` is -1 for sites without one, and positions are text where any of
        them is a label.

        Args:
            metrics: `recovered` by default, or the first that the run can answer.
            sites: all by default.

        Raises:
            DeltapatchError: an unknown metric or site, or one that was not swept.
        """
        metrics = asked_of(self.metrics, metrics)
        sites = list(several(sites or list(self.sites), "sites", "names of sites"))  # type: ignore[arg-type]
        labelled = any(is_labelled(self.positions(site)) for site in sites)
        parts = [self._site_columns(metrics, site, labelled) for site in sites]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def to_pandas(
        self, metrics: str | Sequence[str] | None = None, sites: str | Sequence[str] | None = None
    ) -> Any:
        """A DataFrame with columns pair, site, layer, position, index and one per metric.

        One row a cell, as `deltapatch effects RUN --format csv` has them; cells that a pair does not have are
        left out. Every column has one type: `index` is missing (NA) for whole vectors, and positions are text
        where any of them is a label. Arguments are those of `columns`.

        Raises:
            DeltapatchError: pandas is not installed; an unknown metric or site.
        """
        pandas = import_pandas()
        frame = pandas.DataFrame(self.columns(metrics, sites))
        frame["index"] = frame["index"].astype("Int64").replace(-1, pandas.NA)
        return frame

    def to_xarray(self, metrics: str | Sequence[str] | None = None, site: str | None = None) -> Any:
        """An xarray Dataset of one site: a variable a metric, with named axes and their coordinates.

        Dimensions are pair, layer, position and, where the site has one, what its index counts: head, neuron
        or coordinate. Cells that a pair does not have are NaN. Positions are text where any is a label.

        Args:
            metrics: `recovered` by default, or the first that the run can answer.
            site: which; it may be left out when only one site was swept.

        Raises:
            DeltapatchError: xarray is not installed; an unknown metric or site.
        """
        xarray = import_optional("xarray", "to_xarray")
        swept, _ = self._find(site)
        counted = SITES[swept.site].index.counts
        dims = (*AXES[:3], counted) if counted else AXES[:3]
        positions = position_column(swept.positions, is_labelled(swept.positions))
        return xarray.Dataset(
            {name: (dims, self.values(name, site)) for name in asked_of(self.metrics, metrics)},
            {
                "pair": np.arange(len(self.pairs)),
                "layer": np.asarray(self.layers_of(site)),
                "position": positions.astype(str) if positions.dtype == object else positions,
            },
            {"site": swept.site, "direction": self.direction},
        )

    def plot(self, metric: str | None = None) -> Any:
        """A matplotlib Figure: layer by position of all whole vectors, mean over pairs, on one colour scale.

        Of a run without whole vectors, the `heatmap` of its first site.

        Args:
            metric: `recovered` by default, or the first that the run can answer.

        Raises:
            DeltapatchError: an unknown metric, or one that was not measured.
        """
        return looking().plot(self, metric)

    def heatmap(self, site: str | None = None, metric: str | None = None, *, pair: int | None = None) -> Any:
        """A matplotlib Figure of one site: whole vectors by position, heads by position and head.

        Of neurons and coordinates, the strongest with their intervals.

        Args:
            site: which; it may be left out when only one site was swept.
            metric: as of `plot`.
            pair: the number of a pair; the mean over pairs by default.

        Raises:
            DeltapatchError: an unknown site, metric or pair, or one that was not swept.
        """
        return looking().heatmap(self, site, metric, pair=pair)

    def top(self, n: int = 10, metric: str | None = None, site: str | None = None) -> Any:
        """The n means over pairs that are largest in magnitude, as a table: `columns` has its arrays.

        Args:
            metric: as of `plot`.
            site: which; all by default, unless only some of them have an index.

        Raises:
            DeltapatchError: an unknown site or metric; sites that do not share a ranking.
        """
        return looking().top(self, n, metric, site)

    def explore(self, metrics: str | Sequence[str] | None = None) -> Any:
        """The page of `deltapatch explore`: a notebook shows it, and `.save(path)` writes it.

        Args:
            metrics: that the page can show; all that the run can answer by default.

        Raises:
            DeltapatchError: plotly is not installed; an unknown metric or one that was not measured.
        """
        return looking().Explorer(self, metrics)

    def record(self) -> Record:
        """What a run folder holds of them."""
        tensors, axes = reference_tensors(self.reference)
        sites = {}
        for site, swept in self.sites.items():
            for name, array in swept.measured.items():
                tensors[f"{site}/{name}"] = np.ascontiguousarray(array)
                axes[f"{site}/{name}"] = ",".join(swept.axes)
            sites[site] = {
                "layers": [int(layer) for layer in swept.layers],
                "positions": swept.positions,
                "measured": list(swept.measured),
            }
        return Record({**self.meta, "direction": self.direction, "sites": sites}, self.pairs, tensors, axes)

    def __repr__(self) -> str:
        what = ", ".join(str(self.meta[k]) for k in ("model", "precision", "backend") if k in self.meta)
        what += ", approximate" if self.meta.get("precision") == "fp8" else ""
        if self.answer_tokens > 1:
            what += f", answers of up to {self.answer_tokens} tokens"
        lines = [f"Effects of {len(self.pairs)} pair(s), {self.direction}" + (f", {what}" if what else "")]
        for name, swept in self.sites.items():
            shape = ", ".join(f"{axis} {n}" for axis, n in zip(swept.axes, swept.shape, strict=True))
            lines.append(f"  {name:<14} [{shape}]")
        caveat = self.caveat()
        lines += [f"  {caveat}"] if caveat else []
        return "\n".join([*lines, f"  metrics: {', '.join(self.metrics)}"])

    def _measured(self, site: str | None) -> dict[str, np.ndarray]:
        swept, layer = self._find(site)
        if layer is None:
            return swept.measured
        row = swept.layer_row(layer)
        return {name: array[:, row : row + 1] for name, array in swept.measured.items()}

    def _repr_html_(self) -> str:
        said = repr(self).split("\n")
        header = ("site", *AXES)
        rows = [
            (name, *swept.shape, *[""] * (len(AXES) - len(swept.shape))) for name, swept in self.sites.items()
        ]
        return markup.table(said[0], rows, header, said[1 + len(rows) :])

    def _find(self, name: str | None) -> tuple[SiteEffects, int | None]:
        swept = _listing(list(self.sites))
        if name is None:
            if len(self.sites) != 1:
                raise DeltapatchError(f"several sites were swept, so name one of them: {swept}")
            return next(iter(self.sites.values())), None
        try:
            site, layer = find_site(name)
        except DeltapatchError as error:
            raise DeltapatchError(f"unknown site {name!r}: this run has {swept}") from error
        if site.name not in self.sites:
            raise DeltapatchError(f"site {site.name!r} was not swept: this run has {swept}")
        return self.sites[site.name], layer

    def _site_columns(self, metrics: Sequence[str], site: str, labelled: bool) -> dict[str, np.ndarray]:
        swept, layer = self._find(site)
        layers = self.layers_of(site)
        arrays = {metric: self.values(metric, site) for metric in metrics}
        exists = ~np.isnan(next(iter(swept.measured.values())))
        if layer is not None:
            row = swept.layer_row(layer)
            exists = exists[:, row : row + 1]
        where = np.nonzero(exists)
        positions = position_column(swept.positions, labelled)
        n = len(where[0])
        columns = {
            "pair": where[0],
            "site": np.full(n, swept.site, dtype=object),
            "layer": np.asarray(layers, dtype=np.int64)[where[1]],
            "position": positions[where[2]],
            "index": where[3] if len(where) > 3 else np.full(n, -1),
        }
        return columns | {metric: array[exists] for metric, array in arrays.items()}


def is_labelled(positions: Sequence[int | str]) -> bool:
    """Whether any of a site's positions is a label."""
    return any(isinstance(p, str) for p in positions)


def position_column(positions: Sequence[int | str], labelled: bool) -> np.ndarray:
    """Positions as an array of one type: integers, or text where labels are among them."""
    return np.array([str(p) for p in positions], dtype=object) if labelled else np.array(positions, np.int64)


def looking() -> Any:
    """The part that draws effects, and so stands above them: found by its name, as the face finds its own."""
    return import_module("deltapatch.explore.looking")


def import_pandas() -> Any:
    """The package, which is optional. DeltapatchError where it is not installed."""
    return import_optional("pandas", "to_pandas")


def import_optional(name: str, what: str) -> Any:
    """A package that only some users need, and whose extra has its name; DeltapatchError without it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise DeltapatchError(
            f"{what} needs {name}, which is not installed: pip install 'deltapatch[{name}]'"
        ) from error


def _listing(names: Sequence[Any]) -> str:
    return ", ".join(str(n) for n in names) or "nothing"
