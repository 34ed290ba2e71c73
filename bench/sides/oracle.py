"""The oracle: plain float64 forwards with patches put in, nothing carried as a difference."""

import numpy as np
import torch
from torch import Tensor

from deltapatch.bench.sides.cells import ALONG, FEATURE, Cells, place_of
from deltapatch.bench.sides.workload import Workload
from deltapatch.models.autoencoder import load_sae
from deltapatch.models.model import Model
from deltapatch.models.patched import Visit, patched_logits

_TOKENS = 4096  # of forwards side by side: attention keeps all its weights


def oracle_values(model: Model, work: Workload, cells: Cells) -> np.ndarray:
    """What the metric needs of every intervention, float64 [n, column]."""
    source: dict[tuple[str, int], Tensor] = {}  # [pair, T, ...] of the clean runs

    def keep(site: str, layer: int, value: Tensor) -> None:
        if site == place_of(cells.site):
            source[site, layer] = value.clone()

    answers = torch.tensor(work.answers, device=model.device)
    patched_logits(model, torch.tensor(work.clean), keep)
    base = _columns(patched_logits(model, torch.tensor(work.corrupted), lambda *_: None), answers, work)
    out = []
    rows = max(1, _TOKENS // work.length)
    for start in range(0, len(cells), rows):
        part = cells[slice(start, start + rows)]
        pair = torch.from_numpy(part.pair)
        logits = patched_logits(model, torch.tensor(work.corrupted)[pair], _swap(part, source, work))
        out.append(_columns(logits, answers[pair], work) - base[pair])
    return torch.cat(out).cpu().numpy()


def _swap(cells: Cells, source: dict[tuple[str, int], Tensor], work: Workload) -> Visit:
    """Writes the source's values into the rows that are patched where the forward is."""
    along = torch.tensor(work.direction, dtype=torch.float64)
    sae = load_sae(work.autoencoder) if cells.site == FEATURE else None

    def visit(site: str, layer: int, value: Tensor) -> None:
        if site != place_of(cells.site):
            return
        row, patch = np.nonzero(cells.layer == layer)
        at = [torch.from_numpy(a[row, patch]) for a in (cells.position, cells.index)]
        if not len(row):
            return
        pair, rows = torch.from_numpy(cells.pair[row]), torch.from_numpy(row)
        ours, theirs = value[rows, at[0]], source[site, layer][pair, at[0]]
        if cells.site == ALONG:
            value[rows, at[0]] = ours + ((theirs - ours) @ along)[:, None] * along
        elif sae is not None:
            (now, scale), (then, _) = sae.encode(ours), sae.encode(theirs)
            moved = (then - now).gather(1, at[1][:, None])
            value[rows, at[0]] = ours + scale * moved * sae.rows(at[1])
        elif int(at[1][0]) < 0:
            value[rows, at[0]] = theirs
        else:
            value[rows, at[0], at[1]] = source[site, layer][pair, at[0], at[1]]

    return visit


def _columns(logits: Tensor, answers: Tensor, work: Workload) -> Tensor:
    """[row, 1, vocab] -> [row, column]."""
    logits = logits[:, -1]
    if work.metric == "logit_diff":
        chosen = logits.gather(1, answers)
        return chosen[:, :1] - chosen[:, 1:]
    return logits.log_softmax(-1).gather(1, answers)
