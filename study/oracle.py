"""Effects of a run held to plain float64 forwards: a sample of them, computed again without the engine."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltapatch.interventions.given import Patch
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.roles import Roles
from deltapatch.models.model import Model
from deltapatch.models.patched import Visit, patched_logits
from deltapatch.results.effects import Effects
from deltapatch.results.metrics import Direction

CHECKED = ("logit_diff", "dlogp_clean", "dlogp_corrupted")
_PAIRS = 4  # that a sample is drawn from: each costs two unpatched runs
_NOTHING = 1e-12  # what two float64 runs that are the same differ by
_ROWS = 32  # forwards side by side

Rows = Sequence[Sequence[Patch]]  # interventions on one pair, as the patches of each


def check_run(model: Model, effects: Effects, size: int, seed: int) -> dict[str, Any]:
    """The errors of a sample of a run's effects, over all its sites.

    Where nothing that was measured has an effect, as where both prompts have one answer, errors are absolute.

    Returns:
        effects, how many were computed again; error, the norm of the error over the norm of what is right,
        of the worst measured number; and each number's error under its name.
    """
    rng = np.random.default_rng((seed, len(effects.pairs)))
    n = len(effects.pairs)
    numbers = np.unique(np.linspace(0, n - 1, min(n, _PAIRS)).round().astype(int)).tolist()
    sites = list(effects.sites)
    got: dict[str, list[float]] = {name: [] for name in CHECKED}
    want: dict[str, list[np.ndarray]] = {name: [] for name in CHECKED}
    for number in numbers:
        rows: list[list[Patch]] = []
        for name in sites:
            swept = effects.site(name)
            one = swept.measured[CHECKED[0]][number]  # [layer, position(, index)]
            share = -(-size // (len(numbers) * len(sites)))
            for cell in _drawn(rng, one.ravel(), share).tolist():
                at = np.unravel_index(cell, one.shape)
                index = int(at[2]) if len(at) > 2 else None
                rows.append([Patch(name, int(swept.layers[at[0]]), swept.positions[int(at[1])], index)])
                for key in CHECKED:
                    got[key].append(float(swept.measured[key][(number, *at)]))
        found = plain_effects(model, effects.pairs[number], rows, effects.direction)
        for key in CHECKED:
            want[key].append(found[key])
    return errors(
        {name: np.array(values) for name, values in got.items()},
        {name: np.concatenate(values) for name, values in want.items()},
    )


def _drawn(rng: np.random.Generator, effects: np.ndarray, n: int) -> np.ndarray:
    """Cells to compute again: a quarter of any that exist, and the rest of those that moved something."""
    exists = ~np.isnan(effects)
    moved = np.flatnonzero(exists & (effects != 0))
    some = rng.choice(moved, min(n - n // 4, len(moved)), replace=False)
    rest = np.setdiff1d(np.flatnonzero(exists), some)
    return np.sort(np.concatenate([some, rng.choice(rest, min(n - len(some), len(rest)), replace=False)]))


def errors(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, Any]:
    """Of each measured number: the norm of the error over the norm of what is right."""
    found = {}
    for name in CHECKED:
        size = float(np.linalg.norm(want[name]))
        off = float(np.linalg.norm(got[name] - want[name]))
        found[name] = off / size if size > _NOTHING else off
    return {"effects": len(want[CHECKED[0]]), "error": max(found.values()), **found}


def plain_effects(model: Model, pair: EncodedPair, rows: Rows, direction: Direction) -> dict[str, np.ndarray]:
    """What interventions on a pair do, by plain forwards: each of CHECKED, float64 [row].

    Of an answer of several tokens it is the log-probability of all, each after those before it.
    """
    roles = Roles(direction)
    base, source = roles.prompts(pair)
    values: dict[tuple[str, int], Tensor] = {}
    needed = {(_place(patch.site), patch.layer) for row in rows for patch in row}

    def keep(site: str, layer: int, value: Tensor) -> None:
        if (site, layer) in needed:
            values[site, layer] = value[0].clone()

    patched_logits(model, torch.tensor([source], device=model.device), keep)
    change = {}
    for name, tokens in (("clean", pair.clean_answer), ("corrupted", pair.corrupted_answer)):
        unpatched = _logp(model, base, tokens, 1, lambda *_: None)
        parts = []
        for start in range(0, len(rows), _ROWS):
            some = rows[start : start + _ROWS]
            parts.append(_logp(model, base, tokens, len(some), _swap(some, pair, roles, values)))
        change[name] = np.concatenate(parts) - unpatched
    # Logits of one run differ as log-probabilities do.
    return {
        "logit_diff": change["clean"] - change["corrupted"],
        "dlogp_clean": change["clean"],
        "dlogp_corrupted": change["corrupted"],
    }


def _logp(model: Model, prompt: list[int], answer: list[int], n_rows: int, visit: Visit) -> np.ndarray:
    """log P(answer) after the prompt, [row], of rows that `visit` tells apart."""
    tokens = torch.tensor([prompt + answer[:-1]] * n_rows, device=model.device)
    at = range(len(prompt) - 1, tokens.shape[1])
    logp = patched_logits(model, tokens, visit, at).log_softmax(-1)  # [row, answer token, vocab]
    own = torch.tensor(answer, device=model.device)[None, :, None].expand(n_rows, -1, 1)
    return logp.gather(2, own).sum(dim=(1, 2)).cpu().numpy()


def _swap(rows: Rows, pair: EncodedPair, roles: Roles, values: dict[tuple[str, int], Tensor]) -> Visit:
    """Writes the source's values into each row, where its patches are."""
    counterpart = dict(roles.mapped(pair))
    todo: dict[tuple[str, int], list[tuple[int, Patch]]] = defaultdict(list)
    for number, patches in enumerate(rows):
        for patch in patches:
            todo[_place(patch.site), patch.layer].append((number, patch))

    def visit(site: str, layer: int, value: Tensor) -> None:
        for row, patch in todo.get((site, layer), ()):
            at = roles.place(pair, patch.position)
            assert at is not None
            index = () if patch.index is None else (patch.index,)
            value[(row, at, *index)] = values[site, layer][(counterpart[at], *index)]

    return visit


def _place(site: str) -> str:
    return site.removesuffix(".dim")
