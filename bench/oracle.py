"""The oracle: plain float64 forwards with patches put in where they belong, nothing carried as a difference.

It shares the weights and the elementary steps of `models/forward.py` with the engine and none of the engine.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from deltapatch.bench.cells import Cells
from deltapatch.bench.workload import Workload
from deltapatch.models import forward
from deltapatch.models.model import Model
from deltapatch.models.spec import ModelSpec
from deltapatch.models.weights import LayerWeights

_ROWS = 64  # forwards side by side

# called with (site, layer, value [row, T, ...]) at every site; it may write into the value
Visit = Callable[[str, int, Tensor], None]


def oracle_values(model: Model, work: Workload, cells: Cells) -> np.ndarray:
    """What the metric needs of every intervention, float64 [n, column]."""
    source: dict[tuple[str, int], Tensor] = {}  # [pair, T, ...] of the clean runs

    def keep(site: str, layer: int, value: Tensor) -> None:
        if site == _place(cells.site):
            source[site, layer] = value.clone()

    answers = torch.tensor(work.answers, device=model.device)
    with torch.no_grad():
        _forward(model, torch.tensor(work.clean), keep)
        base = _columns(_forward(model, torch.tensor(work.corrupted), lambda *_: None), answers, work)
        out = []
        for start in range(0, len(cells), _ROWS):
            part = cells[slice(start, start + _ROWS)]
            pair = torch.from_numpy(part.pair)
            logits = _forward(model, torch.tensor(work.corrupted)[pair], _swap(part, source))
            out.append(_columns(logits, answers[pair], work) - base[pair])
    return torch.cat(out).cpu().numpy()


def _place(site: str) -> str:
    return site.removesuffix(".dim")


def _swap(cells: Cells, source: dict[tuple[str, int], Tensor]) -> Visit:
    """Writes the source's values into the rows that are patched where the forward is."""

    def visit(site: str, layer: int, value: Tensor) -> None:
        if site != _place(cells.site):
            return
        row, patch = np.nonzero(cells.layer == layer)
        at = [torch.from_numpy(a[row, patch]) for a in (cells.position, cells.index)]
        if not len(row):
            return
        pair, rows = torch.from_numpy(cells.pair[row]), torch.from_numpy(row)
        if int(at[1][0]) < 0:
            value[rows, at[0]] = source[site, layer][pair, at[0]]
        else:
            value[rows, at[0], at[1]] = source[site, layer][pair, at[0], at[1]]

    return visit


def _columns(logits: Tensor, answers: Tensor, work: Workload) -> Tensor:
    """[row, vocab] -> [row, column]."""
    if work.metric == "logit_diff":
        chosen = logits.gather(1, answers)
        return chosen[:, :1] - chosen[:, 1:]
    return logits.log_softmax(-1).gather(1, answers)


def _forward(model: Model, tokens: Tensor, visit: Visit) -> Tensor:
    """Read-out logits [row, vocab] of prompts [row, T]."""
    dtype = torch.float64
    tables = forward.rope_tables(model.spec.rope, tokens.shape[1], dtype, model.device)
    x = model.embed(tokens, dtype)  # [row, T, d_model]
    for l in range(model.spec.n_layers):
        x = _block(x, model.layer(l, dtype), model.spec, tables, lambda site, v, l=l: visit(site, l, v))  # type: ignore[misc]
    return forward.readout(x[:, -1], model.ends(dtype), model.spec)


def _block(
    x: Tensor,
    layer: LayerWeights,
    spec: ModelSpec,
    tables: tuple[Tensor, Tensor],
    visit: Callable[[str, Tensor], None],
) -> Tensor:
    """`forward.block`, with every site open to changes."""

    def at(site: str, value: Tensor) -> Tensor:
        value = value.clone()
        visit(site, value)
        return value

    x = at("resid_pre", x)
    normed = forward.normalise(x, layer.norm1, spec)
    q, k, v = (at(s, y) for s, y in zip("qkv", forward.project_qkv(normed, layer, spec), strict=True))
    q, k = (forward.rotate(y, *tables, spec.rope) for y in (q, k))
    z = at("z", forward.attend(q, k, v))
    mid = x + at("attn_out", forward.linear(z.flatten(-2), layer.out))
    if not spec.parallel:
        mid = at("resid_mid", mid)
    if layer.norm2 is not None:
        normed = forward.normalise(x if spec.parallel else mid, layer.norm2, spec)
    act = forward.activation(spec.activation)
    up = forward.linear(normed, layer.up)
    post = act(up) if layer.gate is None else act(forward.linear(normed, layer.gate)) * up
    post = at("mlp_post", post)
    return at("resid_post", mid + at("mlp_out", forward.linear(post, layer.down)))
