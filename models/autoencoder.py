"""Sparse autoencoders: folders of SAELens and archives of Gemma Scope, read as their configs say or refused.

An autoencoder reads a vector x of d_in numbers. Its features are f = act(norm(x - b) W_enc + b_enc), and
feature j writes f_j times row j of its decoder, undone by the same norm. A transcoder reads what goes into an
MLP and writes what comes out; a skip connection beside its features stays as it is.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from deltapatch.errors import DeltapatchError, path_of, shown
from deltapatch.models.builtin_models import BUILTIN, builtin_autoencoder_path
from deltapatch.models.header import check_file, open_safetensors

Activation = Literal["relu", "gated", "jumprelu", "topk"]
Norm = Literal["none", "layer_norm", "constant_norm_rescale"]

CONFIG, WEIGHTS, GEMMA = "cfg.json", "sae_weights.safetensors", "params.npz"
# What reading a broken file raises, archives of arrays among them.
_DAMAGE = (
    OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, EOFError, MemoryError,
    RuntimeError, NotImplementedError, BadZipFile, zlib.error, SafetensorError,
)  # fmt: skip
_MOST = 1 << 27  # features times inputs of one matrix are below it: 512 MB in float32
_ACTIVATIONS = {"standard": "relu", "gated": "gated", "jumprelu": "jumprelu", "topk": "topk"}
_TRANSCODERS = {
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_NEEDED = {
    "relu": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
}
# Fields of a SAELens config whose values change what an autoencoder does, and those that are understood.
_UNDERSTOOD: dict[str, tuple[Any, ...]] = {
    "normalize_activations": ("none", "layer_norm", "constant_norm_rescale"),
    "reshape_activations": ("none", "hook_z"),
    "activation_fn": ("relu", "topk"),
    "activation_fn_str": ("relu", "topk"),
    "hook_head_index": (None,),
    "finetuning_scaling_factor": (False, None),
    "use_error_term": (False, True, None),  # errors cancel in a difference
}
_OF_TRANSCODERS: dict[str, tuple[Any, ...]] = {
    "apply_b_dec_to_input": (False,),
    "hook_head_index_out": (None,),
    "reshape_activations": ("none",),
}


@dataclass(frozen=True, repr=False)
class Autoencoder:
    """A sparse autoencoder of one place of a model.

    Attributes:
        name: what it is called.
        site, layer: the place that it writes to, and reads unless it is a transcoder; None where its config
            does not say.
        activation: how features come about.
        norm: what is done to x first and undone behind the decoder.
        weights: name -> tensor: `w_enc` [d_in, d_sae], `w_dec` [d_sae, d_out], `b_dec` [d_out], and [d_sae]
            `b_enc`, or `b_gate`, `b_mag`, `r_mag`, and `threshold`.
        subtracts: whether `b_dec` is taken off what the encoder reads.
        k: features that "topk" keeps.
        by_norm: features are told times the length of their row, which is then taken as of length one.
        reads: what a transcoder reads, a hook's name of the same layer; None of an autoencoder.
        hears: what becomes of x before anything else: of a transcoder in a model, the norm that its MLP has.
    """

    name: str
    site: str | None
    layer: int | None
    activation: Activation
    norm: Norm
    weights: Mapping[str, Tensor]
    subtracts: bool
    k: int | None = None
    by_norm: bool = False
    reads: str | None = None
    hears: Callable[[Tensor], Tensor] | None = None

    @property
    def d_in(self) -> int:
        """The numbers that it reads."""
        return self.weights["w_enc"].shape[0]

    @property
    def d_out(self) -> int:
        """The numbers that it writes."""
        return self.weights["w_dec"].shape[1]

    @property
    def d_sae(self) -> int:
        """Its features."""
        return self.weights["w_enc"].shape[1]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of some vectors, and what a change of features is multiplied with behind the decoder.

        Args:
            x: [token, d_in].

        Returns:
            [token, d_sae] and [token, 1], in x's dtype.
        """
        x = x if self.hears is None else self.hears(x)
        w = {name: tensor.to(x) for name, tensor in self.weights.items()}
        scale = x.new_ones(len(x), 1)
        if self.norm == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.d_in**0.5
            x = x / scale
        elif self.norm == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
            scale = x.std(-1, keepdim=True)
            x = x / (scale + 1e-5)
        if self.reads is not None:  # what a transcoder writes is not in the units of what it reads
            scale = torch.ones_like(scale)
        read = (x - w["b_dec"] if self.subtracts else x) @ w["w_enc"]
        if self.activation == "gated":
            return torch.relu(read * w["r_mag"].exp() + w["b_mag"]) * (read + w["b_gate"] > 0), scale
        read = read + w["b_enc"]
        if self.by_norm:
            read = read * w["w_dec"].norm(dim=-1)
        if self.activation == "topk":
            assert self.k is not None
            kept = read.topk(self.k, -1)
            return torch.zeros_like(read).scatter(-1, kept.indices, kept.values.relu()), scale
        if self.activation == "jumprelu":
            return torch.relu(read) * (read > w["threshold"]), scale
        return torch.relu(read), scale

    def only(self, features: Tensor) -> "Autoencoder":
        """One that has some of the features, in this order. Not of top-k, where they depend on each other."""
        assert self.activation != "topk"
        kept = {
            name: tensor[features] for name, tensor in self.weights.items() if name not in ("w_enc", "b_dec")
        }
        kept |= {"w_enc": self.weights["w_enc"][:, features], "b_dec": self.weights["b_dec"]}
        return replace(self, weights=kept)

    @cached_property
    def digest(self) -> str:
        """What tells it from others: a checksum of its weights and of how it reads."""
        about = (self.site, self.layer, self.activation, self.norm, self.subtracts, self.k, self.by_norm)
        reads = () if self.reads is None else (self.reads,)
        found = hashlib.sha256(repr((*about, *reads)).encode())
        for name, tensor in sorted(self.weights.items()):
            found.update(
                name.encode() + np.ascontiguousarray(tensor.detach().cpu().double().numpy()).tobytes()
            )
        return found.hexdigest()

    def rows(self, features: Tensor) -> Tensor:
        """[feature, d_out], what a unit of each of some features writes; float64."""
        rows = self.weights["w_dec"][features].double()
        return rows / rows.norm(dim=-1, keepdim=True) if self.by_norm else rows

    def __repr__(self) -> str:
        where = "a place that it does not say" if self.site is None else f"{self.site} of layer {self.layer}"
        kind, of = "Autoencoder", "" if self.reads is None else f"from {self.reads} to "
        kind = "Transcoder" if of else kind
        return f"{kind} {self.name}: {self.d_sae:,} features ({self.activation}) {of or 'of '}{where}"


def load_sae(
    path: str | os.PathLike[str],
    *,
    site: str | None = None,
    layer: int | None = None,
    reads: str | None = None,
) -> Autoencoder:
    """Read a sparse autoencoder or a transcoder.

    Args:
        path: a folder of SAELens (`cfg.json` and `sae_weights.safetensors`), or an archive of Gemma Scope
            (`params.npz`), or the folder that it is in; "builtin:gpt-neox-arithmetic-features" ships with the
            package.
        site: where it reads, and a transcoder writes, a name of `sites.SITES` or a hook's; needed where its
            config does not say.
        layer: likewise.
        reads: what a transcoder reads in that layer: `mlp_in`, what the MLP multiplies with its weights;
            `ln2.hook_normalized`, the same without the weights of an RMSNorm; or `resid_mid`.

    Raises:
        DeltapatchError: there is none, it is damaged, or of a kind that is not known: transcoders from one
            layer to another, those of a single head, activations scaled by an average that is not folded
            into the weights.
    """
    if isinstance(path, str) and path.startswith(BUILTIN):
        path = builtin_autoencoder_path(path[len(BUILTIN) :])
    path = path_of(path, "a sparse autoencoder")
    if path.is_dir() and not (path / CONFIG).is_file() and (path / GEMMA).is_file():
        path = path / GEMMA
    try:
        if path.suffix == ".npz":
            found = _gemma_scope(path, reads)
        elif (path / CONFIG).is_file():
            found = _sae_lens(path, reads)
        else:
            raise DeltapatchError(
                f"{path} is no sparse autoencoder: it needs {CONFIG} and {WEIGHTS} of SAELens, or {GEMMA} of "
                "Gemma Scope"
            )
    except DeltapatchError:
        raise
    except _DAMAGE as error:
        said = shown(" ".join(str(error).split()), 200)[1:-1] or type(error).__name__
        raise DeltapatchError(f"the sparse autoencoder {path} cannot be read ({said})") from error
    return replace(
        found,
        site=found.site if site is None else site,
        layer=found.layer if layer is None else layer,
    )


def _sae_lens(folder: Path, reads: str | None) -> Autoencoder:
    check_file(folder / CONFIG)
    about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(about, dict):
        raise ValueError(f"{CONFIG} is no object")
    about |= {k: v for k, v in _object(about.get("metadata")).items() if k not in about}
    architecture = about.get("architecture", "standard")
    known = _ACTIVATIONS | _TRANSCODERS
    if architecture not in known:
        raise DeltapatchError(
            f"the sparse autoencoder {folder} is of the kind {shown(architecture)}: known are "
            f"{', '.join(known)} (a batchtopk is saved as jumprelu)"
        )
    transcodes = architecture in _TRANSCODERS
    if reads is not None and not transcodes:
        raise DeltapatchError(f"{folder} is no transcoder: it reads where it writes; leave out reads")
    for name, values in (_UNDERSTOOD | (_OF_TRANSCODERS if transcodes else {})).items():
        if name in about and about[name] not in values:
            raise DeltapatchError(
                f"the sparse autoencoder {folder} has {name} {shown(about[name])}, which is not known: only "
                f"{', '.join(map(repr, values))}"
            )
    activation = known[architecture]
    k = about.get("k", _object(about.get("activation_fn_kwargs")).get("k"))
    if "topk" in (about.get("activation_fn"), about.get("activation_fn_str")):
        activation = "topk"  # as versions before 6 wrote it
    check_file(folder / WEIGHTS)
    with open_safetensors(folder / WEIGHTS, "pt") as file:
        given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    lower = {n.lower(): t for n, t in given.items()}
    skip = lower.pop("w_skip", None) if transcodes else None
    weights = _checked(lower, activation, transcodes)
    _check_skip(skip, weights, "skip" in architecture)
    if activation == "topk" and not (type(k) is int and 0 < k <= weights["w_enc"].shape[1]):
        raise ValueError(f"k is {shown(k)}")
    hook = about.get("hook_name", about.get("hook_point"))
    site, layer = _place(hook)
    if transcodes:
        said, at = site, layer
        site, layer = _place(about.get("hook_name_out"))
        if reads is None and None not in (at, layer) and at != layer:
            raise DeltapatchError(
                f"the transcoder {folder} reads {hook} and writes {about.get('hook_name_out')}: both must be "
                "of one layer"
            )
        reads = said if reads is None else reads
        if reads is None:
            raise DeltapatchError(
                f"the transcoder {folder} does not say what it reads: load it with reads=, for example "
                'load_sae(path, site="mlp_out", layer=3, reads="mlp_in")'
            )
    return Autoencoder(
        name=str(about.get("neuronpedia_id") or folder.name),
        site=site,
        layer=layer,
        activation=activation,  # type: ignore[arg-type]  # a value of _ACTIVATIONS
        norm=about.get("normalize_activations", "none"),
        weights=weights,
        subtracts=not transcodes and bool(about.get("apply_b_dec_to_input", True)),
        k=k if activation == "topk" else None,
        by_norm=bool(about.get("rescale_acts_by_decoder_norm", False)),
        reads=reads,
    )


def _gemma_scope(path: Path, reads: str | None) -> Autoencoder:
    check_file(path)
    with np.load(path, allow_pickle=False) as file:
        given = {name: torch.from_numpy(np.array(file[name])) for name in file.files}
    weights = _checked({n.lower(): t for n, t in given.items()}, "jumprelu", reads is not None)
    return Autoencoder(
        name="/".join(path.parts[-4:-1]) or path.name,
        site=None,
        layer=None,
        activation="jumprelu",
        norm="none",
        weights=weights,
        subtracts=False,
        reads=reads,
    )


def _checked(weights: dict[str, Tensor], activation: str, transcodes: bool) -> dict[str, Tensor]:
    """The tensors that are needed, seen to fit together."""
    needed = ("w_enc", "w_dec", "b_dec", *_NEEDED[activation])
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    unknown = sorted(set(weights) - set(needed) - {"scaling_factor"})
    if activation == "gated":
        unknown = [name for name in unknown if name != "b_enc"]
    if unknown:
        raise DeltapatchError(
            f"the sparse autoencoder has a tensor {shown(unknown[0])}, which none of its kind should have"
        )
    first = weights["w_enc"]
    if first.ndim != 2 or not 0 < first.numel() < _MOST or not first.is_floating_point():
        raise ValueError(f"w_enc has shape {list(first.shape)}")
    d_in, d_sae = first.shape
    d_out = weights["w_dec"].shape[-1] if transcodes and weights["w_dec"].ndim else d_in
    shapes = {"w_enc": (d_in, d_sae), "w_dec": (d_sae, d_out), "b_dec": (d_out,)}
    for name in needed:
        tensor = weights[name]
        if tuple(tensor.shape) != shapes.get(name, (d_sae,)) or not tensor.is_floating_point():
            raise ValueError(f"{name} has shape {list(tensor.shape)}, and w_enc {list(first.shape)}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")
    scaling = weights.get("scaling_factor")
    if scaling is not None and not (scaling == 1).all():
        raise DeltapatchError(
            "the sparse autoencoder has a scaling factor of fine-tuning, which is not known"
        )
    return {name: weights[name] for name in needed}


def _check_skip(skip: Tensor | None, weights: dict[str, Tensor], needed: bool) -> None:
    """See that a skip connection is there where it should be. It is no feature, so nothing else is done."""
    if needed != (skip is not None):
        raise ValueError("it has no W_skip" if needed else "it has a W_skip, which none of its kind should")
    if skip is not None and skip.shape != (weights["w_dec"].shape[1], weights["w_enc"].shape[0]):
        raise ValueError(f"W_skip has shape {list(skip.shape)}")


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _place(hook: Any) -> tuple[str | None, int | None]:
    """Site and layer of a hook's name; one that is no site is kept, to be refused by name."""
    if not isinstance(hook, str):
        return None, None
    parts = hook.split(".")
    layer = int(parts[1]) if len(parts) > 2 and parts[0] == "blocks" and parts[1].isdecimal() else None
    return (".".join(parts[2:]) if layer is not None else hook), layer
