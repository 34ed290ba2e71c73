"""Effects of edges: what a sweep of edges found, by sender and receiver, in memory and in a run folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deltapatch import markup
from deltapatch.interventions.edges import EdgeGrid
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.results.effects import import_pandas, is_labelled, looking, position_column
from deltapatch.results.folder import Record, reference_tensors
from deltapatch.results.metrics import Direction, Own, Reference, asked_of, compute, metrics_of, terms
from deltapatch.results.result import Result

AXES = ("pair", "effect", "position", "edge")  # of every measured array


@dataclass(repr=False)
class EdgeEffects(Result):
    """What a sweep of edges found. `values` is the way in.

    Attributes:
        grid: which edges, positions and effects there are.
        measured: name (see `metrics.MEASURED`) -> [pair, effect, position, edge]; NaN where a pair has no
            such position.
        pairs: of prompts.
        reference: their unpatched runs.
        direction: of the run. "noise" has the clean run as its base, as MIB's edges and all circuits have.
        meta: what was run.
    """

    grid: EdgeGrid
    measured: dict[str, np.ndarray]
    pairs: list[EncodedPair]
    reference: Reference
    direction: Direction
    meta: dict[str, Any] = field(default_factory=dict)
    # Of a sweep that kept nothing: hashes the model, should its effects be saved.
    _fingerprint: Callable[[], str | None] | None = field(default=None, compare=False)

    @property
    def senders(self) -> list[str]:
        """[sender], their names: "input", "a3.h5", "m3"."""
        return self.grid.sender_names

    @property
    def receivers(self) -> list[str]:
        """[receiver], their names: "a5.h2<q>", "m7", "logits"."""
        return self.grid.receivers

    @property
    def edges(self) -> list[tuple[str, str]]:
        """[edge], the names of sender and receiver, in the order of `flat`."""
        return [(self.grid.nodes.senders[s], self.receivers[r]) for s, r in self.grid.edges.tolist()]

    @property
    def positions(self) -> list[int | str]:
        """[position], as the user gave them; just "together" for all of a prompt at once."""
        return list(self.grid.positions)

    @property
    def metrics(self) -> list[str]:
        """The metrics that this run can answer."""
        return metrics_of(self.measured)

    def flat(self, metric: str | Own, effect: str | None = None) -> np.ndarray:
        """A metric of every edge: float64, [pair, edge], or [pair, edge, position] at single positions.

        Args:
            metric: its name.
            effect: "total" or "direct"; the first that was measured by default.

        Raises:
            DeltapatchError: an unknown metric, or one or an effect that was not measured.
        """
        return self.by_edge(compute(metric, self._of(effect), self.reference, self.direction))

    def terms(self, metric: str | Own, effect: str | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """A metric as it is averaged, as of `Effects.terms`: as `flat`, and [pair] or None."""
        top, below = terms(metric, self._of(effect), self.reference, self.direction)
        return self.by_edge(top), below

    def mean(self, metric: str, effect: str | None = None) -> np.ndarray:
        """The mean over pairs, [edge] or [edge, position]; of a ratio such as `recovered` that of means."""
        top, below = self.terms(metric, effect)
        there = ~np.isnan(top)
        weight = np.ones(len(top)) if below is None else below
        total = (there * weight.reshape(-1, *(1,) * (top.ndim - 1))).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            found: np.ndarray = np.where(there, top, 0).sum(0) / total
        return found

    def values(self, metric: str | Own, effect: str | None = None) -> np.ndarray:
        """A metric by sender and receiver: float64, [pair, sender, receiver]; NaN where there is no edge.

        Of edges at single positions it is [pair, sender, receiver, position]. Raises what `flat` raises.
        """
        return self.by_node(self.flat(metric, effect))

    def by_node(self, flat: np.ndarray) -> np.ndarray:
        """Numbers of edges, [..., edge] or [..., edge, position], as [..., sender, receiver] and so on.

        NaN where there is no edge.
        """
        sender, receiver = self.grid.edges.T
        axis = flat.ndim - 1 - (not self.grid.together)
        row = np.searchsorted(self.grid.senders, sender)
        shape = (*flat.shape[:axis], len(self.senders), len(self.receivers), *flat.shape[axis + 1 :])
        out = np.full(shape, np.nan)
        out[(*[slice(None)] * axis, row, receiver)] = flat
        return out

    def shapes(self) -> dict[str, Any]:
        """How many nodes and edges there are, for programs."""
        counts = (len(self.senders), len(self.receivers), len(self.edges))
        return dict(zip(("senders", "receivers", "edges"), counts, strict=True))

    def columns(
        self, metrics: str | Sequence[str] | None = None, effect: str | None = None
    ) -> dict[str, np.ndarray]:
        """The long form: pair, sender, receiver, position (of edges at single ones) and the metrics.

        One entry an edge of a pair. `recovered` by default, or the first metric that the run can answer.

        Raises:
            DeltapatchError: as of `flat`.
        """
        names = asked_of(self.metrics, metrics)
        arrays = {name: self.flat(name, effect) for name in names}
        exists = ~np.isnan(next(iter(self._of(effect).values())))  # [pair, position, edge]
        exists = self.by_edge(exists)
        where = np.nonzero(exists)
        sender, receiver = (np.array(side, dtype=object)[where[1]] for side in zip(*self.edges, strict=True))
        out = {"pair": where[0], "sender": sender, "receiver": receiver}
        if not self.grid.together:
            out["position"] = position_column(self.positions, is_labelled(self.positions))[where[2]]
        return out | {name: array[exists] for name, array in arrays.items()}

    def to_pandas(self, metrics: str | Sequence[str] | None = None, effect: str | None = None) -> Any:
        """A DataFrame of `columns`, a row an edge. DeltapatchError where pandas is not installed."""
        return import_pandas().DataFrame(self.columns(metrics, effect))

    def plot(self, metric: str | None = None, effect: str | None = None, *, pair: int | None = None) -> Any:
        """A matplotlib Figure, senders by receivers.

        Args:
            metric: `recovered` by default, or the first that the run can answer.
            effect: "total" or "direct"; the first that was measured by default.
            pair: the number of a pair; the mean over pairs by default.

        Raises:
            DeltapatchError: an unknown metric, effect or pair, or one that was not measured.
        """
        return looking().plot_edges(self, metric, effect, pair=pair)

    def top(self, n: int = 10, metric: str | None = None, effect: str | None = None) -> Any:
        """The n means over pairs that are largest in magnitude, as a table: `columns` has its arrays.

        Arguments and errors are those of `plot`.
        """
        return looking().top_edges(self, n, metric, effect)

    def explore(self, metrics: str | Sequence[str] | None = None) -> Any:
        """The page of `deltapatch explore`: a notebook shows it, and `.save(path)` writes it.

        Args:
            metrics: that the page can show; all that the run can answer by default.

        Raises:
            DeltapatchError: plotly is not installed; an unknown metric or one that was not measured.
        """
        return looking().Explorer(self, metrics)

    def _repr_html_(self) -> str:
        title, *lines = repr(self).split("\n")
        best = self.top(5)
        rows = zip(*(column.tolist() for column in best.columns.values()), strict=True)
        shown = [[f"{v:.4g}" if isinstance(v, float) else v for v in row] for row in rows]
        return markup.table(title, shown, tuple(best.columns), [line.strip() for line in lines])

    def record(self) -> Record:
        """What a run folder holds of it."""
        tensors, axes = reference_tensors(self.reference)
        for name, array in self.measured.items():
            tensors[f"measured/{name}"], axes[f"measured/{name}"] = (
                np.ascontiguousarray(array),
                ",".join(AXES),
            )
        about = {**self.meta, "direction": self.direction, **self.grid.settings()}
        return Record(about | {"measured": list(self.measured)}, self.pairs, tensors, axes)

    def __repr__(self) -> str:
        what = "".join(f", {self.meta[key]}" for key in ("model", "precision", "backend") if key in self.meta)
        at = "all positions together" if self.grid.together else f"{len(self.positions)} position(s)"
        lines = [
            f"Effects of {len(self.edges):,} edge(s) on {len(self.pairs)} pair(s), {self.direction}{what}",
            f"  {' and '.join(self.grid.effects)}, {at}: {len(self.senders)} sender(s), "
            f"{len(self.receivers)} receiver(s)",
        ]
        caveat = self.caveat()
        return "\n".join(
            [*lines, *([f"  {caveat}"] if caveat else []), f"  metrics: {', '.join(self.metrics)}"]
        )

    def _of(self, effect: str | None) -> dict[str, np.ndarray]:
        """What was measured of total or direct effects, [pair, position, edge]."""
        at = self.grid.number_of(effect)
        return {name: array[:, at] for name, array in self.measured.items()}

    def by_edge(self, found: np.ndarray) -> np.ndarray:
        """Of [pair, position, edge]: [pair, edge], or at single positions [pair, edge, position]."""
        return found[:, 0] if self.grid.together else np.moveaxis(found, 1, 2)
