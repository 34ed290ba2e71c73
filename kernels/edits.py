"""Edits: what a patch does to the difference d that arrives at its site, d <- d + P (v - d).

v is the source's difference (source - base), and P says what of it is replaced; or a given vector is added.
A kind of edit is a class here and a number in interventions/table.py. The Triton kernels carry out those
that are `fused`, and PyTorch the others beside them (see unfused.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from deltapatch.kernels.device import upload


@dataclass(frozen=True)
class Edit(ABC):
    """Edits of one kind, at one place, that fall into one block of rows.

    Attributes:
        token: [patch] int64, row token in the block.
        on_host: [patch], `token` once more, so that nobody waits for a device's.
        fused: whether the Triton kernels know this kind.
        by_patch: the names of what has a line for each patch.
    """

    token: Tensor
    on_host: np.ndarray | None = field(default=None, kw_only=True)
    fused: ClassVar[bool] = False
    by_patch: ClassVar[tuple[str, ...]] = ("token",)

    @abstractmethod
    def apply(self, d: Tensor) -> None:
        """Change the difference of a place: [token, d_model], [token, d_mlp] or [token, head, d_head]."""

    def within(self, tokens: slice) -> Self | None:
        """What falls into some of the tokens, which are counted from the first of these; None if nothing."""
        told = self.token.cpu().numpy() if self.on_host is None else self.on_host
        mine = np.flatnonzero((told >= tokens.start) & (told < tokens.stop))
        if not len(mine):
            return None
        which = upload(mine, self.token.device)
        lines = {name: getattr(self, name) for name in self.by_patch}
        some: dict[str, Any] = {name: None if line is None else line[which] for name, line in lines.items()}
        some["token"] = some["token"] - tokens.start
        return replace(self, **some, on_host=told[mine] - tokens.start)


@dataclass(frozen=True)
class Swap(Edit):
    """P is everything, or one head, neuron or coordinate: what arrived there is replaced.

    Attributes:
        source: [patch] int64, row of `delta`.
        at: [patch] int64, head, neuron or coordinate; None: the whole vector.
        delta: [source token, ...] with the site's own trailing shape, (source - base) at every source token.
    """

    source: Tensor
    at: Tensor | None
    delta: Tensor
    fused = True
    by_patch = ("token", "source", "at")

    def apply(self, d: Tensor) -> None:
        """Write what the source says."""
        if self.at is None:
            d[self.token] = self.delta[self.source]
        else:
            d[self.token, self.at] = self.delta[self.source, self.at]


@dataclass(frozen=True)
class Along(Edit):
    """P is the part along some directions, U^T U: what arrived there is replaced in their span alone.

    Attributes:
        source: [patch] int64, row of `delta`.
        at: [patch] int64, head; None: the whole vector.
        delta: as of `Swap`.
        basis: [k, width], orthonormal rows.
    """

    source: Tensor
    at: Tensor | None
    delta: Tensor
    basis: Tensor
    by_patch = ("token", "source", "at")

    def apply(self, d: Tensor) -> None:
        """Move what arrived there towards what the source says."""
        there = self.token if self.at is None else (self.token, self.at)
        theirs = self.delta[self.source if self.at is None else (self.source, self.at)]
        off = theirs - d[there]
        d[there] += (off @ self.basis.T) @ self.basis


@dataclass(frozen=True)
class Add(Edit):
    """d <- d + a: steering, whatever arrived there.

    Attributes:
        at: [patch] int64, head; None: the whole vector.
        vector: [patch, width], a.
    """

    at: Tensor | None
    vector: Tensor
    by_patch = ("token", "at", "vector")

    def apply(self, d: Tensor) -> None:
        """Add it."""
        # One row may be steered in several ways at one place.
        there = (self.token,) if self.at is None else (self.token, self.at)
        d.index_put_(there, self.vector.to(d.dtype), accumulate=True)


@dataclass(frozen=True)
class SetFeature(Edit):
    """Features of an autoencoder become what the source says, whatever arrived.

    The encoder is read at base + d, which moves d by (f* - f(base + d)) times the feature's row. That is
    (f* - f(base)) - (f(base + d) - f(base)).

    Attributes:
        x: [patch, width] float64, the base run's activation where the encoder reads.
        change: [patch] float64, f* - f(base).
        feature: [patch] int64, which of the features that `encode` gives.
        row: [patch, width] float64, of the decoder.
        encode: [n, width] -> features [n, k], and [n, 1], what a change of them is multiplied with.
    """

    x: Tensor
    change: Tensor
    feature: Tensor
    row: Tensor
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    by_patch = ("token", "x", "change", "feature", "row")

    def apply(self, d: Tensor) -> None:
        """Move what arrived there; all features at once, each seen before any is set."""
        step = self.step(d[self.token].flatten(1).double()).to(d.dtype)
        d.index_put_((self.token,), step.view(-1, *d.shape[1:]), accumulate=True)

    def step(self, arrived: Tensor) -> Tensor:
        """[patch, width of a row], how far each patch moves, where `arrived` has: [patch, width] float64."""
        (before, _), (now, scale) = self.encode(self.x), self.encode(self.x + arrived)
        moved = (now - before).gather(1, self.feature.unsqueeze(1))  # [patch, 1]
        moved.masked_fill_(~arrived.any(1, keepdim=True), 0)  # the same may round differently twice
        return scale * (self.change.unsqueeze(1) - moved) * self.row


@dataclass(frozen=True)
class Transcode(SetFeature):
    """The same of a transcoder, whose encoder reads the residual stream that an MLP reads, elsewhere."""

    def apply(self, d: Tensor) -> None:
        """What arrived at the other place has to be known."""
        raise TypeError("a transcoder's patch is carried out by `where`")

    def where(self, d: Tensor | None) -> Add:
        """What it does where that much arrived at what it reads, [token, d_model]; None: nothing."""
        arrived = self.x.new_zeros(self.x.shape) if d is None else d[self.token].double()
        return Add(self.token, None, self.step(arrived), on_host=self.on_host)


def within(edits: Iterable[Edit], tokens: slice) -> list[Edit]:
    """The edits that fall into some of the tokens, which are counted from the first of these."""
    return [some for edit in edits if (some := edit.within(tokens)) is not None]


def apply_edits(d: Tensor, edits: Iterable[Edit]) -> None:
    """Change a place's difference, in place, by one edit after the other."""
    for edit in edits:
        edit.apply(d)


def swaps_of(edits: Sequence[Edit]) -> list[Swap]:
    """The same, which are all swaps: what fused operations take. TypeError where one is not."""
    for edit in edits:
        if not isinstance(edit, Swap):
            raise TypeError(f"{type(edit).__name__} is no swap")
    return list(edits)  # type: ignore[arg-type]  # just checked


def gather_columns(edits: Sequence[Edit], weight: Tensor, n_tokens: int) -> Tensor:
    """Entry of hidden neurons without a matrix product: Σ delta[source, j] * weight[:, j] over patches.

    Args:
        edits: swaps of single neurons.
        weight: [d_model, d_mlp], the down-projection in the base dtype.
        n_tokens: in the block.

    Returns:
        [token, d_model], zero where there is no patch.
    """
    out = weight.new_zeros(n_tokens, len(weight))
    for swap in swaps_of(edits):
        assert swap.at is not None
        scale = swap.delta[swap.source, swap.at].unsqueeze(1)  # [patch, 1]
        # Reading columns of a row-major matrix is slow: where many are needed, transpose it once.
        many = len(swap.at) * 4 > weight.shape[1]
        columns = weight.t().contiguous()[swap.at] if many else weight[:, swap.at].t()
        out.index_add_(0, swap.token, columns * scale)
    return out
