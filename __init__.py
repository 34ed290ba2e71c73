"""deltapatch: exact activation patching of language models, carried as differences.

This face loads lazily, so that `import deltapatch` and `deltapatch --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltapatch.engine.effects import Effects, load_effects
    from deltapatch.engine.interventions import Intervention, Patch
    from deltapatch.engine.outcome import Outcome, load_outcome
    from deltapatch.engine.pairs import PromptPair
    from deltapatch.engine.sweep import run, sweep
    from deltapatch.errors import DeltapatchError
    from deltapatch.models.model import Model, from_transformers, load_model

__version__ = "0.1.0"

_HOME = {
    "DeltapatchError": "errors",
    "Effects": "engine.effects",
    "Intervention": "engine.interventions",
    "Model": "models.model",
    "Outcome": "engine.outcome",
    "Patch": "engine.interventions",
    "PromptPair": "engine.pairs",
    "from_transformers": "models.model",
    "load_effects": "engine.effects",
    "load_model": "models.model",
    "load_outcome": "engine.outcome",
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
    "from_transformers",
    "load_effects",
    "load_model",
    "load_outcome",
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
