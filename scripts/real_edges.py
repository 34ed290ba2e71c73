"""All edges of a real language model, exactly, beside what gradients and 16-bit subtraction say of them.

    python scripts/real_edges.py WORK          WORK keeps the run, which goes on where it was cut off

Writes bench/results/real_edges_cpu.json and the figures of docs/real_edges.md. The model is real_model.py's.
About eight minutes a pair of facts on two cores; longer where more tokens come after the first that differs.
"""

import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from real_model import folder
from transformers import AutoModelForCausalLM

import deltapatch as dp
from deltapatch.analysis.attribution import SplitForward, attribute_edges
from deltapatch.analysis.circuit_runs import SHARES
from deltapatch.analysis.edge_plots import circuit_graph, edge_heatmap
from deltapatch.analysis.style import COLOURS, figure_style, save
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.nodes import LOGITS, MLP, Nodes
from deltapatch.interventions.wirings import existing
from deltapatch.results.folder import environment

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "real_edges_cpu.json"
FIGURES = ROOT / "docs" / "figures"
PAIRS = [
    dp.PromptPair("The capital of France is", "The capital of Italy is", " Paris", " Rome"),
    dp.PromptPair("The capital of Japan is", "The capital of China is", " Tokyo", " Beijing"),
    dp.PromptPair(
        "When Mary and John went to the store, John gave a drink to",
        "When Mary and John went to the store, Mary gave a drink to",
        " Mary",
        " John",
    ),
]
SAMPLED, SEED = 2000, 0
METHODS = {"exact": "exact effects", "eap": "EAP", "eap-ig": "EAP-IG, 5 steps"}


def correlations(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Pearson, of ranks (Spearman), and how much of the largest n of b are among the largest n of a."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    out = {"pearson": float(np.corrcoef(a, b)[0, 1]), "spearman": float(np.corrcoef(*ranks)[0, 1])}
    for n in (100, 1000):
        top = [set(np.argsort(-np.abs(x))[:n].tolist()) for x in (a, b)]
        out[f"top_{n}"] = len(top[0] & top[1]) / n
    return out


@torch.no_grad()
def by_subtraction(path: Path, model: dp.Model, pair: Any, edges: list[tuple[int, str]]) -> np.ndarray:
    """Effects of some edges as the difference of two runs of transformers' model in bfloat16, with hooks."""
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, trust_remote_code=False).eval()
    nodes, split = Nodes.of(model.spec), SplitForward(model, torch.float32)
    answers = pair.clean_answer, pair.corrupted_answer
    runs = [split.run(split.embed(tokens), answers) for tokens in (pair.clean, pair.corrupted)]
    message = split.messages(*runs).to(torch.bfloat16)
    ids, d_head = torch.tensor([pair.clean]), model.spec.d_head
    group = model.spec.n_heads // model.spec.n_kv_heads

    def metric() -> torch.Tensor:
        logits = hf(ids).logits[0, -1]
        return logits[pair.clean_answer[0]] - logits[pair.corrupted_answer[0]]

    base, out = metric(), []
    for sender, name in edges:
        receiver, add = nodes.receivers[name], message[sender]
        layer = hf.model.layers[receiver.layer]
        held: dict[str, torch.Tensor] = {}
        handles = []
        if receiver.reads == LOGITS:
            handles.append(hf.model.norm.register_forward_pre_hook(lambda m, args, add=add: (args[0] + add,)))
        elif receiver.reads == MLP:
            norm = layer.post_attention_layernorm
            handles.append(norm.register_forward_pre_hook(lambda m, args, add=add: (args[0] + add,)))
        else:
            part = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)[receiver.reads]
            shared = receiver.reads and group > 1
            if shared:  # what one query head reads of its group cannot be told apart here
                out.append(np.nan)
                continue
            handles.append(
                layer.input_layernorm.register_forward_pre_hook(
                    lambda m, args, held=held: held.__setitem__("x", args[0])
                )
            )
            mine = slice(receiver.head * d_head, (receiver.head + 1) * d_head)

            def swap(m, args, given, layer=layer, held=held, add=add, mine=mine):
                normed = layer.input_layernorm.forward(held["x"] + add)
                new = given.clone()
                new[..., mine] = torch.nn.functional.linear(normed, m.weight, m.bias)[..., mine]
                return new

            handles.append(part.register_forward_hook(swap))
        out.append(float(metric() - base))
        for handle in handles:
            handle.remove()
    return np.array(out)


def main(work: Path) -> None:
    """Run what is missing, write the result and the figures."""
    path = folder()
    model = dp.load_model(path)
    encoded = encode_pairs(PAIRS, model.tokenizer, model.spec.d_vocab)
    nodes = Nodes.of(model.spec)
    began = time.perf_counter()
    edges = dp.sweep_edges(
        model, PAIRS, direction="noise", precision="fp32", metrics=["logit_diff", "kl"], out=work / "edges",
        resume=True, noise_sample=32,
    )  # fmt: skip
    there = existing(nodes)
    exact = edges.values("logit_diff")  # [pair, sender, receiver]
    scores, took = {"exact": exact}, {"exact": edges.meta["seconds"]}
    for method in ("eap", "eap-ig"):
        start = time.perf_counter()
        scores[method] = attribute_edges(model, PAIRS, method=method, direction="noise")
        took[method] = time.perf_counter() - start
    result: dict[str, Any] = {
        "what": "all edges of a real model: exact effects, gradients, and subtraction in bfloat16",
        **environment(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "machine_name": platform.processor() or platform.machine(),
        "model": path.name,
        "edges": int(there.sum()),
        "pairs": [{"clean": p.clean, "corrupted": p.corrupted, "tokens": len(e.clean),
                   "differ_from": e.first_difference} for p, e in zip(PAIRS, encoded, strict=True)],
        "precision": edges.meta["precision"],
        "noise_floor": edges.meta["noise_floor"],
        "seconds": took,
    }  # fmt: skip
    # How well gradients estimate: by pair, and of the means over pairs.
    result["estimates"] = {
        method: {
            "by_pair": [correlations(exact[i][there], scores[method][i][there]) for i in range(len(PAIRS))],
            "of_means": correlations(exact.mean(0)[there], scores[method].mean(0)[there]),
        }
        for method in ("eap", "eap-ig")
    }
    curves = {}
    for method, found in scores.items():
        mean = np.nan_to_num(found.mean(0))
        line = dp.circuit_curve(
            model, PAIRS, lambda n, mean=mean: dp.Circuit.of_scores(nodes, mean, model.spec.d_model, n),
            progress=False,
        )  # fmt: skip
        curves[method] = {
            "cpr": line.cpr,
            "cmd": line.cmd,
            "shares": list(SHARES),
            "edges": [len(circuit) for circuit in line.circuits],
            "faithfulness": line.faithfulness.share.tolist(),
        }
    result["curves"] = curves
    # What 16-bit subtraction makes of single effects.
    rng = np.random.default_rng(SEED)
    receivers, where = list(nodes.receivers), np.argwhere(there)
    some = where[rng.choice(len(where), SAMPLED, replace=False)]
    start = time.perf_counter()
    rough = by_subtraction(path, model, encoded[0], [(int(s), receivers[r]) for s, r in some])
    told = ~np.isnan(rough)
    own = exact[0][tuple(some[told].T)]
    result["subtraction"] = {
        "pair": 0,
        "sampled": int(told.sum()),
        "exactly_zero": float((rough[told] == 0).mean()),
        "distinct_values": len(np.unique(rough[told])),
        "seconds": time.perf_counter() - start,
        **{k: v for k, v in correlations(own, rough[told]).items() if not k.startswith("top")},
    }
    mean = edges.mean("logit_diff")
    order = np.argsort(-np.abs(mean))[:20]
    result["largest"] = [[*edges.edges[i], float(mean[i])] for i in order]
    result["wall_seconds"] = time.perf_counter() - began
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    figures(edges, scores, there, curves, own, rough[told])
    print(json.dumps({k: result[k] for k in ("seconds", "estimates", "curves", "subtraction")}, indent=1))


def _both(a: np.ndarray, b: np.ndarray) -> str:
    found = correlations(a, b)
    return f"Pearson {found['pearson']:.2f}, Spearman {found['spearman']:.2f}"


def figures(
    edges: dp.EdgeEffects,
    scores: dict[str, np.ndarray],
    there: np.ndarray,
    curves: dict[str, Any],
    own: np.ndarray,
    rough: np.ndarray,
) -> None:
    """The page's figures."""
    with figure_style():
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
        for panel, method in zip(axes[:2], ("eap", "eap-ig"), strict=True):
            a, b = (np.nan_to_num(scores[m]).mean(0)[there] for m in ("exact", method))
            panel.plot(a, b, ".", markersize=1.5, color=COLOURS[0], rasterized=True)
            panel.set_title(f"{METHODS[method]}\n{_both(a, b)}")
            panel.set_ylabel("estimate, mean of 3 pairs")
        axes[2].plot(own, rough, ".", markersize=2, color=COLOURS[1], rasterized=True)
        axes[2].set_title(f"bfloat16 by subtraction\n{_both(own, rough)}")
        axes[2].set_ylabel("difference of two runs, one pair")
        for panel in axes:
            panel.plot([-20, 20], [-20, 20], color="0.7", linewidth=0.7, zorder=0)
            for axis in ("x", "y"):
                getattr(panel, f"set_{axis}scale")("symlog", linthresh=0.01)
                getattr(panel, f"set_{axis}lim")(-20, 20)
                getattr(panel, f"set_{axis}ticks")([-10, -1, -0.1, 0, 0.1, 1, 10])
            panel.set_xlabel("exact effect on the logit difference")
        _keep(figure, "estimates")
        figure, panel = plt.subplots(figsize=(5, 3.2))
        for colour, (method, curve) in zip(COLOURS, curves.items(), strict=False):
            label = f"{METHODS[method]}: CPR {curve['cpr']:.2f}, CMD {curve['cmd']:.2f}"
            panel.plot(curve["shares"], curve["faithfulness"], "o-", markersize=3, color=colour, label=label)
        panel.set_xscale("log")
        panel.axhline(1, color="0.7", linewidth=0.7, zorder=0)
        panel.set_xlabel("share of edges that are kept")
        panel.set_ylabel("faithfulness, ratio of means of 3 pairs")
        panel.legend()
        _keep(figure, "curves")
        _keep(edge_heatmap(edges, "logit_diff", "total"), "total")
        circuit = dp.Circuit.top(edges, 80)
        if len(circuit):
            title = f"{len(circuit)} of the 80 largest edges reach the logits"
            _keep(circuit_graph(circuit, title), "circuit")


def _keep(figure: Figure, name: str) -> None:
    """As PNG alone."""
    _, pdf = save(figure, FIGURES / f"real_edges_{name}")
    pdf.unlink()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
