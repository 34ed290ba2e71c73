"""Activations of plain runs at some places, for what has to be known before a sweep is planned."""

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deltapatch.models.forward import block, contexts
from deltapatch.models.model import Model
from deltapatch.models.surroundings import undisturbed
from deltapatch.models.weights import Converter

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
        convert = Converter(model.device, dtype)
        for l in range(last + 1):
            weights = convert(read.layer(l))
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
    model: Model,
    prompts: Sequence[Sequence[int]],
    places: Collection[Place],
    apart: Sequence[Sequence[tuple[int, int]]] = (),
) -> dict[Place, Tensor]:
    """The means of what a model's unpatched runs have at some places, in float64, on its device.

    The layers are gone through once, up to the last that is asked for. Beside the means, the prompts'
    residual streams are held, and one layer's activations of a few thousand tokens.

    Args:
        prompts: token ids; T is the length of the longest.
        places: names of `forward.Activations` and layers.
        apart: prompts and positions, whose means are taken as well; not of patterns.

    Returns:
        place -> [T + apart, ...], at each position over the prompts that have it, and then those apart.
    """
    found: dict[Place, Tensor] = {}
    longest, dtype, device = max(len(prompt) for prompt in prompts), torch.float64, model.device
    lengths = sorted({len(prompt) for prompt in prompts})
    have = torch.tensor([sum(len(prompt) > t for prompt in prompts) for t in range(longest)], device=device)
    own: list[
        list[tuple[int, int, int]]
    ] = []  # of each of the runs below: which of those apart, row, position
    with torch.no_grad(), undisturbed(device), model.reading() as read:
        runs = []  # each [prompt, T of these, d_model]
        for n in lengths:
            numbers = torch.tensor([i for i, prompt in enumerate(prompts) if len(prompt) == n])
            at = torch.arange(n) if model.spec.learned_positions else None
            for some in numbers.split(max(1, _TOKENS // n)):
                ids = torch.tensor([list(prompts[i]) for i in some.tolist()])
                runs.append(model.embed(ids, dtype, positions=at))
                row = {number: r for r, number in enumerate(some.tolist())}
                own.append([(k, row[i], t) for k, spots in enumerate(apart) for i, t in spots if i in row])
        known = {n: contexts(model.spec, n, dtype, device) for n in lengths}
        convert = Converter(device, dtype)
        for l in range(1 + max(layer for _, layer in places)):
            weights = convert(read.layer(l))
            names = [name for name, layer in places if layer == l]
            for i, x in enumerate(runs):
                n = x.shape[1]
                here = block(x, weights, known[n][l], pattern="pattern" in names)
                runs[i] = here.resid_post
                for name in names:
                    total = getattr(here, name).sum(0)  # [T of these, ...]
                    if name == "pattern":  # keys that these do not have get nothing
                        total = F.pad(total, (0, longest - n))
                    if (name, l) not in found:
                        found[name, l] = total.new_zeros(longest + len(apart), *total.shape[1:])
                    found[name, l][:n] += total / have[:n].view(-1, *[1] * (total.ndim - 1))
                    for k, row_of, t in own[i]:
                        found[name, l][longest + k] += getattr(here, name)[row_of, t] / len(apart[k])
    return found
