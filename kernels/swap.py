"""The swap: a patched site's difference becomes (source - base), whatever arrived there."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from deltapatch.kernels.device import upload


class Swap(NamedTuple):
    """Patches of one site that fall into one block of rows.

    `delta` is (source - base) at the site for every source token: [source token, ...].
    """

    token: Tensor  # [patch] int64, row token in the block
    source: Tensor  # [patch] int64, row of `delta`
    at: Tensor | None  # [patch] int64, head, neuron or coordinate; None: the whole vector
    delta: Tensor  # [source token, ...] with the site's own trailing shape
    on_host: np.ndarray | None = None  # `token` once more, so that nobody waits for a device's


def within(swaps: list[Swap], tokens: slice) -> list[Swap]:
    """The swaps that fall into some of the tokens, which are counted from the first of these."""
    out = []
    for token, source, at, delta, on_host in swaps:
        told = token.cpu().numpy() if on_host is None else on_host
        mine = np.flatnonzero((told >= tokens.start) & (told < tokens.stop))
        if len(mine):
            which = upload(mine, token.device)
            at = None if at is None else at[which]
            out.append(Swap(token[which] - tokens.start, source[which], at, delta, told[mine] - tokens.start))
    return out


def apply_swaps(d: Tensor, swaps: list[Swap]) -> None:
    """Write the swaps of a site into its difference, in place.

    Args:
        d: [token, d_model], [token, d_mlp] or [token, head, d_head].
        swaps: patches of the site.
    """
    for token, source, at, delta, _ in swaps:
        if at is None:
            d[token] = delta[source]
        else:
            d[token, at] = delta[source, at]


def gather_columns(swaps: list[Swap], weight: Tensor, n_tokens: int) -> Tensor:
    """Entry of hidden neurons without a matrix product: Σ delta[source, j] * weight[:, j] over patches.

    Args:
        swaps: of single neurons.
        weight: [d_model, d_mlp], the down-projection in the base dtype.
        n_tokens: in the block.

    Returns:
        [token, d_model], zero where there is no patch.
    """
    out = weight.new_zeros(n_tokens, len(weight))
    for token, source, at, delta, _ in swaps:
        assert at is not None
        scale = delta[source, at].unsqueeze(1)  # [patch, 1]
        # Reading columns of a row-major matrix is slow: where many are needed, transpose it once.
        many = len(at) * 4 > weight.shape[1]
        columns = weight.t().contiguous()[at] if many else weight[:, at].t()
        out.index_add_(0, token, columns * scale)
    return out
