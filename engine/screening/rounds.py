"""A screened sweep that goes on until it has found enough: the top grows, then samples grow beside it.

First the top alone grows, while its lower half still has a good share of all large effects found. Then come
rounds, each with a longer top and a larger sample of the rest than the one before. Nothing of this follows
from what a sample found, but when to stop: results/recall.py says why the bound holds all the same.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import numpy as np

from deltapatch.engine.screening.screen import SAMPLE_UNLESS_GIVEN, Screen, first_sizes
from deltapatch.results.estimated import Choice, Estimated
from deltapatch.results.outcome import Outcome
from deltapatch.results.recall import Recall, in_round

Verify = Callable[[np.ndarray, int], Outcome]


def verify_until(screen: Screen, verify: Verify) -> Estimated:
    """Verify until it is enough.

    Args:
        screen: of a sweep with `until`.
        verify: computes some effects exactly, [effect], in the run of that number, from 1; each labelled as
            `Screen.listed` does.
    """
    return _Rounds(screen, verify).run()


class _Rounds:
    """The rounds of one sweep; arguments as of `verify_until`."""

    def __init__(self, screen: Screen, verify: Verify) -> None:
        self.screen, self.verify, options = screen, verify, screen.options
        assert options.until is not None
        assert options.threshold is not None
        self.goal, self.threshold = Recall.of(options.until), options.threshold
        self.most = min(len(screen.can), options.screen_limit or len(screen.can))
        self.large = np.zeros(len(screen.estimates), dtype=bool)  # of what was verified
        self.parts: list[Outcome] = []

    def run(self) -> Estimated:
        """All of them."""
        top = self._top()
        choice = self.screen.choose_nested(top, 0)
        sample = self._sample(int(self.large.sum()), choice.strata.unseen)
        for k in count(1):
            last = top + sample >= self.most
            choice = replace(self.screen.choose_nested(top, sample), looks=k)
            self._verify(choice)
            drawn = self.large & (choice.stratum == 0)
            at_most = choice.strata.at_most(np.array([drawn.sum()]), in_round(self.goal.confidence, k))
            found = int(self.large.sum())
            self._say(
                f"round {k}: {found:,} of {len(choice.effects):,} exact effects are large; of the "
                f"{choice.strata.unseen:,} others at most {at_most:,}"
            )
            if last or self.goal.reached(found, at_most):
                return self.screen.result(self._joined(choice), choice)
            before, top, sample = top, 2 * top, 2 * sample
            if top + sample > self.most:
                sample = min(sample, self.most - before)
                top = self.most - sample
        raise AssertionError

    def _top(self) -> int:
        """How long the top is before anything is drawn; its effects are verified."""
        top = min(max(1, first_sizes(self.screen.options)[0]), self.most)
        while True:
            choice = self.screen.choose_nested(top, 0)
            self._verify(choice)
            upper = self.large[self.screen.choose_nested(top // 2, 0).effects].sum()
            found = self.large.sum()
            if found - upper <= (1 - self.goal.share) * found or 4 * top > self.most:
                return top
            top *= 2

    def _sample(self, found: int, rest: int) -> int:
        """How large the first sample is, where so many are large at the top."""
        given = self.screen.options.screen_sample
        needed = self.goal.draws(found, rest) if found else SAMPLE_UNLESS_GIVEN
        share = f"{100 * self.goal.share:g}%"
        self._say(
            f"{found:,} effects of the top are large: to know that these are {share} of all, {needed:,} of "
            f"the {rest:,} others have to be drawn if none of them is large, and more if some are"
        )
        top = len(self.screen.can) - rest
        return min(needed if given is None else max(1, given), max(0, self.most - top))

    def _verify(self, choice: Choice) -> None:
        """Compute what of a choice is not known yet."""
        known = [part.interventions.labels["effect"] for part in self.parts]
        new = np.setdiff1d(choice.effects, np.concatenate([np.empty(0, np.int64), *known]))
        if len(new):
            part = self.verify(new, len(self.parts) + 1)
            self.parts.append(part)
            size = np.abs(part.values(self.screen.by))
            self.large[part.interventions.labels["effect"]] = size > self.threshold

    def _joined(self, choice: Choice) -> Outcome:
        """What all runs found, as if it had been one."""
        first, metas = self.parts[0], [part.meta for part in self.parts]
        known = np.concatenate([part.interventions.labels["effect"] for part in self.parts])
        listed = self.screen.listed(choice.effects, self.screen.spec, self.screen.pairs)
        order = np.argsort(known)
        at = order[np.searchsorted(known[order], listed.labels["effect"])]
        measured = {
            name: np.concatenate([part.measured[name] for part in self.parts])[at] for name in first.measured
        }
        sums = {name: sum(meta[name] for meta in metas) for name in ("passes", "rows", "seconds")}
        return replace(first, measured=measured, interventions=listed, meta=first.meta | sums)

    def _say(self, text: str) -> None:
        if self.screen.options.progress:
            print(text, file=sys.stderr)
