"""Screen all hidden neurons of a streamed model of GPT-J-6B's shape, and verify the largest: time and memory.

    python scripts/screening_large.py FOLDER

FOLDER receives a checkpoint of random weights, 12 GB, unless it is there already. Results go to
bench/results/screening_gptj_cpu.json. Random weights say nothing of how well estimates rank; they take as
long as trained ones.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import deltapatch
from deltapatch.bench.stream import Watch, make_checkpoint
from deltapatch.engine.estimates import Estimates, Method
from deltapatch.engine.forecast import forecast
from deltapatch.engine.options import SweepOptions
from deltapatch.engine.question import ask
from deltapatch.results.folder import environment

OUT = Path(__file__).resolve().parent.parent / "bench" / "results" / "screening_gptj_cpu.json"
SHAPE, TOKENS, BUDGET = "gptj-6b", 16, 3_000_000_000
SWEPT: dict[str, Any] = {"sites": "mlp_post", "positions": "last", "memory_budget": BUDGET}
SCREEN: dict[str, Any] = {"screen": "attribution", "top": 1000, "screen_sample": 1000}


def main() -> None:
    """Measure, and write down."""
    folder = Path(sys.argv[1])
    make_checkpoint(SHAPE, None, folder)
    model = deltapatch.load_model(folder, device="cpu", stream=True)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, model.spec.d_vocab, (2, TOKENS))
    tokens[1, :-6] = tokens[0, :-6]
    pairs = [deltapatch.PromptPair(*tokens.tolist(), *draw.choice(model.spec.d_vocab, 2, False).tolist())]
    question = ask(model, pairs, SweepOptions(**SWEPT))
    exact = forecast(question).as_dict()
    began = time.perf_counter()
    Estimates(question, Method("attribution", "logit_diff", 1)).run()
    estimating = time.perf_counter() - began
    watch, began = Watch(), time.perf_counter()
    screened = deltapatch.sweep(model, pairs, **SWEPT, **SCREEN, metrics="logit_diff", progress=False)
    seconds = time.perf_counter() - began
    watch.stop()
    found = {
        "format": "deltapatch screening",
        "shape": SHAPE,
        "tokens": TOKENS,
        "options": SWEPT | SCREEN,
        **environment(),
        "effects": int(screened.estimate("logit_diff").size),
        "verified": int(np.isfinite(screened.values("logit_diff")).sum()),
        "estimating_seconds": round(estimating, 1),
        "seconds": round(seconds, 1),
        "peak_own_bytes": watch.own,
        "weights_bytes": model.n_bytes,
        "exact_predicted_seconds": round(exact["predicted_seconds"], 1),
        "missed": str(screened.missed()),
    }
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(OUT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
