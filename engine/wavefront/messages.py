"""Messages: what senders say in the source runs, (source - base), kept from layer to layer.

A message is the difference that a sender alone adds to the residual stream. Where there is a norm behind
attention, a head's is what attention would add with that head swapped, minus what it adds.
"""

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.wavefront.block import BlockStep, Layer
from deltapatch.engine.wavefront.prompts import Prompts
from deltapatch.engine.wavefront.setup import Setup
from deltapatch.interventions.nodes import Nodes
from deltapatch.kernels.device import upload
from deltapatch.kernels.product import Scaled


class Messages:
    """Those of some senders, in the pairs of a pass.

    Args:
        setup: what the pass is carried out with.
        prompts: the pairs.
        nodes: of the model.
        senders: [slot], their numbers, ascending.

    Attributes:
        said: [base token, slot, d_model], filled layer by layer; anything behind the prompts.
    """

    said: Tensor

    def __init__(self, setup: Setup, prompts: Prompts, nodes: Nodes, senders: np.ndarray) -> None:
        self.spec, self.shapes, self.nodes, self.senders = setup.model.spec, prompts.shapes, nodes, senders
        self._source = prompts.source_token(np.arange(self.shapes.n_tokens))

    def places(self, layer: int) -> list[str]:
        """What of a layer's source runs is needed."""
        first, mlp = self.nodes.attention(layer), self.nodes.mlp(layer)
        heads = ((self.senders >= first) & (self.senders < mlp)).any()
        return [*(["z"] if heads else []), *(["mlp_out"] if (self.senders == mlp).any() else [])]

    def before(self, layer: int) -> int:
        """How many of the senders speak before a layer: the first ones."""
        return int(np.searchsorted(self.senders, self.nodes.attention(layer)))

    def hear_embedding(self, delta: Tensor) -> None:
        """Keep what `input` says: delta is [source token, d_model]."""
        self.said = delta.new_zeros(self.shapes.n_tokens, len(self.senders), self.spec.d_model)
        if len(self.senders) and self.senders[0] == 0:
            self.said[:, 0] = self._of_base(delta)

    def hear(self, number: int, layer: Layer, deltas: dict[str, Tensor]) -> None:
        """Keep what the senders of a layer say.

        Args:
            number: of the layer.
            layer: in the precision of the base runs.
            deltas: "z" and "mlp_out", (source - base), [source token, ...].
        """
        first, mlp = self.nodes.attention(number), self.nodes.mlp(number)
        slots = slice(*np.searchsorted(self.senders, [first, mlp]))
        heads = self.senders[slots] - first
        if len(heads):
            z = self._of_base(deltas["z"])[:, heads]  # [base token, head, d_head]
            out = layer.weights.out.values.unflatten(1, (-1, self.spec.d_head))[:, heads]
            raw = torch.einsum("thc,dhc->thd", z, out).flatten(0, 1)
            step = BlockStep(layer, self.shapes.segments(len(heads)), {})
            said = step.spoken("attn_out", Scaled(raw, None))
            assert said is not None
            self.said[:, slots] = said.plain().view(len(z), len(heads), -1)
        if slots.stop < len(self.senders) and self.senders[slots.stop] == mlp:
            self.said[:, slots.stop] = self._of_base(deltas["mlp_out"])

    def _of_base(self, delta: Tensor) -> Tensor:
        """A source's difference at every base token, of [source token, ...]."""
        return delta[upload(self._source, delta.device)]
