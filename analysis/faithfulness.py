"""From a ranking to a mechanism: joint patches of its top k for growing k, and of random sets beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from deltapatch.analysis.select import select
from deltapatch.analysis.statistics import bootstrap, mean_over, mean_over_pairs
from deltapatch.analysis.tables import Table
from deltapatch.arguments import seed as check_seed
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.given import Intervention, Patch
from deltapatch.interventions.sites import SITES
from deltapatch.results.effects import Effects

_RANKING = -1  # the set number of the ranking's own sets; random ones count from 0


@dataclass(frozen=True)
class Plan:
    """Joint interventions for `deltapatch.run`, in either direction, and what each of them is.

    Attributes:
        interventions: to be run.
        pair, size, group: [intervention], its pair, how many patches it joins, and -1 for the ranking's top
            or the number of the random order that it is the beginning of.
        sizes: the sizes, ascending.
    """

    interventions: list[Intervention]
    pair: np.ndarray
    size: np.ndarray
    group: np.ndarray
    sizes: list[int]

    def by_pair(self, values: np.ndarray, group: int = _RANKING) -> np.ndarray:
        """What `run` found, [intervention], as [pair, size] of the ranking or of one random order."""
        order = np.flatnonzero(self.group == group)
        order = order[np.lexsort((self.size[order], self.pair[order]))]
        return np.asarray(values)[order].reshape(-1, len(self.sizes))

    def curve(
        self,
        values: np.ndarray,
        metric: str,
        level: float = 0.95,
        seed: int = 0,
        over: np.ndarray | None = None,
    ) -> Table:
        """Means over pairs by size, of the ranking and of the random sets, with bootstrap intervals.

        Args:
            values, over: what `run` found, as of `Outcome.terms`: [intervention], and [intervention] or None.
            metric: which that is.

        Returns:
            columns size, the metric, low, high, random, random_low, random_high (of the pairs' means over
            the random sets) and pairs; the random columns are NaN without random sets.
        """
        own = self.by_pair(values)
        per_pair = None if over is None else self.by_pair(over)[:, 0]
        random = np.full((1, *own.shape), np.nan)
        if self.group.max() >= 0:
            random = np.stack([self.by_pair(values, g) for g in range(int(self.group.max()) + 1)])
        columns: dict[str, np.ndarray] = {"size": np.array(self.sizes)}
        for name, found in ((metric, own), ("random", mean_over(random, (0,)))):
            before = "" if name == metric else "random_"
            mean, _, n = mean_over_pairs(found, per_pair)
            low, high = bootstrap(found, level, seed=seed, over=per_pair)
            columns |= {name: mean, f"{before}low": low, f"{before}high": high}
            if name == metric:
                pairs = n
        return Table(columns | {"pairs": pairs}, metric)


def ranking(
    effects: Effects, metric: str, site: str, position: int | str = "last", magnitude: bool = False
) -> "Ranked":
    """The patches of a site at one position, by mean effect over pairs, the largest first.

    Of `logit_diff` in the direction "noise" the largest come last: rank by `recovered`, or by magnitude.

    Args:
        position: as it was swept; the last one by default.
        magnitude: rank by magnitude, so that harmful ones come early too.

    Raises:
        DeltapatchError: the position was not swept.
    """
    swept = effects.positions(site)
    places = [i for i, p in enumerate(swept) if p == position or {p, position} == {-1, "last"}]
    if not places:
        raise DeltapatchError(
            f"position {position!r} of {site} was not swept: there are {', '.join(map(str, swept))}"
        )
    layers, name = effects.layers_of(site), effects.site(site).site
    rows = range(len(layers))  # one by one: a large model's neurons are many
    parts = (select(effects, layers=np.array([row]), sites=[name]) for row in rows)
    means = []
    for values, over in (part.terms(metric, name) for part in parts):
        means.append(mean_over_pairs(values[:, 0, places[0]], over)[0])
    mean = np.stack(means)  # [layer] or [layer, index]
    keys = np.abs(mean) if magnitude else mean
    order = np.argsort(-np.where(np.isnan(keys), -np.inf, keys).ravel(), kind="stable")
    order = order[~np.isnan(mean.ravel()[order])]
    where = np.unravel_index(order, mean.shape)
    indices = where[1] if SITES[name].index.counts else None
    return Ranked(name, layers[where[0]], position, indices)


@dataclass(frozen=True, eq=False)
class Ranked(Sequence[Patch]):
    """Patches of one site in an order; the objects are made when they are asked for, since they may be many.

    Attributes:
        layer: [patch].
        indices: [patch]; None for whole vectors.
    """

    site: str
    layer: np.ndarray
    position: int | str
    indices: np.ndarray | None

    def __len__(self) -> int:
        return len(self.layer)

    @overload
    def __getitem__(self, at: int) -> Patch: ...

    @overload
    def __getitem__(self, at: slice) -> list[Patch]: ...

    def __getitem__(self, at: int | slice) -> Patch | list[Patch]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        index = None if self.indices is None else int(self.indices[at])
        return Patch(self.site, int(self.layer[at]), self.position, index)


def sizes_up_to(n: int) -> list[int]:
    """1, 2, 4, ... and n itself."""
    return sorted({1 << i for i in range(n.bit_length()) if 1 << i <= n} | {n})


def plan(
    ranked: Sequence[Patch],
    n_pairs: int,
    sizes: Sequence[int] | None = None,
    random_sets: int = 3,
    pool: Sequence[Patch] | None = None,
    seed: int = 0,
) -> Plan:
    """The joint interventions of a faithfulness curve.

    Run with direction "denoise" they say how much of the clean answer the top k bring back alone, with
    "noise" how much of it is lost without them.

    Args:
        ranked: patches, the most important first.
        sizes: how many of them are joined; 1, 2, 4, ... and all by default.
        random_sets: how many random orders there are; each is cut at the same sizes.
        pool: what random sets are drawn from, `ranked` by default.

    Raises:
        DeltapatchError: nothing ranked, no pairs, or sizes that cannot be had.
    """
    pool = ranked if pool is None else pool
    if not len(ranked) or n_pairs < 1:
        raise DeltapatchError("a faithfulness curve needs ranked patches and at least one pair")
    chosen = sorted(set(sizes_up_to(len(ranked)) if sizes is None else sizes))
    most = min(len(ranked), len(pool) if random_sets else len(ranked))
    if not chosen or chosen[0] < 1 or chosen[-1] > most:
        raise DeltapatchError(f"sizes go from 1 to {most}, the number of patches, not {list(sizes or ())}")
    rng = np.random.default_rng(check_seed(seed))
    orders = {_RANKING: list(ranked[: chosen[-1]])}
    for group in range(random_sets):
        orders[group] = [pool[i] for i in rng.permutation(len(pool))[: chosen[-1]].tolist()]
    rows = [
        (pair, size, group, order[:size])
        for group, order in orders.items()
        for size in chosen
        for pair in range(n_pairs)
    ]
    about = np.array([row[:3] for row in rows])
    interventions = [Intervention(pair, patches) for pair, _, _, patches in rows]
    return Plan(interventions, about[:, 0], about[:, 1], about[:, 2], chosen)


def needed(curve: Table, share: float = 0.8) -> int | None:
    """The smallest size whose mean is at least a share of that of the largest; None where none has it."""
    values = curve.columns[curve.metric]
    reached = np.flatnonzero(values / values[-1] >= share) if values[-1] else np.array([], dtype=int)
    return int(curve.columns["size"][reached[0]]) if len(reached) else None
