"""Screened sweeps: estimates of all effects, exact effects of some, and what that says of the others."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from deltapatch.arguments import scale
from deltapatch.errors import DeltapatchError, path_of
from deltapatch.interventions.grid import Grid
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.sites import find_site
from deltapatch.models.header import open_safetensors
from deltapatch.results.effects import AXES, import_pandas, is_labelled, position_column
from deltapatch.results.folder import plain_errors
from deltapatch.results.metrics import (
    METRICS,
    Direction,
    Function,
    Reference,
    asked_of,
    check_metric,
    quotient,
)
from deltapatch.results.outcome import Outcome
from deltapatch.results.reading import load_outcome
from deltapatch.results.recall import CONFIDENCE, Recall, in_round
from deltapatch.results.strata import Strata
from deltapatch.results.tensorfile import save_file
from deltapatch.results.wholefile import write_whole

ESTIMATES = "estimates.safetensors"
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
TOP, NOTHING = -1, -2  # in the place of strata: the top, and what is no effect or can only be zero
# What follows, to first order, from the change of a measured number.
FIRST_ORDER = {
    "logit_diff": ("logit_diff", "ie", "recovered"),
    "dlogp_clean": ("dlogp_clean", "dp_clean"),
    "dlogp_corrupted": ("dlogp_corrupted", "dp_corrupted"),
}


@dataclass(frozen=True)
class Missed:
    """How many large effects are there that nobody looked at.

    Attributes:
        metric: of the effects.
        threshold: those are large whose magnitude is above it.
        found: large ones among those that were verified.
        at_most: large ones among all others, with this confidence.
        unseen: how many were not verified.
        confidence: that the bound holds, over the draws of the sample.
    """

    metric: str
    threshold: float
    found: int
    at_most: int
    unseen: int
    confidence: float

    @property
    def recall(self) -> float:
        """The share of all large effects that were found, at least, with this confidence; NaN of none."""
        all_ = self.found + self.at_most
        return self.found / all_ if all_ else float("nan")

    def __str__(self) -> str:
        return (
            f"{self.found:,} verified effects have |{self.metric}| above {self.threshold:.4g}; with "
            f"{100 * self.confidence:g}% confidence at most {self.at_most:,} of the {self.unseen:,} not "
            "looked at have"
        )


@dataclass(frozen=True)
class Choice:
    """What is computed exactly: the largest estimates, and a sample of all others that can have an effect.

    Attributes:
        stratum: [effect], TOP, NOTHING or a number of `strata`.
        strata: of what is not at the top.
        effects: ascending, what is at the top or was drawn.
        looks: in which round of a sweep with `until` this is; 0 of what is looked at once.
    """

    stratum: np.ndarray
    strata: Strata
    effects: np.ndarray
    looks: int = 0


class Screened:
    """What a screened sweep found.

    Args:
        verified: the exact effects, each labelled with `effect`, which it is of the grid's.
        grid: all that was screened, as axes.
        estimates: [effect], of `by`.
        choice: what was verified, and why.
        by: the number that was estimated.

    Attributes:
        verified: those of the top by estimate (of each pair one at least), and of a random sample of the
            rest, as `run` returns them.
        looks: rounds after which a sweep with `until` looked at its sample; 0 of any other.
    """

    def __init__(self, verified: Outcome, grid: Grid, estimates: np.ndarray, choice: Choice, by: str) -> None:
        self.verified, self.by, self.looks = verified, by, choice.looks
        self._grid, self._estimates = grid, estimates
        self._stratum, self._strata = choice.stratum, choice.strata
        self._effect = verified.interventions.labels["effect"]  # [intervention]

    def __repr__(self) -> str:
        drawn = int(self._strata.drawn.sum())
        return (
            f"Screened {int((self._stratum != NOTHING).sum()):,} effects of {len(self.pairs)} pair(s) by "
            f"{self.meta['screen']}, {self.direction}; exact: the top {len(self._effect) - drawn:,}, and "
            f"{drawn:,} drawn of the rest\n  sites: {', '.join(self.sites)}\n"
            f"  metrics: {', '.join(self.metrics)}; estimated: {', '.join(self.estimated)}"
        )

    @property
    def pairs(self) -> list[EncodedPair]:
        """Of prompts."""
        return self.verified.pairs

    @property
    def reference(self) -> Reference:
        """The unpatched runs."""
        return self.verified.reference

    @property
    def direction(self) -> Direction:
        """Of the sweep."""
        return self.verified.direction

    @property
    def meta(self) -> dict[str, Any]:
        """What was run."""
        return self.verified.meta

    @property
    def sites(self) -> list[str]:
        """Names of the sites that were screened."""
        return [g.site.name for g in self._grid.sites]

    @property
    def metrics(self) -> list[str]:
        """The metrics that `values` can answer."""
        return self.verified.metrics

    @property
    def estimated(self) -> tuple[str, ...]:
        """The metrics that `estimate` can answer."""
        return FIRST_ORDER[self.by]

    def accuracy(self) -> float:
        """As of `Effects.accuracy`, of the pairs that were run."""
        return self._known.accuracy()

    def caveat(self) -> str | None:
        """As of `Effects.caveat`, of the pairs that were run."""
        return self._known.caveat()

    @property
    def _known(self) -> Reference:
        """The unpatched runs of pairs that have an effect to be verified."""
        return self.reference.of(~np.isnan(self.reference.logp).any((1, 2)))

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

    def weights(self) -> np.ndarray:
        """[intervention], how many effects each of `verified` stands for: 1 at the top, more in a stratum."""
        stratum = self._stratum[self._effect]
        each = np.append(self._strata.size / np.maximum(self._strata.drawn, 1), 1.0)  # TOP is the last
        found: np.ndarray = each[stratum]
        return found

    def estimates_of_verified(self, metric: str | None = None) -> np.ndarray:
        """[intervention], the estimates of what was verified; as of `estimate`."""
        found: np.ndarray = self._estimated(self.by if metric is None else metric)[self._effect]
        return found

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

    def missed(
        self, threshold: float | None = None, metric: str | None = None, confidence: float = CONFIDENCE
    ) -> Missed:
        """A bound on how many large effects are among those that were not looked at (see strata.py).

        It holds for a threshold that is fixed before the sample is seen: one that is given beforehand, or the
        default, which follows from the top alone. It holds with its confidence for sweeps with `until`, too,
        which looked at it in several rounds before they stopped.

        Args:
            threshold: magnitudes above it are large; by default what the sweep was given, for what was
                screened by, or the median magnitude of the top.
            metric: of `metrics`; what was screened by, unless told.
            confidence: from 0.5 to below 1.

        Raises:
            DeltapatchError: an unknown metric, one that is undefined for some pair, or a number out of range.
        """
        name = self.by if metric is None else metric
        size, stratum = np.abs(self.verified.values(name)), self._stratum[self._effect]
        if np.isnan(size).any():
            raise DeltapatchError(
                f"{name} is NaN for some of what was verified: use {self.by}, or finish the parts of the run"
            )
        if threshold is None and name == self.by:
            threshold = self.meta.get("threshold")
        limit = float(np.median(size[stratum == TOP])) if threshold is None else scale(threshold, "threshold")
        large = size > limit
        counts = np.bincount(stratum[large & (stratum >= 0)], minlength=len(self._strata.size))
        sure = in_round(confidence, self.looks) if self.looks else confidence
        bound = self._strata.at_most(counts, sure)
        return Missed(name, limit, int(large.sum()), bound, self._strata.unseen, confidence)

    @property
    def goal(self) -> Recall | None:
        """What the sweep went on until."""
        until = self.meta.get("until")
        return None if until is None else Recall.of(until)

    @property
    def confidence(self) -> float:
        """That of its goal, or 0.95."""
        return CONFIDENCE if self.goal is None else self.goal.confidence

    @property
    def reached(self) -> bool:
        """Whether it found what it went on until; False of a sweep that has no goal."""
        missed = self.missed(confidence=self.confidence)
        return self.goal is not None and self.goal.reached(missed.found, missed.at_most)

    @property
    def verdict(self) -> str | None:
        """How a sweep with `until` ended, in words."""
        if self.goal is None:
            return None
        recall = self.missed(confidence=self.confidence).recall
        least = "100%" if math.isnan(recall) else f"{math.floor(1000 * recall) / 10:g}%"
        found = f"at least {least} of the large effects were found"
        wanted, rounds = f"{100 * self.goal.share:g}%", f"{self.looks} round{'' if self.looks == 1 else 's'}"
        if self.reached:
            return f"enough after {rounds}: {found}, and {wanted} was asked for"
        return (
            f"NOT enough: the limit of {self.meta['screen_limit']:,} exact effects ended after {rounds}; "
            f"{found}, and {wanted} was asked for: raise screen_limit or threshold, or ask for less"
        )

    def shapes(self) -> dict[str, Any]:
        """The axes of every site, for programs."""
        n_pairs = self._grid.n_pairs
        return {
            "sites": {g.site.name: dict(zip(AXES, g.shape(n_pairs), strict=False)) for g in self._grid.sites}
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a run folder, which `load_screened` reads.

        Raises:
            DeltapatchError: the path is taken or cannot be written.
        """
        path = path_of(path, "a run folder")
        self.verified.save(path)
        self.put_estimates(path)

    def put_estimates(self, path: Path) -> None:
        """Write the estimates into the run folder of `verified`."""
        arrays = {
            "estimate": self._estimates,
            "stratum": self._stratum,
            "size": self._strata.size,
            "drawn": self._strata.drawn,
        }
        about = {"by": self.by, "looks": str(self.looks), "grid": json.dumps(self._grid.settings())}
        with plain_errors(path):
            write_whole(path / ESTIMATES, lambda draft: save_file(arrays, draft, metadata=about))

    def _estimated(self, metric: str) -> np.ndarray:
        """[effect], of a metric."""
        if metric not in self.estimated:
            check_metric(metric)
            by = next((by for by, names in FIRST_ORDER.items() if metric in names), None)
            other = f"screen again with screen_by={by!r}" if by else "no gradient of one number gives it"
            raise DeltapatchError(
                f"{metric} does not follow from the estimates of {self.by}, but {', '.join(self.estimated)} "
                f"do: {other}"
            )
        flat = self._estimates.astype(np.float64)
        factor = _factor(metric, self.reference, self.direction)  # [pair]
        for g in self._grid.sites:
            shape = g.shape(self._grid.n_pairs)
            own = flat[g.offset : g.offset + math.prod(shape)].reshape(len(self.pairs), -1)
            own *= factor[:, None]
        return flat

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


def load_screened(path: str | os.PathLike[str]) -> Screened:
    """The result of a screened sweep in a run folder.

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


def _read(verified: Outcome, arrays: dict[str, np.ndarray], about: dict[str, str]) -> Screened:
    """What a file holds, checked. ValueError, KeyError or TypeError where it makes no sense."""
    axes = json.loads(about["grid"]) | {"source": verified.meta["source"], "direction": verified.direction}
    if not all(type(position) in (int, str) for position in axes["positions"]):
        raise ValueError("positions")
    grid = Grid.of_settings(axes, len(verified.pairs))
    estimates, stratum, size, drawn = (arrays[name] for name in ("estimate", "stratum", "size", "drawn"))
    effect = verified.interventions.labels["effect"]
    whole = all(a.ndim == 1 and a.dtype == np.int64 for a in (stratum, size, drawn, effect))
    fits = len(estimates) == len(stratum) == grid.n_effects and len(size) == len(drawn)
    if not whole or not fits or estimates.dtype not in (np.float32, np.float64):
        raise ValueError("arrays do not fit the grid")
    inside = (stratum >= NOTHING) & (stratum < len(size))
    if not inside.all() or (effect < 0).any() or (effect >= grid.n_effects).any():
        raise ValueError("numbers out of range")
    mine = stratum[effect]
    right = len(np.unique(effect)) == len(effect) and (mine != NOTHING).all()
    right &= (np.bincount(stratum[stratum >= 0], minlength=len(size)) == size).all()
    right &= (np.bincount(mine[mine >= 0], minlength=len(size)) == drawn).all()
    if not right or about["by"] not in FIRST_ORDER:
        raise ValueError("strata do not fit what was verified")
    choice = Choice(stratum, Strata(size, drawn), np.sort(effect), int(about.get("looks", 0)))
    if (choice.looks > 0) != (verified.meta.get("until") is not None):
        raise ValueError("looks")
    return Screened(verified, grid, estimates, choice, about["by"])


def _factor(metric: str, reference: Reference, direction: Direction) -> np.ndarray:
    """[pair], how a metric moves with what it follows from, to first order."""
    n, base = len(reference.logp), 1 if direction == "denoise" else 0
    if metric in ("dp_clean", "dp_corrupted"):
        found: np.ndarray = np.exp(reference.logp[:, base, int(metric == "dp_corrupted")])
        return found
    if metric == "ie":
        return np.full(n, 0.5 if direction == "denoise" else -0.5)
    over = METRICS[metric].over
    return quotient(metric, np.ones(n), None if over is None else over(reference, direction))
