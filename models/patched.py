"""The plain forward with every site but `pattern` open to changes: nothing is carried as a difference.

It shares the weights and the elementary steps of `forward.py` with the engine and none of the engine, so
that effects can be held to it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltapatch.models import forward
from deltapatch.models.model import Model
from deltapatch.models.surroundings import undisturbed
from deltapatch.models.weights import LayerWeights, constant

# Called with (site, layer, value [row, T, ...]) at every site; it may write into the value.
Visit = Callable[[str, int, Tensor], None]


@undisturbed()
def patched_logits(
    model: Model,
    tokens: Tensor,
    visit: Visit,
    read: Sequence[int] = (-1,),
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Logits of prompts that `visit` changes on the way.

    Args:
        tokens: [row, T], on the model's device.
        visit: sees, and may change, a copy of every site's value.
        read: at which positions.
        dtype: that everything is computed in.

    Returns:
        [row, read, vocab].
    """
    return changed_logits(model, tokens, visit, read, dtype)


def changed_logits(
    model: Model, tokens: Tensor, visit: Visit, read: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """As `patched_logits`, under what is switched on in PyTorch: so gradients are taken through it."""
    x = model.embed(tokens, dtype, positions=torch.arange(tokens.shape[1]))  # [row, T, d_model]
    for l, context in enumerate(forward.contexts(model.spec, tokens.shape[1], dtype, model.device)):
        layer = constant(model.layer(l, dtype))
        x = _block(x, layer, context, lambda site, v, l=l: visit(site, l, v))  # type: ignore[misc]
    return forward.readout(x[:, list(read)], constant(model.ends(dtype)), model.spec)


def _block(
    x: Tensor,
    layer: LayerWeights,
    context: forward.LayerContext,
    visit: Callable[[str, Tensor], None],
) -> Tensor:
    """`forward.block`, with every site open to changes."""

    def at(site: str, value: Tensor) -> Tensor:
        value = value.clone()
        visit(site, value)
        return value

    spec = context.spec
    x = at("resid_pre", x)
    normed = forward.normalise(x, layer.norm1, spec)
    q, k, v = (at(s, y) for s, y in zip("qkv", forward.project_qkv(normed, layer, spec), strict=True))
    q, k = (
        forward.rotate(forward.normalise_heads(y, norm, spec), *context.rope_tables, context.rope)
        for y, norm in ((q, layer.q_norm), (k, layer.k_norm))
    )
    z = at("z", forward.attend(q, k, v, context.scores))
    attn_out = forward.spoken(forward.linear(z.flatten(-2), layer.out), layer.post1, spec)
    mid = x + at("attn_out", attn_out)
    if not spec.parallel:
        mid = at("resid_mid", mid)
    if not spec.shared_norm:
        normed = forward.normalise(x if spec.parallel else mid, layer.norm2, spec)
    act = forward.activation(spec.activation)
    up = forward.linear(normed, layer.up)
    post = act(up) if layer.gate is None else act(forward.linear(normed, layer.gate)) * up
    post = at("mlp_post", post)
    mlp_out = forward.spoken(forward.linear(post, layer.down), layer.post2, spec)
    return at("resid_post", mid + at("mlp_out", mlp_out))
