"""Estimates of all effects beside the exact effects of some, and what that says of the others.

What is screened is a grid (screened.py) or a list of interventions (screened_outcome.py).
"""

import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltapatch.arguments import scale
from deltapatch.errors import DeltapatchError, path_of
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.results.folder import plain_errors
from deltapatch.results.metrics import METRICS, Direction, Reference, check_metric, quotient
from deltapatch.results.outcome import Outcome
from deltapatch.results.recall import CONFIDENCE, Recall, in_round
from deltapatch.results.strata import Strata
from deltapatch.results.tensorfile import save_file
from deltapatch.results.wholefile import write_whole

ESTIMATES = "estimates.safetensors"
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


class Estimated(ABC):
    """What is known of effects that were all estimated, and of which some were verified.

    Args:
        verified: the exact effects, each labelled with `effect`, its number among all.
        estimates: [effect], of `by`.
        choice: what was verified, and why.
        by: the number that was estimated.

    Attributes:
        verified: those of the top by estimate (of each pair one at least), and of a random sample of the
            rest, as `run` returns them.
        looks: rounds after which a run with `until` looked at its sample; 0 of any other.
    """

    def __init__(self, verified: Outcome, estimates: np.ndarray, choice: Choice, by: str) -> None:
        self.verified, self.by, self.looks = verified, by, choice.looks
        self._estimates = estimates
        self._stratum, self._strata = choice.stratum, choice.strata
        self._effect = verified.interventions.labels["effect"]  # [intervention]

    def __repr__(self) -> str:
        drawn = int(self._strata.drawn.sum())
        return (
            f"Screened {int((self._stratum != NOTHING).sum()):,} effects of {len(self.pairs)} pair(s) by "
            f"{self.meta['screen']}, {self.direction}; exact: the top {len(self._effect) - drawn:,}, and "
            f"{drawn:,} drawn of the rest\n{self._what}"
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
        own, axes = self._as_file()
        arrays = {
            "estimate": self._estimates,
            "stratum": self._stratum,
            "size": self._strata.size,
            "drawn": self._strata.drawn,
        }
        about = {"by": self.by, "looks": str(self.looks), **axes}
        with plain_errors(path):
            write_whole(path / ESTIMATES, lambda draft: save_file(arrays | own, draft, metadata=about))

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
        self._scale(flat, _factor(metric, self.reference, self.direction))
        return flat

    @property
    def _what(self) -> str:
        """A line on what was screened, where it needs one."""
        return ""

    @abstractmethod
    def _scale(self, flat: np.ndarray, factor: np.ndarray) -> None:
        """Multiply [effect] in place with a factor of each pair."""

    @abstractmethod
    def _as_file(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """What a file keeps of all that was screened: arrays, and text."""


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
