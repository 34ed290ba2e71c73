"""What a pass costs in memory, and how much it may use."""

from collections.abc import Collection
from dataclasses import dataclass

from deltapatch.engine.planning.costs import layer_parameters
from deltapatch.engine.wavefront import readout
from deltapatch.engine.wavefront.unpatched import met
from deltapatch.interventions.sites import PLACES
from deltapatch.kernels import activation, attention, readout_tail, readout_triton
from deltapatch.kernels import readout as readout_torch
from deltapatch.kernels.product import Precision
from deltapatch.kernels.softcap import CAP_NUMBERS
from deltapatch.models.forward import widths
from deltapatch.models.model import Model
from deltapatch.models.spec import ModelSpec

_SLACK = 3 / 2  # each thread's allocator keeps half as much again
_OTHER = 8 << 20  # threads' stacks, PyTorch's own, Python's objects


@dataclass(frozen=True)
class Costs:
    """What things cost in memory, in bytes. Upper estimates: a test holds them against the real peak.

    Attributes:
        fixed: the layers' converted weights and the workspace of blocks.
        read: what a pair needs at each position that it is read at.
        base_token: a token of a pair's runs: the activations of two layers, of base and source runs.
        row_token: a token of a row in flight, in this layer's packing and the next's.
        row: the bookkeeping of a row that is read at one position; at several it is as many times that.
        after: the workspace of the read-out, which comes after the layers and takes their place.
        base_token_after: what is left of a token of the unpatched runs then.
        distribution: a pair's output distributions at one position.
        held: how many are held at a time.
    """

    fixed: int
    read: int
    base_token: int
    row_token: int
    row: int
    after: int = 0
    base_token_after: int = 0
    distribution: int = 0
    held: int = 0

    @classmethod
    def of(
        cls,
        model: Model,
        precision: Precision,
        block_tokens: int,
        *,
        n_sources: int,
        length: int,
        threads: int,
        stream: bool,
        places: Collection[str] = PLACES,
        against_base: bool = True,
        n_senders: int = 0,
        apart: bool = False,
    ) -> "Costs":
        """The costs of a sweep of this model, with runs of at most `length` tokens.

        Args:
            block_tokens: row tokens of a block.
            n_sources: runs of each pair beside the base run.
            threads: how many blocks are worked on at once (`Pool.count`).
            places: where patches go.
            against_base: whether patches bring something that is not a source run (sources zero and mean).
            stream: whether the weights are streamed.
            apart: whether source runs are prompts of their own, which are run in float64.
            n_senders: of edges, if these are patched: what they say is kept, and what heads hear of it.
        """
        spec, size, d = model.spec, precision.base.itemsize, model.spec.d_model
        width = {name: _numbers(shape) for name, shape in widths(spec, length).items()}
        patched = sum(width.get(place, 0) for place in places if place != "resid_post")
        # Of one layer: what rows meet, the source runs after it and at patched places.
        kept = sum(width[name] for name in met(spec) if name in width and name != "resid_pre")
        kept += sum(rope.dim for rope in spec.all_ropes())
        kept += n_sources * (d + patched) + (2 * patched + d if against_base else 0)
        heard = n_senders * (d + 3 * spec.n_heads * spec.d_head)
        on_cpu = model.device.type == "cpu"
        capped = spec.logit_softcap is not None  # such logits have no expansions
        tail = 0 if capped else readout_tail.tail_bytes(spec.d_vocab, d, size, precision)
        fixed = _layers(model, precision, block_tokens, length, threads, "mlp_post" in places)
        if apart:  # a layer's weights, twice (see `Converter`), and a block of plain runs
            fixed += 8 * (
                2 * layer_parameters(spec) + threads * _block(spec, precision, block_tokens, length)
            )
        return cls(
            fixed=fixed,
            read=8 * d * size + 400,
            base_token=(2 * kept + heard) * size,
            row_token=2 * d * size,
            row=400 + (d * size if n_senders else 0),
            after=_read_out(model, precision, block_tokens, threads, stream),
            base_token_after=(1 + n_sources) * d * size,
            distribution=readout.distribution_bytes(spec.d_vocab, d, size, on_cpu, capped) + tail,
            held=readout.reads_held(spec.d_vocab, size, on_cpu, tail, capped),
        )

    def total(self, reads: int, base_tokens: int, row_tokens: int, rows: int) -> int:
        """Bytes of a pass; a row counts once for every position that it is read at."""
        layers = self.fixed + base_tokens * self.base_token
        held = min(reads, self.held) * self.distribution
        after = self.after + base_tokens * self.base_token_after + held
        return max(layers, after) + reads * self.read + row_tokens * self.row_token + rows * self.row


def _layers(
    model: Model, precision: Precision, block_tokens: int, length: int, threads: int, neurons: bool
) -> int:
    """Weights of the layers that are in memory together, and the workspace of blocks."""
    spec, size = model.spec, precision.base.itemsize
    layer, on_gpu = layer_parameters(spec), model.device.type == "cuda"
    exact = precision.name in ("fp64", "fp32")
    out = 0
    if model.dtype.itemsize != size:
        out += 2 * layer * size  # the next layer is prepared while the rows pass through one
    if not exact:
        # Elsewhere than on a GPU what is rounded may be kept in float32.
        out += 2 * layer * (precision.operand.itemsize if on_gpu else size)
    if model.holds_what_it_reads:
        out += 3 * layer * model.dtype.itemsize
    workspace = _block(spec, precision, block_tokens, length) * size
    if not on_gpu and precision.operand.itemsize < size:
        workspace += spec.d_model * spec.d_mlp * size  # operands are widened for the product
    if neurons:  # columns of those that enter; of a narrow layer the matrix is turned
        workspace += spec.d_model * (3 * block_tokens + min(spec.d_mlp, 6 * block_tokens)) * size
    return _OTHER + out + round(threads * workspace * _SLACK)


def _block(spec: ModelSpec, precision: Precision, block_tokens: int, length: int) -> int:
    """Numbers that a block takes on its way through a layer, or whole prompts of the unpatched runs."""
    queries, keys = spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head
    tokens = block_tokens * 3 // 2 + length
    through_attention = 7 * spec.d_model + 5 * queries + 6 * keys
    hidden = min(tokens, 2 * block_tokens) * (3 + spec.gated) * spec.d_mlp
    numbers = 6 if spec.attention_softcap is None else 4 + CAP_NUMBERS
    logits = numbers * max(attention.CELLS, (block_tokens * 3 // 2 + 1) * length)
    return tokens * through_attention + max(hidden + 10 * max(activation.CELLS, spec.d_mlp), logits)


def _read_out(model: Model, precision: Precision, block_tokens: int, threads: int, stream: bool) -> int:
    """What the read-out takes: the layers' weights are gone by then."""
    spec, size = model.spec, precision.base.itemsize
    on_cpu = model.device.type == "cpu"
    entries, rows = spec.d_vocab * spec.d_model, block_tokens * 3 // 2
    out = 0
    if not stream and (model.dtype.itemsize != size or precision.name not in ("fp64", "fp32")):
        out += entries * size
    if model.holds_what_it_reads:
        out += entries * model.dtype.itemsize
    capped = spec.logit_softcap is not None
    if not capped:
        out += readout_tail.workspace(spec.d_vocab, spec.d_model, size, precision)
    piece = -(-entries // 8) * size if stream else 0  # narrowed for each block
    held = readout_torch.CELLS if on_cpu else readout_triton.CELLS
    # Logit changes, widened, and expm1 of them; as much of the piece before may stay with the allocator.
    cells = min(max(held, 1024 * rows), rows * spec.d_vocab)
    # What a cap takes on the way is kept beside the rest by the allocator; in a kernel it takes nothing.
    token = 2 * size + 32 + (CAP_NUMBERS * size if capped and on_cpu else 0)
    block = cells * token + 4 * rows * spec.d_model * size + piece
    unpatched = readout.workspace(spec.d_vocab, spec.d_model, size, on_cpu, capped)
    return _OTHER + out + round(threads * max(block, unpatched) * _SLACK)


def _numbers(shape: tuple[int, ...]) -> int:
    n = 1
    for length in shape:
        n *= length
    return n
