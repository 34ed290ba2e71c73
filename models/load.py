"""Making models: from a folder or a hub id, or around a transformers model in memory."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from deltapatch.errors import DeltapatchError, shown
from deltapatch.models.checkpoint import Checkpoint
from deltapatch.models.config import Config
from deltapatch.models.folder import commit_of, find_folder, read_folder
from deltapatch.models.lora import ADAPTER_FILES, read_adapter
from deltapatch.models.model import Model, Origin
from deltapatch.models.model_weights import InMemory, weights_of
from deltapatch.models.registry import read_config
from deltapatch.models.surroundings import Shared, undisturbed
from deltapatch.models.tensors import ModuleTensors
from deltapatch.models.tokenizer import load_tokenizer

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@undisturbed()
def load_model(
    path_or_hub_id: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    stream: bool = False,
    adapter: str | Path | None = None,
    *,
    revision: str | None = None,
) -> Model:
    """Load a checkpoint from safetensors, of any architecture in `models.registry`.

    Args:
        path_or_hub_id: a local folder, a model of the Hugging Face hub, or `builtin:gpt-neox-arithmetic`.
        device: "auto" is cuda where there is one, else the CPU.
        dtype: what weights are stored in; "auto" keeps the checkpoint's, memory-mapped on the CPU. The engine
            computes in its own precision, whatever this is. "float64" makes `logits` float64.
        stream: read each layer's weights from the file in every pass, one layer ahead, instead of keeping all
            of them. A model that does not fit is streamed all the same: one that takes more than three
            quarters of the memory that can be had on its device (`models.memory.available`).
        adapter: folder or hub id of a LoRA adapter in PEFT's format, merged as the weights are read.
        revision: of a model of the hub (not of its adapter): a branch, a tag or a commit, such as "step1000"
            of a Pythia model's training.

    Raises:
        DeltapatchError: something about the checkpoint, the adapter or an argument is wrong; the message says
            what, and where.
    """
    on, given_dtype = choose_device(device), _dtype(dtype)
    folder = find_folder(path_or_hub_id, revision=revision)
    fields, tensors = read_folder(folder, str(path_or_hub_id))
    architecture, spec = read_config(Config(fields, str(folder / "config.json")))
    lora = None if adapter is None else read_adapter(adapter, architecture, spec)
    checkpoint = Checkpoint(architecture, spec, tensors, device=on, dtype=given_dtype, adapter=lora)
    weights = weights_of(checkpoint, stream=stream)
    same_adapter = adapter if adapter is None else str(find_folder(adapter, ADAPTER_FILES).resolve())
    again = partial(
        load_model, str(folder.resolve()), str(on), given_dtype or "auto", weights.stream, same_adapter
    )
    origin = Origin(str(path_or_hub_id), again, revision, commit_of(folder))
    return Model(weights, origin, find_tokenizer=partial(load_tokenizer, folder))


@undisturbed()
def from_transformers(hf_model: Any, tokenizer: Any = None) -> Model:
    """A model that shares the weights of a transformers model in memory: what changes there changes here.

    Args:
        hf_model: a causal language model of a supported architecture, compiled or not.
        tokenizer: goes with it as `model.tokenizer`.

    Raises:
        DeltapatchError: an architecture, option or dtype that is not supported; forward hooks, whose changes
            would be missing here; weights that are computed from others (pruning, parametrizations).
    """
    hf_model = getattr(hf_model, "_orig_mod", hf_model)  # of torch.compile
    kind = type(hf_model).__name__
    try:
        fields, names = hf_model.config.to_dict(), list(hf_model.state_dict())
    except AttributeError as error:
        raise DeltapatchError(f"from_transformers needs a transformers model, not a {kind}") from error
    if any(".lora_A." in name for name in names):
        raise DeltapatchError("the model carries an unmerged LoRA adapter: call its merge_and_unload() first")
    architecture, spec = read_config(Config(fields, f"the configuration of {kind}"))
    shared = Shared(hf_model, kind)
    tensors, device = ModuleTensors(kind, shared.state), choose_device(hf_model.device)
    weights = InMemory(Checkpoint(architecture, spec, tensors, device=device), shared)
    name = str(getattr(hf_model.config, "_name_or_path", "") or kind)
    origin = Origin(name, partial(from_transformers, hf_model, tokenizer))
    return Model(weights, origin, find_tokenizer=lambda: tokenizer)


def choose_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" is cuda where there is one, else the CPU.

    Raises:
        DeltapatchError: it is unknown, or not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeltapatchError(f"unknown device {shown(device)}: choose auto, cpu, cuda or cuda:N") from error
    strange = isinstance(device, str) and str(chosen) != device  # PyTorch takes cuda:256 for cuda:0
    if chosen.type not in ("cpu", "cuda") or strange or (chosen.type == "cpu" and chosen.index):
        raise DeltapatchError(
            f"device {str(device)!r} is not one that deltapatch computes on: choose auto, cpu, cuda or cuda:N"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise DeltapatchError(
            f"device {str(device)!r} is not there: PyTorch sees {torch.cuda.device_count()} GPUs"
        )
    return chosen


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if dtype == "auto":
        return None
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise DeltapatchError(f"unknown dtype {str(dtype)!r}: choose auto, {', '.join(DTYPES)}")
    return chosen
