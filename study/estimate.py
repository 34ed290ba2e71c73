"""What a study would be: its experiments' pairs, how much they take, and the commands that do each alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltapatch.engine.planning.costs import sweep_cost
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.grid import make_grid
from deltapatch.interventions.roles import Roles
from deltapatch.models.model import Model
from deltapatch.study import pairs as pair_files
from deltapatch.study.found import Found
from deltapatch.study.presets import RUNS, experiments
from deltapatch.study.settings import Settings
from deltapatch.study.subject import Subject


@dataclass(frozen=True)
class Estimate:
    """One experiment.

    Attributes:
        reason: why the model cannot do it; None where it can.
        pairs, rows, flops: of its sweeps; joint patches are few beside them.
    """

    name: str
    title: str
    reason: str | None = None
    pairs: int = 0
    rows: int = 0
    flops: int = 0
    commands: tuple[str, ...] = ()


def estimate(model: Model, settings: Settings, names: Sequence[str]) -> list[Estimate]:
    """What each experiment would take. Pairs are made, and nothing is written."""
    found = []
    nowhere = Path()
    # The layer of single coordinates is chosen by the first sweep; all cost nearly the same.
    layer = model.spec.n_layers // 2 if settings.layer is None else settings.layer
    subject = Subject(model, nowhere, nowhere, settings, lambda line: None, layer=layer)
    for name in names:
        experiment = experiments(settings.shots)[name]
        try:
            made = pair_files.make(experiment, settings, model, ask=False)
        except DeltapatchError as error:
            found.append(Estimate(name, experiment.title, str(error)))
            continue
        encoded = encode_pairs(made.pairs, model.tokenizer, model.spec.d_vocab)
        alone = Found(subject, experiment, made)
        rows = flops = 0
        for run in experiment.runs:
            plan = RUNS[run]
            layers: str | list[int] = [layer] if plan.one_layer else "all"
            grid = make_grid(plan.sites, alone.positions(run), layers, encoded, model.spec, Roles())
            more = sweep_cost(grid, encoded, model.spec)
            rows, flops = rows + more[0], flops + more[1]
        commands = tuple(alone.commands())
        found.append(Estimate(name, experiment.title, None, len(encoded), rows, flops, commands))
    return found
