"""Activations of plain runs at some places, for what has to be known before a sweep is planned."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from deltapatch.models.forward import block, contexts
from deltapatch.models.model import Model
from deltapatch.models.surroundings import undisturbed
from deltapatch.models.weights import cast

Place = tuple[str, int]  # a name of `Activations`, and a layer
_TOKENS = 4096  # that go through a layer together where only their mean is kept


def read_activations(
    model: Model, prompts: Sequence[Sequence[int]], places: Collection[Place]
) -> dict[Place, list[Tensor]]:
    """What a model's unpatched runs have at some places, in float64.

    The layers are gone through once, up to the last that is asked for; prompts of one length go together.

    Args:
        prompts: token ids.
        places: names of `forward.Activations` and layers.

    Returns:
        place -> for each prompt [T, ...], the heads' numbers of a token side by side.
    """
    last = max(layer for _, layer in places)
    found: dict[Place, list[Tensor]] = {place: [torch.empty(0)] * len(prompts) for place in places}
    lengths: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        lengths.setdefault(len(prompt), []).append(number)
    dtype = torch.float64
    with torch.no_grad(), undisturbed(model.device), model.reading() as read:
        runs = {
            n: model.embed(
                torch.tensor([list(prompts[i]) for i in mine]),
                dtype,
                positions=torch.arange(n) if model.spec.learned_positions else None,
            )
            for n, mine in lengths.items()
        }  # length -> [prompt, T, d_model]
        known = {n: contexts(model.spec, n, dtype, model.device) for n in lengths}
        for l in range(last + 1):
            weights = cast(read.layer(l), model.device, dtype)
            names = [name for name, layer in places if layer == l]
            for n, mine in lengths.items():
                here = block(runs[n], weights, known[n][l])
                runs[n] = here.resid_post
                for name in names:
                    value = getattr(here, name).flatten(2)
                    for i, number in enumerate(mine):
                        found[name, l][number] = value[i].clone()
    return found


def mean_activations(
    model: Model, prompts: Sequence[Sequence[int]], places: Collection[Place]
) -> dict[Place, Tensor]:
    """The means of what a model's unpatched runs have at some places, in float64, on its device.

    The layers are gone through once, up to the last that is asked for. Beside the means, the prompts'
    residual streams are held, and one layer's activations of a few thousand tokens.

    Args:
        prompts: token ids, all of one length T.
        places: names of `forward.Activations` and layers.

    Returns:
        place -> [T, ...].
    """
    found: dict[Place, Tensor] = {}
    tokens, dtype = torch.tensor([list(prompt) for prompt in prompts]), torch.float64  # [prompt, T]
    length = tokens.shape[1]
    with torch.no_grad(), undisturbed(model.device), model.reading() as read:
        at = torch.arange(length) if model.spec.learned_positions else None
        some = tokens.split(max(1, _TOKENS // length))
        runs = [model.embed(ids, dtype, positions=at) for ids in some]  # each [prompt, T, d_model]
        known = contexts(model.spec, length, dtype, model.device)
        for l in range(1 + max(layer for _, layer in places)):
            weights = cast(read.layer(l), model.device, dtype)
            names = [name for name, layer in places if layer == l]
            for i, x in enumerate(runs):
                here = block(x, weights, known[l], pattern="pattern" in names)
                runs[i] = here.resid_post
                for name in names:
                    share = getattr(here, name).sum(0) / len(tokens)
                    found[name, l] = found[name, l] + share if (name, l) in found else share
    return found
