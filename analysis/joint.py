"""How much the strongest do together: joint patches of the top k of a ranking, carried out, as one table."""

from collections.abc import Sequence
from typing import Any

from deltapatch.analysis.faithfulness import plan, ranking
from deltapatch.analysis.tables import Table
from deltapatch.engine.sweep import run
from deltapatch.interventions.given import Patch
from deltapatch.interventions.pairs_file import Pairs, as_pairs
from deltapatch.models.model import Model
from deltapatch.results.effects import Effects


def faithfulness_curve(
    model: Model,
    pairs: Pairs,
    ranked: Effects | Sequence[Patch],
    *,
    metric: str = "recovered",
    sizes: Sequence[int] | None = None,
    random_sets: int = 3,
    **options: Any,
) -> Table:
    """Patch the top k of a ranking together, for growing k, and random sets of equal size beside them.

    Take other pairs than those of the ranking: what is found for the top k is then not the luck by which they
    came to the top.

    Args:
        pairs: as of `sweep`.
        ranked: patches, the most important first; or effects of one site that was swept at the last position,
            which are ranked by their mean.
        metric: what is told, and ranked by.
        sizes: how many are joined; 1, 2, 4, ... and all of them by default.
        random_sets: how many random orders of the same patches there are.
        options: those of `run`, such as direction, precision and seed.

    Returns:
        A row a size: size, the metric, low, high (95% over pairs), random, random_low, random_high, pairs.

    Raises:
        DeltapatchError: effects of several sites, or not of the last position; sizes that cannot be had; as
            of `run`.
    """
    if isinstance(ranked, Effects):
        ranked = ranking(ranked, metric, ranked.site().site)
    listed, seed = as_pairs(pairs)[0], options.get("seed", 0)
    joint = plan(ranked, len(listed), sizes, random_sets, seed=seed)
    outcome = run(model, listed, joint.interventions, **{"metrics": [metric]} | options)
    values, over = outcome.terms(metric)
    return joint.curve(values, metric, seed=seed, over=over)
