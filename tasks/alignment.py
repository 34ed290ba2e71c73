"""Which tokens of two prompts differ, as labels, and which problems of a file are nearest to each other."""

from collections.abc import Sequence

import numpy as np


def differing_labels(clean: Sequence[int], corrupted: Sequence[int]) -> dict[str, int]:
    """Labels diff1, diff2, ... on the runs of tokens that differ, each at its last token; diff1_first at its
    first where it has several. The prompts have the same length.
    """
    differ = np.flatnonzero(np.asarray(clean) != np.asarray(corrupted))
    runs = np.split(differ, np.flatnonzero(np.diff(differ) > 1) + 1) if len(differ) else []
    labels = {}
    for i, run in enumerate(runs, start=1):
        if len(run) > 1:
            labels[f"diff{i}_first"] = int(run[0])
        labels[f"diff{i}"] = int(run[-1])
    return labels


def nearest(tokens: np.ndarray, answers: np.ndarray) -> list[tuple[int, int]]:
    """Pair up rows with different answers, each in one pair at most, so that few tokens differ.

    The rows are gone through in order; each takes the nearest of those that are left, of equally near ones
    the first.

    Args:
        tokens: [row, T], prompts of one length.
        answers: [row].
    """
    free = np.ones(len(tokens), dtype=bool)
    pairs = []
    for i in range(len(tokens)):
        if not free[i]:
            continue
        others = np.flatnonzero(free & (answers != answers[i]))
        if len(others):
            distance = (tokens[others] != tokens[i]).sum(axis=1)
            j = int(others[np.argmin(distance)])
            free[[i, j]] = False
            pairs.append((i, j))
    return pairs
