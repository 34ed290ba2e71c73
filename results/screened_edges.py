"""Screened sweeps of edges: estimates of all edges, exact effects of some."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from deltapatch.interventions.edges import EdgeGrid
from deltapatch.interventions.nodes import READS
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.effects import import_pandas, is_labelled, position_column
from deltapatch.results.estimated import Choice, Estimated
from deltapatch.results.metrics import Own, asked_of
from deltapatch.results.outcome import Outcome


class ScreenedEdges(Estimated):
    """What a screened sweep of edges found.

    Args:
        verified, estimates, choice, by: as of `Estimated`.
        grid: all edges that were screened.

    Attributes:
        grid: the same.
    """

    def __init__(
        self, verified: Outcome, grid: EdgeGrid, estimates: np.ndarray, choice: Choice, by: str
    ) -> None:
        super().__init__(verified, estimates, choice, by)
        self.grid = grid

    @property
    def senders(self) -> list[str]:
        """As of `EdgeEffects`."""
        return self.grid.sender_names

    @property
    def receivers(self) -> list[str]:
        """As of `EdgeEffects`."""
        return self.grid.receivers

    @property
    def edges(self) -> list[tuple[str, str]]:
        """As of `EdgeEffects`."""
        return self._exact.edges

    @property
    def positions(self) -> list[int | str]:
        """As of `EdgeEffects`."""
        return self._exact.positions

    def values(self, metric: str | Own, effect: str | None = None) -> np.ndarray:
        """Exact effects: float64, of the shape that `EdgeEffects.values` has; NaN where none was verified.

        That is [pair, sender, receiver], or [pair, sender, receiver, position]. What is verified is chosen by
        its estimate, so means over what is here are no means over all.

        Args:
            metric: its name.
            effect: "total" or "direct"; the first that was screened by default.

        Raises:
            DeltapatchError: an unknown metric, or one or an effect that was not measured.
        """
        return self._exact.values(metric, effect)

    def estimate(self, metric: str | None = None, effect: str | None = None) -> np.ndarray:
        """First-order estimates: float64, of the shape of `values`; NaN where there is no edge.

        Args:
            metric: of `estimated`; what was screened by, unless told.
            effect: as of `values`.

        Raises:
            DeltapatchError: a metric that does not follow from what was estimated; as of `values`.
        """
        return self._at(self._estimated(self.by if metric is None else metric), effect)

    def is_verified(self, effect: str | None = None) -> np.ndarray:
        """Whether an effect is exact here: bool, of the shape of `values`."""
        flat = np.zeros(self.grid.n_effects)
        flat[self._effect] = 1
        return self._at(flat, effect) == 1

    def is_drawn(self, effect: str | None = None) -> np.ndarray:
        """Whether an effect was verified as one of the random sample: bool, of the shape of `values`."""
        flat = np.zeros(self.grid.n_effects)
        flat[self._effect] = self._stratum[self._effect] >= 0
        return self._at(flat, effect) == 1

    def columns(self, metrics: str | Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The long form of what was verified, one entry each: pair, sender, receiver, position.

        Positions are told of edges at single ones, and where both kinds of effects were screened `effect`.
        Then `estimate` (of what was screened by), `drawn` (by chance, not by its estimate) and the metrics.

        Args:
            metrics: `recovered` by default, or the first that can be answered.

        Raises:
            DeltapatchError: an unknown metric, or one that was not measured.
        """
        pair, effect, position, edge = np.unravel_index(self._effect, self.grid.shape)
        sender, receiver = (np.array(side, dtype=object)[edge] for side in zip(*self.edges, strict=True))
        columns: dict[str, np.ndarray] = {"pair": pair, "sender": sender, "receiver": receiver}
        if len(self.grid.effects) > 1:
            columns["effect"] = np.array(self.grid.effects, dtype=object)[effect]
        if not self.grid.together:
            columns["position"] = position_column(self.positions, is_labelled(self.positions))[position]
        columns["estimate"] = self.estimates_of_verified()
        columns["drawn"] = self._stratum[self._effect] >= 0
        return columns | {name: self.verified.values(name) for name in asked_of(self.metrics, metrics)}

    def to_pandas(self, metrics: str | Sequence[str] | None = None) -> Any:
        """A DataFrame of `columns`. DeltapatchError where pandas is not installed."""
        return import_pandas().DataFrame(self.columns(metrics))

    def kinds(self) -> tuple[np.ndarray, np.ndarray]:
        """[intervention] twice, of what was verified: what its receiver reads, and the receiver's layer.

        It reads q, k, v, mlp or logits; where both kinds of effects were screened, "total q" and so on.
        """
        _, effect, _, edge = np.unravel_index(self._effect, self.grid.shape)
        reads = np.array([name.strip("<>") for name in READS], dtype=object)[self.grid.reads[edge]]
        layers = np.array([self.grid.nodes.receivers[name].layer for name in self.receivers])
        if len(self.grid.effects) > 1:
            reads = np.array([f"{kind} " for kind in self.grid.effects], dtype=object)[effect] + reads
        return reads, layers[self.grid.edges[edge, 1]]

    def shapes(self) -> dict[str, Any]:
        """How many nodes and edges there are, for programs."""
        return self._exact.shapes()

    @property
    def _what(self) -> str:
        at = "all positions together" if self.grid.together else f"{len(self.positions)} position(s)"
        return f"  {' and '.join(self.grid.effects)} effects of {len(self.edges):,} edges, {at}\n"

    @cached_property
    def _exact(self) -> EdgeEffects:
        """What was verified, in its place among all edges."""
        measured = {}
        for name, values in self.verified.measured.items():
            whole = np.full(self.grid.n_effects, np.nan, dtype=values.dtype)
            whole[self._effect] = values
            measured[name] = whole.reshape(self.grid.shape)
        return EdgeEffects(self.grid, measured, self.pairs, self.reference, self.direction, self.meta)

    def _scale(self, flat: np.ndarray, factor: np.ndarray) -> None:
        own = flat.reshape(self.grid.shape)
        own *= factor[:, None, None, None]

    def _as_file(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        return {}, {"grid": json.dumps(self.grid.settings())}

    def _at(self, flat: np.ndarray, effect: str | None) -> np.ndarray:
        """[effect] as `EdgeEffects.values` has it, of total or direct effects."""
        own = flat.reshape(self.grid.shape)[:, self.grid.number_of(effect)]
        return self._exact.by_node(self._exact.by_edge(own))
