"""How the parts of a built-in model that add two numbers interact, and which neurons are enough for it.

    python scripts/interactions_page.py

Writes bench/results/interactions_builtin.json and docs/figures/interactions.png and smallest_set.png, which
docs/interactions.md shows. About nine minutes on two cores that other work shares.
"""

import json
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import deltapatch as dp
from deltapatch.analysis.interaction_plots import interaction_matrix
from deltapatch.analysis.interactions import interaction_table
from deltapatch.analysis.statistics import bootstrap, mean_over_pairs
from deltapatch.analysis.style import COLOURS, figure_style
from deltapatch.results.folder import environment
from deltapatch.tasks.arithmetic import arithmetic_pairs

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "interactions_builtin.json"
FIGURES = ROOT / "docs" / "figures"
MODEL = "builtin:gpt-neox-arithmetic"
POSITIONS = ("op1", "op2", "last")
COMPONENTS, NEURONS, CANDIDATES = 24, 60, 300  # the strongest, by mean effect on the pairs they are chosen on
SHARE, RATE = 0.9, 0.05
QUIET = {"progress": False, "metrics": "recovered"}


def drawn(model: dp.Model, per_template: int, seed: int) -> list[dp.PromptPair]:
    """Additions, asked in several ways."""
    return arithmetic_pairs(model.tokenizer, per_template=per_template, shots=0, seed=seed, operators=["+"])[
        0
    ]


def told(found: dp.Interactions) -> dict[str, Any]:
    """What a page says of interactions: signs, the strongest, and how sums of effects miss the whole."""
    table = interaction_table(found, "recovered", draws=10_000)
    mean, noise = table.columns["recovered"], found.noise("recovered") or 0.0
    sure = (table.columns["q"] <= RATE) & (np.abs(mean) > noise)
    measured = found.measured("recovered")
    over = measured.over
    alone = mean_over_pairs(measured.alone, over)[0]
    rows = [
        {
            name: column[i].item() if name not in ("first", "second") else column[i]
            for name, column in table.columns.items()
        }
        for i in np.argsort(-np.abs(mean))[:8]
    ]
    positive = np.flatnonzero(sure & (mean > 0))
    gates = positive[np.argsort(-mean[positive])][:4]
    names = [(str(table.columns["first"][i]), str(table.columns["second"][i])) for i in gates]
    first, second = np.triu_indices(len(found.parts), 1)
    kinds: dict[str, list[float]] = {}
    for value, a, b in zip(mean.tolist(), first.tolist(), second.tolist(), strict=True):
        one, other = found.parts[a], found.parts[b]
        at = "one position" if one.position == other.position else "two positions"
        same = "one layer" if one.layer == other.layer else "two layers"
        kinds.setdefault(f"{same}, {at}", []).append(value)
    return {
        "parts": len(found.parts),
        "pairs_of_parts": len(found),
        "precision": found.meta["precision"],
        "relative_noise": found.relative_noise("recovered"),
        "negative": int((sure & (mean < 0)).sum()),
        "positive": len(positive),
        "sum_alone": float(alone.sum()),
        "sum_of_interactions": float(mean.sum()),
        "together": float(mean_over_pairs(measured.together[:, None], over)[0][0]),
        "strongest": rows,
        "gates": [[*pair, float(mean[i])] for pair, i in zip(names, gates.tolist(), strict=True)],
        "mean_by_place": {k: [len(v), float(np.mean(v))] for k, v in sorted(kinds.items())},
        "rows": found.meta["rows"],
        "seconds": found.meta["seconds"],
    }


def precisions(model: dp.Model, pairs: list[dp.PromptPair], parts: list[dp.Patch]) -> list[dict[str, Any]]:
    """How far effects and interactions are off in each precision, and what the run says of it itself."""

    def measured(name: str) -> dp.Interactions:
        return dp.interactions(model, pairs, parts, precision=name, noise_sample=32, **QUIET)

    true = measured("fp64")
    want = true.measured("recovered")
    upper = np.triu_indices(len(parts), 1)
    out = []
    for name in ("bf16", "fp16", "fp32"):
        got = measured(name)
        have = got.measured("recovered")
        pairs_of_numbers = {
            "effects": (have.both[:, *upper], want.both[:, *upper]),
            "interactions": (have.interaction[:, *upper], want.interaction[:, *upper]),
        }
        off = {
            key: float(np.linalg.norm(a - b) / np.linalg.norm(b)) for key, (a, b) in pairs_of_numbers.items()
        }
        out.append({"precision": name, **off, "told": got.relative_noise("recovered")})
    return out


def held_out(model: dp.Model, pairs: list[dp.PromptPair], sets: dict[str, list[Any]]) -> dict[str, Any]:
    """What sets of parts recover of other pairs, with a 95% interval."""
    rows = [
        dp.Intervention(i, [dp.Patch(p.site, p.layer, p.position, p.index) for p in parts])
        for parts in sets.values()
        for i in range(len(pairs))
    ]
    values, over = dp.run(model, pairs, rows, precision="fp32", **QUIET).terms("recovered")
    assert over is not None
    values, over = values.reshape(len(sets), -1).T, over[: len(pairs)]
    mean, (low, high) = mean_over_pairs(values, over)[0], bootstrap(values, over=over)
    return {
        name: {"size": len(parts), "recovered": mean[i].item(), "low": low[i].item(), "high": high[i].item()}
        for i, (name, parts) in enumerate(sets.items())
    }


def enough(
    model: dp.Model, pairs: list[dp.PromptPair], others: list[dp.PromptPair], parts: list[dp.Patch]
) -> tuple[dp.SmallestSet, dict[str, Any]]:
    """The smallest set of neurons, and what is told of it."""
    began = time.perf_counter()
    found = dp.smallest_set(
        model, pairs, parts, share=SHARE, precision="fp32", noise_sample=0, progress=False
    )
    seconds = time.perf_counter() - began
    ranked = sorted((s for s in found.steps if s.method == "top"), key=lambda s: len(s.members))
    best, by_top = found.smallest(), found.smallest("top")
    assert best is not None
    size = len(best.members)
    sets = {
        "search": found.parts,
        "top of that size": [found.candidates[i] for i in ranked[size - 1].members],
    }
    if by_top is not None:
        sets["top that is enough"] = [found.candidates[i] for i in by_top.members]
    where = Counter(f"layer {p.layer} at {p.position}" for p in found.parts)
    return found, {
        "candidates": len(parts),
        "share": SHARE,
        "pairs": len(pairs),
        "joint_patches": found.rows,
        "seconds": round(seconds, 1),
        "search": {"size": size, "recovered": best.recovered},
        "top": None if by_top is None else {"size": len(by_top.members), "recovered": by_top.recovered},
        "top_of_that_size": ranked[size - 1].recovered,
        "all_candidates": ranked[-1].recovered,
        "where": dict(where.most_common()),
        "other_pairs": len(others),
        "on_other_pairs": held_out(model, others, sets),
    }


def draw(found: dp.Interactions, smallest: dp.SmallestSet) -> None:
    """Both figures."""
    with figure_style():
        figure = interaction_matrix(found, "recovered")
        figure.savefig(FIGURES / "interactions.png", dpi=150, metadata={"Software": None})
        plt.close(figure)
        figure, axes = plt.subplots(figsize=(6, 3.0))
        for method, label, colour in (
            ("search", "greedy search", COLOURS[0]),
            ("top", "top k by single effects", COLOURS[1]),
        ):
            size, recovered = smallest.curve(method)
            axes.plot(size, recovered, color=colour, linewidth=1.4, label=label)
        axes.axhline(smallest.share, color="0.6", linewidth=0.8, linestyle=":")
        axes.set_xlabel("neurons patched together")
        axes.set_ylabel("logit difference recovered")
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(FIGURES / "smallest_set.png", dpi=150, metadata={"Software": None})
        plt.close(figure)


def main() -> None:
    """Measure, draw, and write both."""
    began = time.perf_counter()
    model = dp.load_model(MODEL, device="cpu")
    chosen_on, others = drawn(model, 3, seed=7), drawn(model, 10, seed=8)
    sweeps = [
        dp.sweep(model, chosen_on, sites=sites, positions=POSITIONS, precision="fp32", **QUIET)
        for sites in (["mlp_out", "z"], ["mlp_post"])
    ]
    components, neurons = dp.top_parts(sweeps[0], COMPONENTS), dp.top_parts(sweeps[1], CANDIDATES)
    found = dp.interactions(model, others, components, noise_sample=32, **QUIET)
    of_neurons = dp.interactions(model, others, neurons[:NEURONS], noise_sample=32, **QUIET)
    shared = dp.shapley(model, others, components, permutations=64, progress=False, noise_sample=0)
    smallest, about = enough(model, chosen_on, others, neurons)
    rows = zip(*(column.tolist() for column in shared.table().columns.values()), strict=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "environment": environment(),
        "model": MODEL,
        "device": str(model.device),
        "pairs_chosen_on": len(chosen_on),
        "pairs": len(others),
        "components": told(found),
        "neurons": told(of_neurons),
        "shapley": [dict(zip(shared.table().columns, row, strict=True)) for row in rows],
        "precisions": precisions(model, others[:12], components),
        "smallest_set": about,
        "seconds": round(time.perf_counter() - began, 1),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    draw(found, smallest)
    print(json.dumps({key: result[key] for key in ("components", "precisions", "smallest_set")}, indent=1))


if __name__ == "__main__":
    main()
