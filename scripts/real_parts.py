"""Heads and neurons of a real language model: what names a capital, and who gets the drink.

    python scripts/real_parts.py WORK          WORK keeps the runs, which go on where they were cut off

Writes bench/results/real_parts_cpu.json and the figures of docs/real.md. The model is real_model.py's, and is
fetched where it is not there. About fifteen minutes on two cores, most of it the neurons.
"""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from real_capitals import SITES, words
from real_model import folder
from real_model import main as fetch

import deltapatch as dp
from deltapatch.analysis.curves import neuron_ranking
from deltapatch.analysis.heatmaps import head_heatmaps, position_heatmaps
from deltapatch.analysis.statistics import mean_over_pairs
from deltapatch.analysis.study_plots import faithfulness_curves
from deltapatch.analysis.style import figure_style, save
from deltapatch.results.folder import environment
from deltapatch.tasks.factual import factual_pairs

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "real_parts_cpu.json"
FIGURES = ROOT / "docs" / "figures"
CAPITALS, WITH_NEURONS, DPI = 36, 4, 130
SIZES = [2**i for i in range(13)]
NAMES = ["Mary", "John", "Tom", "Anna", "Paul", "Sarah", "James",
         "Emma", "Peter", "Lucy", "David", "Alice", "Mark"]  # fmt: skip
TOP = 12
METRICS = ["logit_diff", "kl"]


def drinks() -> list[dp.PromptPair]:
    """Whose name is told twice differs; the other one gets the drink (Wang et al. 2022, shortened)."""
    labels: dict[str, int | str] = {"[name 1]": 1, "[name 2]": 3, "[giver]": 9, "to": -1}
    text = "When {} and {} went to the store, {} gave a drink to"
    return [
        dp.PromptPair(text.format(a, b, b), text.format(a, b, a), f" {a}", f" {b}", labels=labels)
        for a, b in pairwise(NAMES)
    ]


def largest(effects: dp.Effects, site: str | None = None) -> list[dict[str, Any]]:
    """The strongest means over pairs."""
    columns = effects.top(TOP, "recovered", site).columns
    names = [name for name in columns if name != "n"]
    rows = zip(*(np.asarray(columns[name]).tolist() for name in names), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]


def told(effects: dp.Effects) -> dict[str, Any]:
    """What is kept of a sweep: its size, how exact it is, and the strongest of each of its sites."""
    meta = effects.meta
    return {
        "pairs": [[p.clean_text, p.clean_answer_text, p.corrupted_answer_text] for p in effects.pairs],
        **{name: meta[name] for name in ("rows", "seconds", "precision", "noise_floor")},
        "accuracy": effects.accuracy(),
        "largest": {site: largest(effects, site) for site in effects.sites},
    }


def draw(figure: Figure, name: str, size: tuple[float, float] | None = None) -> None:
    """A PNG for the pages."""
    if size is not None:
        figure.set_size_inches(*size)
    _, pdf = save(figure, FIGURES / name, DPI)
    pdf.unlink()


def main(work: Path) -> None:
    """Run what is missing, write the result and the figures."""
    fetch()
    model = dp.load_model(folder())
    found, _ = factual_pairs(model.tokenizer, per_template=CAPITALS, relations=["capital"])
    capitals = [replace(pair, labels=words(pair)) for pair in found]
    givers = drinks()

    def run(name: str, pairs: list[dp.PromptPair], sites: Any, positions: Any) -> dp.Effects:
        how = {"sites": sites, "positions": positions, "metrics": METRICS, "precision": "fp32"}
        return dp.sweep(model, pairs, out=work / name, resume=True, **how)

    sweeps = {
        "capitals, heads": run("capital-heads", capitals, ["z"], ["[country]", "last"]),
        "capitals, neurons": run("capital-neurons", capitals[:WITH_NEURONS], ["mlp_post"], "last"),
        "drinks, components": run("drinks", givers, SITES, "all"),
        "drinks, heads": run("drink-heads", givers, ["z"], ["[giver]", "last"]),
    }
    neurons = sweeps["capitals, neurons"]
    curve = dp.faithfulness_curve(model, capitals[WITH_NEURONS:16], neurons, sizes=SIZES, metric="recovered")
    alone = dp.run(model, capitals[WITH_NEURONS:16], _all_mlps(model.spec.n_layers, 12))
    result = {
        "what": "capitals of countries, and who gets the drink: heads and neurons of a real model",
        **environment(),
        "threads": torch.get_num_threads(),
        "model": folder().name,
        **{name: told(effects) for name, effects in sweeps.items()},
        "neurons together": {name: np.round(c, 4).tolist() for name, c in curve.columns.items()},
        "all MLPs at the last position": float(mean_over_pairs(*alone.terms("recovered"))[0]),
    }
    RESULT.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    with figure_style():
        draw(head_heatmaps(sweeps["capitals, heads"], "recovered", "z"), "real_heads_capitals")
        draw(neuron_ranking(neurons, "recovered", "mlp_post"), "real_neurons")
        draw(faithfulness_curves({"neurons at the last position": curve}), "real_neurons_together")
        draw(position_heatmaps(sweeps["drinks, components"], "recovered", SITES), "real_drinks", (9, 4.6))
        draw(head_heatmaps(sweeps["drinks, heads"], "recovered", "z"), "real_heads_drinks")


def _all_mlps(n_layers: int, pairs: int) -> list[dp.Intervention]:
    """All MLPs' outputs at the last position, jointly: the most that neurons there can do."""
    everywhere = [dp.Patch("mlp_out", layer, -1) for layer in range(n_layers)]
    return [dp.Intervention(pair, everywhere) for pair in range(pairs)]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
