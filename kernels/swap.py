"""The swap: a patched site's difference becomes (source - base), whatever arrived there."""

from typing import NamedTuple

from torch import Tensor


class Swap(NamedTuple):
    """Patches of one site that fall into one block of rows.

    `delta` is (source - base) at the site for every source token: [source token, ...].
    """

    token: Tensor  # [patch] int64, row token in the block
    source: Tensor  # [patch] int64, row of `delta`
    at: Tensor | None  # [patch] int64, head, neuron or coordinate; None: the whole vector
    delta: Tensor  # [source token, ...] with the site's own trailing shape


def within(swaps: list[Swap], tokens: slice) -> list[Swap]:
    """The swaps that fall into some of the tokens, which are counted from the first of these."""
    out = []
    for swap in swaps:
        mine = (swap.token >= tokens.start) & (swap.token < tokens.stop)
        at = None if swap.at is None else swap.at[mine]
        out.append(Swap(swap.token[mine] - tokens.start, swap.source[mine], at, swap.delta))
    return [swap for swap in out if len(swap.token)]


def apply_swaps(d: Tensor, swaps: list[Swap]) -> None:
    """Write the swaps of a site into its difference, in place.

    Args:
        d: [token, d_model], [token, d_mlp] or [token, head, d_head].
        swaps: patches of the site.
    """
    for token, source, at, delta in swaps:
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
    for token, source, at, delta in swaps:
        assert at is not None
        scale = delta[source, at].unsqueeze(1)  # [patch, 1]
        # Reading columns of a row-major matrix is slow: where many are needed, transpose it once.
        many = len(at) * 4 > weight.shape[1]
        columns = weight.t().contiguous()[at] if many else weight[:, at].t()
        out.index_add_(0, token, columns * scale)
    return out
