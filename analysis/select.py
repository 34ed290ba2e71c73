"""Parts of a run: some pairs, some layers, some sites, as effects of their own."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from deltapatch.arguments import whole
from deltapatch.errors import DeltapatchError
from deltapatch.results.effects import Effects, SiteEffects


def select(
    effects: Effects,
    pairs: np.ndarray | None = None,
    layers: np.ndarray | None = None,
    sites: Sequence[str] | None = None,
) -> Effects:
    """Some of a run's effects, everything unless told; arrays are shared where what is asked lies together.

    Args:
        pairs: numbers of pairs.
        layers: rows of the layer axis.
        sites: names.
    """
    which, rows = _indices(pairs), _indices(layers)
    found = {}
    for name in sites or effects.sites:
        site = effects.sites[name]
        measured = {key: array[which][:, rows] for key, array in site.measured.items()}
        found[name] = SiteEffects(site.site, site.layers[rows], site.positions, measured)
    own = [effects.pairs[i] for i in np.arange(len(effects.pairs))[which]]
    return replace(effects, sites=found, pairs=own, reference=effects.reference.of(which))


def one_pair(effects: Effects, pair: int) -> Effects:
    """The effects of one pair. DeltapatchError where there is no such pair."""
    pair = whole(pair, "pair must be a whole number")
    if not 0 <= pair < len(effects.pairs):
        raise DeltapatchError(f"there is no pair {pair}: pairs are 0 to {len(effects.pairs) - 1}")
    return select(effects, pairs=np.array([pair]))


def _indices(numbers: np.ndarray | None) -> slice | np.ndarray:
    """A slice, which copies nothing, where the numbers follow each other."""
    if numbers is None:
        return slice(None)
    numbers = np.asarray(numbers)
    if len(numbers) and (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers
