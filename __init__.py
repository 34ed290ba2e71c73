"""deltapatch: exact activation patching of language models, carried as differences.

This face loads lazily, so that `import deltapatch` and `deltapatch --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltapatch.analysis.acdc import acdc
    from deltapatch.analysis.circuit import Circuit
    from deltapatch.analysis.circuit_runs import circuit_curve, faithfulness, path_effects
    from deltapatch.analysis.directions import sweep_directions
    from deltapatch.analysis.features import sweep_features
    from deltapatch.analysis.interactions import interactions, top_parts
    from deltapatch.analysis.joint import faithfulness_curve
    from deltapatch.analysis.shapley import Shapley, shapley
    from deltapatch.analysis.smallest_set import SmallestSet, smallest_set
    from deltapatch.engine.sweep import run, sweep, sweep_edges
    from deltapatch.errors import DeltapatchError
    from deltapatch.interventions.given import Intervention, Patch
    from deltapatch.interventions.pairs import AnyOf, PromptPair
    from deltapatch.interventions.pairs_file import load_pairs
    from deltapatch.models.autoencoder import Autoencoder, load_sae
    from deltapatch.models.load import from_transformers, load_model
    from deltapatch.models.model import Model
    from deltapatch.results.edge_effects import EdgeEffects
    from deltapatch.results.effects import Effects
    from deltapatch.results.interactions import Interactions
    from deltapatch.results.outcome import Outcome
    from deltapatch.results.reading import load_edges, load_effects, load_interactions, load_outcome
    from deltapatch.results.recall import Recall
    from deltapatch.results.screened import Screened, load_screened
    from deltapatch.results.screened_edges import ScreenedEdges
    from deltapatch.results.screened_outcome import ScreenedOutcome

__version__ = "0.2.0.dev0"

_HOME = {
    "AnyOf": "interventions.pairs",
    "Autoencoder": "models.autoencoder",
    "Circuit": "analysis.circuit",
    "DeltapatchError": "errors",
    "EdgeEffects": "results.edge_effects",
    "Effects": "results.effects",
    "Interactions": "results.interactions",
    "Intervention": "interventions.given",
    "Model": "models.model",
    "Outcome": "results.outcome",
    "Patch": "interventions.given",
    "Probe": "results.probe",
    "PromptPair": "interventions.pairs",
    "Recall": "results.recall",
    "Screened": "results.screened",
    "ScreenedEdges": "results.screened_edges",
    "ScreenedOutcome": "results.screened_outcome",
    "Shapley": "analysis.shapley",
    "SmallestSet": "analysis.smallest_set",
    "acdc": "analysis.acdc",
    "circuit_curve": "analysis.circuit_runs",
    "faithfulness": "analysis.circuit_runs",
    "faithfulness_curve": "analysis.joint",
    "from_transformers": "models.load",
    "interactions": "analysis.interactions",
    "load_edges": "results.reading",
    "load_effects": "results.reading",
    "load_interactions": "results.reading",
    "load_model": "models.load",
    "load_outcome": "results.reading",
    "load_sae": "models.autoencoder",
    "load_screened": "results.screened",
    "path_effects": "analysis.circuit_runs",
    "load_pairs": "interventions.pairs_file",
    "run": "engine.sweep",
    "shapley": "analysis.shapley",
    "smallest_set": "analysis.smallest_set",
    "sweep": "engine.sweep",
    "sweep_directions": "analysis.directions",
    "sweep_edges": "engine.sweep",
    "sweep_features": "analysis.features",
    "top_parts": "analysis.interactions",
}

__all__ = [
    "AnyOf",
    "Autoencoder",
    "Circuit",
    "DeltapatchError",
    "EdgeEffects",
    "Effects",
    "Interactions",
    "Intervention",
    "Model",
    "Outcome",
    "Patch",
    "Probe",
    "PromptPair",
    "Recall",
    "Screened",
    "ScreenedEdges",
    "ScreenedOutcome",
    "Shapley",
    "SmallestSet",
    "acdc",
    "circuit_curve",
    "faithfulness",
    "faithfulness_curve",
    "from_transformers",
    "interactions",
    "load_edges",
    "load_effects",
    "load_interactions",
    "load_model",
    "load_outcome",
    "load_pairs",
    "load_sae",
    "load_screened",
    "path_effects",
    "run",
    "shapley",
    "smallest_set",
    "sweep",
    "sweep_directions",
    "sweep_edges",
    "sweep_features",
    "top_parts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deltapatch' has no attribute {name!r}")
    value = getattr(import_module(f"deltapatch.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
