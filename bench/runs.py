"""What all runs of a comparison say together of a sweep: every repeat, and the worst of the ratios."""

from typing import Any

import numpy as np

from deltapatch.bench.peers.ours import PREFIX
from deltapatch.bench.peers.registry import ESTIMATES

Columns = dict[str, dict[str, Any]]  # what there is to say of a sweep, by side


def together(runs: list[Columns]) -> Columns:
    """The columns of a sweep in every run, as one: no speed of a side that failed or was wrong in any."""
    out: Columns = {}
    best = [fastest_peer({"columns": columns}) for columns in runs]
    for side in runs[0]:
        each = [columns[side] for columns in runs]
        failed = [column for column in each if column["status"] != "measured"]
        if failed:
            out[side] = failed[0]
            continue
        out[side] = column = _joined(each)
        column["times_as_fast"] = [
            own["rate"] / columns[peer]["rate"]
            for own, columns, peer in zip(each, runs, best, strict=True)
            if peer is not None
        ]
    return out


def tell_shares(sweep: dict[str, Any], about: dict[str, Any], products: dict[str, float | None]) -> None:
    """What share of the product rate beside it each side reached; not of approximations, which do less.

    Args:
        sweep: whose columns are told.
        about: the sides.
        products: FLOP/s by precision, which become the best that any side saw.
    """
    flops = sweep["necessary_flops"] / sweep["interventions"]
    for name, column in sweep["columns"].items():
        if column["status"] != "measured":
            continue
        beside, precision = column["product_rate"], about[name]["precision"]
        known = about[name]["exact"] and None not in beside
        column["of_product_rate"] = None
        if known:
            products[precision] = max(products.get(precision) or 0.0, *beside)
            column["of_product_rate"] = float(np.median(flops * np.array(column["rates"]) / beside))


def fastest_peer(sweep: dict[str, Any]) -> str | None:
    """The side with the highest rate among those that are exact and not deltapatch."""
    rates = {
        name: column["rate"]
        for name, column in sweep["columns"].items()
        if column["status"] == "measured" and not name.startswith(PREFIX) and name not in ESTIMATES
    }
    return max(rates, key=lambda name: rates[name]) if rates else None


def _joined(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Lists of repeats one after the other; the worst agreement and the most memory; batch sizes by run."""
    out = dict(each[0])
    for key in ("seconds", "measured_seconds", "product_rate", "others", "rates"):
        out[key] = [value for column in each for value in column[key]]
    for key in ("batch", "trials"):
        out[key] = [column[key] for column in each]
    out["agreement"] = max((column["agreement"] for column in each), key=lambda found: found["error"])
    out["peak_bytes"] = max(column["peak_bytes"] for column in each)
    out["sampled"] = any(column["sampled"] for column in each)
    out["rate"] = float(np.median(out["rates"]))
    out["spread"] = [min(out["rates"]), max(out["rates"])]
    return out
