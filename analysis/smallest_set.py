"""Which set of parts is enough: the smallest that recovers a share, found by greedy or beam search.

Each step of the search is one sweep of joint patches. Beside it stands what most do instead: the top k by
single effects.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltapatch.analysis.interactions import Parts
from deltapatch.analysis.part_sets import PartSets, each_alone, growing
from deltapatch.analysis.tables import Table
from deltapatch.arguments import scale, whole
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs_file import Pairs
from deltapatch.interventions.parts import Part, names_of
from deltapatch.models.model import Model

METHODS = ("top", "search", "pruned")


@dataclass(frozen=True)
class Step:
    """The best set of one size that a method knows.

    Attributes:
        method: "top", the parts with the largest single effects; "search", greedy or beam; "pruned", what is
            left of the found set when parts are taken out again.
        members: numbers of parts, ascending.
        recovered, low, high: mean over pairs (a ratio of means) and its 95% bootstrap interval over pairs.
    """

    method: str
    members: tuple[int, ...]
    recovered: float
    low: float
    high: float


@dataclass(frozen=True, repr=False)
class SmallestSet:
    """What `smallest_set` found.

    Attributes:
        candidates: [part], as they were asked for.
        share: that was to be recovered.
        steps: of every method, size by size.
        rows: how many joint patches were carried out.
    """

    candidates: tuple[Part, ...]
    share: float
    steps: list[Step]
    rows: int

    def smallest(self, method: str | None = None) -> Step | None:
        """The smallest set that recovers the share, of one method or of all; None where there is none.

        Raises:
            DeltapatchError: no such method.
        """
        if method is not None and method not in METHODS:
            raise DeltapatchError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
        enough = [s for s in self.steps if method in (None, s.method) and s.recovered >= self.share]
        return min(enough, key=lambda s: (len(s.members), -s.recovered), default=None)

    @property
    def parts(self) -> list[Part]:
        """The smallest set that recovers the share; empty where none does."""
        best = self.smallest()
        return [self.candidates[i] for i in best.members] if best else []

    @property
    def recovered(self) -> float:
        """What it recovers; NaN where none recovers the share."""
        best = self.smallest()
        return best.recovered if best else float("nan")

    def curve(self, method: str) -> tuple[np.ndarray, np.ndarray]:
        """Sizes and what the method's sets recover, each [step]."""
        mine = sorted((len(s.members), s.recovered) for s in self.steps if s.method == method)
        size, recovered = np.array(mine).reshape(-1, 2).T
        return size.astype(np.int64), recovered

    def table(self, *, parts: bool = False) -> Table:
        """A row a step: method, size, recovered, low, high; and the names of its `parts`, where asked for."""
        columns: dict[str, np.ndarray] = {
            "method": np.array([s.method for s in self.steps], dtype=object),
            "size": np.array([len(s.members) for s in self.steps]),
        }
        for name in ("recovered", "low", "high"):
            columns[name] = np.array([getattr(s, name) for s in self.steps])
        if parts:
            names = names_of(self.candidates)
            joined = ["; ".join(names[i] for i in s.members) for s in self.steps]
            columns["parts"] = np.array(joined, dtype=object)
        return Table(columns, "recovered")

    def in_words(self) -> list[str]:
        """What the search and the top k need, in lines."""
        lines = []
        for method in METHODS:
            best = self.smallest(method)
            if best is not None:
                lines.append(f"{method}: {len(best.members)} parts recover {best.recovered:.3f}")
            elif method != "pruned":
                most = max((s.recovered for s in self.steps if s.method == method), default=float("nan"))
                lines.append(f"{method}: no set that was tried recovers {self.share:g}; at most {most:.3f}")
        return lines

    def __repr__(self) -> str:
        names = names_of(self.candidates)
        best = self.smallest()
        found = ", ".join(names[i] for i in best.members) if best else "none"
        title = f"Smallest set of {len(names)} parts that recovers {self.share:g}: {found}"
        return "\n".join([title, *(f"  {line}" for line in self.in_words())])


def smallest_set(
    model: Model,
    pairs: Pairs,
    parts: Parts,
    *,
    share: float = 0.9,
    beam: int = 1,
    most: int | None = None,
    **options: Any,
) -> SmallestSet:
    """Search for the smallest set of some parts whose joint patch recovers a share of the logit difference.

    Forward: from the best single part on, the part is added that makes the joint effect largest, all
    candidates being tried in one sweep of joint patches; with a `beam` of b the best b sets of each size go
    on. Then backward: as long as the share stays recovered, the part that is missed least is taken out.
    "Recovered" is the ratio of means over pairs, as everywhere. The set is the best on these pairs: hold it
    to others with `run`.

    Args:
        model, pairs: as of `sweep`.
        parts: the candidates, as of `interactions`. One that a pair does not have adds nothing there.
        share: to be recovered, above 0.
        beam: how many sets of each size are followed; 1 is greedy.
        most: the largest size that is tried; all by default.
        options: those of `run`, such as direction, precision and seed. No run folder is written.

    Raises:
        DeltapatchError: bad input, as of `interactions`; pairs whose two runs have one logit difference in
            the mean, of which nothing can be recovered.
    """
    share = scale(share, "share")
    if not share > 0:
        raise DeltapatchError(f"share must be above 0, as 0.9 is, not {share:g}")
    beam = _at_least_one(beam, "beam")
    runs = PartSets(model, pairs, parts, "recovered", options)
    n = len(runs)
    most = n if most is None else min(n, _at_least_one(most, "most"))
    single = each_alone(n)
    alone = runs.effects(single)
    mean = runs.mean(alone)
    if np.isnan(mean).any():
        raise DeltapatchError(
            "recovered is undefined: clean and corrupted runs have the same mean logit difference"
        )
    top = growing(np.argsort(-mean, kind="stable")[None])[0, :most]
    steps = list(_steps(runs, "top", top, runs.effects(top)))
    found = list(_search(runs, (single, alone), share, beam, most))
    steps += found
    if found[-1].recovered >= share:
        steps += _pruned(runs, found[-1], share)
    return SmallestSet(runs.parts, share, steps, runs.rows)


def _search(
    runs: PartSets, first: tuple[np.ndarray, np.ndarray], share: float, beam: int, most: int
) -> Iterator[Step]:
    """The best set of each size that is found, until one recovers the share.

    Args:
        first: the sets of one part, and their effects.
    """
    sets, effects = first
    while True:
        mean = runs.mean(effects)
        best = np.argsort(-mean, kind="stable")[:beam]
        yield next(_steps(runs, "search", sets[best[:1]], effects[:, best[:1]]))
        size = int(sets[0].sum())
        if mean[best[0]] >= share or size == most:
            return
        grown = sets[best][:, None, :] | np.eye(len(runs), dtype=bool)  # [beam, part that joins, part]
        grown = grown[~sets[best]]  # but for the parts that it has
        sets = np.unique(grown, axis=0)
        effects = runs.effects(sets)


def _pruned(runs: PartSets, found: Step, share: float) -> Iterator[Step]:
    """What is left of a set when parts are taken out, one by one, and it still recovers the share."""
    kept = np.array(found.members)
    while len(kept) > 1:
        sets = np.zeros((len(kept), len(runs)), dtype=bool)
        sets[:, kept] = ~np.eye(len(kept), dtype=bool)
        effects = runs.effects(sets)
        mean = runs.mean(effects)
        best = int(mean.argmax())
        if mean[best] < share:
            return
        yield next(_steps(runs, "pruned", sets[[best]], effects[:, [best]]))
        kept = np.delete(kept, best)


def _steps(runs: PartSets, method: str, sets: np.ndarray, effects: np.ndarray) -> Iterator[Step]:
    """What is told of some sets, [set, part], and their effects, [pair, set]."""
    mean, (low, high) = runs.mean(effects), runs.interval(effects)
    for i, members in enumerate(sets):
        yield Step(
            method, tuple(np.flatnonzero(members).tolist()), float(mean[i]), float(low[i]), float(high[i])
        )


def _at_least_one(value: object, name: str) -> int:
    found = whole(value, f"{name} must be a whole number")
    if found < 1:
        raise DeltapatchError(f"{name} must be at least 1, not {found}")
    return found
