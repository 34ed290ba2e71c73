"""Where the sites of a transformers model are: modules, and whether a site is their input or output."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltapatch.models.spec import ModelSpec


class Names(NamedTuple):
    """The modules of an architecture."""

    backbone: str
    layers: str  # within the backbone
    attention: str  # within a layer, as are those that follow
    out: str
    mlp: str
    down: str
    block: str = ""  # the layer itself


NAMES = {
    "gpt2": Names("transformer", "h", "attn", "attn.c_proj", "mlp", "mlp.c_proj"),
    "gpt_neox": Names("gpt_neox", "layers", "attention", "attention.dense", "mlp", "mlp.dense_4h_to_h"),
    "gptj": Names("transformer", "h", "attn", "attn.out_proj", "mlp", "mlp.fc_out"),
    "llama": Names("model", "layers", "self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj"),
}
# site -> the module (a field of Names) and whether the site is what goes into it
PLACES = {
    "mlp_out": ("down", False),
    "attn_out": ("out", False),
    "z": ("out", True),
    "mlp_post": ("down", True),
    "resid_post.along": ("block", False),
    "feature": ("block", False),
}


def load(folder: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers gives it, quiet, on a device."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False
    )
    return model.to(device).eval()


def backbone(model: Any, spec: ModelSpec) -> Any:
    """All of it but the read-out."""
    return model.get_submodule(NAMES[spec.architecture].backbone)


@contextmanager
def only_from(model: Any, spec: ModelSpec, first: int) -> Iterator[None]:
    """Within it the backbone has only the layers from `first` on."""
    body, name = backbone(model, spec), NAMES[spec.architecture].layers
    every = getattr(body, name)
    setattr(body, name, every[first:])
    try:
        yield
    finally:
        setattr(body, name, every)


def layers(model: Any, spec: ModelSpec) -> Any:
    """Its blocks, in order."""
    names = NAMES[spec.architecture]
    return model.get_submodule(f"{names.backbone}.{names.layers}")


def module(block: Any, spec: ModelSpec, site: str) -> tuple[Any, bool]:
    """Of a block: the module at a site, and whether the site is its input."""
    field, before = PLACES[site]
    return block.get_submodule(getattr(NAMES[spec.architecture], field)), before


def path(spec: ModelSpec, site: str, layer: int) -> tuple[list[str], bool]:
    """The same as names from the model's root."""
    names = NAMES[spec.architecture]
    field, before = PLACES[site]
    return [names.backbone, names.layers, str(layer), *getattr(names, field).split(".")], before


def indexed(x: Tensor, spec: ModelSpec, site: str) -> Tensor:
    """A view whose third axis is what the site's index counts: heads of z, else coordinates."""
    return x.unflatten(-1, (spec.n_heads, spec.d_head)) if site == "z" else x
