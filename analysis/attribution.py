"""Attribution: first-order estimates of the effects of all edges, by gradients of what receivers read.

EAP (Syed et al. 2023): the change that a sender brings, times the gradient of the metric in what the
receiver reads, in the base run. EAP-IG (Hanna et al. 2024): the gradient is the mean over runs whose
embeddings lie between those of both prompts. They are what exact effects are compared with; gradients are
PyTorch's, through the plain forward.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from deltapatch.arguments import choice, whole
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.nodes import Nodes
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.pairs_file import Pairs, as_pairs
from deltapatch.interventions.roles import Roles, check_everywhere
from deltapatch.interventions.wirings import existing
from deltapatch.models import forward
from deltapatch.models.model import Model
from deltapatch.models.surroundings import undisturbed
from deltapatch.models.weights import EndWeights, LayerWeights, map_tensors
from deltapatch.results.metrics import Direction

Method = Literal["eap", "eap-ig"]


@dataclass(frozen=True)
class _Run:
    """One run, T tokens.

    Attributes:
        said: [sender, T, d_model], what every node adds to the residual stream; heads before a norm behind.
        raw: [layer][T, d_model], what attention gives before the norm behind it, where there is one.
        metric: the logits of both answers apart.
        read: [receiver][T, d_model], what was added to what each reads, whose gradients can be asked for.
    """

    said: Tensor
    raw: list[Tensor]
    metric: Tensor
    read: list[Tensor]


class SplitForward:
    """The plain forward of one prompt, in which every receiver's reading is a tensor of its own.

    Args:
        model: whose weights it takes, in `dtype`.
        dtype: that all is computed in.
    """

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self.model, self.spec, self.dtype = model, model.spec, dtype
        with model.reading() as read:
            self.layers: list[LayerWeights] = [
                map_tensors(read.layer(l), lambda t: t.to(dtype)) for l in range(self.spec.n_layers)
            ]
            self.ends: EndWeights = read.ends()

    def embed(self, tokens: list[int]) -> Tensor:
        """[T, d_model], positions with them where the model has them."""
        positions = torch.arange(len(tokens)) if self.spec.learned_positions else None
        return self.model.embed(torch.tensor(tokens), self.dtype, positions=positions)

    def run(
        self, x: Tensor, answers: tuple[list[int], list[int]], added: dict[int, Tensor] | None = None
    ) -> _Run:
        """A run from its embeddings.

        Args:
            x: [T, d_model].
            answers: tokens whose logits' difference at the last position is the metric; of several that count
                as one, log Σ exp(logit).
            added: receiver -> [T, d_model], what it reads beside the residual stream.
        """
        spec, heads, length = self.spec, self.spec.n_heads, len(x)
        group = heads // spec.n_kv_heads
        read: list[Tensor] = []
        said, raws = [x], []

        def reading(count: int) -> Tensor:
            """[receiver, T, d_model], what is added to what the next receivers read."""
            fresh = []
            for number in range(len(read), len(read) + count):
                start = None if added is None else added.get(number)
                fresh.append(torch.zeros_like(x) if start is None else start.to(x.dtype))
            read.extend(t.requires_grad_() for t in fresh)
            return torch.stack(read[-count:])

        head = torch.arange(heads, device=x.device)
        contexts = forward.contexts(spec, length, self.dtype, x.device)
        for layer, context in zip(self.layers, contexts, strict=True):
            into = forward.normalise(x + reading(3 * heads), layer.norm1, spec)  # [3 * head, T, d_model]
            q, k, v = forward.project_qkv(into, layer, spec)  # [3 * head, T, head, d_head]
            q = forward.normalise_heads(q[:heads], layer.q_norm, spec)[head, :, head]
            k = forward.normalise_heads(k[heads : 2 * heads], layer.k_norm, spec)[head, :, head // group]
            v = v[2 * heads :][head, :, head // group]  # [head, T, d_head]
            q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
            cos, sin = context.rope_tables
            q, k = (forward.rotate(t, cos[:length], sin[:length], context.rope) for t in (q, k))
            z = forward.attend(q, k, v, context.scores)[0]  # [T, head, d_head]
            out = layer.out.weight.unflatten(1, (heads, -1))
            raw_heads = torch.einsum("thc,dhc->htd", z, out)
            raw = raw_heads.sum(0) if layer.out.bias is None else raw_heads.sum(0) + layer.out.bias
            attn_out = forward.spoken(raw, layer.post1, spec)
            scale = 1.0 if spec.post_norm else spec.residual_scale
            said += list(raw_heads * scale)
            raws.append(raw)
            mlp_out = forward.mlp(x + reading(1)[0], attn_out, layer, spec).mlp_out
            said.append(mlp_out)
            x = x + attn_out + mlp_out
        logits = forward.readout((x + reading(1)[0])[-1], self.ends, spec)
        metric = logits[answers[0]].logsumexp(-1) - logits[answers[1]].logsumexp(-1)
        return _Run(torch.stack(said), raws, metric, read)

    def messages(self, base: _Run, source: _Run) -> Tensor:
        """[sender, T, d_model], what each sender's change adds to the residual stream of the base run."""
        spec, nodes = self.spec, Nodes.of(self.spec)
        out = (source.said - base.said).detach()
        if spec.post_norm:
            for l, layer in enumerate(self.layers):
                mine = slice(nodes.attention(l), nodes.mlp(l))
                raw = base.raw[l].detach()
                swapped = forward.spoken(raw + out[mine], layer.post1, spec)
                out[mine] = swapped - forward.spoken(raw, layer.post1, spec)
        return out


@undisturbed()
def attribute_edges(
    model: Model,
    pairs: Pairs,
    *,
    method: Method = "eap",
    direction: Direction = "denoise",
    steps: int = 5,
) -> np.ndarray:
    """Estimates of the total effects of all edges on the logit difference, all positions together.

    Args:
        model: in memory.
        pairs: as of `sweep`, with answers of one token.
        method: "eap", or "eap-ig" with gradients at `steps` embeddings between those of both prompts.
        direction: as of `sweep_edges`, whose `values("logit_diff")` this estimates.
        steps: of "eap-ig".

    Returns:
        [pair, sender, receiver] float64, NaN where there is no edge.

    Raises:
        DeltapatchError: bad input, an answer of several tokens, or prompts that do not line up.
    """
    choice(method, ("eap", "eap-ig"), "method")
    steps = whole(steps, "steps must be a whole number") if method == "eap-ig" else 1
    if steps < 1:
        raise DeltapatchError(f"steps must be 1 or more, not {steps}")
    found, names = as_pairs(pairs)
    encoded = encode_pairs(found, model.tokenizer, model.spec.d_vocab, names)
    if any(pair.answer_tokens > 1 for pair in encoded):
        raise DeltapatchError("estimates by gradients are of answers of one token: shorten them")
    check_everywhere(encoded, "estimates by gradients")
    nodes = Nodes.of(model.spec)
    there = existing(nodes)
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    split = SplitForward(model, dtype)
    out = np.full((len(encoded), *there.shape), np.nan)
    for i, pair in enumerate(encoded):
        out[i][there] = _estimates(split, pair, method, direction, steps)[there]
    return out


def _estimates(
    split: SplitForward, pair: EncodedPair, method: Method, direction: Direction, steps: int
) -> np.ndarray:
    """[sender, receiver], where there is an edge or not."""
    base, source = Roles(direction).prompts(pair)
    answers = pair.clean_answer + pair.clean_others, pair.corrupted_answer + pair.corrupted_others
    x, other = (split.embed(tokens) for tokens in (base, source))
    with torch.no_grad():
        runs = [split.run(t, answers) for t in (x, other)]
    message = split.messages(*runs)
    total: Tensor | None = None
    for share in _shares(method, steps):
        with torch.enable_grad():
            run = split.run(x + share * (other - x), answers)
            slope = torch.stack(torch.autograd.grad(run.metric, run.read))  # [receiver, T, d_model]
        total = slope if total is None else total + slope
    assert total is not None
    mean = total / steps
    return (message.flatten(1) @ mean.flatten(1).T).double().cpu().numpy()


def _shares(method: Method, steps: int) -> Iterator[float]:
    """How far from the base run to the source run gradients are taken."""
    return iter([0.0]) if method == "eap" else (k / steps for k in range(1, steps + 1))
