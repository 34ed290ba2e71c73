"""Magnitudes with their uncertainty: means, intervals, p-values and false-discovery rates."""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from deltapatch.analysis.significance import POOLED_FROM, benjamini_hochberg, out_of_reach, sign_flip_test
from deltapatch.analysis.statistics import bootstrap, mean_over_pairs
from deltapatch.analysis.tables import Table, check_groups, collect, medians
from deltapatch.errors import DeltapatchError
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.effects import Effects


def magnitudes(
    effects: Effects | EdgeEffects,
    metrics: str | Sequence[str],
    by: Iterable[str],
    sites: Sequence[str] | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    pooled: bool | None = None,
) -> Table:
    """Means over pairs of each group of cells, with intervals, p-values and false-discovery rates.

    Args:
        metrics: as of `tables.averages`.
        by: what to keep apart, as of `tables.averages`, but not pair.
        level: of the bootstrap interval over pairs.
        draws: bootstrap draws, and random sign patterns of the test.
        pooled: see `significance.sign_flip_test`; from a thousand cells on by default.

    Returns:
        A table with columns site, the names in `by`, the metric, median (as of `tables.averages`), stderr,
        low, high, p (sign-flip test that the mean is zero), q (Benjamini-Hochberg, over all rows of all
        sites) and pairs. Of several metrics the columns beside each are called <metric>_low and so on.

    Raises:
        DeltapatchError: groups that do not exist, a level not between 0 and 1, fewer than two pairs.
    """
    by = check_groups(by)
    if "pair" in by:
        raise DeltapatchError("intervals and tests are over pairs: do not group by pair")
    check_draws(level, draws)
    if len(effects.pairs) < 2:
        raise DeltapatchError("intervals and tests are over pairs, and this run has one pair only")

    def numbers(metric: str, values: np.ndarray, over: np.ndarray | None) -> dict[str, np.ndarray]:
        return with_uncertainty(metric, values, over, level=level, draws=draws, seed=seed, pooled=pooled)

    table = collect(effects, metrics, by, sites, numbers)
    columns: dict[str, np.ndarray] = {}
    for name, column in table.columns.items():
        columns[name] = column
        if name == "p" or name.endswith("_p"):
            columns[f"{name[:-1]}q"] = benjamini_hochberg(column)
    return Table(columns, table.metric)


def with_uncertainty(
    metric: str,
    values: np.ndarray,
    over: np.ndarray | None,
    *,
    level: float,
    draws: int,
    seed: int,
    pooled: bool | None = None,
) -> dict[str, np.ndarray]:
    """Means over pairs of a metric's terms, [pair, ...] and [pair] or None, and how sure they are.

    Returns:
        The metric, median (as of `tables.averages`), stderr, low, high, p and pairs, each [...].
    """
    mean, stderr, n = mean_over_pairs(values, over)
    low, high = bootstrap(values, level, draws, seed, over)
    many = mean.size >= POOLED_FROM if pooled is None else pooled
    # A ratio of means is zero where its numerator is.
    p = sign_flip_test(values, draws, seed, many)
    found = {metric: mean} | medians(metric, values) | {"stderr": stderr, "low": low, "high": high}
    return found | {"p": p, "pairs": n}


def check_draws(level: float, draws: int) -> None:
    """Raise DeltapatchError where an interval has no such level, or there are no draws."""
    if not 0 < level < 1:
        raise DeltapatchError(f"the level of an interval lies between 0 and 1, as 0.95 does, not {level}")
    if draws < 1:
        raise DeltapatchError(f"intervals and tests need at least one draw, not {draws}")


def discoveries(table: Table, rate: float, draws: int = 1000) -> Table:
    """The rows of a table with q, that of its first metric, at most `rate`.

    Warns where so few pairs, or so few draws of the test, let nothing come below the rate.

    Raises:
        DeltapatchError: the rate is no rate.
    """
    if not 0 < rate <= 1:
        raise DeltapatchError(f"a false-discovery rate lies between 0 and 1, as 0.05 does, not {rate}")
    _, rows = np.unique(
        table.columns.get("site", table.columns.get("effect", np.zeros(len(table)))), return_counts=True
    )
    pooled = bool((rows >= POOLED_FROM).any())
    said = (
        out_of_reach(int(table.columns["pairs"].max(initial=0)), rate, draws, pooled) if len(table) else None
    )
    if said is not None:
        warnings.warn(said, stacklevel=2)
    q = table.columns["q" if "q" in table.columns else f"{table.metric}_q"]
    kept = np.flatnonzero(q <= rate)
    return Table({name: column[kept] for name, column in table.columns.items()}, table.metric)
