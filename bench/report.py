"""Tables of results, as text."""

from collections.abc import Sequence
from typing import Any

from deltapatch.bench.results import cases
from deltapatch.bench.sides.cells import SWEEPS


def comparison(result: dict[str, Any]) -> str:
    """A table of the sides, then one for each sweep; of each model."""
    return "\n".join([*map(_case, cases(result)), NOTES])


def _case(result: dict[str, Any]) -> str:
    rates = {k: v for k, v in result["limits"]["products"].items() if v}
    products = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.items())
    model, work = result["model"], result["workload"]
    head = (
        f"{model['name']}: {model['architecture']}, {model['n_layers']} layers, d_model {model['d_model']}, "
        f"d_mlp {model['d_mlp']}, vocabulary {model['d_vocab']}\n"
        f"{work['pairs']} pair(s) of {work['length']} tokens, metric {work['metric']}, on {work['device']}, "
        f"{result['limits']['threads']} threads{_pinned(result['sides'])}: {result['machine']['processor']}\n"
        f"limits: products {products} GFLOP/s; copying {result['limits']['copy'] / 1e9:,.0f} GB/s\n"
        f"{result['quiet']['note']}\n"
    )
    return "\n".join([head, _sides(result), *map(_sweep, result["sweeps"])])


def _pinned(sides: dict[str, Any]) -> str:
    """Which CPUs the sides were pinned to."""
    cpus = next((about["cpus"] for about in sides.values() if about.get("cpus")), None)
    return f" on CPUs {', '.join(map(str, cpus))}" if cpus else ""


_LEFT = ("what it is", "versions", "note")
NOTES = (
    "spread: slowest and fastest repeat. x: times the fastest exact one of the others, in the worst run.\n"
    "batch: rows of a forward, the best of those tried. first: seconds to the first result, plain runs\n"
    "included. GB: peak of the process. log P: largest difference from the float64 oracle. error: of all\n"
    "effects, relative to their norm. ranks: Spearman's. top: share of the 50 strongest found. limit:\n"
    "necessary FLOPs over the product rate that was measured beside. ~: on a sample, scaled.\n"
)


def _sides(result: dict[str, Any]) -> str:
    rows = []
    for name, about in result["sides"].items():
        versions = about.get("versions", {})
        rows.append(
            {
                "side": name,
                "what it is": about.get("what", ""),
                "import s": _number(about.get("import_seconds"), ".1f"),
                "load s": _number(about.get("load_seconds"), ".1f"),
                "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
                "note": about["missing"] or "",
            }
        )
    return _text(rows, "Sides")


def _sweep(sweep: dict[str, Any]) -> str:
    rows, absent = [], []
    for name, column in sweep["columns"].items():
        if column["status"] in ("missing", "lacks"):
            absent.append(f"{name} ({'not here' if column['status'] == 'missing' else column['reason']})")
        else:
            rows.append(_row(name, column))
    title = SWEEPS.get(sweep["name"], sweep["name"])
    flops = sweep["necessary_flops"] / 1e9
    table = _text(rows, f"{title}: {sweep['interventions']:,} interventions, {flops:,.1f} GFLOP necessary")
    return table + (f"not measured: {', '.join(absent)}\n" if absent else "")


def _row(name: str, column: dict[str, Any]) -> dict[str, str]:
    """One side of one sweep; speed only where its results agreed."""
    found = column.get("agreement", {})
    told = column["status"] == "measured"
    low, high = column["spread"] if told else (None, None)
    limit = column.get("of_product_rate")
    return {
        "side": name,
        "per second": ("~" if column["sampled"] else "") + _rate(column["rate"]) if told else "",
        "spread": f"{_rate(low)} - {_rate(high)}" if told else "",
        "x": _number(min(column.get("times_as_fast", ()), default=None), ".2f"),
        "batch": ", ".join(sorted({str(size) for size in column.get("batch", ()) if size}, key=int)),
        "first": _number(column.get("first_seconds"), ".2f"),
        "GB": _number(_scaled(column.get("peak_bytes")), ".2f"),
        "GB of GPU": _number(_scaled(column.get("device_peak_bytes")), ".2f"),
        "log P": _number(found.get("difference"), ".0e"),
        "error": _number(found.get("effect_error"), ".0e"),
        "ranks": _number(found.get("rank_correlation"), ".5f"),
        "top": _number(found.get("top_overlap"), ".2f"),
        "limit": f"{limit:.0%}" if limit else "",
        "note": "" if told else f"{column['status']}: {column['reason']}",
    }


def _rate(value: float | None) -> str:
    """Three digits, or a whole number."""
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def precision(result: dict[str, Any]) -> str:
    """The table of a precision experiment."""
    rows = [
        {
            "method": name,
            "error": _number(found["error"], ".0e"),
            "ranks": _number(found["rank_correlation"], ".5f"),
            "top 50, mean": _number(found["top_mean"], ".2f"),
            "top 50, worst": _number(found["top_worst"], ".2f"),
            "seconds": _number(found["seconds"], ".2f"),
        }
        for name, found in result["methods"].items()
        if "reason" not in found
    ]
    failed = [
        f"{name}: {found['reason']}\n" for name, found in result["methods"].items() if "reason" in found
    ]
    title = (
        f"{result['model']['name']}: {result['metric']} of the {result['interventions']:,} neurons of layer "
        f"{result['layer']} over {result['workload']['pairs']} pairs, against float64"
    )
    return _text(rows, title) + "".join(failed)


def growth(result: dict[str, Any]) -> str:
    """Rates along each axis."""
    parts = []
    for axis, points in result["axes"].items():
        names = list(dict.fromkeys(name for point in points for name in point["columns"]))
        rows = []
        for point in points:
            row = {axis: f"{point['value']:,}", "interventions": f"{point['interventions']:,}"}
            for name in names:
                column = point["columns"].get(name, {"status": "missing"})
                row[name] = _rate(column.get("rate")) or column["status"]
            rows.append(row)
        parts.append(_text(rows, f"Interventions per second by {axis}"))
    parts.append(f"{result['quiet']['note']}\n")
    return "\n".join(parts)


def _text(rows: list[dict[str, str]], title: str) -> str:
    """A plain table, as wide as it must be; columns that are empty throughout are left out."""
    names = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    if not names:
        return f"{title}: nothing\n"
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    texts = [i == 0 or name in _LEFT for i, name in enumerate(names)]

    def line(cells: Sequence[str]) -> str:
        padded = zip(cells, widths, texts, strict=True)
        return "  ".join(c.ljust(w) if left else c.rjust(w) for c, w, left in padded).rstrip()

    body = [line([row[name] for name in names]) for row in rows]
    return "\n".join([title, "", line(names), line(["-" * w for w in widths]), *body]) + "\n"


def _scaled(number: float | None) -> float | None:
    return None if number is None else number / 1e9


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def stream_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """What each sweep of deltapatch alone took, by column."""
    rows = []
    for run in result["runs"]:
        found, sweep = run["found"], run["sweep"]
        lengths = sweep["lengths"]
        tokens = str(lengths[0]) if len(set(lengths)) == 1 else f"{min(lengths)}-{max(lengths)}"
        rows.append(
            {
                "pairs": str(len(lengths)),
                "tokens": tokens,
                **({"screened": f"{found['screened']:,}"} if "screened" in found else {}),
                "rows": f"{found['predicted']['rows']:,}",
                "passes": str(found["run"]["passes"]),
                "s": _number(found["seconds"], ".1f"),
                "predicted s": _number(found["predicted"]["predicted_seconds"], ".1f"),
                "rows/s": _number(found["rows_per_second"], ",.1f"),
                "own GB": _number(found["peak_own_bytes"] / 1e9, ".2f"),
                "mapped GB": _number(found["peak_mapped_bytes"] / 1e9, ".2f"),
                "device GB": _number((found["peak_device_bytes"] or 0) / 1e9 or None, ".2f"),
                "limit": _number(found["of_product_rate"], ".0%"),
                "with runs": _number(found["of_product_rate_with_unpatched"], ".0%"),
            }
        )
    return rows


def stream(result: dict[str, Any]) -> str:
    """A line for each sweep of deltapatch alone."""
    one = result["runs"][0]["found"]
    spec, rate = one["spec"], one["product_rate"] or float("nan")
    head = (
        f"{spec['architecture']}, {spec['n_layers']} layers, d_model {spec['d_model']}, "
        f"{one['weights_bytes'] / 1e9:.1f} GB in {one['dtype']}, "
        f"{'streamed' if one['run']['stream'] else 'in memory'}\n"
        f"{one['machine']['processor']}, {one['threads']} threads; products {rate / 1e9:,.0f} GFLOP/s\n"
    )
    notes = (
        "own: peak of the process but for pages of files, mapped: of those. limit: necessary FLOPs over the\n"
        "measured product rate; with runs: with the products of the unpatched runs, too.\n"
    )
    return "\n".join(
        [head, _text(stream_rows(result), ", ".join(result["runs"][0]["sweep"]["sites"])), notes]
    )
