"""Every operation of a backend as the engine calls it, on random data of a model's shapes."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltapatch.kernels.activation import Neurons
from deltapatch.kernels.attention import QKV, AttentionBase, Rotary
from deltapatch.kernels.backend import Backend
from deltapatch.kernels.edits import Swap
from deltapatch.kernels.norm import Norms, Part
from deltapatch.kernels.product import Precision, Scaled, narrow_weight
from deltapatch.kernels.readout import BaseReadout, ReadRows, Unembedding
from deltapatch.kernels.segments import Segment
from deltapatch.models import forward
from deltapatch.models.spec import ModelSpec

OPERATIONS = ("norms", "activations", "attention", "columns", "readout")
_LENGTH = 16  # tokens of a prompt
_PATCHES = 64  # of each place that is swapped


class Case(NamedTuple):
    """One call of one operation.

    Attributes:
        name: operation and variant.
        call: makes it; inputs that it overwrites are not restored.
        n_bytes: what is read and written where nothing stays in a cache.
    """

    name: str
    call: Callable[[], Any]
    n_bytes: int


class Cases:
    """The operations of a backend on random rows.

    Args:
        backend: whose operations.
        spec: of the model.
        precision: of the products, and so of what the operations hand to them.
        rows: row tokens.
        device: where.
    """

    def __init__(
        self, backend: Backend, spec: ModelSpec, precision: Precision, rows: int, device: torch.device
    ) -> None:
        self.ops, self.spec, self.precision, self.rows, self.device = backend, spec, precision, rows, device
        self.narrow = precision.operand.itemsize  # bytes of what goes into a product; all else has 4
        self.scale = torch.ones(rows, device=device) if precision.scaled else None
        self.one = [Segment(0, 1, 1, rows, 0, _LENGTH)]  # rows at the last position
        self.at = torch.arange(min(_PATCHES, rows), device=device)

    def __iter__(self) -> Iterator[Case]:
        """All of them; the data of one operation is gone when the next one's is drawn."""
        for operation in OPERATIONS:
            yield from getattr(self, operation)()

    def norms(self) -> Iterator[Case]:
        """Residual adds and norms at the start, in the middle and at the end of a layer, and swaps."""
        spec, d = self.spec, self.spec.d_model
        dx, x, out = self._draw(self.rows, d), self._draw(_LENGTH, d), self._draw(self.rows, d)
        changes = [Scaled(self._draw(self.rows, d), self.scale) for _ in range(2)]
        parts = [Part(Scaled(dx), []), *(Part(c, []) for c in changes)]
        norms = [self._draw(d) for _ in range(2 if spec.parallel and not spec.shared_norm else 1)]
        delta = self._draw(_LENGTH, d)
        swaps = [self._swap(None, delta), self._swap(self.at % d, delta)]

        def call(parts: list[Part], swaps: list[Swap], norms: list[Tensor], out: Tensor | None) -> Any:
            centred = spec.norm == "layer"
            of = Norms(x, norms, spec.norm_eps, centred)
            return self.ops.add_norm(parts, swaps, of, self.one, self.precision, out=out)

        cells = self.rows * d
        start = cells * (4 + len(norms) * self.narrow)
        yield Case("norm", lambda: call(parts[:1], [], norms, None), start)
        middle = cells * (12 + self.narrow)
        yield Case("add and norm", lambda: call(parts[:2], [], norms[:1], out), middle)
        yield Case("add", lambda: call(parts, [], [], out), cells * 16)
        yield Case("add, swaps", lambda: call(parts, swaps, [], out), cells * 16)

    def activations(self) -> Iterator[Case]:
        """The activation, with and without swaps of neurons."""
        spec, f = self.spec, self.spec.d_mlp
        act = forward.activation(spec.activation)
        up, *gates = (
            Neurons(Scaled(self._draw(self.rows, f), self.scale), self._draw(_LENGTH, f))
            for _ in range(1 + spec.gated)
        )
        gate = gates[0] if gates else None
        swap = self._swap(self.at % f, self._draw(_LENGTH, f))

        def call(swaps: list[Swap]) -> Any:
            return self.ops.activation_difference(act, up, gate, self.one, swaps, self.precision)

        n_bytes = self.rows * f * ((1 + spec.gated) * 4 + self.narrow)
        yield Case("activation", lambda: call([]), n_bytes)
        yield Case("activation, swaps", lambda: call([swap]), n_bytes)

    def attention(self) -> Iterator[Case]:
        """Attention of rows of one token, with and without swaps, and of rows that are whole prompts."""
        spec, c = self.spec, self.spec.d_head
        heads, kv = spec.n_heads, spec.n_kv_heads
        q, k, v = (self._draw(_LENGTH, h, c) for h in (heads, kv, kv))
        angle = self._draw(_LENGTH, spec.rope.dim // 2)
        rotary = Rotary(angle.cos(), angle.sin(), spec.rope.interleaved)
        swaps = {
            place: [self._swap(self.at % h, self._draw(_LENGTH, h, c))]
            for place, h in (("q", heads), ("k", kv), ("v", kv), ("z", heads))
        }
        if spec.fused_qkv:
            changes = self._draw(self.rows, heads, 3, c).unbind(2)
        else:
            changes = tuple(self._draw(self.rows, h, c) for h in (heads, kv, kv))
        few = max(1, self.rows // _LENGTH)
        whole = [Segment(0, 1, _LENGTH, few, 0, _LENGTH)]

        def call(segments: list[Segment], last: bool, swaps: dict[str, list[Swap]]) -> Any:
            n = sum(s.n_tokens for s in segments)
            scale = None if self.scale is None else self.scale[:n]
            dq, dk, dv = (t[:n] for t in changes)
            d, base = QKV(dq, dk, dv, scale), AttentionBase(q, k, v, rotary, c**-0.5)
            return self.ops.attention_difference(d, base, segments, swaps, self.precision, reads_only=last)

        # Bytes a token; a result that is to be scaled is written and read once more, in float32.
        key, query = 2 * kv * c * 4, heads * c * (4 + self.narrow + 8 * self.precision.scaled)
        both = self.rows * (key + query)
        yield Case("attention", lambda: call(self.one, False, {}), both)
        yield Case("attention, swaps", lambda: call(self.one, False, swaps), both)
        of_prompts = few * _LENGTH * (key + query)
        yield Case("attention, whole prompts", lambda: call(whole, False, {}), of_prompts)
        at_last = few * (_LENGTH * key + query)
        yield Case("attention, whole prompts, last layer", lambda: call(whole, True, {}), at_last)

    def columns(self) -> Iterator[Case]:
        """Entry of as many neurons as there are rows."""
        d, f = self.spec.d_model, self.spec.d_mlp
        down, delta = self._draw(d, f), self._draw(_LENGTH, f)
        every = torch.arange(self.rows, device=self.device)
        swaps = [Swap(every, every % _LENGTH, every % f, delta)]
        yield Case(
            "columns", lambda: self.ops.gather_columns(swaps, down, self.rows), self.rows * d * 4 + d * f * 4
        )

    def readout(self) -> Iterator[Case]:
        """Log-probabilities of the two answers; the logit changes are written and read once."""
        d, vocab = self.spec.d_model, self.spec.d_vocab
        dn, exact = self._draw(self.rows, d), self._draw(vocab, d) * d**-0.5
        logits = self._draw(1, vocab)
        p = logits.double().softmax(-1)
        answers = torch.tensor([[0, 1]], device=self.device)
        base = BaseReadout(logits, p, p.float() @ exact, answers)
        unembedding = Unembedding(exact, narrow_weight(exact, self.precision))
        rows = ReadRows(dn, self.one, [0])

        def call() -> Any:
            return self.ops.readout(rows, unembedding, base, measured=("dlogp_clean", "dlogp_corrupted"))

        yield Case("read-out", call, self.rows * (d * 4 + vocab * 8))

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def _swap(self, at: Tensor | None, delta: Tensor) -> Swap:
        return Swap(self.at, self.at % _LENGTH, at, delta)
