"""Changes of prediction: desired ones, to the source's answer, and undesired ones, from a right answer."""

from dataclasses import dataclass

import numpy as np

from deltapatch.results.effects import Effects


@dataclass(frozen=True)
class PredictionChanges:
    """Each 1 where it is so, else 0, NaN where a pair has no such position: [pair, layer, position, ...].

    Attributes:
        desired: the patched run says the source's answer, and the base run did not.
        undesired: the base run said its own answer, and the patched run does not.
    """

    desired: np.ndarray
    undesired: np.ndarray


def prediction_changes(effects: Effects, site: str | None = None) -> PredictionChanges:
    """How patching each cell of a site changes what the model says: the likeliest token, answer by answer.

    Of an answer of several tokens each must be the likeliest after those before it.

    Raises:
        DeltapatchError: the run did not measure says_clean and says_corrupted.
    """
    source, base = (0, 1) if effects.direction == "denoise" else (1, 0)
    now = [effects.values(metric, site) for metric in ("says_clean", "says_corrupted")]
    # [pair, answer, 1, ...]
    before = effects.reference.says[:, base].reshape(-1, 2, *(1,) * (now[0].ndim - 1)).astype(np.float64)
    return PredictionChanges(
        desired=now[source] * (1 - before[:, source]), undesired=(1 - now[base]) * before[:, base]
    )
