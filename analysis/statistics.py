"""Statistics over pairs: means with standard errors, and bootstrap confidence intervals."""

from collections.abc import Iterator

import numpy as np

from deltapatch.engine.arguments import seed as check_seed

_CHUNK_BYTES = 64_000_000  # of what is held at a time for [draw, cell]


def mean_over_pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[pair, ...] -> mean, standard error and count over pairs that are not NaN; a mean of none is NaN."""
    present = ~np.isnan(values)
    n = present.sum(axis=0)
    mean = divide(np.where(present, values, 0).sum(axis=0), n)
    squares = np.where(present, (values - mean) ** 2, 0).sum(axis=0)
    return mean, np.sqrt(divide(squares, (n - 1) * n)), n


def mean_over(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The mean over some axes of what is not NaN; a mean of none is NaN."""
    present = ~np.isnan(values)
    return divide(np.where(present, values, 0).sum(axis=axes), present.sum(axis=axes))


def bootstrap(
    values: np.ndarray, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """[pair, ...] -> low and high end of the mean's percentile interval, [...]; pairs are drawn anew.

    NaN everywhere for a single pair, which says nothing about the spread. Cells are gone through in parts, so
    that hundreds of thousands of them need little memory; all see the same draws.
    """
    cells = values.reshape(len(values), -1)
    ends = np.full((2, cells.shape[1]), np.nan)
    if len(values) > 1:
        counts = pair_counts(len(values), draws, seed)
        tail = (1 - level) / 2
        for part in parts(cells.shape[1], draws):
            means = resampled_means(cells[:, part], counts)
            some = ~np.isnan(means).all(axis=0)
            ends[:, part][:, some] = _ends(means[:, some], tail)
    return ends[0].reshape(values.shape[1:]), ends[1].reshape(values.shape[1:])


def pair_counts(n: int, draws: int, seed: int) -> np.ndarray:
    """[draw, pair], how often each draw takes each of n pairs: a draw's mean is a product and not a copy."""
    return (
        np.random.default_rng(check_seed(seed))
        .multinomial(n, np.full(n, 1 / n), size=draws)
        .astype(np.float64)
    )


def resampled_means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[pair, cell], [draw, pair] -> [draw, cell], the mean of each draw over what is not NaN."""
    present = ~np.isnan(values)
    if present.all():
        return counts @ values / len(values)
    return divide(counts @ np.where(present, values, 0), counts @ present)


def parts(cells: int, draws: int) -> Iterator[slice]:
    """Slices of the cells, so many at a time that [draw, cell] stays small."""
    size = max(1, _CHUNK_BYTES // (8 * draws))
    return (slice(start, start + size) for start in range(0, cells, size))


def _ends(means: np.ndarray, tail: float) -> np.ndarray:
    """The quantiles of each cell; a draw may have none of the pairs that a cell has."""
    quantile = np.nanquantile if np.isnan(means).any() else np.quantile
    return quantile(means, [tail, 1 - tail], axis=0)


def divide(total: np.ndarray, n: np.ndarray) -> np.ndarray:
    """total / n, and NaN where n is not positive."""
    return np.divide(total, n, out=np.full(np.shape(total), np.nan), where=n > 0)
