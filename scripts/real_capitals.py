"""The README's first picture: what makes a real language model say the capital of a country.

    python scripts/real_capitals.py WORK          WORK keeps the run, which goes on where it was cut off

Writes bench/results/real_capitals_cpu.json and docs/figures/real_capitals.png. The model is real_model.py's,
and is fetched where it is not there. A minute or two on two cores.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_model import folder
from real_model import main as fetch

import deltapatch as dp
from deltapatch.analysis.heatmaps import position_heatmaps
from deltapatch.analysis.statistics import mean_over_pairs
from deltapatch.analysis.style import figure_style, save
from deltapatch.results.folder import environment
from deltapatch.tasks.factual import factual_pairs

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "real_capitals_cpu.json"
FIGURE = ROOT / "docs" / "figures" / "real_capitals"
SITES = ["mlp_out", "attn_out", "resid_post"]
PAIRS, DPI, LARGEST = 36, 130, 12


def words(pair: dp.PromptPair) -> dict[str, int | str]:
    """Names of all positions of "The capital of X is"."""
    subject, last = pair.labels["subject"], pair.labels["last"]
    return {"The": 0, "capital": 1, "of": 2, "[country]": subject, "is": last}


def largest(effects: dp.Effects) -> list[dict[str, Any]]:
    """The strongest means over pairs, of all sites."""
    columns = effects.top(LARGEST, "recovered").columns
    names = ("site", "layer", "position", "recovered", "stderr")
    rows = zip(*(columns[name].tolist() for name in names), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]


def main(work: Path) -> None:
    """Run what is missing, write the result and the figure."""
    fetch()
    model = dp.load_model(folder())
    found, _ = factual_pairs(model.tokenizer, per_template=PAIRS, relations=["capital"])
    pairs = [replace(pair, labels=words(pair)) for pair in found]
    effects = dp.sweep(model, pairs, sites=SITES, metrics=["logit_diff", "kl"], out=work, resume=True)
    means = {}
    for site in SITES:
        values, over = effects.terms("recovered", site)
        means[site] = np.round(mean_over_pairs(values, over)[0], 4).tolist()
    result = {
        "what": "capitals of countries: how much of the logit difference MLP outputs, attention outputs and "
        "residual streams recover, by layer and position",
        **environment(),
        "threads": torch.get_num_threads(),
        "model": folder().name,
        "pairs": [
            {"clean": p.clean, "corrupted": p.corrupted, "answers": [p.clean_answer, p.corrupted_answer]}
            for p in pairs
        ],
        "interventions": effects.meta["rows"],
        "seconds": effects.meta["seconds"],
        "precision": effects.meta["precision"],
        "noise_floor": effects.meta["noise_floor"],
        "accuracy": effects.accuracy(),
        "largest": largest(effects),
        "positions": list(effects.pairs[0].labels),
        "recovered": {site: {"by": "layer, position", "mean": mean} for site, mean in means.items()},
    }
    RESULT.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    with figure_style():
        figure = position_heatmaps(effects, "recovered", SITES)
        figure.set_size_inches(8, 4.4)
        _, pdf = save(figure, FIGURE, DPI)
    pdf.unlink()
    print(json.dumps({k: result[k] for k in ("interventions", "seconds", "accuracy", "largest")}, indent=1))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
