"""Exhibits of heads, single coordinates and single neurons: the strongest, how many, what operators share."""

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np

from deltapatch.analysis.curves import ranking_figure
from deltapatch.analysis.heatmaps import head_heatmaps
from deltapatch.analysis.neurons import group_means, strongest_table
from deltapatch.analysis.overlap import overlaps
from deltapatch.analysis.study_plots import discovery_plot, overlap_matrix
from deltapatch.results.metrics import METRICS
from deltapatch.study.exhibit import Exhibit
from deltapatch.study.found import Found

RATE = 0.05  # of false discoveries
LISTED, DRAWN = 200, 20  # the strongest, in the file and in the figure
PAPER_SHARE = 400 / 4096  # the strongest, of GPT-J's coordinates

# run -> its site, and what its indices are called
KINDS = {
    "heads": ("z", "heads"),
    "coordinates": ("mlp_out.dim", "coordinates of the MLP's output"),
    "neurons": ("mlp_post", "hidden neurons"),
}


def heads(found: Found) -> Iterator[Exhibit]:
    """Attention heads at the last token."""
    effects = found.effects("heads")
    yield Exhibit(
        "heads",
        "Attention heads at the last token",
        f"Mean {METRICS[found.signed].title} over {found.over} of replacing one head's output at the last "
        "token; where nothing has an effect it is 0.",
        figure=lambda: head_heatmaps(effects, found.signed, "z"),
    )
    yield from _strongest(found, "heads", figure=False)


def coordinates(found: Found) -> Iterator[Exhibit]:
    """The paper's neurons: coordinates of one layer's MLP output."""
    yield from _strongest(found, "coordinates")


def neurons(found: Found) -> Iterator[Exhibit]:
    """All hidden neurons of all layers, and how many of them have an effect at all."""
    yield from _strongest(found, "neurons")
    tested = found.screen("neurons", "mlp_post")
    yield Exhibit(
        "discoveries",
        "Neurons with an effect",
        f"Every hidden neuron's mean {METRICS[found.signed].title} over {found.over}, against the "
        "false-discovery rate q of its sign-flip permutation test that the mean is 0 (against the sign "
        f"patterns of all of them). The dashed line is at {RATE:.0%}."
        f"{found.out_of_reach(RATE, tested.mean.size)}",
        figure=lambda: discovery_plot(tested.cells(), RATE),
    )


def operator_overlap(found: Found) -> Iterator[Exhibit]:
    """What share of their strongest coordinates and neurons operators have in common."""
    found.check_groups()
    if not found.grouped:
        return
    for run in ("coordinates", "neurons"):
        site = KINDS[run][0]
        means = group_means(found.effects(run), "ie", site, found.grouped)
        yield overlap(f"overlap_operators_{run}", "by operator", run, means, found.subject.settings.top)


def overlap(
    name: str, what: str, run: str, means: Mapping[str, np.ndarray], top: int | None, note: str = ""
) -> Exhibit:
    """The exhibit of an overlap.

    Args:
        name, what: of the exhibit; what is compared.
        run: a key of KINDS.
        means: name -> [layer, index], of one shape.
        top: how many coordinates are the strongest; None for a tenth, as in the paper.
        note: ends the caption.
    """
    cells = next(iter(means.values())).size
    k = how_many(run, cells, top)
    table = overlaps(means, k)
    return Exhibit(
        name,
        f"The strongest {KINDS[run][1]} in common, {what}",
        f"Shares that each two have in common of their {k:,} strongest {KINDS[run][1]} of {cells:,}, by mean "
        f"indirect effect at the last token. Random sets would share {k / cells:.1%}; p is the probability "
        f"that they share as many or more.{note}",
        table,
        partial(overlap_matrix, table),
        shown=30,
    )


def how_many(run: str, cells: int, top: int | None) -> int:
    """How many are the strongest: `top` coordinates, else the paper's share of all."""
    if run == "coordinates" and top is not None:
        return min(top, cells)
    return max(1, round(cells * PAPER_SHARE))


def _strongest(found: Found, run: str, figure: bool = True) -> Iterator[Exhibit]:
    site, several = KINDS[run]
    effects, settings = found.effects(run), found.subject.settings
    tested = found.screen(run, site)
    everyone = {"all": np.arange(len(found.made.pairs))}
    found.means[site] = group_means(effects, "ie", site, everyone)["all"]
    k = min(LISTED, tested.mean.size)
    table = strongest_table(effects, tested, k, found.metrics, draws=settings.draws, seed=settings.seed)
    where = f" of layer {int(tested.layers[0])}" if run == "coordinates" else ""
    total, n = tested.mean.size, tested.found(RATE)
    drawn, s = min(DRAWN, k), found.signed
    c = {name: column[:drawn] for name, column in table.columns.items()}
    means = [name for m in found.metrics for name in (m, f"{m}_median") if name in table.columns]
    yield Exhibit(
        f"strongest_{run}",
        f"The strongest {several}{where}",
        f"The {k:,} of {total:,} {several}{where} whose replacement at the last token moves the answer "
        f"most, by mean {METRICS[s].title} over {found.over}, with 95% bootstrap intervals over pairs; {n:,} "
        f"have a false-discovery rate q of at most {RATE:.0%} (sign-flip permutation test that the mean is "
        f"0, over all {total:,}).{found.out_of_reach(RATE, total)}",
        table,
        (
            lambda: ranking_figure(
                f"{several}{where}: top {drawn} of {total:,}",
                c["name"].tolist(),
                c[s],
                c[f"{s}_low"],
                c[f"{s}_high"],
                tested.mean.ravel(),
                s,
            )
        )
        if figure
        else None,
        shown=10,
        columns=("name", *means, f"{s}_low", f"{s}_high", "p", "q"),
    )
