"""The tables of the README and the documentation, made of result files: a test holds the pages to them.

python -m deltapatch.bench.markdown bench/results/compare_cpu.json
"""

import sys
from pathlib import Path
from typing import Any

from deltapatch.bench.edits import BESIDE
from deltapatch.bench.growth import AXES
from deltapatch.bench.peers.ours import PREFIX
from deltapatch.bench.peers.registry import ESTIMATES
from deltapatch.bench.report import stream_rows
from deltapatch.bench.results import cases, read
from deltapatch.errors import DeltapatchError

# Sides as a reader knows them, in the order of the table; of the others the report tells.
SIDES = {
    "paper": "the paper's code",
    "hooks": "hooks, one by one",
    "tlens-patching": "TransformerLens, patching functions",
    "tlens-hooks": "TransformerLens, hooks in batches",
    "nnsight-invokes": "nnsight, batched invokes",
    "pyvene": "pyvene, one call each",
    "pyvene-batched": "pyvene, in batches",
    "sae-lens": "SAELens, features set by hooks",
    "hooks-batched": "hooks in batches",
    "hooks-layer": "… from the patched layer on",
    "hooks-prefix": "… over a cached prefix",
    "attribution": "*attribution patching (an estimate)*",
    "tlens-attribution": "*TransformerLens, attribution patching (an estimate)*",
    "deltapatch-screen": "*deltapatch, estimates of a screen*",
    "deltapatch-verified": "*deltapatch, a screen with what it verifies*",
    "deltapatch-fp32": "**deltapatch, fp32**",
    "deltapatch-tf32": "**deltapatch, tf32**",
    "deltapatch-bf16": "**deltapatch, bf16**",
}
SWEEPS = {
    "mlp_out": "`mlp_out`",
    "attn_out": "`attn_out`",
    "z": "`z`",
    "neurons-layer": "neurons of a layer",
    "neurons": "all neurons",
    "joint": "20 neurons jointly",
    "directions": "a direction everywhere",
    "features": "features of an autoencoder",
}


def comparison(result: dict[str, Any]) -> str:
    """The rates of every model; of several, each under its name."""
    found = cases(result)
    titles = [f"**{case['model']['name']}**\n\n" if len(found) > 1 else "" for case in found]
    return "\n\n".join(title + rates(case) for title, case in zip(titles, found, strict=True))


def rates(result: dict[str, Any]) -> str:
    """Interventions per second of every side and sweep; ~ on a sample, – where a side has no such sweep.

    Of several runs there is a line for each of deltapatch's sides: how many times as fast as the fastest
    exact one of the others it was, in the worst of them.
    """
    columns = {sweep["name"]: sweep["columns"] for sweep in result["sweeps"]}
    names = [name for name in SWEEPS if name in columns]
    rows = [["", *(SWEEPS[name] for name in names)]]
    for side, title in SIDES.items():
        if any(side in columns[name] for name in names):
            rows.append([title, *(_rate(columns[name].get(side, {})) for name in names)])
    for side, title in SIDES.items():
        worst = [_worst(columns[name].get(side, {})) for name in names]
        if side.startswith(PREFIX) and side not in ESTIMATES and any(worst):
            rows.append([f"{title.strip('*')}: times the fastest other", *(found or "–" for found in worst)])
    return as_table(rows)


def precision(result: dict[str, Any]) -> str:
    """Errors, ranks and overlaps of every method."""
    rows = [["", "relative error", "rank correlation", "top 50 found, worst pair"]]
    for name, found in result["methods"].items():
        if "reason" not in found:
            numbers = f"{found['error']:.0e}", f"{found['rank_correlation']:.4f}", f"{found['top_worst']:.0%}"
            rows.append([name, *numbers])
    return as_table(rows)


def stream(result: dict[str, Any]) -> str:
    """Time and memory of every sweep of deltapatch alone, in the columns that are not empty."""
    rows = stream_rows(result)
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    return as_table([names, *([row[name] for name in names] for row in rows)])


def growth(result: dict[str, Any]) -> str:
    """Interventions per second of every side at every size along each axis."""
    sides = [side for side in SIDES if side in result["sides"]]
    rows = [["", "interventions", *(SIDES[side] for side in sides)]]
    for axis, points in result["axes"].items():
        for point in points:
            rates = (_rate(point["columns"][side]) for side in sides)
            rows.append([f"{AXES[axis]}: {point['value']:,}", f"{point['interventions']:,}", *rates])
    return as_table(rows)


_WAYS = {
    "deltapatch": "deltapatch",
    "prefix": "a row a patched edge, over cached keys and values",
    "layer": "the same, whole prompts from the receiver's layer on",
    "full": "the same, whole forwards",
    "two-runs": "two forwards an edge, all logits (EAP-IG's way)",
}


def edges(result: dict[str, Any]) -> str:
    """Every way to patch all edges: seconds, and how many times as long as deltapatch."""
    rows = [["", "seconds", "times as long", "error against float64"]]
    for way, what in _WAYS.items():
        seconds, error = _median(result["seconds"][way]), result["agreement"][way]
        ratio = result["times_as_long"][way]
        rows.append([what, f"{seconds:,.0f}", f"{ratio:.1f}", f"{error:.0e}"])
    return as_table(rows)


_ARCHITECTURES = {"gpt2": "GPT-2", "gpt_neox": "GPT-NeoX", "llama": "LLaMA, grouped queries"}


def edge_peers(result: dict[str, Any]) -> str:
    """Every tool's effects of edges beside deltapatch's in float64, of each model."""
    rows = [["", "edges", "rows a forward", "seconds", "times as long", "largest difference"]]
    for architecture, found in result["models"].items():
        ours = found["peers"].get("deltapatch-fp32", {}).get("seconds")
        rows.append([f"**{_ARCHITECTURES[architecture]}**", *[""] * 5])
        for peer in found["peers"].values():
            row = [peer["what"], f"{peer['edges']:,}", str(peer.get("best") or ""), "", ""]
            if peer["status"] == "measured":
                seconds = _median(peer["seconds"])
                row[3:] = f"{seconds:.1f}", f"{seconds / _median(ours):.1f}" if ours else ""
            rows.append([*row, f"{peer['difference']:.0e}" if "difference" in peer else peer["status"]])
    return as_table(rows)


_BESIDE = {
    "features": ("features of an autoencoder", "hidden neurons of the layer"),
    "directions": ("a direction everywhere", "the whole stream everywhere"),
}


def edits(result: dict[str, Any]) -> str:
    """Features and directions beside what each is held to; and by every side, where there are peers."""
    rows = [["", "a second", "beside", "a second", "times as fast"]]
    for name, other in BESIDE.items():
        ours, theirs = (f"{_median(result['rates'][one]):,.0f}" for one in (name, other))
        what, beside = _BESIDE[name]
        rows.append([what, ours, beside, theirs, f"{result['ratios'][name]:.2f}"])
    found = as_table(rows)
    return f"{found}\n\n**By other tools**\n\n{rates(result['peers'])}" if "peers" in result else found


def table(result: dict[str, Any]) -> str:
    """The table of a result."""
    tables = {
        "compare": comparison,
        "growth": growth,
        "precision": precision,
        "stream": stream,
        "edges": edges,
        "edge-peers": edge_peers,
        "edits": edits,
    }
    return tables[result["kind"]](result)


def _median(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]


def _rate(column: dict[str, Any]) -> str:
    rate = column.get("rate")
    if rate is None:
        return "–"
    return ("~" if column.get("sampled") else "") + (f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}")


def _worst(column: dict[str, Any]) -> str:
    """The smallest ratio to the fastest of the others; nothing where there was one run alone."""
    ratios = column.get("times_as_fast", [])
    return f"{min(ratios):.2f}" if len(ratios) > 1 else ""


def as_table(rows: list[list[str]]) -> str:
    """Rows of cells, of which the first is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def main() -> None:
    """Print the table of each file that is named."""
    try:
        for path in sys.argv[1:]:
            print(table(read(Path(path))))
    except DeltapatchError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
