"""Sparse autoencoders with random weights, as SAELens writes them, and what they are by definition."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

KINDS = ("standard", "gated", "jumprelu", "topk")
NORMS = ("none", "layer_norm", "constant_norm_rescale")
TOLERANCE = {"fp32": 2e-5, "fp64": 1e-8}


def made(kind, d_in, d_sae=24, seed=0):
    """Random weights under the names of SAELens."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=draw) * scale

    out = {
        "W_enc": normal(d_in, d_sae),
        "W_dec": normal(d_sae, d_in, scale=0.3),
        "b_dec": normal(d_in, scale=0.1),
    }
    if kind == "gated":
        return out | {name: normal(d_sae, scale=0.3) for name in ("b_gate", "b_mag", "r_mag")}
    out["b_enc"] = normal(d_sae, scale=0.3)
    return out | ({"threshold": normal(d_sae).abs()} if kind == "jumprelu" else {})


def written(folder, weights, kind="standard", hook="blocks.1.hook_resid_post", **more):
    folder.mkdir()
    d_in, d_sae = weights["W_enc"].shape
    config = {"architecture": kind, "d_in": d_in, "d_sae": d_sae, "metadata": {"hook_name": hook}, **more}
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def encoded(x, weights, kind, norm="none", subtracts=True, k=5, by_norm=False):
    """Features [token, d_sae] and what a change is multiplied with, [token, 1], by definition, in numpy."""
    w = {name: t.double().numpy() for name, t in weights.items()}
    scale = np.ones((len(x), 1))
    if norm == "constant_norm_rescale":
        scale = np.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(x.shape[-1])
        x = x / scale
    if norm == "layer_norm":
        x = x - x.mean(-1, keepdims=True)
        scale = x.std(-1, keepdims=True, ddof=1)
        x = x / (scale + 1e-5)
    x = x - w["b_dec"] if subtracts else x
    if kind == "gated":
        on = x @ w["W_enc"] + w["b_gate"] > 0
        return on * np.maximum(x @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"], 0), scale
    h = x @ w["W_enc"] + w["b_enc"]
    if by_norm:
        h = h * np.linalg.norm(w["W_dec"], axis=-1)
    f = np.maximum(h, 0)
    if kind == "jumprelu":
        f = f * (h > w["threshold"])
    if kind == "topk":
        f = f * (h >= np.sort(h, -1)[:, -k][:, None])
    return f, scale
