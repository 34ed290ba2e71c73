"""LoRA adapters in PEFT's format, merged into the weights as they are read: W + scale * B @ A."""

import hashlib
import math
import re
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltapatch.errors import DeltapatchError, shown
from deltapatch.models.architecture import Architecture, Slot, expected_shape
from deltapatch.models.config import LARGEST_NUMBER
from deltapatch.models.folder import find_folder, read_json
from deltapatch.models.header import check_file
from deltapatch.models.spec import ModelSpec
from deltapatch.models.tensors import SafetensorsFiles, check_finite
from deltapatch.models.weights import end_shapes, layer_shapes

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FILES = (_CONFIG, _WEIGHTS)

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
# Options that change what is added to the weights. Set to anything, they are refused. `fan_in_fan_out` is not
# among them: it describes base weights stored [in, out], and no supported architecture has any, so PEFT
# itself overrides it.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
)
# Ways to initialise that leave the base weights alone; others (PiSSA, OLoRA, LoftQ, CorDA, ...) change them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

# What PEFT targets where a config says nothing, and the architecture is none of these.
_DEFAULTS = {"gpt_neox": ["query_key_value"], "gpt2": ["c_attn"], "phi3": ["qkv_proj"]}
_DEFAULT = ["q_proj", "v_proj"]

_TABLES = ("embedding.weight", "positions.weight")  # looked up, not multiplied with
_ROWS = 4096  # merged at a time
# In a pattern: repeated groups, references and looks ahead; and what multiplies the ways of matching it.
_ENDLESS = re.compile(r"\)[*+?{]|\(\?|\\[1-9]")
_REPEATS, _CHOICES = re.compile(r"[*+{]"), re.compile(r"[?|]")


class _Update(NamedTuple):
    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float


class Adapter:
    """The low-rank updates of one adapter, by slot."""

    def __init__(self, updates: dict[Slot, _Update]) -> None:
        self._updates = updates

    def changes(self, slot: Slot) -> bool:
        """Whether there is an update of that slot."""
        return slot in self._updates

    def merge(self, slot: Slot, weight: Tensor) -> Tensor:
        """The weight with its update added, in its own dtype and on its device; others are shared."""
        update = self._updates.get(slot)
        if update is None:
            return weight
        # At least float32 inside: rounding happens once, at the end. Never a wide copy of the whole.
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (t.to(weight.device, wide) for t in (update.a, update.b))
        out = torch.empty_like(weight)
        for some in torch.arange(len(weight)).split(_ROWS):
            rows = slice(int(some[0]), int(some[-1]) + 1)
            out[rows] = torch.addmm(weight[rows].to(wide), b[rows], a, alpha=update.scale)
        return out

    def digest(self) -> bytes:
        """A hash of all that the adapter adds."""
        digest = hashlib.sha256()
        for slot, update in sorted(self._updates.items(), key=str):
            digest.update(f"{slot} {update.scale!r}".encode())
            for tensor in (update.a, update.b):
                digest.update(tensor.to(torch.float64).contiguous().numpy().tobytes())
        return digest.digest()


def read_adapter(path_or_id: str | Path, architecture: Architecture, spec: ModelSpec) -> Adapter:
    """An adapter from a folder or hub id, checked against the model that it is for.

    Raises:
        DeltapatchError: a file is missing or broken, an option is not supported, a target is unknown, or a
            shape or rank does not fit.
    """
    folder = find_folder(path_or_id, ADAPTER_FILES)
    for file in (_CONFIG, _WEIGHTS):
        check_file(folder / file)
    if not (folder / _CONFIG).is_file():
        raise DeltapatchError(f"{folder} has no {_CONFIG}: it is not a LoRA adapter")
    config = read_json(folder / _CONFIG)
    _check_options(config, str(folder / _CONFIG))
    if not (folder / _WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file() or not Path(path_or_id).is_dir():
            raise DeltapatchError(
                f"{path_or_id} has no {_WEIGHTS}, and PyTorch .bin files are not read directly: convert it "
                f"once with `deltapatch convert {quote(str(path_or_id))} --out OUT` and give OUT as "
                "the adapter"
            )
        raise DeltapatchError(f"{folder} has no {_WEIGHTS}")
    tensors = SafetensorsFiles(str(folder), [folder / _WEIGHTS])
    pairs = _pair_up(tensors)
    matrices = {module: _matrix(module, architecture, spec, folder) for module in pairs}
    found = {slot: module for module, slots in matrices.items() for slot in slots}
    _check_targets(config, found, architecture, spec, folder)
    updates = {}
    for module, (name_a, name_b) in pairs.items():
        n_out = sum(rows for rows, _ in matrices[module].values())
        n_in = next(iter(matrices[module].values()))[1]
        if not all(len(tensors.shape(n)) == 2 and all(tensors.shape(n)) for n in (name_a, name_b)):
            raise DeltapatchError(
                f"{tensors.place(name_a)}: the update of {shown(module)} is not of matrices"
            )
        a, b = tensors.read(name_a), tensors.read(name_b)
        scale = _scale(config, module, a.shape[0], folder)
        if a.shape != (a.shape[0], n_in) or b.shape != (n_out, a.shape[0]):
            raise DeltapatchError(
                f"{tensors.place(name_a)}: the update of {module!r} is {list(b.shape)} x {list(a.shape)}, "
                f"but the model's matrix is {[n_out, n_in]}"
            )
        check_finite(a, name_a, tensors.place(name_a))
        check_finite(b, name_b, tensors.place(name_b))
        start = 0
        for slot, (n_rows, _) in matrices[module].items():
            updates[slot] = _Update(a, b[start : start + n_rows], scale)
            start += n_rows
    return Adapter(updates)


def _check_options(config: dict[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise DeltapatchError(
            f"{where}: adapters of type {shown(config.get('peft_type'))} are not supported: LORA is"
        )
    for name in _UNSUPPORTED:
        if config.get(name):
            raise DeltapatchError(
                f"{where}: option {name!r} is not supported: merge the adapter with peft first"
            )
    if config.get("bias", "none") != "none":
        raise DeltapatchError(f"{where}: 'bias' is {shown(config['bias'])}, and only 'none' is supported")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise DeltapatchError(
            f"{where}: 'init_lora_weights' is {shown(start)}, which changes the base weights: "
            "merge the adapter with peft first"
        )


def _pair_up(tensors: SafetensorsFiles) -> dict[str, tuple[str, str]]:
    """Module -> the names of its A and B."""
    sides: dict[str, dict[str, str]] = {}
    for name in tensors.names():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise DeltapatchError(
                f"{tensors.place(name)}: tensor {shown(name)} is not supported: "
                "only lora_A and lora_B of matrices are"
            )
        sides.setdefault(match["module"], {})[match["side"]] = name
    if not sides:
        raise DeltapatchError(f"{tensors.where}: the adapter is empty")
    for module, found in sides.items():
        if len(found) != 2:
            raise DeltapatchError(
                f"{tensors.where}: the adapter has only one of lora_A and lora_B of {module!r}"
            )
    return {module: (found["A"], found["B"]) for module, found in sides.items()}


def _check_targets(
    config: dict[str, Any], found: dict[Slot, str], architecture: Architecture, spec: ModelSpec, folder: Path
) -> None:
    """See that the tensors are of those modules that the config targets: PEFT leaves out all others.

    Args:
        found: slot -> the module that the file has an update of.
    """
    targets = _Targets(config, architecture, str(folder / _CONFIG))
    layers = {slot.layer for slot in found} | {None}  # others are left as they are, by PEFT too
    slots = [
        Slot(l, name) for l in layers for name in (end_shapes(spec) if l is None else layer_shapes(spec))
    ]
    for slot in slots:
        if slot.name in _TABLES or len(expected_shape(spec, slot) or ()) != 2:
            continue
        names = [name.removesuffix(".weight") for name in architecture.tensor_names(slot)]
        targeted = targets.include(names, slot.layer is None)
        if slot in found and targeted is False:
            raise DeltapatchError(
                f"{folder}: {_WEIGHTS} holds an update of {found[slot]!r}, which {_CONFIG} does not target, "
                "so PEFT leaves it out: take it out as well, or target it"
            )
        if slot not in found and targeted:
            raise DeltapatchError(
                f"{folder / _CONFIG} targets {names[0]!r}, for which {_WEIGHTS} holds no tensors"
            )


class _Targets:
    """Which modules an adapter is for, as PEFT reads its config.

    Args:
        config: adapter_config.json.
        architecture: of the model.
        where: what a sentence calls the config.

    Raises:
        DeltapatchError: an option is broken.
    """

    def __init__(self, config: dict[str, Any], architecture: Architecture, where: str) -> None:
        self._where = where
        targets = config.get("target_modules")
        self._all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
        self._targets = self._names(
            "target_modules", _DEFAULTS.get(architecture.name, _DEFAULT) if targets is None else targets
        )
        self._excluded = self._names("exclude_modules", config.get("exclude_modules") or [])
        layers = config.get("layers_to_transform")
        layers = layers if isinstance(layers, list) else [] if layers is None else [layers]
        if not all(type(layer) is int for layer in layers):
            raise DeltapatchError(f"{where}: 'layers_to_transform' must be numbers, not {shown(layers)}")
        self._layers = layers
        patterns = self._names("layers_pattern", config.get("layers_pattern") or [])
        self._patterns = [patterns] if isinstance(patterns, str) else patterns

    def include(self, names: list[str], outside_layers: bool) -> bool | None:
        """Whether a matrix is targeted, by any of the names that it has in versions of transformers.

        None where that hangs on an expression that could take forever, and is not tried.
        """
        found = {self._includes(name, outside_layers) for name in names}
        return True if True in found else None if None in found else False

    def _includes(self, name: str, outside_layers: bool) -> bool | None:
        excluded = self._matches("exclude_modules", self._excluded, name)
        if excluded or excluded is None:
            return None if excluded is None else False
        if self._all_linear:
            return not outside_layers  # all but the output matrix
        targeted = self._matches("target_modules", self._targets, name)
        if not targeted or not self._layers or isinstance(self._targets, str):
            return targeted
        # As PEFT finds a layer's number: after the pattern, or after any name that is not the first.
        for pattern in [rf"(?:^|.*?\.){p}" for p in self._patterns] or [r".*?\.[^.]*"]:
            number = _match(pattern + r"\.(?P<number>\d+)\.", name, "'layers_pattern' has one", self._where)
            if number is not None:
                return int(number["number"]) in self._layers
        return False

    def _matches(self, option: str, names: str | list[str], name: str) -> bool | None:
        if isinstance(names, list):
            return any(name == n or name.endswith(f".{n}") for n in names)
        if _takes_forever(names):
            return None
        return _match(f"(?:{names})\\Z", name, f"{option!r} is {shown(names)},", self._where) is not None

    def _names(self, option: str, given: Any) -> str | list[str]:
        if isinstance(given, str) or (isinstance(given, list) and all(isinstance(n, str) for n in given)):
            return given
        raise DeltapatchError(f"{self._where}: {option!r} must be names or a pattern, not {shown(given)}")


def _matrix(
    module: str, architecture: Architecture, spec: ModelSpec, folder: Path
) -> dict[Slot, tuple[int, int]]:
    """The slots of a module, in the order of its rows, and [out, in] of each."""
    try:
        slots = architecture.find(f"{module}.weight")
    except KeyError:
        slots = ()
    shapes = {slot: expected_shape(spec, slot) or () for slot in slots}
    if not slots or any(len(shape) != 2 or slot.name in _TABLES for slot, shape in shapes.items()):
        raise DeltapatchError(
            f"{folder}: the adapter changes {shown(module)}, which is not a matrix of this model"
        )
    return {slot: (shape[0], shape[1]) for slot, shape in shapes.items()}


def _scale(config: dict[str, Any], module: str, rank: int, folder: Path) -> float:
    where = str(folder / _CONFIG)
    given = _pattern(config, "rank_pattern", module, config.get("r"), where)
    if given != rank:
        raise DeltapatchError(
            f"{folder}: the adapter's update of {module!r} has rank {rank}, but {_CONFIG} says {shown(given)}"
        )
    alpha = _pattern(config, "alpha_pattern", module, config.get("lora_alpha"), where)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < LARGEST_NUMBER:
        raise DeltapatchError(f"{where}: 'lora_alpha' must be a number, not {shown(alpha)}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(config: dict[str, Any], name: str, module: str, default: Any, where: str) -> Any:
    """The entry whose key matches the end of the module's name, as PEFT matches it."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise DeltapatchError(f"{where}: {name!r} must be an object, not {shown(patterns)}")
    for key, value in patterns.items():
        if _takes_forever(key):
            raise DeltapatchError(
                f"{where}: {name!r} has a key {shown(key)} that is too involved: name modules"
            )
        if _match(rf"(.*\.)?({key})$", module, f"{name!r} has a key {shown(key)}", where):
            return value
    return default


def _takes_forever(pattern: str) -> bool:
    """Whether an expression from a file could, as far as one can tell."""
    ways = 2 * len(_REPEATS.findall(pattern)) + len(_CHOICES.findall(pattern))
    return len(pattern) > 200 or bool(_ENDLESS.search(pattern)) or ways > 6


def _match(pattern: str, name: str, what: str, where: str) -> re.Match[str] | None:
    """A match of an expression from a file; `what` begins the sentence for one that is none."""
    try:
        return re.match(pattern, name)
    except (re.error, OverflowError, RecursionError) as error:
        raise DeltapatchError(f"{where}: {what} that is no pattern") from error
