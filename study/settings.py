"""What a study is made with: sizes, seeds and options, kept in its folder, and the same on resuming."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltapatch.engine.planning.costs import layer_parameters
from deltapatch.errors import DeltapatchError
from deltapatch.models.model import Model
from deltapatch.results.wholefile import write_whole
from deltapatch.study.presets import Experiment

SIZES = ("quick", "usual", "paper")
SETTINGS = "settings.json"

_WORDS = {
    "size": "size (--quick, --paper-size)",
    "facts": "file of facts",
    "problems": "file of word problems",
    "fingerprint": "model (fingerprint)",
    "other": "other checkpoint (fingerprint)",
    "dtype": "dtype",
    "facts_sha256": "content of the file of facts",
    "problems_sha256": "content of the file of word problems",
}


@dataclass(frozen=True)
class Settings:
    """Of a study.

    Attributes:
        size: how many pairs: quick, usual, or as many as in the paper.
        per_template: pairs of each template, shape or relation, whatever the size says.
        shots: exemplars before each question, where an experiment has any.
        seed: of the pairs, of bootstrap and tests, of random sets.
        max_number: the largest number; the tasks' own, 300, by default.
        answers: "one" token, "text" of any length, or "auto": of any length where numbers are several tokens.
        correct_only: keep only pairs whose two prompts the model answers right, as in the paper.
        facts: a LAMA folder or a JSONL of facts, rather than those that come along.
        problems: a JSONL of word problems.
        top: how many coordinates are the strongest, of which overlaps are told; about a tenth by default.
        layer: whose coordinates are patched; where its MLP has the largest effect by default.
        precision, memory_budget: of `sweep`. The budget decides how passes are cut, and so the last bits.
        draws: of the bootstrap and of tests.
        joint_pairs: on how many pairs components and neurons are patched jointly.
        checked: how many effects of each run are computed again by plain float64 forwards.
    """

    size: str = "usual"
    per_template: int | None = None
    shots: int = 2
    seed: int = 0
    max_number: int | None = None
    answers: str = "auto"
    correct_only: bool = False
    facts: str | None = None
    problems: str | None = None
    top: int | None = None
    layer: int | None = None
    precision: str = "auto"
    memory_budget: int | None = None
    draws: int = 1000
    joint_pairs: int = 16
    checked: int = 16

    def check(self) -> None:
        """Raise DeltapatchError where an option is out of range."""
        least = {
            "per_template": 1,
            "shots": 0,
            "seed": 0,
            "max_number": 2,
            "top": 1,
            "layer": 0,
            "draws": 1,
            "joint_pairs": 2,
            "checked": 1,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise DeltapatchError(f"{name.replace('_', '-')} must be at least {low}, not {value}")
        if self.size not in SIZES:
            raise DeltapatchError(f"unknown size {self.size!r}: choose from {', '.join(SIZES)}")
        if self.answers not in ("auto", "one", "text"):
            raise DeltapatchError(f"unknown answers {self.answers!r}: choose auto, one or text")

    def pairs_of(self, experiment: Experiment) -> int:
        """How many pairs of each template an experiment has."""
        return self.per_template or experiment.sizes[SIZES.index(self.size)]

    def shots_of(self, experiment: Experiment) -> int:
        """How many exemplars an experiment has."""
        return self.shots if experiment.shots is None else experiment.shots

    def budget_for(self, model: Model) -> int:
        """The memory budget: fixed, whatever is free, so that two studies are cut alike.

        Half of what a GPU has beside the weights; elsewhere 1 GiB and what layers need while they are used.
        """
        import torch

        if self.memory_budget is not None:
            return self.memory_budget
        spec = model.spec
        layer, ends = layer_parameters(spec), 2 * spec.d_vocab * spec.d_model
        if model.device.type == "cuda":
            weights = (spec.n_layers * layer + ends) * model.dtype.itemsize
            return max(1 << 30, (torch.cuda.mem_get_info(model.device)[1] - weights) // 2)
        return (1 << 30) + 8 * (2 * layer + ends)


def inputs(settings: Settings, model: Model, other: Model | None) -> dict[str, str | None]:
    """What a study depends on beside its settings: the weights and files that are behind their names."""
    return {
        "fingerprint": model.fingerprint(),
        "other": None if other is None else other.fingerprint(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "facts_sha256": _hash(settings.facts),
        "problems_sha256": _hash(settings.problems),
    }


def _hash(name: str | None) -> str | None:
    """Of a file, or of all files in a folder."""
    if name is None:
        return None
    path, out = Path(name), hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        out.update(f"{file.relative_to(path).as_posix()}\n".encode())
        with open(file, "rb") as content:
            out.update(hashlib.file_digest(content, "sha256").digest())
    return out.hexdigest()


def begin(folder: Path, settings: Settings, given: dict[str, str | None], chosen: list[str]) -> list[str]:
    """Write a study's settings, or hold a study that is resumed to those that it was begun with.

    Args:
        given: what `inputs` says.

    Returns:
        the names of the experiments that the study has, those of earlier times among them.

    Raises:
        DeltapatchError: the folder holds a study with other settings, or no study.
    """
    path = folder / SETTINGS
    mine: dict[str, Any] = {"format": "deltapatch study", "settings": asdict(settings), **given}
    if path.is_file():
        try:
            own = json.loads(path.read_text(encoding="utf-8"))
            before = {**own["settings"], **{name: own.get(name) for name in given}}
            chosen = [*own["experiments"], *(name for name in chosen if name not in own["experiments"])]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DeltapatchError(
                f"{path} is damaged: remove the folder, or choose another with --out"
            ) from error
        for name, value in {**mine["settings"], **given}.items():
            if before.get(name) != value:
                word = _WORDS.get(name, name.replace("_", " "))
                raise DeltapatchError(
                    f"cannot resume {folder}: it was begun with a different {word} ({before.get(name)} "
                    f"there, {value} here); give the same, or choose another output path"
                )
    text = json.dumps(mine | {"experiments": chosen}, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))
    return chosen
