"""The settings of a run: all that decides a bit of its result, and how another run's are told from them.

Every process that resumes, shares or asks again for a run is held to them, whether it is finished or not.
"""

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from deltapatch.engine.options import EdgeOptions, SweepOptions
from deltapatch.engine.question import Decided, Question
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.edges import SETTINGS
from deltapatch.kernels.product import PRECISIONS
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.folder import environment
from deltapatch.results.manifest import digest_of
from deltapatch.results.measured import Found
from deltapatch.results.metrics import Own, source_of
from deltapatch.results.outcome import Outcome

PLAN_VERSION = 8  # to be raised whenever passes are cut, or computed, in another way

# What a sentence calls what is no option.
_WORDS = {
    "plan": "version of the plan",
    "deltapatch": "version of deltapatch",
    "torch": "version of PyTorch",
    "model": "model (fingerprint)",
    "dtype": "dtype",
    "device": "kind of device",
    "pairs": "pairs",
    "interventions": "list of interventions",
    "functions": "source of a metric",
    "nodes": "shape of the model",
    "threads": "number of threads",
    "stream": "way of keeping weights",
}
_LEFT_OPEN = {"precision", "memory_budget", "threads", "stream", "backend"}  # None takes what the run has
# Nobody asks for these, and they change the last bits at most: one run is of one kind, but one that is
# finished answers for all.
_SURROUNDINGS = {"plan", "deltapatch", "torch", "device", "threads"}
_OF_GRIDS = ("sites", "layers", *SETTINGS)
_SHORT = 120  # characters of a value that fit into a sentence


def settings_of(question: Question, decided: Decided | None = None) -> dict[str, Any]:
    """What decides the result of a question; None for what may still be decided.

    The model's fingerprint is among them: all its weights are read.

    Args:
        decided: what was left open.
    """
    versions, model, options = environment()["versions"], question.model, question.options
    own = {each.name: value for each, value in options.decisive()}
    open_: dict[str, Any]
    if decided is None:
        open_ = {"precision": question.precision and question.precision.name, "threads": None, "stream": None}
    else:
        open_ = {
            "precision": decided.precision.name,
            "memory_budget": decided.memory_budget,
            "threads": decided.threads,
            "stream": decided.stream,
        }
    for name in _OF_GRIDS:  # as the grid has made them
        own.pop(name, None)
    return {
        **own,
        **question.interventions.settings(),
        "plan": PLAN_VERSION,
        "deltapatch": versions["deltapatch"],
        "torch": versions["torch"],
        "model": question.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_kind(model.device),
        "backend": question.backend.name,
        "pairs": digest_of(question.pairs),
        "metrics": list(question.measured),
        "noise_scale": options.noise_scale if options.source == "noise" else None,
        **_functions(question),
        **open_,
    }


def meta_of(question: Question, decided: Decided, fingerprint: str | None) -> dict[str, Any]:
    """What was run, for the record: the model, every option that decides something, and the machine.

    Args:
        fingerprint: of the model, where it was taken.
    """
    model, options = question.model, question.options
    own = {each.name: value for each, value in options.decisive()}
    for name in (*_OF_GRIDS, "metrics"):  # the results tell them as axes
        own.pop(name, None)
    return {
        "model": model.name,
        "revision": model.revision,
        "commit": model.commit,
        "fingerprint": fingerprint,
        "architecture": model.spec.architecture,
        "d_model": model.spec.d_model,
        **own,
        "answer_tokens": max(pair.answer_tokens for pair in question.pairs),
        "precision": decided.precision.name,
        "backend": question.backend.name,
        "device": str(model.device),
        "device_kind": device_kind(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "stream": model.stream,
        "noise_scale": options.noise_scale if options.source == "noise" else None,
        "memory_budget": decided.memory_budget,
        "threads": decided.threads,
        "plan": PLAN_VERSION,
        **_functions(question),
        "noise_floor": None,
        "noise_floor_left_out": None,
        "passes": 0,
        "rows": 0,
        "seconds": 0.0,
        **environment(),
    }


def _functions(question: Question) -> dict[str, Any]:
    """Metrics that users bring, by name, each with what tells it from others of its name."""
    own: dict[str, Own] = {**question.functions, **question.probes}
    found = {name: source_of(metric) for name, metric in own.items()}
    return {"functions": found} if found else {}


def decided_by(settings: Mapping[str, Any]) -> Decided:
    """What a run decided when it began."""
    precision = PRECISIONS[settings["precision"]]
    return Decided(precision, settings["memory_budget"], settings["threads"], settings["stream"])


def settings_of_run(found: Found) -> dict[str, Any]:
    """The settings of a finished run, as `settings_of` has them: those of what it holds, not what it says."""
    meta = found.meta
    versions = meta["versions"] if isinstance(meta.get("versions"), dict) else {}
    names = [name for name in (*_words(), *_WORDS) if name not in ("interventions", *_OF_GRIDS)]
    said = {name: meta.get(name) for name in names} | {
        "deltapatch": versions.get("deltapatch"),
        "torch": versions.get("torch"),
        "model": meta.get("fingerprint"),
        "device": meta.get("device_kind"),
        "pairs": digest_of(found.pairs),
        "direction": found.direction,
    }
    if isinstance(found, EdgeEffects):
        return said | found.grid.settings() | {"metrics": list(found.measured)}
    if isinstance(found, Outcome):
        return said | found.interventions.settings() | {"metrics": list(found.measured)}
    sites = found.sites.values()
    positions = {site.site: list(site.positions) for site in sites}
    measured = {site.site: list(site.measured) for site in sites}
    return said | {
        "sites": [
            {"site": s.site, "layers": s.layers.tolist(), "indices": s.shape[3] if len(s.shape) > 3 else 0}
            for s in sites
        ],
        "positions": _one(positions),
        "metrics": _one(measured),
    }


def _one(by_site: dict[str, Any]) -> Any:
    """What all sites have, or by site where they differ."""
    return next(iter(by_site.values())) if len({str(v) for v in by_site.values()}) == 1 else by_site


def _words() -> dict[str, str]:
    """What a sentence calls each option."""
    both = (*fields(SweepOptions), *fields(EdgeOptions))
    return {each.name: each.metadata["word"] for each in both if each.metadata["word"]}


def check_same(own: Mapping[str, Any], asked: Mapping[str, Any], where: object, finished: bool) -> None:
    """Check that what a process was asked for is what a run was begun with, or holds.

    Args:
        own: the settings of the run.
        asked: those of the process; None leaves a choice to the run where there is one.
        where: what a sentence calls the run.
        finished: whether it is; then a difference of version or machine is a warning.

    Raises:
        DeltapatchError: something differs; what, and both values.
    """
    words = _WORDS | _words()
    differ = {
        name: f"{words.get(name, name)}: {_both(name, own.get(name), asked.get(name))}"
        for name in dict.fromkeys([*own, *asked])
        if own.get(name) != asked.get(name) and not (asked.get(name) is None and name in _LEFT_OPEN)
    }
    if not differ:
        return
    what = f"a different {'; a different '.join(differ.values())}"
    if not finished:
        raise DeltapatchError(
            f"cannot resume {where}: it was begun with {what}; give the same, or choose another output path"
        )
    if differ.keys() <= _SURROUNDINGS:
        warnings.warn(f"run {where} was finished with {what}", stacklevel=4)
        return
    raise DeltapatchError(
        f"run {where} is finished, with {what}; give the same, choose another output path, or remove it"
    )


def _both(name: str, own: Any, mine: Any) -> str:
    """Two values that differ, on one line, whatever was read: from where they do where they are long."""
    texts = [_said(name, own), _said(name, mine)]
    if max(map(len, texts)) > _SHORT:
        same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), 0)
        begin = max(0, same - _SHORT // 3)
        texts = [("..." if begin else "") + text[begin:] for text in texts]
        texts = [text if len(text) <= _SHORT else f"{text[:_SHORT]}..." for text in texts]
    return "{} there, {} here".format(*texts)


def _said(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name == "pairs":
        return f"sha256 {str(value)[:12]}"
    if name == "sites" and isinstance(value, list) and all(isinstance(s, dict) for s in value):
        value = "; ".join(f"{s.get('site')} of layers {_ranges(s.get('layers'))}" for s in value)
    return " ".join(str(value).split())


def _ranges(numbers: Any) -> str:
    """0-5,9."""
    found: list[list[Any]] = []
    for n in numbers if isinstance(numbers, list) else []:
        if found and isinstance(n, int) and found[-1][1] == n - 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def device_kind(device: torch.device) -> str:
    """What must be the same for the same bits: "cuda 9.0", "cpu AVX512"."""
    if device.type == "cuda":
        return "cuda {}.{}".format(*torch.cuda.get_device_capability(device))
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
