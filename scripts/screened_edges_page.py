"""How many of the largest effects of edges each screen finds on the built-in models: the numbers of a page.

    python scripts/screened_edges_page.py

Writes bench/results/screened_edges_builtin.json, and prints the table of docs/edges.md; half a minute.
"""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deltapatch as dp
from deltapatch.results.folder import environment
from deltapatch.tasks.arithmetic import arithmetic_pairs

RESULT = Path(__file__).resolve().parent.parent / "bench" / "results" / "screened_edges_builtin.json"
MODELS = ("gpt-neox-arithmetic", "llama-arithmetic")
RECEIVERS = {"all": ("attribution", "ig-inputs"), "a<v>,m,logits": ("attribution", "relp", "ig-inputs")}
TRUE, SHARE = 100, 0.05
TRUE_MEANS, SHARE_MEANS = 20, 0.1


def found(truth: np.ndarray, estimates: np.ndarray, true: int, share: float) -> int:
    """How many of the largest effects are among a share of all with the largest estimates."""
    best, first = (np.argsort(-np.abs(a).ravel(), kind="stable") for a in (truth, estimates))
    return len(set(best[:true].tolist()) & set(first[: int(share * truth.size)].tolist()))


def seconds_of(work: Any) -> tuple[Any, float]:
    """What it gives, and the processor's seconds."""
    began = time.process_time()
    return work(), round(time.process_time() - began, 2)


def of_model(name: str) -> list[dict[str, Any]]:
    """A row for each screen."""
    model = dp.load_model(f"builtin:{name}")
    pairs, _ = arithmetic_pairs(model.tokenizer, per_template=2, shots=0, seed=7)
    own = {"direction": "noise", "precision": "fp32", "noise_sample": 0, "metrics": "logit_diff"}
    own["progress"] = False
    rows = []
    for receivers, screens in RECEIVERS.items():
        options = own | {"receivers": receivers}
        exact, took = seconds_of(lambda o=options: dp.sweep_edges(model, pairs, **o))
        truth = exact.flat("logit_diff")
        for screen in screens:
            asked = {"screen": screen, "top": 1, "screen_sample": 0, **options}
            screened, estimating = seconds_of(lambda a=asked: dp.sweep_edges(model, pairs, **a))
            grid, estimate = screened.grid, screened.estimate("logit_diff")
            sender = np.searchsorted(grid.senders, grid.edges[:, 0])
            estimates = estimate[:, sender, grid.edges[:, 1]]
            rows.append(
                {
                    "model": name,
                    "receivers": receivers,
                    "screen": screen,
                    "pairs": len(pairs),
                    "effects": truth.size,
                    "exact_seconds": took,
                    "seconds": estimating,
                    "found": found(truth, estimates, TRUE, SHARE),
                    "found_of_means": found(truth.mean(0), estimates.mean(0), TRUE_MEANS, SHARE_MEANS),
                    "correlation": float(np.corrcoef(truth.ravel(), estimates.ravel())[0, 1]),
                }
            )
    return rows


def page_table(rows: list[dict[str, Any]]) -> str:
    """The table of the page."""
    lines = [
        "| model | receivers | effects | exact, s | screen | s | of the 100 largest | of the 20 largest "
        "means | correlation |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | `{row['receivers']}` | {row['effects']:,} | {row['exact_seconds']:.1f} "
            f"| {row['screen']} | {row['seconds']:.1f} | {row['found']} | {row['found_of_means']} "
            f"| {row['correlation']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """All of it."""
    torch.set_num_threads(1)
    rows = [row for name in MODELS for row in of_model(name)]
    about = {"date": datetime.now(UTC).date().isoformat(), "environment": environment(), "rows": rows}
    RESULT.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(page_table(rows), end="")


if __name__ == "__main__":
    main()
