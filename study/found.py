"""What an experiment found: its pairs, and the runs that exhibits ask for, made when they are asked for."""

import shlex
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deltapatch.analysis.curves import last_position
from deltapatch.analysis.importance import RelativeImportance
from deltapatch.analysis.neurons import Screen, screen
from deltapatch.analysis.select import select
from deltapatch.analysis.significance import POOLED_FROM, out_of_reach
from deltapatch.analysis.statistics import mean_over_pairs
from deltapatch.engine.sweep import sweep
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.results.effects import Effects
from deltapatch.study import pairs as pair_files
from deltapatch.study.oracle import check_run
from deltapatch.study.pairs import Made
from deltapatch.study.presets import RUNS, Experiment
from deltapatch.study.subject import Subject

MOST_GROUPS = 8  # beyond, figures do not tell operators apart
_KEPT = 2  # runs that are held in memory at a time


@dataclass
class Found:
    """An experiment on a subject.

    Attributes:
        importance: name of a group of pairs (or "all") -> relative importance; filled by its exhibit.
        bare_importance: that of all pairs without a floor under the effects.
        checks: run -> what `oracle.check_run` found.
        means: site -> [layer, index], mean indirect effects; filled by the exhibits of neurons.
    """

    subject: Subject
    experiment: Experiment
    made: Made
    importance: dict[str, RelativeImportance] = field(default_factory=dict)
    bare_importance: float = float("nan")
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    means: dict[str, np.ndarray] = field(default_factory=dict)
    _runs: "OrderedDict[str, Effects]" = field(default_factory=OrderedDict)
    _screens: dict[str, Screen] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where its pairs, runs, tables and figures lie."""
        return self.subject.folder / self.experiment.name

    @property
    def signed(self) -> str:
        """The metric that says how far the answer moved: for two answers, or for the one that both have."""
        return "dlogp_clean" if self.experiment.same_result else "logit_diff"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that magnitudes are told in."""
        same = self.experiment.same_result
        return ("ie", "dlogp_clean", "dp_clean") if same else ("ie", "logit_diff", "dlogp_clean", "dp_clean")

    @property
    def over(self) -> str:
        """The pairs, for captions."""
        return f"{len(self.made.pairs)} pairs"

    @cached_property
    def members(self) -> dict[str, np.ndarray]:
        """Operator (or shape, relation) -> its pairs' numbers."""
        found: dict[str, list[int]] = {}
        for i, pair in enumerate(self.made.pairs):
            found.setdefault(str(pair.meta.get("operator", "all")), []).append(i)
        return {name: np.array(numbers) for name, numbers in found.items()}

    @property
    def grouped(self) -> dict[str, np.ndarray]:
        """Those of `members` that figures tell apart: 2 to 8 of them with two pairs or more; else none."""
        usable = {name: numbers for name, numbers in self.members.items() if len(numbers) > 1}
        return usable if 2 <= len(usable) <= MOST_GROUPS else {}

    def check_groups(self) -> None:
        """Raise DeltapatchError, which says why, where `members` are several and `grouped` are none."""
        n = len(self.members)
        if n < 2 or self.grouped:
            return
        why = f"figures tell at most {MOST_GROUPS} apart" if n > MOST_GROUPS else "each has a single pair"
        raise DeltapatchError(f"its pairs are of {n} kinds, and {why}: they are shown together only")

    @property
    def layer(self) -> int:
        """Whose MLP's output coordinates are patched: the one with the largest effect in the upper half."""
        if self.subject.layer is None:
            effects = self.effects("components")
            last = last_position(effects, "ie", "mlp_out")
            assert last is not None
            mean = mean_over_pairs(last)[0]  # [layer]
            upper = len(mean) // 2
            self.subject.layer = upper + int(np.argmax(mean[upper:]))
            self.subject.say(
                f"  single coordinates: layer {self.subject.layer}, whose MLP has the largest effect at the "
                "last token in the upper half"
            )
        return self.subject.layer

    def positions(self, run: str) -> str | list[int | str]:
        """Where a run patches, as `sweep` takes it."""
        asked = RUNS[run].positions
        return self._differing if asked == "differing" else asked

    @cached_property
    def _differing(self) -> str | list[int | str]:
        """All positions, or those from where the prompts of a pair begin to differ."""
        model = self.subject.model
        encoded = encode_pairs(self.made.pairs, model.tokenizer, model.spec.d_vocab)
        longest = max(len(pair.clean) for pair in encoded)
        reach = max(len(pair.clean) - _first(pair) for pair in encoded)
        return "all" if reach >= longest else list(range(-reach, 0))

    def effects(self, run: str) -> Effects:
        """One of RUNS: carried out, or read where it was before."""
        if run not in self._runs:
            plan, settings, model = RUNS[run], self.subject.settings, self.subject.model
            layers: Any = [self.layer] if plan.one_layer else "all"
            path = self.folder / run
            self.subject.say(f"  {run}: {', '.join(plan.sites)}")
            with self.subject.stopping(f"{self.experiment.name}, {run}"):
                found = sweep(
                    model,
                    self.made.pairs,
                    sites=list(plan.sites),
                    positions=self.positions(run),
                    layers=layers,
                    precision=settings.precision,
                    memory_budget=settings.budget_for(model),
                    metrics=plan.metrics if isinstance(plan.metrics, str) else list(plan.metrics),
                    seed=settings.seed,
                    progress=self.subject.progress,
                    out=path,
                    resume=True,
                )
                self.subject.take_times(path)
            if run not in self.checks:
                check = check_run(model, found, settings.checked, settings.seed)
                self.checks[run] = {"precision": found.meta["precision"], **check}
            self._runs[run] = found
            while len(self._runs) > _KEPT:
                self._runs.popitem(last=False)
        self._runs.move_to_end(run)
        return self._runs[run]

    def forget(self) -> None:
        """Let go of the runs that are held in memory."""
        self._runs.clear()
        self._screens.clear()

    def by_group(self, run: str) -> dict[str, Effects]:
        """The effects of each of `grouped`."""
        effects = self.effects(run)
        return {name: select(effects, pairs=numbers) for name, numbers in self.grouped.items()}

    def screen(self, run: str, site: str) -> Screen:
        """Every index of a site, tested in the metric `signed`."""
        if site not in self._screens:
            settings = self.subject.settings
            self._screens[site] = screen(self.effects(run), self.signed, site, settings.draws, settings.seed)
        return self._screens[site]

    def out_of_reach(self, rate: float, cells: int) -> str:
        """A sentence for captions where so few pairs let no test over so many cells come below a rate."""
        pooled = cells >= POOLED_FROM
        said = out_of_reach(len(self.made.pairs), rate, self.subject.settings.draws, pooled)
        return "" if said is None else f" {said[0].upper()}{said[1:]}."

    def commands(self) -> list[str]:
        """The commands that make this experiment's pairs and runs alone."""
        model, settings = self.subject.model, self.subject.settings
        files = f"{self.experiment.name}/{pair_files.PAIRS}"
        adapter, answers = self.subject.adapter, self.made.answers
        lines = [pair_files.command(self.experiment, settings, model, adapter, answers, files)]
        for run in self.experiment.runs:
            plan = RUNS[run]
            words = [
                "deltapatch",
                "sweep",
                "--model",
                model.name,
                "--pairs",
                files,
                "--sites",
                ",".join(plan.sites),
            ]
            words += ["--revision", model.revision] if model.revision else []
            words += ["--adapter", adapter] if adapter else []
            at = self.positions(run)
            words += [] if at == "all" else [f"--positions={at if isinstance(at, str) else _listed(at)}"]
            words += ["--layers", str(self.layer)] if plan.one_layer else []
            words += ["--metrics", ",".join(plan.metrics)] if plan.metrics != "all" else []
            words += ["--precision", settings.precision] if settings.precision != "auto" else []
            words += ["--memory-budget", str(settings.budget_for(self.subject.model))]
            words += ["--seed", str(settings.seed), "--out", f"{self.experiment.name}/{run}"]
            lines.append(shlex.join(words))
        return lines


def _first(pair: EncodedPair) -> int:
    """One before the first position at which the prompts of a pair differ, or the first that has a label."""
    differ = np.flatnonzero(pair.changed).tolist()
    return max(0, min([*(at - 1 for at in differ[:1]), *pair.labels.values(), len(pair.clean) - 1]))


def _listed(positions: list[int | str]) -> str:
    return ",".join(map(str, positions))
