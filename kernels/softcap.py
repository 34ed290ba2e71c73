"""Soft caps: c tanh(x / c), and how it changes with x, without cancellation.

With a = x / c and b = d / c,
    c tanh(a + b) - c tanh(a) = c sinh(b) / (cosh(a) cosh(a + b)),
here with its exponentials written so that none overflows.
"""

from torch import Tensor

CAP_NUMBERS = 5  # what `cap_difference` holds at once for each number that it is asked for


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap); x itself where there is no cap."""
    return x if cap is None else (x / cap).tanh_() * cap  # gradients need the tangent


def cap_difference(x: Tensor, d: Tensor, cap: float) -> Tensor:
    """c tanh((x + d) / c) - c tanh(x / c), for x that broadcasts to the shape of d."""
    a, b = x / cap, d / cap
    after, a, size = (a + b).abs_(), a.abs_(), b.abs()
    grown = size.mul(-2).expm1_().neg_()
    grown.mul_(size.sub_(a).sub_(after).exp_()).mul_(2 * cap).copysign_(b)
    return grown.div_(after.mul_(-2).exp_().add_(1)).div_(a.mul_(-2).exp_().add_(1))


def cap_slope(x: Tensor, cap: float) -> Tensor:
    """The derivative, 1 / cosh²(x / c)."""
    return (x / cap).cosh_().reciprocal_().square_()
