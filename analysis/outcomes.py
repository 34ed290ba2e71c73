"""Tables of given interventions: one by one, or averaged over pairs by what their maker says of each."""

from collections.abc import Sequence

import numpy as np

from deltapatch.analysis.tables import Table
from deltapatch.errors import DeltapatchError
from deltapatch.results.metrics import check_metric, quotient
from deltapatch.results.outcome import GROUPS, Outcome


def outcome_cells(outcome: Outcome, metrics: Sequence[str]) -> Table:
    """A row an intervention: its number, pair, patches, labels and the metrics."""
    return Table(outcome.columns(metrics), metrics[0])


def outcome_averages(outcome: Outcome, metrics: Sequence[str], by: Sequence[str]) -> Table:
    """Means over all pairs of what was patched, apart by some labels.

    A pair that has no such intervention, a feature that is the same in both its runs, counts with 0. Of
    several in one pair their mean counts.

    Args:
        by: labels of the interventions, for example layer, position and feature.

    Returns:
        Columns: those of `by`, the metrics, and `pairs`, how many have any.

    Raises:
        DeltapatchError: `by` names no label, or a metric is unknown or was not measured.
    """
    labels = outcome.interventions.labels
    for name in by:
        if name not in labels:
            known = ", ".join(default_groups(outcome)) or "none: only --by none lists them"
            raise DeltapatchError(f"interventions of this run have no {name!r}: their labels are {known}")
    if not by:
        raise DeltapatchError("say what is kept apart: by names labels")
    keys = np.stack([labels[name] for name in by], 1)
    groups, group = np.unique(keys, axis=0, return_inverse=True)
    group = group.ravel()
    # Each pair weighs the same: an intervention counts with one over those of its pair and group.
    _, cell, size = np.unique(
        np.stack([group, outcome.pair], 1), axis=0, return_inverse=True, return_counts=True
    )
    share = 1 / size[cell.ravel()]
    n_pairs = len(outcome.pairs)
    columns = {name: groups[:, i] for i, name in enumerate(by)}
    for metric in metrics:
        values, _ = outcome.terms(metric)
        total = np.bincount(group, values * share, minlength=len(groups))
        over = check_metric(metric).over
        gap = None if over is None else np.atleast_1d(over(outcome.reference, outcome.direction).mean())
        columns[metric] = quotient(metric, (total / n_pairs)[None], gap)[0]
    columns["pairs"] = np.bincount(group, share, minlength=len(groups)).round().astype(np.int64)
    return Table(columns, metrics[0])


def default_groups(outcome: Outcome) -> list[str]:
    """What means are told by unless it is said: the labels that tell what was patched."""
    labels = outcome.interventions.labels
    several = {name for name in labels if name != "sae" or len(np.unique(labels[name])) > 1}
    return [name for name in GROUPS if name in several]
