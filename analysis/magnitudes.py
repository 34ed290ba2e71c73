"""Magnitudes with their uncertainty: means, intervals, p-values and false-discovery rates."""

from collections.abc import Iterable, Sequence

import numpy as np

from deltapatch.analysis.significance import benjamini_hochberg, sign_flip_test
from deltapatch.analysis.statistics import bootstrap, mean_over_pairs
from deltapatch.analysis.tables import Table, as_columns, check_groups, grouped
from deltapatch.engine.effects import Effects
from deltapatch.errors import DeltapatchError

_POOLED_FROM = 1000  # cells from which a p-value has to be finer than one cell's own sign patterns make it


def magnitudes(
    effects: Effects,
    metric: str,
    by: Iterable[str],
    sites: Sequence[str] | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    pooled: bool | None = None,
) -> Table:
    """Means over pairs of each group of cells, with intervals, p-values and false-discovery rates.

    Args:
        by: what to keep apart, as of `tables.averages`, but not pair.
        level: of the bootstrap interval over pairs.
        draws: bootstrap draws, and random sign patterns of the test.
        pooled: see `significance.sign_flip_test`; from a thousand cells on by default.

    Returns:
        A table with columns site, the names in `by`, the metric, stderr, low, high, p (sign-flip test that
        the mean is zero), q (Benjamini-Hochberg, over all rows of all sites) and pairs.

    Raises:
        DeltapatchError: groups that do not exist, a level not between 0 and 1, fewer than two pairs.
    """
    by = check_groups(by)
    if "pair" in by:
        raise DeltapatchError("intervals and tests are over pairs: do not group by pair")
    if not 0 < level < 1:
        raise DeltapatchError(f"the level of an interval lies between 0 and 1, as 0.95 does, not {level}")
    if draws < 1:
        raise DeltapatchError(f"intervals and tests need at least one draw, not {draws}")
    if len(effects.pairs) < 2:
        raise DeltapatchError("intervals and tests are over pairs, and this run has one pair only")
    parts = []
    for site in sites or effects.sites:
        values, axes, coordinates = grouped(effects, metric, by, site)
        mean, stderr, n = mean_over_pairs(values)
        low, high = bootstrap(values, level, draws, seed)
        many = mean.size >= _POOLED_FROM if pooled is None else pooled
        p = sign_flip_test(values, draws, seed, many)
        numbers = {metric: mean, "stderr": stderr, "low": low, "high": high, "p": p, "pairs": n}
        parts.append(as_columns(numbers, axes, coordinates, by, effects.site(site).site))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    pairs = columns.pop("pairs")
    return Table(columns | {"q": benjamini_hochberg(columns["p"]), "pairs": pairs}, metric)


def discoveries(table: Table, rate: float) -> Table:
    """The rows of a table with q at most `rate`; DeltapatchError where the rate is no rate."""
    if not 0 < rate <= 1:
        raise DeltapatchError(f"a false-discovery rate lies between 0 and 1, as 0.05 does, not {rate}")
    kept = np.flatnonzero(table.columns["q"] <= rate)
    return Table({name: column[kept] for name, column in table.columns.items()}, table.metric)
