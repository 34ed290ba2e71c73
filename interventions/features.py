"""Features of sparse autoencoders: what they are in both runs of pairs, and patches that set them.

A feature that is set becomes what it is in the source run, whatever arrives at its place: d moves by
(f* - f(base + d)) times its row of the decoder, the encoder read at base + d.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltapatch.arguments import whole
from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.roles import Roles
from deltapatch.interventions.runs import run_alike
from deltapatch.interventions.sites import check_site, find_site
from deltapatch.interventions.vectors import SetFeatures
from deltapatch.models.activations import read_activations
from deltapatch.models.autoencoder import Autoencoder
from deltapatch.models.forward import normalise
from deltapatch.models.model import Model
from deltapatch.models.spec import ModelSpec
from deltapatch.models.weights import Norm, map_tensors

SITES_OF_SAES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")
SOURCES_OF_FEATURES = ("counterpart", "zero")
_MID, _INPUT, _NORMALISED = "resid_mid", "mlp_in", "ln2.hook_normalized"
# What transcoders read, by the names that are known. A `hook_mlp_in` is the stream before the norm to
# TransformerLens, and what the MLP reads to those who converted transcoders of other libraries.
READ_BY_TRANSCODERS = {
    _MID: _MID, "hook_resid_mid": _MID, _INPUT: _INPUT, "mlp.hook_in": _INPUT, _NORMALISED: _NORMALISED,
}  # fmt: skip


class SaePlace(NamedTuple):
    """Where an autoencoder writes, and what it reads."""

    site: str
    layer: int
    heads: int  # whose numbers are side by side; 0: a whole vector
    reads: str  # of `forward.Activations`; the residual stream that the MLP reads, of a transcoder
    hears: str = _MID  # of a transcoder, what of it: one of `READ_BY_TRANSCODERS`


class Change(NamedTuple):
    """Features of one pair."""

    base: Tensor  # [T, width] float64, what there is in the base run at the place that is read
    before: Tensor  # [T, d_sae], in the base run
    after: Tensor  # [T, d_sae], in the source run where it lines up; elsewhere as before
    scale: Tensor  # [T, 1], what a change is multiplied with behind the decoder


def place_of_sae(sae: Autoencoder, spec: ModelSpec) -> SaePlace:
    """Where an autoencoder reads in a model. DeltapatchError where that is nowhere."""
    if not isinstance(sae, Autoencoder):
        raise DeltapatchError(f"autoencoders must be what load_sae reads, not {shown(sae)}")
    if sae.site is None or sae.layer is None:
        raise DeltapatchError(
            f"autoencoder {sae.name} does not say where it reads: load it with site= and layer=, for example "
            'load_sae(path, site="resid_post", layer=3)'
        )
    site, _ = find_site(sae.site)
    check_site(site, spec)
    if site.name not in SITES_OF_SAES:
        raise DeltapatchError(f"an autoencoder reads one of {', '.join(SITES_OF_SAES)}, not {site.name}")
    if type(sae.layer) is not int or not 0 <= sae.layer < spec.n_layers:
        raise DeltapatchError(
            f"autoencoder {sae.name} is of layer {shown(sae.layer)}, and this model has 0 to "
            f"{spec.n_layers - 1}"
        )
    if sae.reads is not None:
        return _place_of_transcoder(sae, sae.layer, site.name, spec)
    heads = spec.n_heads if site.name == "z" else 0
    width = heads * spec.d_head if heads else spec.d_model
    if sae.d_in != width:
        raise DeltapatchError(
            f"autoencoder {sae.name} reads {sae.d_in} numbers, and {site.name} of this model has {width}"
        )
    return SaePlace(site.name, sae.layer, heads, site.name)


def _place_of_transcoder(sae: Autoencoder, layer: int, site: str, spec: ModelSpec) -> SaePlace:
    if site != "mlp_out":
        raise DeltapatchError(f"a transcoder writes mlp_out, not {site}")
    hears = READ_BY_TRANSCODERS.get(sae.reads or "")
    if hears is None:
        raise DeltapatchError(
            f"transcoder {sae.name} reads {sae.reads}, which is not known: load it with reads={_INPUT} (what "
            f"the MLP multiplies with its weights), {_NORMALISED} or {_MID}"
        )
    if spec.parallel and hears == _MID:
        raise DeltapatchError(
            f"transcoder {sae.name} reads {_MID}, and this model has none: attention and MLP read the same "
            "residual stream"
        )
    if (sae.d_in, sae.d_out) != (spec.d_model, spec.d_model):
        raise DeltapatchError(
            f"transcoder {sae.name} reads {sae.d_in} numbers and writes {sae.d_out}, and the MLPs of this "
            f"model {spec.d_model}"
        )
    return SaePlace(site, layer, 0, "resid_pre" if spec.parallel else _MID, hears)


def in_model(model: Model, saes: Sequence[Autoencoder], places: Sequence[SaePlace]) -> list[Autoencoder]:
    """Autoencoders that read what there is at their places: transcoders behind the norms of their MLPs.

    Raises:
        DeltapatchError: a transcoder reads what a norm makes, and there is none before the MLP.
    """
    out, spec = [], model.spec
    for sae, place in zip(saes, places, strict=True):
        layer = None if sae.reads is None or place.hears == _MID else model.layer(place.layer, None)
        given = None if layer is None else layer.norm1 if spec.shared_norm else layer.norm2
        if layer is not None and given is None and place.hears == _NORMALISED:
            raise DeltapatchError(
                f"transcoder {sae.name} reads {_NORMALISED}, and the MLPs of this model read the residual "
                f"stream without a norm: load it with reads={_INPUT}"
            )
        if given is not None:
            norm: Norm = map_tensors(given, lambda tensor: tensor.to(model.device, torch.float64))
            if place.hears == _NORMALISED and spec.norm == "rms":  # whose weights come behind that hook
                of_one = torch.zeros_like if spec.unit_offset else torch.ones_like
                norm = norm._replace(weight=of_one(norm.weight))
            sae = replace(sae, hears=partial(normalise, norm=norm, spec=spec))
        out.append(sae)
    return out


def changes_of(
    model: Model,
    saes: Sequence[Autoencoder],
    places: Sequence[SaePlace],
    pairs: Sequence[EncodedPair],
    roles: Roles,
) -> Iterator[tuple[int, int, Change]]:
    """Pair, autoencoder, and what its features are in both runs. The autoencoders are those `in_model`."""
    zero = roles.source == "zero"
    both = [roles.prompts(pair) for pair in pairs]
    prompts = [prompt for base, source in both for prompt in ((base,) if zero else (base, source))]
    read = read_activations(model, prompts, {(place.reads, place.layer) for place in places})
    each = 1 if zero else 2
    for s, (sae, place) in enumerate(zip(saes, places, strict=True)):
        here = read[place.reads, place.layer]
        for i, pair in enumerate(pairs):
            base_at = here[each * i]
            before, scale = sae.encode(base_at)
            if zero:
                after = torch.zeros_like(before)
            else:  # what only sees the same tokens is the same, whatever products round to
                base, source = both[i]
                alike = run_alike(pair, (len(base), len(source)), model.spec)
                moved = [(b, s) for b, s in roles.mapped(pair) if b != s or b >= alike]
                at, of = torch.tensor(moved, dtype=torch.int64).reshape(-1, 2).T
                after = before.clone()
                after[at] = sae.encode(here[each * i + 1])[0][of]
            yield i, s, Change(base_at, before, after, scale)


class FeaturesAsked:
    """Collects the features that patches set; the same one is kept once.

    Args:
        model: in whose runs they are.
        pairs: of prompts.
        roles: of these.
    """

    def __init__(self, model: Model, pairs: Sequence[EncodedPair], roles: Roles) -> None:
        self.model, self.pairs, self.roles = model, pairs, roles
        self._saes: dict[int, tuple[Autoencoder, SaePlace]] = {}
        self._number: dict[tuple[int, int, int, int], int] = {}  # pair, position, autoencoder, feature

    def add(self, given: Any, pair: int, position: int, at: tuple[str, int], where: str) -> int:
        """The number of a feature, (autoencoder, number), at a position of a pair's base run.

        Args:
            at: site and layer of the patch.
            where: what errors call it.

        Raises:
            DeltapatchError: it is none; the autoencoder reads something else.
        """
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise DeltapatchError(f"{where}: feature must be (autoencoder, number), not {shown(given)}")
        sae, number = given
        if self.roles.source not in SOURCES_OF_FEATURES:
            raise DeltapatchError(
                f"{where}: features have the sources {' and '.join(SOURCES_OF_FEATURES)}, not "
                f"{self.roles.source!r}"
            )
        if id(sae) not in self._saes:
            self._saes[id(sae)] = sae, place_of_sae(sae, self.model.spec)
        place = self._saes[id(sae)][1]
        if at != place[:2]:
            does = f"autoencoder {sae.name} reads" if sae.reads is None else f"transcoder {sae.name} writes"
            raise DeltapatchError(
                f"{where}: {does} {place.site} of layer {place.layer}, not {at[0]} of layer {at[1]}"
            )
        must = f"{where}: a feature of {sae.name} is a number from 0 to {sae.d_sae - 1}"
        if not 0 <= whole(number, must) < sae.d_sae:
            raise DeltapatchError(f"{must}, not {number}")
        key = pair, position, list(self._saes).index(id(sae)), int(number)
        return self._number.setdefault(key, len(self._number))

    def __len__(self) -> int:
        return len(self._number)

    def read(self) -> SetFeatures:
        """What they are in the runs of the pairs."""
        pair, position, sae, feature = np.array(list(self._number), dtype=np.int64).T
        change, line = np.zeros(len(pair)), np.zeros(len(pair), dtype=np.int64)
        given, places = zip(*self._saes.values(), strict=True)
        saes = tuple(in_model(self.model, given, places))
        acted = np.unique(pair).tolist()
        here = [self.pairs[p] for p in acted]
        base: list[list[Tensor]] = [[] for _ in saes]
        for i, s, found in changes_of(self.model, saes, places, here, self.roles):
            mine = np.flatnonzero((pair == acted[i]) & (sae == s))
            at = torch.from_numpy(position[mine]), torch.from_numpy(feature[mine])
            change[mine] = (found.after[at] - found.before[at]).cpu().numpy()
            line[mine] = len(base[s]) + np.arange(len(mine))
            base[s] += list(found.base[at[0]])
        lines = tuple(torch.stack(own) if own else torch.empty(0) for own in base)
        digests = np.stack([np.frombuffer(bytes.fromhex(one.digest), np.uint8) for one in saes])
        return SetFeatures(sae, feature, change, line, digests, saes, lines)
