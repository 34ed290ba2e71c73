"""How long a screened sweep will take: its estimates, and as many exact effects as it begins with."""

import math
from dataclasses import dataclass, replace

import numpy as np

from deltapatch.engine.options import ScreenOptions
from deltapatch.engine.passes import at_work
from deltapatch.engine.planning.costs import layer_parameters
from deltapatch.engine.planning.forecast import BESIDE_OTHERS, Forecast, forecast, numbers_beside
from deltapatch.engine.planning.rates import Rates, measure
from deltapatch.engine.question import Question
from deltapatch.engine.screening.estimates import Estimates, reaching
from deltapatch.engine.screening.lines import at_once
from deltapatch.engine.screening.screen import estimates_of, first_sizes, listed_effects, verified_with
from deltapatch.engine.wavefront.layout import PairShapes
from deltapatch.interventions.edges import EdgeGrid
from deltapatch.interventions.grid import Grid
from deltapatch.interventions.nodes import V
from deltapatch.interventions.sites import DIRECTION
from deltapatch.models import forward

# Operations of a block in a layer, whatever its sizes: base run, source run, and a gradient, with the forward
# that it takes. Then of the gradient in what the last layer leaves.
BASE, SOURCE, GRADIENT, OF_LOGITS = 280, 580, 600, 190
# Of a block whose receivers are heard for edges, and of each of them that is a head.
HEARING, OF_HEAD = 550, 110


@dataclass(frozen=True)
class Work:
    """What estimates take.

    Attributes:
        token_layers: tokens that go through a layer, forward or back.
        reads: tokens that go through the unembedding, forward or back.
        numbers: that patches change, each kept and multiplied.
        products: FLOPs beside those of layers and the unembedding.
        calls: operations, whatever their sizes.
        in_a_block: tokens that go through a layer together.
        read_at_once: tokens that go through the unembedding together.
        side_by_side: blocks that threads share.
    """

    token_layers: int
    reads: int
    numbers: int
    products: int
    calls: int
    in_a_block: int
    read_at_once: int
    side_by_side: int


def forecast_screen(question: Question) -> Forecast:
    """What a screened sweep will do: estimate everything, and compute as many effects as it begins with.

    Which these are is known only when all is estimated, so as many are counted that are drawn from all. What
    is verified takes less where it is in late layers, and more where it is in early ones. With `until`, more
    may be needed.

    Args:
        question: of a sweep with a screen.

    Returns:
        The forecast of what is verified; its `seconds` have "estimates" beside the rest.

    Raises:
        DeltapatchError: bad input; the memory budget has no room for one intervention.
    """
    options, grid, model = question.options, question.interventions, question.model
    assert isinstance(options, ScreenOptions)
    assert isinstance(grid, Grid | EdgeGrid)
    estimates, can = estimates_of(question), np.flatnonzero(reaching(question))
    drawn = np.random.default_rng(options.seed).permutation(can)[: max(1, sum(first_sizes(options)))]
    verified = replace(
        question,
        options=verified_with(model, options),
        interventions=listed_effects(grid, drawn, question.pairs),
    )
    found = forecast(verified)
    assert found.seconds is not None
    work = work_of(estimates)
    with at_work(question) as pool:
        precision = estimates.setup.precision
        sizes = {"in_a_block": work.in_a_block, "read_at_once": work.read_at_once}
        rates, threads = measure(question, precision, pool, **sizes), pool.count
    return replace(found, seconds={"estimates": seconds(estimates, work, rates, threads), **found.seconds})


def seconds(estimates: Estimates, work: Work, rates: Rates, threads: int) -> float:
    """How long estimates will take.

    Args:
        work: of these.
        rates: of this machine, at the sizes of this work.
        threads: that share the blocks.
    """
    question, spec, model = estimates.question, estimates.spec, estimates.model
    layer, keys = layer_parameters(spec), max(run.length for run in question.runs)
    of_a_token = 2 * layer / rates.exact + numbers_beside(spec, keys) / rates.numbers
    of_a_read = 2 * spec.d_vocab * spec.d_model / rates.read_out + spec.d_vocab / rates.numbers
    spent = work.token_layers * of_a_token + work.reads * of_a_read
    spent += work.products / rates.exact + 2 * work.numbers / rates.numbers + work.calls / rates.calls
    spent /= min(1.0, work.side_by_side / threads)
    chunks = sum(1 for _ in estimates.chunks())
    if model.dtype != estimates.dtype:  # every layer's weights are converted forward and back
        spent += 2 * chunks * spec.n_layers * layer / rates.weights
    spent /= BESIDE_OTHERS
    return max(spent, 2 * chunks * model.n_bytes / rates.file) if model.stream else spent


def work_of(estimates: Estimates) -> Work:
    """What the estimates of a grid of sites or edges take."""
    question, n_layers, name = estimates.question, estimates.spec.n_layers, estimates.method.name
    most, chunks = question.backend.block_tokens, list(estimates.chunks())
    shapes = [PairShapes([question.runs[i]._replace(beside=0) for i in numbers]) for numbers in chunks]
    blocks, sources = (sum(len(own.segments(n, most)) for own in shapes) for n in (1, question.n_sources))
    calls = n_layers * (blocks * BASE + sources * SOURCE)
    if name == "ig-activations":
        batches, places, lines = _lines(estimates)
        runs = {number: n * estimates.method.steps for number, n in lines.items()}
        tokens, reads = sum(n * question.runs[i].length for i, n in runs.items()), sum(runs.values())
        calls += batches * (n_layers * GRADIENT + OF_LOGITS)
        blocks, products_read, together = batches, batches, places
    else:
        steps = estimates.method.steps if name == "ig-inputs" else 1
        tokens, reads = (int(sum(sizes)) for sizes in zip(*map(_sizes, shapes), strict=True))
        calls += steps * (estimates.n_back * blocks * GRADIENT + len(chunks) * OF_LOGITS)
        calls += steps * n_layers * blocks * BASE if name == "ig-inputs" else 0
        if isinstance(estimates.asked, EdgeGrid):
            heads = sum(r.reads <= V for r in estimates.receivers)
            each = len(estimates.hearing) * HEARING + heads * OF_HEAD
            calls += steps * blocks * len(estimates.asked.effects) * each
        reads, products_read, together = steps * reads, steps * len(chunks), len(chunks)
    numbers, products = (_said if isinstance(estimates.asked, EdgeGrid) else _changes)(estimates)
    return Work(
        token_layers=estimates.token_layers,
        reads=2 * reads,
        numbers=numbers,
        products=products,
        calls=calls,
        in_a_block=math.ceil(tokens / blocks),
        read_at_once=math.ceil(reads / products_read),
        side_by_side=math.ceil(blocks / together),
    )


def _sizes(shapes: PairShapes) -> tuple[int, int]:
    """Tokens of a chunk, and how many of them are read."""
    return shapes.n_tokens, int(shapes.reads.sum())


def _lines(estimates: Estimates) -> tuple[int, int, dict[int, int]]:
    """Batches of lines, the places that these are of in each pair, and by pair how many lines there are."""
    question, steps = estimates.question, estimates.method.steps
    batches = places = 0
    lines = dict.fromkeys(question.order, 0)
    for number in question.order:
        room = at_once(question.runs[number].length, steps)
        for g in estimates.sites:
            n = len(g.spots(question.pairs[number]))  # one of all positions together
            lines[number] += n * len(g.layers)
            batches += math.ceil(n / room) * len(g.layers)
            places += len(g.layers)
    return batches, places, lines


def _changes(estimates: Estimates) -> tuple[int, int]:
    """How many numbers are changed where patches go, and FLOPs of their parts along directions."""
    question, spec = estimates.question, estimates.spec
    widths = forward.widths(spec, max(run.length for run in question.runs))
    numbers = products = 0
    for g in estimates.sites:
        spots = sum(len(at) for number in question.order for _, at in g.spots(question.pairs[number]))
        numbers += len(g.layers) * spots * math.prod(widths[g.site.place])
        if g.site.index is DIRECTION:
            products += len(g.layers) * spots * 4 * spec.d_model * g.n_indices
    return numbers, products


def _said(estimates: Estimates) -> tuple[int, int]:
    """How many numbers senders of edges say, and FLOPs of these, of what is read, and of both together."""
    question, spec, grid = estimates.question, estimates.spec, estimates.asked
    assert isinstance(grid, EdgeGrid)
    tokens = sum(question.runs[number].length for number in question.order)
    d, senders, kinds = spec.d_model, np.array(grid.senders), len(grid.effects)
    steps = estimates.method.steps if estimates.method.name == "ig-inputs" else 1
    width = spec.d_head * (spec.n_heads if spec.qk_norm == "width" else 1)
    heads = sum(r.reads <= V for r in estimates.receivers)
    products = 2 * tokens * len(senders) * spec.d_head * d + steps * kinds * 2 * tokens * heads * width * d
    for receiver in estimates.receivers:
        products += kinds * 2 * tokens * int((senders < grid.nodes.before(receiver)).sum()) * d
    return tokens * len(senders) * d, products
