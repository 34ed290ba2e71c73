"""The experiments: what pairs each makes, and what is shown of them. Adding one is an entry of EXPERIMENTS.

An experiment is one file of prompt pairs. What is shown of it are its exhibits (see `exhibits.EXHIBITS`),
which ask for the sweeps that they need (RUNS), each a run folder of its own. What several experiments are
compared in is one entry of COMPARISONS.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltapatch.errors import DeltapatchError


@dataclass(frozen=True)
class Sweep:
    """A sweep over an experiment's pairs.

    Attributes:
        positions: as of `sweep`, or "differing": without those where the prompts do not differ yet, in the
            exemplars as a rule. Both runs are the same there, so that a patch changes exactly nothing.
        metrics: that can be asked of it.
        one_layer: over the study's layer for single coordinates only (see `Settings.layer`).
    """

    sites: tuple[str, ...]
    positions: str
    metrics: tuple[str, ...] | str = "all"
    one_layer: bool = False


RUNS = {
    "components": Sweep(("mlp_out", "attn_out"), "differing"),
    "heads": Sweep(("z",), "last"),
    "coordinates": Sweep(("mlp_out.dim",), "last", one_layer=True),
    # Without kl and flip: of a large model this is hundreds of thousands of rows a pair.
    "neurons": Sweep(("mlp_post",), "last", ("ie", "logit_diff", "dp_clean")),
}


@dataclass(frozen=True)
class Experiment:
    """A file of prompt pairs, and what is shown of it.

    Attributes:
        title: what it is, for headings and figures.
        task, options: of `tasks.registry.make_pairs`.
        sizes: pairs of each template (or shape, or relation): quick, usual, and as in the paper.
        shots: exemplars before each question; None for as many as the study has.
        exhibits: names of `exhibits.EXHIBITS`.
    """

    name: str
    title: str
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[int, int, int] = (2, 5, 50)
    shots: int | None = None
    exhibits: tuple[str, ...] = ()

    @property
    def same_result(self) -> bool:
        """Whether both prompts of a pair have the same answer."""
        return self.options.get("differ") == "same_result"

    @property
    def runs(self) -> list[str]:
        """Which of RUNS its exhibits ask for."""
        return [run for run in RUNS if run == "components" or run in self.exhibits]


# What is shown where the two prompts have different answers, and where they have the same.
FULL = (
    "accuracy",
    "heatmaps",
    "operator-heatmaps",
    "curves",
    "importance",
    "magnitudes",
    "predictions",
    "heads",
    "coordinates",
    "neurons",
    "operator-overlap",
    "mechanism",
    "oracle",
)
SAME = ("accuracy", "heatmaps", "curves", "importance", "magnitudes", "heads", "neurons", "oracle")
SHORT = ("accuracy", "heatmaps", "curves", "importance", "oracle")

_DIFFER = {
    "operands": "operands and results differ",
    "same-result": "operands differ, results are the same",
    "operator": "operators differ",
}


def _two_operands(numbers: str, differ: str) -> Experiment:
    return Experiment(
        f"{numbers}-{differ}",
        f"Two operands in {numbers}: {_DIFFER[differ]}",
        "arithmetic",
        {"numbers": numbers, "differ": differ.replace("-", "_")},
        exhibits=SAME if differ == "same-result" else FULL,
    )


def _three_operands(differ: str) -> Experiment:
    return Experiment(
        f"three-operands-{differ}",
        f"Three operands: {_DIFFER[differ]}",
        "three-operands",
        {"differ": differ.replace("-", "_")},
        sizes=(1, 4, 15),
        exhibits=SAME if differ == "same-result" else FULL,
    )


EXPERIMENTS = (
    *(_two_operands(numbers, differ) for numbers in ("numerals", "words") for differ in _DIFFER),
    _three_operands("operands"),
    _three_operands("same-result"),
    Experiment("retrieval", "Number retrieval", "retrieval", sizes=(6, 15, 50), exhibits=FULL),
    Experiment("factual", "Factual knowledge", "factual", sizes=(12, 40, 50), shots=0, exhibits=FULL),
    Experiment(
        "more-operators",
        "Modulo, powers, the larger and smaller number, comparison",
        "arithmetic",
        {"operators": ("%", "^", "max", "min", ">", "<")},
        sizes=(2, 4, 50),
        exhibits=FULL,
    ),
    Experiment("word-problems", "Word problems", "word-problems", sizes=(12, 40, 50), shots=0, exhibits=FULL),
)


def experiments(shots: int = 2) -> dict[str, Experiment]:
    """All experiments by name, with two operands once more for every number of exemplars below `shots`."""
    fewer = [
        Experiment(
            f"shots-{n}",
            f"Two operands in numerals, {n} exemplar{'' if n == 1 else 's'}",
            "arithmetic",
            shots=n,
            exhibits=SHORT,
        )
        for n in range(shots)
    ]
    return {e.name: e for e in (*EXPERIMENTS, *fewer)}


@dataclass(frozen=True)
class Comparison:
    """What several experiments of a study are compared in.

    Attributes:
        kind: a name of `across.KINDS_OF_COMPARISON`.
        experiments: names; those that were not done are left out.
        labels: what tables and figures call them, where not by their names.
    """

    name: str
    title: str
    kind: str
    experiments: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)


def comparisons(shots: int = 2) -> tuple[Comparison, ...]:
    """What is compared across experiments."""
    every = tuple(experiments(shots))
    series = {f"shots-{n}" if n < shots else "numerals-operands": n for n in range(shots + 1)}
    counted = {name: f"{n} exemplar{'' if n == 1 else 's'}" for name, n in series.items()}
    tasks = (
        "numerals-operands",
        "words-operands",
        "three-operands-operands",
        "retrieval",
        "factual",
        "more-operators",
        "word-problems",
    )
    return (
        Comparison("accuracy", "Accuracy", "accuracy", every),
        Comparison("importance", "Relative importance of the late MLPs", "importance", every),
        Comparison("shots", "Exemplars", "importance", tuple(series), counted),
        Comparison("neurons", "The strongest neurons in common", "overlap", tasks),
        Comparison("oracle", "Agreement with float64", "oracle", every),
    )


def choose(names: tuple[str, ...] | list[str], shots: int, without: tuple[str, ...] = ()) -> list[str]:
    """Experiments by name, or by what their names begin with (`words` is all of number words), in order.

    Args:
        names: none are all of them.
        without: what "all" does not mean.

    Raises:
        DeltapatchError: no experiment has this name.
    """
    known = experiments(shots)
    if not names:
        return [name for name in known if name not in without]
    chosen: set[str] = set()
    for asked in names:
        found = {name for name in known if name == asked or name.startswith(f"{asked}-")}
        if not found:
            raise DeltapatchError(f"unknown experiment {asked!r}: choose from {', '.join(known)}")
        chosen |= found
    return [name for name in known if name in chosen]
