"""Probes: a number that is read inside the model, as a metric of every intervention."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltapatch.arguments import position as checked_position
from deltapatch.arguments import whole
from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.roles import Roles, no_place
from deltapatch.interventions.sites import find_site
from deltapatch.models.header import read_tensors
from deltapatch.models.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Probe:
    """How far an intervention moves the residual stream along a direction, or a feature: patched minus base.

    It is a metric like any other: `sweep(model, pairs, metrics=["recovered", probe])`, then
    `effects.values(probe)` or by its name. An intervention that comes after it, in a later layer or at a
    later position, moves it by exactly 0. What `resid_pre` of a layer is, is the stream after the one before.

    Attributes:
        name: what the metric is called.
        direction: [d_model], what the residual stream is multiplied with; it is taken as it is given.
        layer: after which layer the stream is read.
        position: where: a whole number, negative from the end, a label, or "last".
        feature: (autoencoder, number) in the place of direction and layer: how far its activation moves, the
            encoder read at what is there. The autoencoder is one of the residual stream.

    Raises:
        DeltapatchError: a name, direction, layer, position or feature that is none.
    """

    name: str
    direction: Any = None
    layer: Any = None
    position: int | str = "last"
    feature: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise DeltapatchError(
                f"a probe's name must be letters, digits and _, such as mood, not {shown(self.name)}"
            )
        if self.feature is None:
            object.__setattr__(self, "direction", self._direction())
            must = f"probe {self.name}: its layer must be a whole number"
            object.__setattr__(self, "layer", whole(self.layer, must))
        else:
            object.__setattr__(self, "layer", self._layer_of_feature())
        must = f"probe {self.name}: its position must be a whole number or a label"
        object.__setattr__(self, "position", checked_position(self.position, must))

    def _direction(self) -> np.ndarray:
        given = self.direction
        if hasattr(given, "detach"):  # a tensor, of any device and dtype
            given = given.detach().cpu().double().numpy()
        try:
            direction = np.array(given, dtype=np.float64)
        except (TypeError, ValueError):
            direction = np.empty(0)
        if direction.ndim != 1 or not len(direction) or not np.isfinite(direction).all():
            raise DeltapatchError(
                f"probe {self.name}: its direction must be one row of finite numbers, [d_model]"
            )
        return direction

    def _layer_of_feature(self) -> int:
        """After which layer the autoencoder reads."""
        from deltapatch.models.autoencoder import Autoencoder

        if self.direction is not None or self.layer is not None:
            raise DeltapatchError(
                f"probe {self.name}: a feature says where it is: leave out direction and layer"
            )
        if not isinstance(self.feature, tuple | list) or len(self.feature) != 2:
            raise DeltapatchError(f"probe {self.name}: feature must be (autoencoder, number)")
        sae, number = self.feature
        if not isinstance(sae, Autoencoder) or sae.site is None or sae.layer is None:
            raise DeltapatchError(
                f"probe {self.name}: its autoencoder must be what load_sae reads, with its place"
            )
        must = f"probe {self.name}: a feature of {sae.name} is a number from 0 to {sae.d_sae - 1}"
        if not 0 <= whole(number, must) < sae.d_sae:
            raise DeltapatchError(f"{must}, not {number}")
        site, _ = find_site(sae.site)
        layer = sae.layer - (site.name == "resid_pre")
        if site.name not in ("resid_pre", "resid_post") or layer < 0:
            raise DeltapatchError(
                f"probe {self.name} reads the residual stream after a layer, and autoencoder {sae.name} "
                f"{site.name} of layer {sae.layer}"
            )
        return int(layer)

    @property
    def width(self) -> int:
        """How many numbers of a token it looks at."""
        return len(self.direction) if self.feature is None else self.feature[0].d_sae

    def read(self, d: "Tensor", base: "Tensor") -> "Tensor":
        """[n], what it says of changes d of the residual stream where that is `base`, both [n, d_model]."""
        import torch  # which readers of results do without

        if self.feature is None:
            return d @ torch.from_numpy(self.direction).to(d)
        sae, number = self.feature
        if sae.activation != "topk":
            sae, number = sae.only(torch.tensor([number])), 0
        base = base.double()
        return (sae.encode(base + d.double())[0] - sae.encode(base)[0])[:, number].to(d.dtype)

    def place(self, pair: EncodedPair, roles: Roles) -> int | None:
        """Where in the base run of a pair it reads; None where there is no such position."""
        return roles.adding.place(pair, self.position)

    def digest(self) -> str:
        """A hash of all that decides what it says."""
        said = f"{self.layer} {self.position} ".encode()
        if self.feature is None:
            said += self.direction.tobytes()
        else:
            said += f"{self.feature[0].digest} {self.feature[1]}".encode()
        return hashlib.sha256(said).hexdigest()


def load_probes(path: str | os.PathLike[str]) -> list[Probe]:
    """Probes from a safetensors file.

    Args:
        path: its tensors, [d_model], are named after what they are called and where they are: `mood@9:last`
            is the probe `mood` after layer 9 at the last position.

    Raises:
        DeltapatchError: the file is none, or a tensor no probe.
    """
    found = []
    for key, tensor in sorted(read_tensors(path, "probes").items()):
        name, _, place = key.partition("@")
        layer, _, position = place.partition(":")
        if not layer.isdecimal() or not position:
            raise DeltapatchError(
                f"the probes {path} have a tensor {key!r}: name it like mood@9:last, which is the probe mood "
                "after layer 9 at the last position"
            )
        at = int(position) if position.removeprefix("-").isdecimal() else position
        found.append(Probe(name, tensor.float(), int(layer), at))
    return found


def check_probes(
    probes: Mapping[str, Probe],
    pairs: Sequence[EncodedPair],
    roles: Roles,
    length: np.ndarray,
    spec: ModelSpec,
) -> None:
    """Refuse a probe that a model or a pair has no place for.

    Args:
        roles: of their prompts.
        length: [pair], tokens of the base run up to where effects are read.

    Raises:
        DeltapatchError: its direction has another width, there is no such layer or position, or nothing is
            computed there.
    """
    for name, probe in probes.items():
        width = len(probe.direction) if probe.feature is None else probe.feature[0].d_in
        if width != spec.d_model:
            raise DeltapatchError(f"probe {name} has {width} numbers, and the residual stream {spec.d_model}")
        if not 0 <= probe.layer < spec.n_layers:
            raise DeltapatchError(
                f"probe {name} is after layer {probe.layer}, and the model's layers go from 0 to "
                f"{spec.n_layers - 1}"
            )
        for number, (pair, n) in enumerate(zip(pairs, length.tolist(), strict=True)):
            at = probe.place(pair, roles)
            if at is None:
                raise DeltapatchError(f"probe {name}, pair {number}: {no_place(pair, probe.position)}")
            if at >= n:
                raise DeltapatchError(
                    f"probe {name} is at position {at} of pair {number}, after position {n - 1}, where "
                    "effects are read: nothing is computed there"
                )
            if probe.layer == spec.n_layers - 1 and at != n - 1:
                raise DeltapatchError(
                    f"probe {name} is after the last layer, where position {n - 1} alone is computed, and of "
                    f"pair {number} at position {at}: take an earlier layer"
                )
