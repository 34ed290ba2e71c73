"""Train the sparse autoencoder that ships with the package: of the residual stream of a built-in model.

    python scripts/train_autoencoder.py [--layer L] [--features N] [--k K] [--steps N] [--out DIR]

Two cores take some minutes. Seeds are fixed. The folder gets `cfg.json` and `sae_weights.safetensors` as
SAELens has them, and `metrics.json`: how much of the variance it explains on held-out prompts, how many
features a token has, and how many are ever active.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import deltapatch
from deltapatch.models.activations import read_activations
from deltapatch.models.autoencoder import CONFIG, WEIGHTS, Autoencoder
from deltapatch.tasks.arithmetic import arithmetic_pairs

MODEL = "builtin:gpt-neox-arithmetic"
OUT = Path(deltapatch.__file__).parent / "models" / "builtin" / "gpt-neox-arithmetic-features"


def activations(model: deltapatch.Model, layer: int, per_template: int, seed: int) -> Tensor:
    """[token, d_model], the residual stream behind a layer at all tokens of questions of all kinds."""
    pairs, _ = arithmetic_pairs(model.tokenizer, per_template=per_template, shots=0, seed=seed)
    texts = dict.fromkeys(text for pair in pairs for text in (pair.clean, pair.corrupted))
    prompts = [model.tokenizer(text).input_ids for text in texts]
    read = read_activations(model, prompts, [("resid_post", layer)])
    return torch.cat(read["resid_post", layer]).float()


def train(x: Tensor, n_features: int, k: int, steps: int, batch: int = 2048) -> dict[str, Tensor]:
    """The weights of a top-k autoencoder (Gao et al. 2024): decoder rows of length one, tied at the start."""
    draw = torch.Generator().manual_seed(0)
    mean, size = x.mean(0), (x - x.mean(0)).norm(dim=-1).mean() / x.shape[1] ** 0.5
    rows = torch.randn(n_features, x.shape[1], generator=draw)
    w_dec = (rows / rows.norm(dim=-1, keepdim=True)).requires_grad_()
    w_enc = w_dec.detach().T.clone().requires_grad_()
    b_enc, b_dec = torch.zeros(n_features, requires_grad=True), torch.zeros_like(mean, requires_grad=True)
    weights = [w_enc, w_dec, b_enc, b_dec]
    adam = torch.optim.Adam(weights, lr=2e-3)
    slower = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, 2 * (1 - step / steps)))
    idle = torch.zeros(n_features, dtype=torch.int64)  # [feature], steps since it was last active
    for _ in range(steps):
        some = (x[torch.randint(len(x), (batch,), generator=draw)] - mean) / size
        read = (some - b_dec) @ w_enc + b_enc
        kept = read.topk(k, -1)
        f = torch.zeros_like(read).scatter(-1, kept.indices, kept.values.relu())
        off = some - f @ w_dec - b_dec
        idle = torch.where((f > 0).any(0), 0, idle + 1)
        loss = off.square().sum(-1).mean()
        dead = idle > 100
        if dead.any():  # they learn what the others leave
            left = torch.where(dead, read, -torch.inf).topk(min(2 * k, int(dead.sum())), -1)
            more = torch.zeros_like(read).scatter(-1, left.indices, left.values.relu())
            loss = loss + (off.detach() - more @ w_dec).square().sum(-1).mean() / 32
        adam.zero_grad()
        loss.backward()
        adam.step()
        slower.step()
        with torch.no_grad():
            w_dec /= w_dec.norm(dim=-1, keepdim=True)
    with torch.no_grad():  # what was scaled and centred first is folded into the weights
        return {
            "W_enc": (w_enc / size).contiguous(),
            "b_enc": b_enc.clone(),
            "W_dec": (w_dec * size).contiguous(),
            "b_dec": b_dec * size + mean,
        }


def measured(sae: Autoencoder, x: Tensor) -> dict[str, float]:
    """How well it does on activations that it was not trained on."""
    f, _ = sae.encode(x)
    off = f @ sae.weights["w_dec"] + sae.weights["b_dec"] - x
    return {
        "variance_explained": round(1 - float(off.square().sum() / (x - x.mean(0)).square().sum()), 4),
        "active_features_a_token": round(float((f > 0).sum(-1).float().mean()), 2),
        "features_ever_active": int((f > 0).any(0).sum()),
    }


def main() -> None:
    """Train, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--k", type=int, default=12)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    began = time.perf_counter()
    model = deltapatch.load_model(MODEL, device="cpu")
    x = activations(model, asked.layer, 400, seed=0)
    weights = train(x, asked.features, asked.k, asked.steps)
    config: dict[str, Any] = {
        "architecture": "topk",
        "d_in": x.shape[1],
        "d_sae": asked.features,
        "k": asked.k,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"model_name": MODEL, "hook_name": f"blocks.{asked.layer}.hook_resid_post"},
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, asked.out / WEIGHTS)
    (asked.out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    sae = deltapatch.load_sae(asked.out)
    found = measured(sae, activations(model, asked.layer, 40, seed=1))
    found |= {"tokens": len(x), "steps": asked.steps, "seconds": round(time.perf_counter() - began)}
    (asked.out / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
