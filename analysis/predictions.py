"""Changes of prediction: desired ones, to the source's answer, and undesired ones, from a right answer."""

from dataclasses import dataclass

import numpy as np

from deltapatch.engine.effects import Effects

PREDICTION = "prediction"  # the patched run's most likely token, where the engine wrote it down


@dataclass(frozen=True)
class PredictionChanges:
    """Each 1 where it is so, else 0, NaN where a pair has no such position: [pair, layer, position, ...].

    Attributes:
        changed: the most likely token is another.
        desired: it is the source's answer now, as far as is certain.
        possible: it may be the source's answer: with `desired` the bounds of what is not written down. Both
            are the same where the patched prediction is.
        undesired: it is another though the base's prediction was right.
    """

    changed: np.ndarray
    desired: np.ndarray
    possible: np.ndarray
    undesired: np.ndarray


def prediction_changes(effects: Effects, site: str | None = None) -> PredictionChanges:
    """How patching each cell of a site changes what the model says.

    A run that has the patched prediction says so exactly. Else a changed prediction is certainly the source's
    answer where that is more likely than the base's answer and than all other tokens together, and possibly
    where it is no less likely than the base's answer.

    Raises:
        DeltapatchError: the run did not measure flip, dlogp_clean and dlogp_corrupted.
    """
    swept = effects.site(site)
    changed = effects.values("flip", site)
    missing = np.isnan(changed)
    extra = (1,) * (changed.ndim - 1)
    source, base = (0, 1) if effects.direction == "denoise" else (1, 0)
    answers = np.array([[p.clean_answer, p.corrupted_answer] for p in effects.pairs])

    def wide(column: np.ndarray) -> np.ndarray:
        return column.reshape(-1, *extra)

    right = wide(effects.reference.prediction[:, base] == answers[:, base])
    undesired = (changed == 1) & right
    if PREDICTION in swept.measured:
        after = np.asarray(swept.measured[PREDICTION])
        certain = possible = (changed == 1) & (after == wide(answers[:, source]))
    else:
        names = ("clean", "corrupted")
        logp = effects.reference.logp[:, base]  # [pair, answer]
        now = [np.exp(wide(logp[:, i]) + effects.values(f"dlogp_{names[i]}", site)) for i in (0, 1)]
        same = wide(answers[:, 0] == answers[:, 1])
        rival = np.where(same, 0.0, now[base])
        rest = np.clip(1 - now[source] - rival, 0, None)
        certain = (changed == 1) & (now[source] > rival) & (now[source] > rest)
        # It was not the source's answer before where the base's prediction is the same answer.
        was = wide(effects.reference.prediction[:, base] == answers[:, source])
        certain &= ~was
        possible = (changed == 1) & (now[source] >= rival) & ~was
    arrays = (changed == 1, certain, possible, undesired)
    return PredictionChanges(*(np.where(missing, np.nan, a.astype(np.float64)) for a in arrays))
