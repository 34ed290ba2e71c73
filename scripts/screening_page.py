"""How many of the largest effects each screen finds on the built-in models: the numbers and figure of a page.

    python scripts/screening_page.py

Writes bench/results/screening_builtin.json and docs/figures/screening.png, which docs/screening.md shows. A
few minutes on two cores.
"""

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import deltapatch as dp
from deltapatch.analysis.style import COLOURS, figure_style
from deltapatch.engine.options import SCREENS, SweepOptions
from deltapatch.engine.question import ask
from deltapatch.engine.screening.estimates import Estimates, Method
from deltapatch.results.folder import environment
from deltapatch.results.strata import cut, draw
from deltapatch.tasks.arithmetic import arithmetic_pairs

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "screening_builtin.json"
FIGURE = ROOT / "docs" / "figures" / "screening.png"
MODELS = ("gpt-neox-arithmetic", "llama-arithmetic")
POSITIONS = {"mlp_post": ["op1", "op2", "last"], "mlp_out": "all", "attn_out": "all", "z": "all"}
TRUE, SHARE, STEPS = 100, 0.05, 5
SEEDS, TOP, SAMPLE = 200, 1000, 1000


def found_by(truth: np.ndarray, estimates: np.ndarray, shares: np.ndarray) -> list[float]:
    """How many of the TRUE largest effects are among the largest estimates, at each share of all of them."""
    best = np.argsort(-np.abs(truth), kind="stable")[:TRUE]
    rank = np.empty(len(truth), dtype=np.int64)
    rank[np.argsort(-np.abs(estimates), kind="stable")] = np.arange(len(truth))
    return [int((rank[best] < share * len(truth)).sum()) for share in shares]


def bounds(truth: np.ndarray, estimates: np.ndarray) -> dict[str, float]:
    """How often the bound holds over SEEDS draws, and how far it lies above what was missed."""
    order = np.argsort(-np.abs(estimates), kind="stable")
    top, rest = order[:TOP], order[TOP:]
    threshold = float(np.median(np.abs(truth[top])))
    large, size = np.abs(truth[rest]) > threshold, np.abs(estimates[rest])
    holds, at_most, missed = [], [], []
    stratum = cut(size, np.zeros(len(rest), np.int64))
    for seed in range(SEEDS):
        strata, drawn = draw(stratum, SAMPLE, seed)
        counts = np.bincount(stratum[drawn][large[drawn]], minlength=len(strata.size))
        at_most.append(strata.at_most(counts, 0.95))
        missed.append(int(large.sum() - counts.sum()))
        holds.append(at_most[-1] >= missed[-1])
    return {
        "threshold": threshold,
        "holds": float(np.mean(holds)),
        "missed": float(np.median(missed)),
        "at_most": float(np.median(at_most)),
    }


def measured(model: dp.Model, pairs: list[dp.PromptPair], site: str, shares: np.ndarray) -> dict[str, Any]:
    """One site of one model: the exact sweep, and every screen. Seconds are the processor's."""
    asked: dict[str, Any] = {"sites": site, "positions": POSITIONS[site], "metrics": "logit_diff"}
    began = time.process_time()
    options = {"precision": "fp32", "noise_sample": 0, "progress": False, **asked}
    truth = dp.sweep(model, pairs, **options).values("logit_diff")
    out: dict[str, Any] = {"seconds": round(time.process_time() - began, 2), "screens": {}}
    there = ~np.isnan(truth)
    out["interventions"] = int(there.sum())
    for name in SCREENS:
        if name == "ig-activations" and site != "mlp_out":
            continue
        question = ask(model, pairs, SweepOptions(**asked))
        began = time.process_time()
        found = Estimates(question, Method(name, "logit_diff", STEPS)).run().reshape(truth.shape)
        seconds = round(time.process_time() - began, 2)
        x, y = truth[there], found[there].astype(np.float64)
        here: dict[str, Any] = {
            "seconds": seconds,
            "pearson": float(np.corrcoef(x, y)[0, 1]),
            "found": found_by(x, y, np.array([SHARE]))[0],
        }
        if site == "mlp_post":
            here["found_of_means"] = found_by(
                truth.mean(0).ravel(), found.mean(0).ravel(), np.array([SHARE])
            )[0]
            here["curve"] = found_by(x, y, shares)
            if name == "attribution":
                here["bound"] = bounds(x, y)
        out["screens"][name] = here
    return out


def figure(results: dict[str, Any], shares: np.ndarray) -> None:
    """Of neurons: the share of the largest effects that is found, by the share that is computed."""
    with figure_style():
        drawn, axes = plt.subplots(1, len(results), figsize=(7, 3), sharey=True, layout="constrained")
        for ax, (name, sites) in zip(axes, results.items(), strict=True):
            for screen, colour in zip(sites["mlp_post"]["screens"], COLOURS, strict=False):
                curve = sites["mlp_post"]["screens"][screen]["curve"]
                ax.plot(100 * shares, curve, color=colour, linewidth=1.2, label=screen)
            ax.plot(100 * shares, TRUE * shares, color="0.6", linewidth=1, linestyle=":", label="at random")
            ax.axvline(100 * SHARE, color="0.8", linewidth=0.8, zorder=0)
            ax.set_xscale("log")
            ax.set_title(name)
            ax.set_xlabel("% of neurons computed exactly")
        axes[0].set_ylabel(f"of the {TRUE} largest effects, found")
        axes[0].legend(frameon=False)
        drawn.savefig(FIGURE, dpi=150, metadata={"Software": None})
        plt.close(drawn)


def table(results: dict[str, Any]) -> str:
    """The table of the page."""
    lines = [
        "| model | site | interventions | exact, s | " + " | ".join(SCREENS) + " |",
        "|" + "---|" * (4 + len(SCREENS)),
    ]
    for name, sites in results.items():
        for site, one in sites.items():
            found = [one["screens"].get(s) for s in SCREENS]
            cells = ["" if f is None else f"{f['found']} ({f['seconds']:.1f} s)" for f in found]
            head = f"| {name} | `{site}` | {one['interventions']:,} | {one['seconds']:.1f} | "
            lines.append(head + " | ".join(cells) + " |")
            if site == "mlp_post":
                means = ["" if f is None else str(f["found_of_means"]) for f in found]
                lines.append(f"| {name} | `{site}`, means over pairs |  |  | " + " | ".join(means) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, draw, and write both."""
    began = time.perf_counter()
    shares = np.geomspace(1e-3, 1, 40)
    results: dict[str, Any] = {}
    n_pairs = 0
    for name in MODELS:
        model = dp.load_model(f"builtin:{name}", device="cpu")
        pairs, _ = arithmetic_pairs(model.tokenizer, per_template=2, shots=0, seed=7)
        n_pairs = len(pairs)
        results[name] = {}
        for site in POSITIONS:
            results[name][site] = measured(model, pairs, site, shares)
            print(name, site, f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "environment": environment(),
        "device": "cpu",
        "pairs": n_pairs,
        "true": TRUE,
        "share": SHARE,
        "steps": STEPS,
        "bounds": {"seeds": SEEDS, "top": TOP, "sample": SAMPLE, "confidence": 0.95},
        "shares": shares.tolist(),
        "models": results,
        "seconds": round(time.perf_counter() - began, 1),
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    figure(results, shares)
    print(table(results))


if __name__ == "__main__":
    main()
