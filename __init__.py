"""deltapatch: exact activation patching of language models, carried as differences.

This face loads lazily, so that `import deltapatch` and `deltapatch --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltapatch.analysis.joint import faithfulness_curve
    from deltapatch.engine.sweep import run, sweep
    from deltapatch.errors import DeltapatchError
    from deltapatch.interventions.given import Intervention, Patch
    from deltapatch.interventions.pairs import PromptPair
    from deltapatch.interventions.pairs_file import load_pairs
    from deltapatch.models.load import from_transformers, load_model
    from deltapatch.models.model import Model
    from deltapatch.results.effects import Effects
    from deltapatch.results.outcome import Outcome
    from deltapatch.results.reading import load_effects, load_outcome

__version__ = "0.1.0"

_HOME = {
    "DeltapatchError": "errors",
    "Effects": "results.effects",
    "Intervention": "interventions.given",
    "Model": "models.model",
    "Outcome": "results.outcome",
    "Patch": "interventions.given",
    "PromptPair": "interventions.pairs",
    "faithfulness_curve": "analysis.joint",
    "from_transformers": "models.load",
    "load_effects": "results.reading",
    "load_model": "models.load",
    "load_outcome": "results.reading",
    "load_pairs": "interventions.pairs_file",
    "run": "engine.sweep",
    "sweep": "engine.sweep",
}

__all__ = [
    "DeltapatchError",
    "Effects",
    "Intervention",
    "Model",
    "Outcome",
    "Patch",
    "PromptPair",
    "faithfulness_curve",
    "from_transformers",
    "load_effects",
    "load_model",
    "load_outcome",
    "load_pairs",
    "run",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deltapatch' has no attribute {name!r}")
    value = getattr(import_module(f"deltapatch.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
