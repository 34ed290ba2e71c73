"""Probes: a number that is read inside the model, along a direction, as a metric of every intervention."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltapatch.arguments import position as checked_position
from deltapatch.arguments import whole
from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.roles import Roles, no_place
from deltapatch.models.header import read_tensors
from deltapatch.models.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class Probe:
    """How far an intervention moves the residual stream along a direction: patched minus base.

    It is a metric like any other: `sweep(model, pairs, metrics=["recovered", probe])`, then
    `effects.values(probe)` or by its name. An intervention that comes after it, in a later layer or at a
    later position, moves it by exactly 0. What `resid_pre` of a layer is, is the stream after the one before.

    Attributes:
        name: what the metric is called.
        direction: [d_model], what the residual stream is multiplied with; it is taken as it is given.
        layer: after which layer the stream is read.
        position: where: a whole number, negative from the end, a label, or "last".

    Raises:
        DeltapatchError: a name, direction, layer or position that is none.
    """

    name: str
    direction: Any
    layer: int
    position: int | str = "last"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise DeltapatchError(
                f"a probe's name must be letters, digits and _, such as mood, not {shown(self.name)}"
            )
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
        object.__setattr__(self, "direction", direction)
        must = f"probe {self.name}: its layer must be a whole number"
        object.__setattr__(self, "layer", whole(self.layer, must))
        must = f"probe {self.name}: its position must be a whole number or a label"
        object.__setattr__(self, "position", checked_position(self.position, must))

    def place(self, pair: EncodedPair, roles: Roles) -> int | None:
        """Where in the base run of a pair it reads; None where there is no such position."""
        return roles.adding.place(pair, self.position)

    def digest(self) -> str:
        """A hash of all that decides what it says."""
        said = f"{self.layer} {self.position} ".encode() + self.direction.tobytes()
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
        if len(probe.direction) != spec.d_model:
            raise DeltapatchError(
                f"probe {name} has {len(probe.direction)} numbers, and the residual stream {spec.d_model}"
            )
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
