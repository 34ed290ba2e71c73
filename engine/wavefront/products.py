"""The matrices of a layer as the products of differences take them."""

from typing import NamedTuple

import torch

from deltapatch.kernels.product import Operand, Precision, narrow_weight
from deltapatch.models.weights import LayerWeights

FEW = 256  # tokens: on a CPU the product of fewer with a matrix costs less than narrowing the matrix


def taken_in(precision: Precision, n_tokens: int, device: torch.device) -> Precision:
    """The precision that a product is taken in: that of the sweep; float32 where bfloat16 saves nothing."""
    few = precision.name == "bf16" and device.type == "cpu" and n_tokens < FEW
    return precision.exact if few else precision


class ProductWeights(NamedTuple):
    """The matrices of one block in the precision of a sweep; see `LayerWeights`."""

    qkv: tuple[Operand, ...]
    out: Operand
    gate: Operand | None
    up: Operand
    down: Operand


def narrow_layer(layer: LayerWeights, precision: Precision) -> ProductWeights:
    """The matrices of a block, shared where they have that precision already."""
    return ProductWeights(
        qkv=tuple(narrow_weight(part.weight, precision) for part in layer.qkv),
        out=narrow_weight(layer.out.weight, precision),
        gate=None if layer.gate is None else narrow_weight(layer.gate.weight, precision),
        up=narrow_weight(layer.up.weight, precision),
        down=narrow_weight(layer.down.weight, precision),
    )
