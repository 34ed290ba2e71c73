"""Vectors that patches are given: directions along which they swap, and what they add.

Many vectors may be multiples of few: those that features of an autoencoder write are its decoder's rows.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltapatch.errors import DeltapatchError, shown

if TYPE_CHECKING:
    from torch import Tensor

    from deltapatch.models.autoencoder import Autoencoder

_DEPENDENT = 1e-6  # a singular value so small beside the largest says that directions depend on each other
_POOR = 1e-3


_KEPT = ("sae", "feature", "change", "read", "digests")  # of features, in a file


@dataclass(frozen=True)
class SetFeatures:
    """Features that patches set.

    Attributes:
        sae, feature: [patch], which autoencoder, and which feature of it.
        change: [patch] float64, the feature in the source run less that in the base run.
        read: [patch], the line of `base`.
        digests: [autoencoder, 32] uint8, what tells them from others.
        saes: the autoencoders; none where a file was read, of which nothing is carried out.
        base: of each autoencoder [line, d_in] float64, what it reads in base runs.
    """

    sae: np.ndarray
    feature: np.ndarray
    change: np.ndarray
    read: np.ndarray
    digests: np.ndarray
    saes: "tuple[Autoencoder, ...]" = ()
    base: "tuple[Tensor, ...]" = ()

    @property
    def n_bytes(self) -> int:
        """What a pass holds of them."""
        return sum(8 * lines.numel() for lines in self.base)

    def as_file(self) -> dict[str, np.ndarray]:
        """As a file keeps them: what was set, how far, and what tells the autoencoders from others."""
        return {f"set_{name}": getattr(self, name) for name in _KEPT}

    @classmethod
    def of_file(cls, arrays: Mapping[str, np.ndarray]) -> "SetFeatures | None":
        """What `as_file` gave; None where it gave nothing. ValueError where it makes no sense."""
        if not any(name.startswith("set_") for name in arrays):
            return None
        sae, feature, change, read, digests = (arrays[f"set_{name}"] for name in _KEPT)
        right = all(a.ndim == 1 and a.dtype == np.int64 and len(a) == len(sae) for a in (sae, feature, read))
        right = right and change.dtype == np.float64 and change.shape == sae.shape
        if not right or not np.isfinite(change).all():
            raise ValueError("features")
        return cls(sae, feature, change, read, digests)


@dataclass(frozen=True)
class Vectors:
    """Those of a run's patches, each once, in the order in which they come.

    Attributes:
        arrays: each [k, width] float64; of directions orthonormal rows, of what is added one row.
        of, scale: [vector], where vectors are multiples of the arrays: which array, and how much of it.
        features: of autoencoders, which patches set.
    """

    arrays: tuple[np.ndarray, ...] = ()
    of: np.ndarray | None = None
    scale: np.ndarray | None = None
    features: SetFeatures | None = None

    def __len__(self) -> int:
        return len(self.arrays if self.of is None else self.of)

    def multiples(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of some vectors: which array each is of, and how much of it."""
        if self.of is None or self.scale is None:
            return number, np.ones(len(number))
        return self.of[number], self.scale[number]

    def lines(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The arrays of one row of that width: [line, width], and [array] the line of each, -1 for others."""
        fits = np.array([array.shape == (1, width) for array in self.arrays], dtype=bool)
        rows = [array for array, right in zip(self.arrays, fits, strict=True) if right]
        return np.concatenate(rows or [np.empty((0, width))]), np.where(fits, np.cumsum(fits) - 1, -1)

    def as_file(self) -> dict[str, np.ndarray]:
        """As a file keeps them: all numbers in a row, and their shapes."""
        features = {} if self.features is None else self.features.as_file()
        if not self.arrays:
            return features
        shapes = np.array([array.shape for array in self.arrays], dtype=np.int64)
        flat = np.concatenate([array.ravel() for array in self.arrays])
        out = {"vectors": flat, "vector_shapes": shapes}
        if self.of is not None and self.scale is not None:
            out |= {"vector_of": self.of, "vector_scale": self.scale}
        return out | features

    @classmethod
    def of_file(cls, arrays: Mapping[str, np.ndarray]) -> "Vectors":
        """What `as_file` gave. ValueError where it makes no sense."""
        features = SetFeatures.of_file(arrays)
        if "vectors" not in arrays and "vector_shapes" not in arrays:
            return cls(features=features)
        flat, shapes = arrays["vectors"], arrays["vector_shapes"]
        right = flat.dtype == np.float64 and flat.ndim == 1 and bool(np.isfinite(flat).all())
        right &= shapes.dtype == np.int64 and shapes.ndim == 2 and shapes.shape[1] == 2
        if not right or (shapes < 1).any() or int(shapes.prod(1).sum()) != len(flat):
            raise ValueError("vectors")
        parts = np.split(flat, np.cumsum(shapes.prod(1))[:-1])
        own = tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        if "vector_of" not in arrays and "vector_scale" not in arrays:
            return cls(own, features=features)
        of, scale = arrays["vector_of"], arrays["vector_scale"]
        right = (of.dtype, scale.dtype) == (np.int64, np.float64) and of.ndim == 1 and of.shape == scale.shape
        if not right or not np.isfinite(scale).all() or ((of < 0) | (of >= len(own))).any():
            raise ValueError("vectors")
        return cls(own, of, scale, features)


class VectorsMade:
    """Collects the vectors of patches; the same one is kept once."""

    def __init__(self) -> None:
        self._number: dict[bytes, int] = {}
        self.arrays: list[np.ndarray] = []

    def along(self, given: Any, width: int, where: str) -> int:
        """The number of directions, [width] or [k, width], made orthonormal.

        Raises:
            DeltapatchError: they have another width, are not finite, or depend on each other.

        Warns:
            where they nearly depend on each other.
        """
        rows = as_rows(given, f"{where}: along", width)
        _, sizes, basis = np.linalg.svd(rows, full_matrices=False)
        if len(rows) > width or sizes[-1] <= _DEPENDENT * sizes[0] or not sizes[0]:
            raise DeltapatchError(
                f"{where}: the {len(rows)} directions of along are zero or depend on each other: give a basis"
            )
        if sizes[-1] < _POOR * sizes[0]:
            warnings.warn(
                f"{where}: the directions of along are nearly dependent (condition "
                f"{sizes[0] / sizes[-1]:.0e}): their span is uncertain by that much",
                stacklevel=4,
            )
        return self._keep(basis)

    def add(self, given: Any, width: int, where: str) -> int:
        """The number of a vector, [width], that is added. DeltapatchError where it has another shape."""
        rows = as_rows(given, f"{where}: add", width)
        if len(rows) != 1:
            raise DeltapatchError(f"{where}: add takes one vector of {width} numbers, not {len(rows)}")
        return self._keep(rows)

    def _keep(self, array: np.ndarray) -> int:
        key = repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()
        if key not in self._number:
            self._number[key] = len(self.arrays)
            self.arrays.append(array)
        return self._number[key]

    def done(self) -> Vectors:
        """All of them."""
        return Vectors(tuple(self.arrays))


def as_rows(given: Any, what: str, width: int | None = None) -> np.ndarray:
    """[k, width] float64 of numbers, arrays or tensors. DeltapatchError where they are something else."""
    numbers = "numbers" if width is None else f"{width} numbers"
    if hasattr(given, "detach"):  # a tensor, of any device and dtype
        given = given.detach().cpu().double().numpy()
    try:
        rows = np.atleast_2d(np.asarray(given, dtype=np.float64))
    except (TypeError, ValueError):
        raise DeltapatchError(f"{what} must be a vector of {numbers}, not {shown(given)}") from None
    if rows.ndim != 2 or width not in (None, rows.shape[1]) or not rows.size:
        raise DeltapatchError(f"{what} must be vectors of {numbers}, not of shape {list(rows.shape)}")
    if not np.isfinite(rows).all():
        raise DeltapatchError(f"{what} holds numbers that are not finite")
    return rows


def code(number: int, head: int, heads: int) -> int:
    """What a patch table has as the `index` of a given vector at a head; `heads` is 0 for whole vectors."""
    return number * max(1, heads) + head


def decode(index: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Number and head of `code`."""
    number, head = np.divmod(index, max(1, heads))
    return number, head
