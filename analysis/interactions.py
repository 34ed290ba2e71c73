"""How two parts interact: the effect of both minus the effects of each, of all pairs of parts, in one sweep.

The interaction is a second difference, so its rounding is told, and the precision chosen, by its own size.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deltapatch.analysis.magnitudes import check_draws, with_uncertainty
from deltapatch.analysis.significance import benjamini_hochberg
from deltapatch.analysis.statistics import mean_over_pairs
from deltapatch.analysis.tables import Table
from deltapatch.engine.options import Options, takes
from deltapatch.engine.sweep import run_listed
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.given import Listed, Patch
from deltapatch.interventions.joint import Joint, checked_parts
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.pairs_file import Pairs, lasting
from deltapatch.interventions.parts import Part
from deltapatch.interventions.roles import Roles
from deltapatch.interventions.sites import SITES
from deltapatch.models.model import Model
from deltapatch.models.spec import ModelSpec
from deltapatch.results.effects import Effects
from deltapatch.results.interactions import PAIR_OF_PARTS, Interactions, check_additive
from deltapatch.results.metrics import METRICS, default_metric

Parts = Sequence[Patch | Part | tuple[Any, ...]]

TOLERANCE = 1e-2  # what rounding may make of interactions, relative to their norm
_SAMPLED, _PAIRS = 16, 4  # pairs of parts whose interactions are computed twice, and prompt pairs


@takes(Options)
def interactions(model: Model, pairs: Pairs, parts: Parts, **options: Any) -> Interactions:
    """Patch each of some parts alone, each two jointly, and all at once, in every prompt pair, in one sweep.

    The interaction of two parts is the effect of both minus the effects of each. It is a second difference,
    often much smaller than the effects: `precision="auto"` is here float32, or float64 where a sample of the
    interactions themselves (at most 16, in 4 prompt pairs; none with `noise_sample=0`) is more than 1e-2 off
    in float32. `metrics="all"` are here those of which effects add up.

    Args:
        model, pairs: as of `sweep`. Take other pairs than those that the parts were chosen on.
        parts: patches, or (site, layer, position, index), of any sites, layers and positions; a position may
            be "together", all of the prompt at once. What a prompt pair does not have is NaN there.
        {options}

    Returns:
        Interactions: `values(metric)` is [pair, part, part], symmetric, with NaN on the diagonal.

    Raises:
        DeltapatchError: bad input; fewer than two parts, two that are one activation, one that no pair has;
            a metric of which effects do not add up.

    Warns:
        where some pairs do not have a part; where the precision does not keep second differences.
    """
    given = checked_parts(parts)
    pairs = lasting(pairs)
    options = options | {"metrics": _additive(options.get("metrics", "all"))}
    asked = Options(**options)
    sets, labels = _sets(len(given))

    roles = asked.roles

    def make(spec: ModelSpec, encoded: list[EncodedPair]) -> Listed:
        return Joint.of(given, encoded, spec, roles).listed(sets, labels, complete=True)

    if asked.precision == "auto":
        options["precision"] = _precision(model, pairs, given, roles, options)
    found = Interactions(run_listed(model, pairs, make, **options))
    off = found.relative_noise() if asked.part is None else None
    if off is not None and off > TOLERANCE:
        warnings.warn(
            f"in {found.meta['precision']} rounding is about {off:.0%} of these interactions, which are "
            "second differences: take a higher precision, fp64 at best, or ask for larger effects",
            stacklevel=2,
        )
    return found


def interaction_table(
    found: Interactions,
    metric: str | None = None,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Table:
    """Means over prompt pairs of all interactions, with intervals, tests and false-discovery rates.

    Args:
        metric: `recovered` by default, or the first that the run can answer.
        level, draws, seed: of the bootstrap interval over pairs, and of the test.

    Returns:
        Columns first, second (names of the parts), the metric (their interaction), stderr, low, high, p (sign
        flips: that its mean is zero), q (Benjamini-Hochberg, over all rows) where there are several pairs,
        first_alone, second_alone and both (mean effects), and pairs.

    Raises:
        DeltapatchError: as of `Interactions.measured`; a level or number of draws that is none.
    """
    check_draws(level, draws)
    metric = default_metric(found.metrics) if metric is None else metric
    measured, names = found.measured(metric), np.array(found.names, dtype=object)
    first, second = np.triu_indices(len(names), 1)
    values, over = measured.interaction[:, first, second], measured.over
    if len(found.pairs) > 1:
        numbers = with_uncertainty(metric, values, over, level=level, draws=draws, seed=seed)
        p = numbers.pop("p")
        pairs = numbers.pop("pairs")
        numbers |= {"p": p, "q": benjamini_hochberg(p)}
    else:
        mean, _, pairs = mean_over_pairs(values, over)
        numbers = {metric: mean}
    columns = {"first": names[first], "second": names[second], **numbers}
    alone = mean_over_pairs(measured.alone, over)[0]
    both = mean_over_pairs(measured.both[:, first, second], over)[0]
    columns |= {"first_alone": alone[first], "second_alone": alone[second], "both": both, "pairs": pairs}
    there = np.flatnonzero(pairs > 0)
    return Table({name: column[there] for name, column in columns.items()}, metric)


def top_parts(
    effects: Effects, n: int, metric: str | None = None, sites: Sequence[str] | None = None
) -> list[Patch]:
    """The n patches of a sweep with the largest mean effects in magnitude, over all its sites and positions.

    Args:
        metric: `recovered` by default, or the first that the run can answer.
        sites: which; all that were swept by default.

    Raises:
        DeltapatchError: fewer than one; an unknown metric or site.
    """
    if n < 1:
        raise DeltapatchError(f"top {n}: ask for at least one part")
    metric = default_metric(effects.metrics) if metric is None else metric
    found: list[tuple[float, Patch]] = []
    for name in sites or list(effects.sites):
        swept = effects.site(name)
        values, over = effects.terms(metric, name)
        mean = mean_over_pairs(values, over)[0]  # [layer, position(, index)]
        size = np.abs(np.nan_to_num(mean)).ravel()
        best = np.argsort(-size, kind="stable")[:n]
        indexed = bool(SITES[swept.site].index.counts)
        layers = effects.layers_of(name)
        for at in best[~np.isnan(mean.ravel()[best])].tolist():
            layer, position, *index = (int(i) for i in np.unravel_index(at, mean.shape))
            patch = Patch(
                swept.site, int(layers[layer]), swept.positions[position], index[0] if indexed else None
            )
            found.append((float(size[at]), patch))
    found.sort(key=lambda one: -one[0])
    return [patch for _, patch in found[:n]]


def _additive(metrics: Any) -> Any:
    """What is measured: as asked, or all metrics of which effects add up."""
    if metrics == "all":
        return [name for name, metric in METRICS.items() if metric.additive]
    for metric in Options(metrics=metrics).metrics:  # type: ignore[union-attr]  # its check made a tuple
        check_additive(metric)
    return metrics


def _sets(n: int, some: np.ndarray | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Each part alone, each two, and all at once: [set, part], and which two parts each set has.

    Args:
        some: of the pairs of parts only these, as `np.triu_indices` counts them, and not all parts at once.
    """
    pair = np.stack(np.triu_indices(n, 1), 1)
    if some is not None:
        pair = pair[some]
    single = np.stack([np.arange(n), np.full(n, -1)], 1)
    both = np.concatenate([single, pair, *([] if some is not None else [np.full((1, 2), -1)])])
    sets = np.zeros((len(both), n), dtype=bool)
    for column in both.T:
        sets[np.flatnonzero(column >= 0), column[column >= 0]] = True
    sets[both[:, 0] < 0] = True
    return sets, dict(zip(PAIR_OF_PARTS, both.T, strict=True))


def _precision(model: Model, pairs: Pairs, parts: list[Patch], roles: Roles, options: dict[str, Any]) -> str:
    """float32, or float64 where a sample of the interactions is further off in float32 than TOLERANCE."""
    if isinstance(model, Model) and model.dtype == torch.float64:
        return "fp64"
    if options.get("noise_sample") == 0:
        return "fp32"
    n, rng = len(parts), np.random.default_rng(options.get("seed", 0))
    n_pairs = n * (n - 1) // 2
    sets, labels = _sets(n, rng.choice(n_pairs, min(_SAMPLED, n_pairs), replace=False))
    used = sets[n:].any(0)  # parts of a pair that was drawn
    kept = np.concatenate([used, np.ones(len(sets) - n, dtype=bool)])
    sets, labels = sets[kept], {name: label[kept] for name, label in labels.items()}

    def make(spec: ModelSpec, encoded: list[EncodedPair]) -> Listed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what pairs do not have is said when all of them are run
            joint = Joint.of(parts, encoded, spec, roles)
        has = (joint.row[:, used] >= 0).sum(1)  # [pair], how many of these parts
        fullest = np.flatnonzero(has == has.max())
        some = fullest[np.unique(np.linspace(0, len(fullest) - 1, _PAIRS).round().astype(int))]
        return joint.listed(sets, labels, pairs=some.tolist(), complete=True)

    quiet = {"progress": False, "out": None, "resume": False, "shard": None, "noise_sample": 0}
    ways = [
        Interactions(run_listed(model, pairs, make, **(options | quiet | {"precision": name})))
        for name in ("fp32", "fp64")
    ]
    for metric in ways[0].metrics:
        got, want = (np.nan_to_num(way.measured(metric).interaction) for way in ways)
        if np.linalg.norm(got - want) > TOLERANCE * np.linalg.norm(want):
            return "fp64"
    return "fp32"
