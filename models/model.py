"""The model as users and the engine hold it: a spec, weights by layer, a tokenizer, plain logits."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltapatch.errors import DeltapatchError, shown
from deltapatch.models.checkpoint import (
    TOKENIZER_FILES,
    ModuleTensors,
    commit_of,
    find_folder,
    read_checkpoint,
    read_json,
)
from deltapatch.models.config import Config
from deltapatch.models.fetch import hash_of_tensor
from deltapatch.models.forward import block, readout, rope_tables
from deltapatch.models.header import check_file
from deltapatch.models.lora import ADAPTER_FILES, read_adapter
from deltapatch.models.memory import fits
from deltapatch.models.registry import read_config
from deltapatch.models.spec import ModelSpec
from deltapatch.models.store import Store
from deltapatch.models.stream import Reader, kept, streamed
from deltapatch.models.surroundings import Shared, undisturbed
from deltapatch.models.weight_reader import WeightReader
from deltapatch.models.weights import (
    EndWeights,
    LayerWeights,
    cast,
    map_tensors,
)

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_OWN_TOKENIZER_FILES = set(TOKENIZER_FILES) - {
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
}


class Model:
    """A decoder-only model. Made by `load_model` and `from_transformers`.

    Attributes:
        spec: shapes and kinds.
        name: the path, hub id or name that it was loaded by.
        device: where the engine computes.
        dtype: what the weights are stored in (of a mixed checkpoint, its matrices).
        stream: whether layers are read from the file in every pass, rather than kept.
        n_bytes: of all weights, as they are stored.
        revision: of the hub, that was asked for; commit, the one that it is.
    """

    revision: str | None = None
    commit: str | None = None

    def __init__(
        self,
        store: Store,
        name: str,
        device: torch.device,
        dtype: torch.dtype | None = None,
        stream: bool = False,
        tokenizer: Any = None,
        folder: Path | None = None,
    ) -> None:
        self.spec: ModelSpec = store.spec
        self.name = name
        self.device = device
        self.stream = stream
        self._reader = WeightReader(store, device, dtype)
        self._folder = folder
        self._given_tokenizer = tokenizer
        self._shared: Shared | None = None  # the module in memory that the weights belong to
        self._made: tuple[Any, ...] | None = None  # a function and its arguments that make such a model again
        self.n_bytes, self.dtype = self._reader.n_bytes, self._reader.dtype
        if not stream:
            self._ends = self._reader.ends()
            self._layers = [self._reader.layer(l) for l in range(self.spec.n_layers)]
            self._as_read = [_version(tensor) for tensor in self._kept()]

    def __repr__(self) -> str:
        s = self.spec
        return (
            f"Model({self.title!r}, {s.architecture}, {s.n_layers} layers, d_model {s.d_model}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}{', streamed' if self.stream else ''})"
        )

    def __copy__(self) -> "Model":
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made again from where the model came from: files are read again."""
        if self._made is None:
            raise DeltapatchError(
                f"{self!r} cannot be pickled or copied: only models of load_model and from_transformers can"
            )
        about = {"name": self.name, "revision": self.revision, "commit": self.commit}
        return _made_again, (about, self.spec.n_layers, *self._made)

    @property
    def title(self) -> str:
        """Its name, with its revision where one was asked for."""
        return self.name if self.revision is None else f"{self.name} at {self.revision}"

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that are in memory of their own: none where they are pages of a mapped file."""
        return self.n_bytes if self._reader.makes_tensors and not self.stream else 0

    @property
    def holds_what_it_reads(self) -> bool:
        """Whether streamed layers take memory of their own while they are used."""
        return self.stream and self._reader.makes_tensors

    def reading(self) -> AbstractContextManager[Reader]:
        """One pass over the weights: all layers in order, and then the ends.

        Those of a streamed model are read ahead by a thread, and the caller drops them when it is done.

        Raises:
            DeltapatchError: streamed weights hold NaN or infinity; a module that is shared with the program
                has got hooks or other weights.
        """
        if self._shared is not None:
            self._shared.check()
        if not self.stream:
            return kept(self._layers, self._ends)
        reader = self._reader

        def fetch(part: int) -> Any:
            return reader.fetch(part if part < self.spec.n_layers else reader.spec.n_layers)

        return streamed(fetch, self.spec.n_layers, reader.lane)

    def read_some(self, n_bytes: int) -> tuple[int, int, int]:
        """Read part of a streamed model, to see how fast that is (see `WeightReader.read_some`)."""
        return self._reader.read_some(n_bytes)

    def first_layers(self, n: int) -> "Model":
        """The same model, sharing its weights, with only the first of its layers."""
        part = self.__copy__()
        part.spec = replace(self.spec, n_layers=min(n, self.spec.n_layers))
        return part

    @undisturbed()
    def layer(self, index: int, dtype: torch.dtype | None = torch.float32) -> LayerWeights:
        """The weights of one block on the model's device.

        Tensors that are stored in that dtype are shared, others are converted for the caller to drop; without
        a dtype all are shared. With `stream` they are read from the file now.

        Raises:
            IndexError: there is no such layer.
            DeltapatchError: streamed weights hold NaN or infinity.
        """
        if not 0 <= index < self.spec.n_layers:
            raise IndexError(f"layer {index} of a model with {self.spec.n_layers} layers")
        stored = self._reader.layer(index) if self.stream else self._layers[index]
        return cast(stored, self.device, dtype)

    @undisturbed()
    def ends(self, dtype: torch.dtype | None = torch.float32) -> EndWeights:
        """Embedding, final norm and unembedding on the model's device, shared as those of `layer`."""
        return cast(self._reader.ends() if self.stream else self._ends, self.device, dtype)

    @undisturbed()
    def embed(self, token_ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """resid_pre of layer 0, [..., d_model], for token ids [...]: only the chosen rows are converted."""
        if self.stream:
            return _sent(self._reader.embeddings(token_ids), self.device).to(dtype)
        embedding = self._ends.embedding
        return embedding[_sent(token_ids, embedding.device)].to(device=self.device, dtype=dtype)

    def logits(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Logits of one prompt at every position.

        Args:
            token_ids: a list of ints or a 1-d tensor.

        Returns:
            [T, d_vocab], float32, or float64 for a model that is stored in float64.

        Raises:
            DeltapatchError: the prompt is empty, not a list of whole numbers, or out of the vocabulary.
        """
        ids = self.check_tokens(token_ids)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        with undisturbed(self.device):
            tables = rope_tables(self.spec.rope, len(ids), dtype, self.device)
            x = self.embed(ids, dtype)[None]  # [1, T, d_model]
            with self.reading() as read:
                for l in range(self.spec.n_layers):
                    x = block(x, cast(read.layer(l), self.device, dtype), self.spec, tables).resid_post
                return readout(x[0], read.ends(), self.spec)

    def check_tokens(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """The prompt as int64 [T] on the model's device; one beyond the context is allowed, with a warning.

        Raises:
            DeltapatchError: the prompt is empty, not a list of whole numbers, or out of the vocabulary.
        """
        try:
            ids = token_ids if isinstance(token_ids, Tensor) else torch.as_tensor(token_ids, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise DeltapatchError("token_ids must be a list of ints or a 1-d tensor of them") from error
        if ids.ndim == 1 and not len(ids):
            raise DeltapatchError("the prompt is empty: it has no tokens")
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise DeltapatchError("token_ids must be a list of ints or a 1-d tensor of them")
        ids = ids.long()
        outside = ids[(ids < 0) | (ids >= self.spec.d_vocab)]
        if len(outside):
            raise DeltapatchError(
                f"token {int(outside[0])} is out of range: the vocabulary has {self.spec.d_vocab} tokens"
            )
        if len(ids) > self.spec.context:
            warnings.warn(
                f"a prompt of {len(ids)} tokens exceeds the {self.spec.context} that the model was made for",
                stacklevel=3,
            )
        return ids.to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the model's folder, loaded when first asked for, or None."""
        folder = self._folder
        if self._given_tokenizer is not None or folder is None:
            return self._given_tokenizer
        if not any((folder / file).is_file() for file in _OWN_TOKENIZER_FILES):
            return None
        for file in TOKENIZER_FILES:
            check_file(folder / file)
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # a broken file surfaces as whatever its parser raises
            for file in TOKENIZER_FILES:
                if file.endswith(".json") and (folder / file).exists():
                    read_json(folder / file)  # says what is wrong, and where
            reason = str(error).strip().split("\n")[0]
            # Of what is JSON and makes no sense, the tokenizers library tells the line of this file.
            at = folder / "tokenizer.json" if " at line " in reason else folder
            raise DeltapatchError(f"the tokenizer in {at} cannot be loaded: {reason}") from error

    @undisturbed()
    def fingerprint(self) -> str:
        """32 hex digits that tell models apart: a hash of every byte (see `Store.fingerprint`).

        Weights of a file that were changed in memory since they were read count as they are now.

        Raises:
            DeltapatchError: the file has changed since the model was loaded.
        """
        found = self._reader.store.fingerprint()
        if not self._edited():
            return found
        digest = hashlib.sha256(found.encode())
        for tensor in self._kept():
            digest.update(hash_of_tensor(tensor))
        return digest.hexdigest()[:32]

    def fingerprint_later(self) -> Callable[[], str | None]:
        """Gives the fingerprint of what the model is now, once it is asked for: until then nothing is hashed.

        None where that cannot be known then: the weights are in memory only, or the file has changed. The
        weights in memory are not held.
        """
        store = self._reader.store
        if not store.in_file or self._edited():
            return lambda: None

        def found() -> str | None:
            try:
                return store.fingerprint()
            except (DeltapatchError, OSError):
                return None

        return found

    def _edited(self) -> bool:
        """Whether weights that were read from a file were changed in memory since."""
        if self.stream or not self._reader.store.in_file:
            return False
        return [_version(tensor) for tensor in self._kept()] != self._as_read

    def _kept(self) -> Iterator[Tensor]:
        """All weights in memory."""
        found: list[Tensor] = []

        def take(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        for layer in self._layers:
            map_tensors(layer, take)
        map_tensors(self._ends, take)
        return iter(found)


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
    """Load a GPT-J, GPT-NeoX or LLaMA checkpoint from safetensors.

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
    fields, tensors = read_checkpoint(folder, str(path_or_hub_id))
    architecture, spec = read_config(Config(fields, str(folder / "config.json")))
    lora = None if adapter is None else read_adapter(adapter, architecture, spec)
    store = Store(architecture, spec, tensors, lora)
    stream = stream or not fits(store.n_bytes(given_dtype), on)
    model = Model(store, str(path_or_hub_id), on, given_dtype, stream, folder=folder)
    model.revision, model.commit = revision, commit_of(folder)
    again = adapter if adapter is None else str(find_folder(adapter, ADAPTER_FILES).resolve())
    model._made = (load_model, str(folder.resolve()), str(on), given_dtype or "auto", stream, again)
    return model


@undisturbed()
def from_transformers(hf_model: Any, tokenizer: Any = None) -> Model:
    """A model that shares the weights of a transformers model in memory: what changes there changes here.

    Args:
        hf_model: a GPTJForCausalLM, GPTNeoXForCausalLM or LlamaForCausalLM, compiled or not.
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
    store = Store(architecture, spec, ModuleTensors(kind, shared.state))
    name = str(getattr(hf_model.config, "_name_or_path", "") or kind)
    model = Model(store, name, choose_device(hf_model.device), tokenizer=tokenizer)
    model._shared, model._made = shared, (from_transformers, hf_model, tokenizer)
    return model


def _made_again(about: dict[str, Any], n_layers: int, make: Callable[..., Model], *arguments: Any) -> Model:
    """A model that was pickled or copied."""
    model = make(*arguments).first_layers(n_layers)
    model.__dict__.update(about)
    return model


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to, as PyTorch counts."""
    return 0 if tensor.is_inference() else tensor._version


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; a GPU is not waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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
