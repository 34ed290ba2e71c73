"""Rates of this machine: how fast it multiplies, works through numbers and reads a file, seen in a second."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltapatch.engine.question import Question
from deltapatch.engine.wavefront.pool import Pool
from deltapatch.kernels.activation import Neurons
from deltapatch.kernels.product import Operand, Precision, narrow, narrow_weight, product
from deltapatch.kernels.segments import Segment
from deltapatch.models import forward

_TIMES = 3  # of which the fastest counts
_MOST = 1 << 24  # entries of a matrix that products are timed with
_READ = 1 << 28  # bytes that are read to see how fast a file is
_SMALL = 200  # operations on next to nothing


@dataclass(frozen=True)
class Rates:
    """What a second does, all threads together.

    Attributes:
        products: FLOP of a block's products with a layer's matrices, in a run's precision.
        exact: the same in that of the unpatched runs.
        read_out: FLOP of products with the unembedding.
        numbers: of hidden neurons whose activation's difference is taken: what is no product.
        weights: entries of matrices that are converted.
        calls: operations on next to nothing: what a block takes whatever its size.
        file: bytes of weights that are read; endless where the model is in memory.
    """

    products: float
    exact: float
    read_out: float
    numbers: float
    weights: float
    calls: float
    file: float = float("inf")


def measure(
    question: Question,
    precision: Precision,
    pool: Pool,
    *,
    in_a_block: int | None = None,
    read_at_once: int | None = None,
) -> Rates:
    """The rates of this machine at a model's shapes.

    Args:
        precision: of the run.
        pool: does blocks, as in the run itself.
        in_a_block: tokens that products are of; as many as a full block has unless given.
        read_at_once: the same of products with the unembedding.
    """
    spec, model = question.model.spec, question.model
    tokens = question.backend.block_tokens
    hidden = min(spec.d_mlp, max(1, _MOST // spec.d_model))
    vocabulary = min(spec.d_vocab, max(1, _MOST // spec.d_model))
    exact = precision.exact
    draw = torch.Generator(device=model.device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=model.device, dtype=precision.base)

    def rate_of(in_: Precision, n: int, rows: int | None) -> float:
        rows = rows or tokens
        d, weight = drawn(rows, spec.d_model), narrow_weight(drawn(n, spec.d_model), in_)
        return 2 * rows * n * spec.d_model / _seconds(lambda: _multiply(d, weight, in_), model.device, pool)

    act, run = forward.activation(spec.activation), [Segment(0, 1, 1, tokens, 0, 1)]
    base, d = drawn(1, hidden), drawn(tokens, hidden)
    gated = [drawn(tokens, hidden)] if spec.gated else []

    def activate() -> None:
        up, *gate = (Neurons(narrow(part.clone(), exact), base) for part in (d, *gated))
        question.backend.activation_difference(act, up, gate[0] if gate else None, run, [], exact)

    matrix = drawn(hidden, spec.d_model).to(model.dtype)
    narrowed = _seconds(lambda: narrow_weight(matrix.to(precision.base), precision), model.device, Pool())
    little = drawn(8)
    small = _seconds(lambda: [little.add(1) for _ in range(_SMALL)], model.device, pool)
    return Rates(
        products=rate_of(precision, hidden, in_a_block) * pool.count,
        exact=rate_of(exact, hidden, in_a_block) * pool.count,
        read_out=rate_of(precision, vocabulary, read_at_once) * pool.count,
        numbers=tokens * hidden / _seconds(activate, model.device, pool) * pool.count,
        weights=matrix.numel() / narrowed,
        calls=_SMALL / small * pool.count,
        file=_file(question),
    )


def _multiply(d: Tensor, weight: Operand, precision: Precision) -> None:
    product(narrow(d, precision), weight)


def _seconds(work: Callable[[], object], device: torch.device, pool: Pool) -> float:
    """Of some work, done by every thread at once: the fastest of a few times."""
    found = []
    for _ in range(_TIMES):
        began = _now(device)
        pool(lambda _: _done(work()), range(pool.count))
        found.append(_now(device) - began)
    return max(min(found), 1e-9)


def _done(_: object) -> None:
    """What a map takes returns nothing."""


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _file(question: Question) -> float:
    began = time.perf_counter()
    done = question.model.read_some(_READ)
    return done / max(time.perf_counter() - began, 1e-9) if question.model.stream else float("inf")
