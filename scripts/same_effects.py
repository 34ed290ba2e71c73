"""Whether two checkouts find the same effects: built-in models, all sites, both directions, joint patches.

    python scripts/same_effects.py BEFORE AFTER

Each checkout runs in a process of its own. Differences are relative to the largest effect of the pair at the
site. Prints one JSON object; the exit code is 1 where one is above 1e-6.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 1e-6
METRICS = ("ie", "logit_diff", "kl")
MODELS = (
    "gpt-neox-arithmetic",
    "gptj-arithmetic",
    "llama-arithmetic",
    "gpt-neox-study",
    "llama-digits-study",
)
PROMPTS = (
    ("What is 17 plus 24? The answer is", "What is 52 plus 31? The answer is", "41", "83"),
    ("14 + 25 =", "36 + 42 =", "39", "78"),
)
SITES = ("mlp_out", "attn_out", "resid_pre", "resid_mid", "resid_post", "q", "k", "v", "z", "mlp_post")


def effects(file: Path) -> None:
    """Write what the checkout that is imported finds."""
    import deltapatch as dp
    from deltapatch.errors import DeltapatchError

    found: dict[str, np.ndarray] = {}
    for name in MODELS:
        try:
            model = dp.load_model(f"builtin:{name}", device="cpu")
        except DeltapatchError:
            continue
        pairs = []
        for prompt in PROMPTS:
            try:
                dp.sweep(model, [dp.PromptPair(*prompt)], sites="mlp_out", positions="last", progress=False)
            except DeltapatchError:
                continue
            pairs.append(dp.PromptPair(*prompt))
        for direction in ("denoise", "noise"):
            for site in SITES:
                options: dict[str, Any] = {"sites": site, "direction": direction, "precision": "fp32"}
                if site == "mlp_post":
                    options["positions"] = "last"
                try:
                    swept = dp.sweep(model, pairs, progress=False, **options)
                except DeltapatchError:  # a site that the model does not have
                    continue
                for metric in METRICS:
                    found[f"{name}/{direction}/{site}/{metric}"] = swept.values(metric)
            joint = [
                dp.Intervention(i, [dp.Patch("mlp_out", layer, -1), dp.Patch("z", layer, -1, 1)])
                for i in range(len(pairs))
                for layer in range(model.spec.n_layers)
            ]
            done = dp.run(model, pairs, joint, direction=direction, precision="fp32", progress=False)
            for metric in METRICS:
                found[f"{name}/{direction}/joint/{metric}"] = done.values(metric).reshape(len(pairs), -1)
    np.savez(file, **found)  # type: ignore[arg-type]  # which takes any names


def of(checkout: Path, folder: Path) -> dict[str, np.ndarray]:
    """What a checkout finds."""
    site = folder / f"site{len(list(folder.iterdir()))}"
    site.mkdir()
    (site / "deltapatch").symlink_to(checkout.resolve())
    file = site / "effects.npz"
    environment = os.environ | {"PYTHONPATH": str(site)}
    subprocess.run([sys.executable, __file__, "--write", str(file)], check=True, env=environment, cwd=folder)
    with np.load(file) as found:
        return dict(found)


def compare(before: Path, after: Path) -> dict[str, Any]:
    """The largest difference, and where."""
    with tempfile.TemporaryDirectory() as folder:
        one, two = (of(checkout, Path(folder)) for checkout in (before, after))
    assert one.keys() == two.keys(), sorted(one.keys() ^ two.keys())
    worst, where = 0.0, ""
    for name, a in one.items():
        b = two[name]
        assert a.shape == b.shape, name
        assert np.array_equal(np.isnan(a), np.isnan(b)), name
        axes = tuple(range(1, a.ndim))
        largest = np.nanmax(np.abs(a), axis=axes, keepdims=True)
        off = float(np.nanmax(np.abs(a - b) / np.where(largest > 0, largest, 1)))
        if off > worst:
            worst, where = off, name
    n = int(sum(np.isfinite(a).sum() for a in one.values()))
    return {"effects": n, "arrays": len(one), "largest_difference": worst, "where": where}


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        effects(Path(sys.argv[2]))
    else:
        result = compare(Path(sys.argv[1]), Path(sys.argv[2]))
        print(json.dumps(result))
        sys.exit(result["largest_difference"] > TOLERANCE)
