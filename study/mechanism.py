"""Exhibits from ranking to mechanism: the top k components or neurons patched jointly, in both directions.

The ranking comes from some of the pairs, and the joint patches act on others, so that what is found for the
top k is not the luck by which they came to the top.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from deltapatch.analysis.faithfulness import Plan, needed, plan, ranking, sizes_up_to
from deltapatch.analysis.select import select
from deltapatch.analysis.statistics import mean_over_pairs
from deltapatch.analysis.study_plots import faithfulness_curves
from deltapatch.analysis.tables import Table
from deltapatch.engine.sweep import run
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.given import Intervention, Patch
from deltapatch.results.effects import Effects
from deltapatch.results.folder import RUN
from deltapatch.results.metrics import METRICS, Direction
from deltapatch.results.outcome import Outcome
from deltapatch.study.exhibit import Exhibit
from deltapatch.study.found import Found
from deltapatch.study.oracle import CHECKED, errors, plain_effects

JOINT = "joint"  # the folder of what joint patches did
METRIC = "recovered"
RANDOM_SETS = 3
LARGEST = 4096  # more neurons together are told of only as all
_CHECKED_SETS = 4  # joint interventions that are computed again, of each direction
# What a recovery of 1 is, in each.
DIRECTIONS: dict[Direction, str] = {"denoise": "denoise: brought back", "noise": "noise: taken away"}


def mechanism(found: Found) -> Iterator[Exhibit]:
    """Faithfulness curves of components and of neurons."""
    acted, ranked_by = _split(len(found.made.pairs), found.subject.settings.joint_pairs)
    effects = select(found.effects("components"), pairs=ranked_by)
    components = _rank_components(effects)
    yield _exhibit(
        found,
        "components",
        "MLP and attention outputs, at the labelled positions and the last,",
        acted,
        components,
        sizes_up_to(len(components)),
        None,
    )
    effects = select(found.effects("neurons"), pairs=ranked_by)
    neurons = ranking(effects, METRIC, "mlp_post")
    n, layers = len(neurons), effects.layers_of("mlp_post").tolist()
    whole = [Patch("mlp_out", layer, "last") for layer in layers] if n > LARGEST else None
    sizes = sizes_up_to(min(n, LARGEST))
    yield _exhibit(found, "neurons", "hidden neurons at the last token", acted, neurons, sizes, whole)


def _exhibit(
    found: Found,
    name: str,
    what: str,
    acted: np.ndarray,
    ranked: Sequence[Patch],
    sizes: list[int],
    whole: list[Patch] | None,
) -> Exhibit:
    """One pair of curves. `whole` is what patching all of them comes to, where that is too many."""
    settings = found.subject.settings
    joint = plan(ranked, len(acted), sizes, RANDOM_SETS, seed=settings.seed)
    curves = {}
    for direction, title in DIRECTIONS.items():
        values, over = _carry_out(found, f"{name}-{direction}", acted, joint.interventions, direction)
        curve = joint.curve(values, METRIC, seed=settings.seed, over=over)
        if whole is not None:
            every = [Intervention(i, whole) for i in range(len(acted))]
            ends = _carry_out(found, f"{name}-all-{direction}", acted, every, direction)
            curve = _with_all(curve, ends, len(ranked), joint, settings.seed)
        curves[title] = curve
    columns = {
        "direction": np.concatenate(
            [
                np.full(len(curve), direction, dtype=object)
                for direction, curve in zip(DIRECTIONS, curves.values(), strict=True)
            ]
        )
    }
    columns |= {
        c: np.concatenate([curve.columns[c] for curve in curves.values()])
        for c in next(iter(curves.values())).columns
    }
    enough = [needed(curve) for curve in curves.values()]
    said = ", ".join(
        f"{k:,} of {len(ranked):,} for {d}" if k else f"no number for {d}"
        for k, d in zip(enough, DIRECTIONS, strict=True)
    )
    n_ranked, title = len(found.made.pairs) - len(acted), METRICS[METRIC].title
    return Exhibit(
        f"joint_{name}",
        f"The strongest {name} patched together",
        f"{title[0].upper()}{title[1:]} by replacing the top k {what} together: 0 is the base run, 1 the "
        "source run, whether clean activations go into the corrupted prompt (denoise: the clean answer is "
        "brought back) or the other way round (noise: it is taken away). It is a ratio of means over pairs, "
        f"beside {RANDOM_SETS} random sets of equal size. Ranked by mean {METRIC} on {n_ranked} pairs, "
        f"patched on {len(acted)} others; bands are 95% bootstrap intervals over these. Without an effect it "
        f"is 0. 80% of what all do together is reached by {said}.",
        Table(columns, METRIC),
        lambda: faithfulness_curves(curves),
        shown=40,
    )


def _split(n: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs are patched, evenly over all, and which the ranking comes from."""
    if n < 4:
        raise DeltapatchError(f"joint patches need at least 4 pairs, and there are {n}")
    acted = np.unique(np.linspace(0, n - 1, min(wanted, n // 2)).round().astype(int))
    return acted, np.setdiff1d(np.arange(n), acted)


def _rank_components(effects: Effects) -> list[Patch]:
    """MLP and attention outputs at the positions that every pair has a label for, the strongest first."""
    shared = set.intersection(*(set(pair.labels) for pair in effects.pairs))
    labels = sorted(name for name in shared if not name.endswith("_first") and name != "last")
    found: list[tuple[float, Patch]] = []
    for site in effects.sites:
        values, over = effects.terms(METRIC, site)  # [pair, layer, position]
        swept = effects.positions(site)
        places = [[pair.resolve(position) for position in swept] for pair in effects.pairs]
        for label in (*labels, "last"):
            own = [pair.resolve(label) for pair in effects.pairs]
            if any(place not in row for place, row in zip(own, places, strict=True)):
                continue  # nothing differs there yet
            at = [row.index(place) for place, row in zip(own, places, strict=True)]
            mean = mean_over_pairs(values[np.arange(len(at)), :, at], over)[0]  # [layer]
            for layer, value in zip(effects.layers_of(site).tolist(), mean.tolist(), strict=True):
                found.append((value, Patch(site, layer, label)))
    return [patch for _, patch in sorted(found, key=lambda item: -np.nan_to_num(item[0], nan=-np.inf))]


def _carry_out(
    found: Found, name: str, acted: np.ndarray, interventions: list[Intervention], direction: Direction
) -> tuple[np.ndarray, np.ndarray | None]:
    """The metric's terms for every intervention, as of `Outcome.terms`; what was done before is read."""
    path = found.folder / JOINT / name
    settings, model = found.subject.settings, found.subject.model
    pairs = [found.made.pairs[i] for i in acted.tolist()]
    if not (path / RUN).is_file():
        found.subject.say(f"  joint patches, {name}: {len(interventions):,}")
    with found.subject.stopping(f"{found.experiment.name}, joint patches"):
        outcome = run(
            model,
            pairs,
            interventions,
            direction=direction,
            precision=settings.precision,
            memory_budget=settings.budget_for(model),
            metrics=[METRIC, "ie"],
            seed=settings.seed,
            progress=found.subject.progress,
            out=path,
            resume=True,
        )
        found.subject.take_times(path)
    found.checks[f"joint {name}"] = _check(found, name, outcome, acted, interventions, direction)
    return outcome.terms(METRIC)


def _check(
    found: Found,
    name: str,
    outcome: Outcome,
    acted: np.ndarray,
    interventions: list[Intervention],
    direction: Direction,
) -> dict[str, Any]:
    """A few of the joint interventions on the first pair, against plain float64 forwards."""
    own = [i for i, each in enumerate(interventions) if each.pair == 0]
    some = [own[i] for i in np.unique(np.linspace(0, len(own) - 1, _CHECKED_SETS).round().astype(int))]
    pair = found.effects("components").pairs[int(acted[0])]
    want = plain_effects(found.subject.model, pair, [interventions[i].patches for i in some], direction)
    got = {key: np.asarray(outcome.measured[key], dtype=np.float64)[some] for key in CHECKED}
    return {"precision": outcome.meta["precision"], **errors(got, want)}


def _with_all(
    curve: Table, terms: tuple[np.ndarray, np.ndarray | None], n: int, joint: Plan, seed: int
) -> Table:
    """The curve with a last row: all of them, which is the same set in any order."""
    ends, over = terms
    last = replace(
        joint,
        pair=np.arange(len(ends)),
        size=np.full(len(ends), n),
        group=np.full(len(ends), -1),
        sizes=[n],
    ).curve(ends, METRIC, seed=seed, over=over)
    c = last.columns
    c["random"], c["random_low"], c["random_high"] = c[METRIC], c["low"], c["high"]
    return Table({name: np.concatenate([curve.columns[name], c[name]]) for name in curve.columns}, METRIC)
