"""Which features carry the operands of a built-in model to the result: the numbers and the figure of a page.

    python scripts/features_page.py

Writes bench/results/features_builtin.json and docs/figures/features.png, which docs/features.md shows. About
a minute on two cores.
"""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

import deltapatch as dp
from deltapatch.analysis.outcomes import outcome_averages
from deltapatch.analysis.style import COLOURS, figure_style
from deltapatch.models.activations import read_activations
from deltapatch.results.folder import environment
from deltapatch.tasks.arithmetic import arithmetic_pairs

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "features_builtin.json"
FIGURE = ROOT / "docs" / "figures" / "features.png"
MODEL, SAE = "builtin:gpt-neox-arithmetic", "builtin:gpt-neox-arithmetic-features"
SHOWN, STRENGTHS = 6, (-4, -2, 0, 2, 4)


def by_position(outcome: dp.Outcome, n: int) -> dict[str, Any]:
    """At each labelled position, how many features differ a pair, and the largest mean effects alone."""
    columns = outcome.columns("logit_diff")
    labels = [{place: name for name, place in pair.labels.items()} for pair in outcome.pairs]
    where = np.array(
        [labels[i].get(p, "elsewhere") for i, p in zip(columns["pair"], columns["position"], strict=True)]
    )
    out: dict[str, Any] = {}
    for name in ("op1", "operator", "op2", "last"):
        mine = where == name
        sums = np.bincount(columns["feature"][mine], columns["logit_diff"][mine])
        mean = sums / len(outcome.pairs)
        top = np.argsort(-np.abs(mean))[:n]
        out[name] = {
            "features_a_pair": float(mine.sum() / len(outcome.pairs)),
            "top": [{"feature": int(j), "logit_diff": float(mean[j])} for j in top],
        }
    return out


def at_the_end(model: dp.Model, sae: dp.Autoencoder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Operands [question, 2], and the features [question, feature] at the last token of their questions."""
    drawn = np.random.default_rng(0).integers(1, 100, (3000, 2))
    prompts = [model.tokenizer(f"Q: What is {a} plus {b}? A:").input_ids for a, b in drawn.tolist()]
    read = read_activations(model, prompts, [("resid_post", 1)])["resid_post", 1]
    f, _ = sae.encode(torch.stack([x[-1] for x in read]))
    return drawn, drawn.sum(1), f.numpy()


def explained(f: np.ndarray, by: np.ndarray) -> float:
    """The share of a feature's variance that its means for each value of something explain."""
    means = np.array([f[by == value].mean() for value in np.unique(by)])
    return float(1 - np.square(f - means[np.unique(by, return_inverse=True)[1]]).sum() / f.var() / len(f))


def steered(model: dp.Model, sae: dp.Autoencoder, feature: int) -> list[dict[str, float]]:
    """What adding multiples of a row does to the answer 10 above the right one, against that 10 below."""
    row = sae.rows(torch.tensor([feature]))[0]
    pairs = []
    for a, b in np.random.default_rng(1).integers(20, 80, (60, 2)).tolist():
        asked = f"Q: What is {a} plus {b}? A:"
        pairs.append(dp.PromptPair(asked, asked, f" {a + b + 10}", f" {a + b - 10}"))
    runs = [
        dp.Intervention(i, [dp.Patch("resid_post", 1, -1, add=strength * row)])
        for i in range(len(pairs))
        for strength in STRENGTHS
    ]
    found = dp.run(model, pairs, runs, precision="fp32", progress=False).values("logit_diff")
    means = found.reshape(len(pairs), len(STRENGTHS)).mean(0)
    return [{"strength": s, "logit_diff": float(m)} for s, m in zip(STRENGTHS, means, strict=True)]


def draw(sums: np.ndarray, f: np.ndarray, features: list[int]) -> None:
    """The figure: mean activation by sum. f: [question, feature]."""
    with figure_style():
        figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
        values = np.unique(sums)
        for j, colour in zip(features, COLOURS, strict=False):
            mean = [f[sums == value, j].mean() for value in values]
            axes.plot(values, mean, color=colour, linewidth=1.2, label=f"feature {j}")
        axes.set_xlabel("sum of the operands")
        axes.set_ylabel("mean activation")
        axes.set_title("Features at the last token, layer 1: functions of the sum")
        axes.legend(frameon=False, ncols=3)
        figure.savefig(FIGURE, dpi=150, metadata={"Software": None})
        plt.close(figure)


def main() -> None:
    """Measure, draw, and write both."""
    began = time.perf_counter()
    model, sae = dp.load_model(MODEL, device="cpu"), dp.load_sae(SAE)
    pairs, _ = arithmetic_pairs(model.tokenizer, per_template=10, shots=0, seed=7, operators=["+"])
    outcome = dp.sweep_features(model, pairs, sae, precision="fp32", progress=False)
    places = by_position(outcome, SHOWN)
    operands, sums, f = at_the_end(model, sae)
    rows = []
    for one in places["last"]["top"]:
        j = one["feature"]
        own = {"first operand": operands[:, 0], "second operand": operands[:, 1], "sum": sums}
        shares = {name: explained(f[:, j], by) for name, by in own.items()}
        rows.append({**one, "active": float((f[:, j] > 0).mean()), "explained": shares})
    best = max(rows, key=lambda row: row["explained"]["sum"])
    ranked = outcome_averages(outcome, ["logit_diff"], ["feature"]).top(1)
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "environment": environment(),
        "model": MODEL,
        "autoencoder": SAE,
        "pairs": len(pairs),
        "interventions": len(outcome),
        "strongest_feature": int(ranked.columns["feature"][0]),
        "positions": places,
        "last": rows,
        "steered": {"feature": best["feature"], "means": steered(model, sae, best["feature"])},
        "seconds": round(time.perf_counter() - began, 1),
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    draw(sums, f, [row["feature"] for row in rows])
    print(json.dumps({key: found[key] for key in ("interventions", "last", "steered", "seconds")}, indent=1))


if __name__ == "__main__":
    main()
